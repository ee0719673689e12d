"""Brier score as a module for `evaluate.load`."""

from torch import Tensor

from hf_attentiondrop.evaluation import calibration
from hf_attentiondrop.evaluation.metrics.base import LogitsMetric, Options


class BrierScore(LogitsMetric):
    """Squared error of the probabilities, summed over the classes and averaged over the items, in [0, 2]."""

    def score(self, logits: Tensor, labels: Tensor, options: Options) -> float:
        return calibration.brier_score(logits, labels)
