"""Classified items, reduced to the values that calibration metrics need.

An item is one vector of logits with its label: a sample, or a token. Items with label -100 are ignored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


IGNORE_INDEX = -100
# Number of logits that are processed at a time, in at least float32.
CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class ItemScores:
    """The values of each item that the metrics need; all fields are -100 for items without a label.

    The Trainer also pads with -100, so fields that it gathered and concatenated can be used directly.

    Args:
        confidence (`torch.Tensor` of any shape): probability of the predicted class, in (0, 1].
        is_correct (`torch.Tensor`): 1 if the prediction is the label, else 0.
        nll (`torch.Tensor`): negative log-likelihood of the label, in nats.
        brier (`torch.Tensor`): squared error of the probabilities, summed over the classes, in [0, 2].
    """

    confidence: Tensor
    is_correct: Tensor
    nll: Tensor
    brier: Tensor

    def of_labelled(self, name: str) -> Tensor:
        """A field of the labelled items, as a vector on the CPU.

        Raises:
            ValueError: if no item has a label.
        """
        is_labelled = torch.as_tensor(self.confidence) != IGNORE_INDEX
        check_not_empty(int(is_labelled.sum()))
        return torch.as_tensor(getattr(self, name))[is_labelled].cpu()


def check_not_empty(num_items: int) -> None:
    """Raises a `ValueError` if there are no items."""
    if num_items == 0:
        raise ValueError(
            "Expected at least one item with a label, got none: a mean over no items is undefined. Check that the "
            f"data is not empty and not every label is {IGNORE_INDEX}."
        )


def select_items(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Selects the labelled items and validates them.

    Args:
        logits (`torch.Tensor` of shape `(..., C)`): of any floating-point dtype.
        labels (`torch.Tensor` of shape `(...)`): integers in [0, C), or `ignore_index`.
        ignore_index (`int`, defaults to -100): label of the items to leave out.

    Returns:
        `tuple`: logits `(N, C)` and labels `(N,)`.

    Raises:
        ValueError: for invalid shapes or dtypes, labels outside [0, C), logits with NaN or infinity, and probabilities
            instead of logits.
    """
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    if logits.dim() < 2 or logits.shape[-1] < 2 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            "Expected `logits` of shape (..., C) with at least two classes and `labels` of shape (...), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}: each item needs a vector of logits and one label. "
            "Regression and multi-label classification are not supported."
        )
    if not logits.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"Expected floating-point `logits` and integer `labels`, got {logits.dtype} and {labels.dtype}: labels "
            "are class numbers, and predicted classes carry no confidence."
        )
    labels = labels.to(logits.device, torch.int64)  # An unsigned type would wrap `ignore_index` to a class.
    is_labelled = labels != ignore_index
    logits, labels = logits[is_labelled], labels[is_labelled]
    num_classes = logits.shape[-1]
    is_outside = (labels < 0) | (labels >= num_classes)
    if is_outside.any():
        raise ValueError(
            f"Expected labels in [0, {num_classes}), one per class of the logits, or {ignore_index} for items "
            f"to leave out, got {labels[is_outside][0].item()}: the model has no probability for that class. Check "
            "its `num_labels` and the order of its classes."
        )
    if not logits.isfinite().all():
        raise ValueError(
            "Expected finite logits, got NaN or infinity: their probabilities are undefined. Look for an overflow in "
            "half precision or a diverged training run, and replace -inf with a large negative number."
        )
    if len(logits) and _are_probabilities(logits):
        raise ValueError(
            "Expected logits, got values that look like probabilities: all are non-negative and every row sums to 1. "
            "A second softmax would flatten them and make every metric wrong. Pass the model's logits, or the "
            "logarithm of the probabilities."
        )
    return logits, labels


def _are_probabilities(rows: Tensor) -> bool:
    if (rows < 0).any():
        return False
    tolerance = max(1e-4, torch.finfo(rows.dtype).eps)  # rounded to bfloat16, their sum is only close to 1
    if _are_decimals(rows):
        tolerance += min(0.005 * rows.shape[-1], 0.05)  # each is off by up to 0.005
    return ((rows.sum(-1, dtype=torch.float32) - 1).abs() < tolerance).all().item()


def _are_decimals(rows: Tensor) -> bool:
    """Whether all numbers are rounded to at most four decimals, as probabilities often are.

    Computed logits are not: one float in 250 is this close to such a number, and here all are. So the wider tolerance
    does not take logits for probabilities.
    """
    scaled = rows.double() * 1e4
    return rows.dtype in (torch.float32, torch.float64) and ((scaled - scaled.round()).abs() < 2e-3).all().item()


def score_items(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> ItemScores:
    """Reduces the logits of each item to the values that the metrics need, in chunks of items.

    Args:
        logits (`torch.Tensor` of shape `(..., C)`): scored in at least float32.
        labels (`torch.Tensor` of shape `(...)`): integers in [0, C), or `ignore_index`.
        ignore_index (`int`, defaults to -100): label of the items to leave out.

    Returns:
        [`ItemScores`]: with fields of the shape of the labels. A batch without labelled items is allowed.

    Raises:
        ValueError: see [`select_items`].

    Example:

    >>> score_items(torch.tensor([[0.0, 0.0], [9.0, -9.0]]), torch.tensor([1, -100])).nll
    tensor([   0.6931, -100.0000])
    """
    rows, targets = select_items(logits, labels, ignore_index)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    is_labelled = torch.as_tensor(labels).to(rows.device, torch.int64) != ignore_index
    scores = torch.full((*is_labelled.shape, 4), float(IGNORE_INDEX), dtype=dtype, device=rows.device)
    size = max(1, CHUNK_ELEMENTS // rows.shape[-1])
    chunks = zip(rows.split(size), targets.split(size), strict=True)
    scores[is_labelled] = torch.cat([_score(of_rows.to(dtype), of_targets) for of_rows, of_targets in chunks])
    return ItemScores(*scores.unbind(-1))


def _score(rows: Tensor, targets: Tensor) -> Tensor:
    probabilities = rows.softmax(-1)
    confidence, is_correct = probabilities.amax(-1), rows.argmax(-1) == targets
    nll = cross_entropy(rows, targets, reduction="none")
    errors = probabilities.scatter_add_(-1, targets[:, None], -torch.ones_like(rows[:, :1]))
    return torch.stack((confidence, is_correct.to(rows.dtype), nll, errors.square().sum(-1)), dim=-1)
