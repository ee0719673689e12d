"""Negative log-likelihood as a module for `evaluate.load`."""

from torch import Tensor

from hf_attentiondrop.evaluation import calibration
from hf_attentiondrop.evaluation.metrics.base import LogitsMetric, Options


class NegativeLogLikelihood(LogitsMetric):
    """Mean of `-log p(right class)`, in nats."""

    def score(self, logits: Tensor, labels: Tensor, options: Options) -> float:
        return calibration.negative_log_likelihood(logits, labels)
