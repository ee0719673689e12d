"""Matthews correlation as a module for `evaluate.load`."""

from sklearn.metrics import matthews_corrcoef
from torch import Tensor

from hf_attentiondrop.evaluation.metrics.base import LogitsMetric, Options


class MatthewsCorrelation(LogitsMetric):
    """Correlation of predicted and right classes, in [-1, 1]; 0 at chance level and if all items are of one class."""

    def score(self, logits: Tensor, labels: Tensor, options: Options) -> float:
        return matthews_corrcoef(labels, logits.argmax(-1))
