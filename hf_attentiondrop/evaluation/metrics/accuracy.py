"""Accuracy as a module for `evaluate.load`."""

from sklearn.metrics import accuracy_score
from torch import Tensor

from hf_attentiondrop.evaluation.metrics.base import LogitsMetric, Options


class Accuracy(LogitsMetric):
    """Fraction of the items whose highest logit is that of the right class, in [0, 1]."""

    def score(self, logits: Tensor, labels: Tensor, options: Options) -> float:
        return accuracy_score(labels, logits.argmax(-1))
