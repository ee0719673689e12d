"""How far a model's probabilities can be trusted: calibration errors, proper scores, and temperature scaling.

Every metric takes `logits` `(..., C)` with `labels` `(...)`, or the [`ItemScores`] that such a batch was reduced to.
Items labelled -100 count for nothing.

A language model's logits are too large to keep. They are reduced batch by batch, and the Trainer collects the rest:

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
# Beyond these temperatures the probabilities are those of a vote, or of chance.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
MAX_STEPS = 100


@dataclass(frozen=True)
class ReliabilityBins:
    """The bins that hold an item, from the least to the most confident.

    Args:
        lower, upper (`torch.Tensor` of shape `(bins,)`): where a bin begins and ends.
        count (`torch.Tensor`): number of items.
        confidence (`torch.Tensor`): mean confidence.
        accuracy (`torch.Tensor`): share of right predictions.
    """

    lower: Tensor
    upper: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def gap(self) -> Tensor:
        """Distance of accuracy from confidence in each bin."""
        return (self.accuracy - self.confidence).abs()

    @property
    def expected_error(self) -> float:
        """Mean over the items of the gap of their bin."""
        return ((self.count * self.gap).sum() / self.count.sum()).item()

    @property
    def maximum_error(self) -> float:
        """The largest gap. That of a bin with few items is large by chance: see `maximum_error_items`."""
        return self.gap.max().item()

    @property
    def maximum_error_items(self) -> int:
        """Number of items in the bin with the largest gap."""
        return int(self.count[self.gap.argmax()])


def _as_scores(logits: Tensor | ItemScores, labels: Tensor | None) -> ItemScores:
    if isinstance(logits, ItemScores):
        return logits
    if labels is None:
        raise ValueError("Expected `labels` beside the logits, got None: only `ItemScores` know their labels already.")
    return score_items(logits, labels)


def reliability(
    logits: Tensor | ItemScores, labels: Tensor | None = None, num_bins: int = 15, binning: str = "equal_width"
) -> ReliabilityBins:
    """Confidence and accuracy of the items, in bins by confidence.

    Args:
        logits (`torch.Tensor` of shape `(..., C)` or [`ItemScores`]): the items.
        labels (`torch.Tensor` of shape `(...)`, *optional*): labels of the logits.
        num_bins (`int`, defaults to 15): number of bins, at least 1.
        binning (`str`, defaults to `"equal_width"`):
            With `"equal_width"` bin `b` is [b / num_bins, (b + 1) / num_bins). A confidence of exactly 1 lies beyond
            the last of them and has a bin of its own, as in torchmetrics. With `"equal_mass"` the bins hold equally
            many items, as far as items of equal confidence, which share a bin, allow.

    Raises:
        ValueError: for fewer than one bin, an unknown binning, no item, and by [`select_items`].
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
    """Mean over the items of the distance between confidence and accuracy in their bin, in [0, 1].

    Args and errors are those of [`reliability`].

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

    Every bin counts, however few items it holds, so that one unlucky item alone in its bin decides. Look at
    `reliability(...).maximum_error_items`, and take fewer bins, or bins of equal mass, where it is small.

    Args and errors are those of [`reliability`].

    Source: arXiv 1706.04599, equation 5.
    """
    return reliability(logits, labels, num_bins, binning).maximum_error


def negative_log_likelihood(logits: Tensor | ItemScores, labels: Tensor | None = None) -> float:
    """Mean over the items of `-log p(label)`, in nats: the cross entropy.

    Raises:
        ValueError: for no item, and by [`select_items`].
    """
    return _as_scores(logits, labels).of_labelled("nll").double().mean().item()


def brier_score(logits: Tensor | ItemScores, labels: Tensor | None = None) -> float:
    """Mean over the items of `Σ_c (p_c - [c is the label])²`, in [0, 2].

    The sum over all classes is Brier's own convention. With two classes it is twice that of the common binary one.

    Raises:
        ValueError: for no item, and by [`select_items`].

    Source: Brier 1950, "Verification of Forecasts Expressed in Terms of Probability", equation 2.
    """
    return _as_scores(logits, labels).of_labelled("brier").double().mean().item()


def calibration_metrics(
    logits: Tensor | ItemScores, labels: Tensor | None = None, num_bins: int = 15
) -> dict[str, float]:
    """All metrics of this module at once.

    Args and errors are those of [`reliability`].

    Returns:
        `dict`: `expected_calibration_error`, `expected_calibration_error_equal_mass`, `maximum_calibration_error` (of
        equal width), `maximum_calibration_error_items`, the number of items in the bin with that error,
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
    """The temperature `T` for which `logits / T` have the least negative log-likelihood.

    Fit it on a validation split and report metrics on another one: on its own split it flatters the model. It changes
    no prediction. The likelihood is convex in `1 / T`, and Newton's method in a shrinking bracket finds its minimum in
    float64. There is none inside [0.01, 100] where every label has the highest logit (sharper is always better) or
    where the logits say nothing about the labels; then the bound is returned, with a warning. Where the classes of
    every item have the same logit any temperature does, and 1 is returned.

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
    temperature = likeliest_temperature(logits, labels)
    if temperature in (MIN_TEMPERATURE, MAX_TEMPERATURE):
        logger.warning(
            f"The likelihood of these items has no minimum at temperatures between {MIN_TEMPERATURE} and "
            f"{MAX_TEMPERATURE}, so {temperature} stands for it: either all predictions are right, or they are no "
            "better than chance. Do not use it as a temperature; fit it on more, or harder, validation items."
        )
    return temperature


def likeliest_temperature(logits: Tensor, labels: Tensor) -> float:
    """[`fit_temperature`] without its warning, for those who look whether it is a bound."""
    logits, labels = select_items(logits, labels)
    check_not_empty(len(labels))
    logits, labels = logits.cpu().double(), labels.cpu()
    # The distance of each logit from that of the label.
    distances = logits - logits.gather(-1, labels[:, None])

    def slope_and_curvature(inverse: float) -> tuple[float, float]:
        """Of the likelihood, in `1 / T`."""
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
