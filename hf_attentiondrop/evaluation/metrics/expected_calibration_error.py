"""Expected calibration error as a module for `evaluate.load`."""

from torch import Tensor

from hf_attentiondrop.evaluation import calibration
from hf_attentiondrop.evaluation.metrics.base import LogitsMetric, Options


class ExpectedCalibrationError(LogitsMetric):
    """Distance between confidence and accuracy in bins of equal width, averaged over the items, in [0, 1]."""

    def score(self, logits: Tensor, labels: Tensor, options: Options) -> float:
        return calibration.expected_calibration_error(logits, labels, options.num_bins)
