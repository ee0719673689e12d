"""F1 as a module for `evaluate.load`."""

from sklearn.metrics import f1_score
from torch import Tensor

from hf_attentiondrop.evaluation.metrics.base import LogitsMetric, Options


class F1(LogitsMetric):
    """Harmonic mean of precision and recall, averaged over the classes; 0 for a class without a correct prediction."""

    def score(self, logits: Tensor, labels: Tensor, options: Options) -> float:
        return f1_score(labels, logits.argmax(-1), average=options.average, zero_division=0)
