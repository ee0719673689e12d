"""Calibration of a model's probabilities: calibration errors, proper scoring rules and temperature scaling.

Every metric takes `logits` `(..., C)` with `labels` `(...)`, or [`ItemScores`] computed from them. Items with label
-100 are ignored.

A language model's logits are too large to keep. Reduce them batch by batch, and the Trainer gathers the scores:

    def preprocess_logits_for_metrics(logits, labels):
        return vars(score_items(logits[:, :-1], labels[:, 1:]))

    def compute_metrics(prediction):
        return calibration_metrics(ItemScores(**prediction.predictions))
"""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .items import ItemScores, check_not_empty, score_items, select_items


logger = logging.getLogger(__name__)

BINNINGS = ("equal_width", "equal_mass")
# Outside these temperatures the probabilities are practically one-hot or uniform.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
MAX_STEPS = 100


@dataclass(frozen=True)
class ReliabilityBins:
    """The non-empty bins, in order of confidence.

    Args:
        lower, upper (`torch.Tensor` of shape `(bins,)`): the edges of each bin.
        count (`torch.Tensor`): number of items.
        confidence (`torch.Tensor`): mean confidence, in (0, 1].
        accuracy (`torch.Tensor`): fraction of correct predictions, in [0, 1].
    """

    lower: Tensor
    upper: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def gap(self) -> Tensor:
        """Distance between accuracy and confidence in each bin."""
        return (self.accuracy - self.confidence).abs()

    @property
    def expected_error(self) -> float:
        """Mean gap of the bins, weighted by their number of items."""
        return ((self.count * self.gap).sum() / self.count.sum()).item()

    @property
    def maximum_error(self) -> float:
        """The largest gap. In a bin with few items it is large by chance: see `maximum_error_items`."""
        return self.gap.max().item()

    @property
    def maximum_error_items(self) -> int:
        """Number of items in the bin with the largest gap."""
        return int(self.count[self.gap.argmax()])


def _as_scores(logits: Tensor | ItemScores, labels: Tensor | None) -> ItemScores:
    if isinstance(logits, ItemScores):
        return logits
    if labels is None:
        raise ValueError(
            "Expected `labels` with the logits, got None: only `ItemScores` already include their labels."
        )
    return score_items(logits, labels)


def reliability(
    logits: Tensor | ItemScores, labels: Tensor | None = None, num_bins: int = 15, binning: str = "equal_width"
) -> ReliabilityBins:
    """Bins the items by confidence.

    Args:
        logits (`torch.Tensor` of shape `(..., C)` or [`ItemScores`]): the items.
        labels (`torch.Tensor` of shape `(...)`, *optional*): required with logits.
        num_bins (`int`, defaults to 15): number of bins, at least 1.
        binning (`str`, defaults to `"equal_width"`):
            `"equal_width"`: bin `b` is [b / num_bins, (b + 1) / num_bins); a confidence of exactly 1 has a separate
            bin, as in torchmetrics. `"equal_mass"`: bins with equal numbers of items, except that items of equal
            confidence share a bin.

    Raises:
        ValueError: for fewer than one bin, an unknown binning or no items, and see [`select_items`].
    """
    if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 1:
        raise ValueError(f"`num_bins` must be an integer of at least 1, got {num_bins!r}: every item needs a bin.")
    if binning not in BINNINGS:
        raise ValueError(f"`binning` must be one of {BINNINGS}, got {binning!r}.")
    scores = _as_scores(logits, labels)
    confidence, is_correct = scores.of_labelled("confidence"), scores.of_labelled("is_correct").double()
    if binning == "equal_width":
        edges = torch.linspace(0, 1, num_bins + 1, dtype=confidence.dtype)
        index = torch.bucketize(confidence, edges, right=True) - 1
    else:
        index = torch.searchsorted(confidence.sort().values, confidence) * num_bins // len(confidence)
    bins, index, count = index.unique(return_inverse=True, return_counts=True)
    if binning == "equal_width":
        lower, upper = edges[bins], edges[(bins + 1).clamp(max=num_bins)]
    else:
        lower, upper = (
            confidence.new_empty(len(bins)).scatter_reduce(0, index, confidence, how, include_self=False)
            for how in ("amin", "amax")
        )
    means = [torch.bincount(index, weights=values) / count for values in (confidence.double(), is_correct)]
    return ReliabilityBins(lower, upper, count, *means)


def expected_calibration_error(
    logits: Tensor | ItemScores, labels: Tensor | None = None, num_bins: int = 15, binning: str = "equal_width"
) -> float:
    """Mean distance between confidence and accuracy over the bins, weighted by items, in [0, 1].

    Arguments and errors are those of [`reliability`].

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599), equation 3.

    Example:

    >>> logits, labels = torch.log(torch.tensor([[0.8, 0.2], [0.7, 0.3]])), torch.tensor([0, 1])
    >>> round(expected_calibration_error(logits, labels), 4)
    0.45
    """
    return reliability(logits, labels, num_bins, binning).expected_error


def maximum_calibration_error(
    logits: Tensor | ItemScores, labels: Tensor | None = None, num_bins: int = 15, binning: str = "equal_width"
) -> float:
    """The largest distance between confidence and accuracy in a bin, in [0, 1].

    Bins count regardless of their size, so a bin with one misclassified item can dominate. Check
    `reliability(...).maximum_error_items`, and use fewer bins or bins of equal mass if it is small.

    Arguments and errors are those of [`reliability`].

    Source: arXiv 1706.04599, equation 5.
    """
    return reliability(logits, labels, num_bins, binning).maximum_error


def negative_log_likelihood(logits: Tensor | ItemScores, labels: Tensor | None = None) -> float:
    """Mean of `-log p(label)`, in nats: the cross-entropy.

    Raises:
        ValueError: for no items, and see [`select_items`].
    """
    return _as_scores(logits, labels).of_labelled("nll").double().mean().item()


def brier_score(logits: Tensor | ItemScores, labels: Tensor | None = None) -> float:
    """Mean of `Σ_c (p_c - [c is the label])²`, in [0, 2].

    The sum over all classes is Brier's convention; with two classes it is twice the common binary score.

    Raises:
        ValueError: for no items, and see [`select_items`].

    Source: Brier 1950, "Verification of Forecasts Expressed in Terms of Probability", equation 2.
    """
    return _as_scores(logits, labels).of_labelled("brier").double().mean().item()


def calibration_metrics(
    logits: Tensor | ItemScores, labels: Tensor | None = None, num_bins: int = 15
) -> dict[str, float]:
    """All metrics of this module.

    Arguments and errors are those of [`reliability`].

    Returns:
        `dict`: `expected_calibration_error`, `expected_calibration_error_equal_mass`, `maximum_calibration_error` (of
        equal width), `maximum_calibration_error_items` (the number of items in that bin),
        `negative_log_likelihood` and `brier_score`.
    """
    scores = _as_scores(logits, labels)
    bins = reliability(scores, num_bins=num_bins)
    return {
        "expected_calibration_error": bins.expected_error,
        "expected_calibration_error_equal_mass": expected_calibration_error(
            scores, num_bins=num_bins, binning="equal_mass"
        ),
        "maximum_calibration_error": bins.maximum_error,
        "maximum_calibration_error_items": bins.maximum_error_items,
        "negative_log_likelihood": negative_log_likelihood(scores),
        "brier_score": brier_score(scores),
    }


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature `T` that minimizes the negative log-likelihood of `logits / T`.

    Fit it on a validation split and report metrics on another split: on the same split they are too optimistic. It
    changes no prediction. The negative log-likelihood is convex in `1 / T`; Newton's method with bracketing finds the
    minimum in float64. There is no minimum in [0.01, 100] if every label has the highest logit (sharper is always
    better) or the logits carry no information about the labels; then the bound is returned, with a warning. If all
    classes of every item have equal logits, any temperature is optimal, and 1 is returned.

    Args:
        logits (`torch.Tensor` of shape `(..., C)`): of validation items.
        labels (`torch.Tensor` of shape `(...)`): integers in [0, C), or -100.

    Returns:
        `float`: in [0.01, 100]. Above 1 the model was over-confident.

    Raises:
        ValueError: for no item, and by [`select_items`].

    Source: arXiv 1706.04599, section 4.2.

    Example:

    >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 4)  # sigmoid(4 / T) is 3 / 4
    3.641
    """
    temperature = optimal_temperature(logits, labels)
    if not is_optimal(temperature):
        logger.warning(
            f"The negative log-likelihood has no minimum at temperatures between {MIN_TEMPERATURE} and "
            f"{MAX_TEMPERATURE}, so the bound {temperature} is returned: either all predictions are right, or they "
            "are no better than chance. Do not use it as a temperature; fit on more, or harder, validation items."
        )
    return temperature


def is_optimal(temperature: float) -> bool:
    """Whether [`optimal_temperature`] found one: a bound stands for none."""
    return MIN_TEMPERATURE < temperature < MAX_TEMPERATURE


def optimal_temperature(logits: Tensor, labels: Tensor) -> float:
    """[`fit_temperature`] without its warning, for callers that check for the bounds."""
    logits, labels = select_items(logits, labels)
    check_not_empty(len(labels))
    logits, labels = logits.cpu().double(), labels.cpu()
    # The difference of each logit from the label's logit.
    distances = logits - logits.gather(-1, labels[:, None])

    def slope_and_curvature(inverse: float) -> tuple[float, float]:
        """Of the negative log-likelihood as a function of `1 / T`."""
        probabilities = (inverse * distances).softmax(-1)
        mean = (probabilities * distances).sum(-1, keepdim=True)
        return mean.mean().item(), (probabilities * (distances - mean).square()).sum(-1).mean().item()

    if not distances.any():
        return 1.0
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    is_separable = slope_and_curvature(high)[0] <= 0
    if is_separable or slope_and_curvature(low)[0] >= 0:
        return MIN_TEMPERATURE if is_separable else MAX_TEMPERATURE
    inverse = 1.0
    for _ in range(MAX_STEPS):
        slope, curvature = slope_and_curvature(inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        newton = inverse - slope / curvature if curvature > 0 else low
        following = newton if low < newton < high else math.sqrt(low * high)
        if slope == 0 or abs(following - inverse) < 1e-10 * inverse:
            break
        inverse = following
    return 1 / inverse
