"""A training batch for two passes in one forward, and its losses."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .alignment import IGNORE_INDEX, LabelAlignment, has_answers
from .doubling import batch_size_of, check_packing, first_pass, repeat_rows
from .losses import consistency_loss


LABEL_NAMES = ("labels", "shift_labels", "start_positions", "end_positions")


@dataclass(frozen=True, eq=False)
class ConsistencyBatch:
    """A batch whose rows, or some of them, run twice in one forward: `B` rows, then `n` of them again.

    The task loss and the divergence average over the same items: rows, labeled tokens, or answer positions.

    Args:
        inputs (`Mapping[str, Any]`): Model inputs of `B` rows, with labels.
        batch_size (`int`): `B`.
        alignment ([`LabelAlignment`]): Which label the logits at each position predict.
        problem_type (`str`, *optional*): As in the model's config; `None` infers it from the labels, as Transformers
            does.
        main_input_name (`str`, defaults to `"input_ids"`): The `main_input_name` of the model.
        rows (`torch.Tensor` of shape `(n,)`, *optional*): The rows that run twice; `None` for all, `n = B`.
        fraction (`float`, defaults to 1.0): The probability with which a row is among them.

    Example:

    >>> batch = ConsistencyBatch({"input_ids": torch.tensor([[7], [8]]), "labels": torch.tensor([0, -100])}, 2)
    >>> batch.num_items.item(), batch.repeated["input_ids"].tolist()
    (1, [[7], [8], [7], [8]])
    >>> batch.divergence({"logits": torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])})
    tensor(1.5232)
    """

    inputs: Mapping[str, Any]
    batch_size: int
    alignment: LabelAlignment = LabelAlignment()
    problem_type: str | None = None
    main_input_name: str = "input_ids"
    rows: Tensor | None = None
    fraction: float = 1.0

    @classmethod
    def for_model(cls, model: nn.Module, inputs: Mapping[str, Any], alignment: LabelAlignment) -> "ConsistencyBatch":
        """The batch of a model.

        Args:
            model (`torch.nn.Module`): The model, without the wrappers of a launcher.
            inputs (`Mapping[str, Any]`): Its inputs, with labels.
            alignment ([`LabelAlignment`]): The alignment of the model.

        Raises:
            ValueError: if the batch size is unknown, or if packed documents would mix.
        """
        config = getattr(model, "config", None)
        check_packing(inputs, getattr(config, "_attn_implementation", None) or "")
        name = getattr(model, "main_input_name", "input_ids")
        return cls(inputs, batch_size_of(inputs, name), alignment, getattr(config, "problem_type", None), name)

    def sample_rows(self, fraction: float) -> "ConsistencyBatch":
        """The batch with random rows that run twice: `fraction * B` of them, rounded up or down at random so that this
        is their expected number. Fractions of 0 and 1 sample nothing.

        Args:
            fraction (`float`): 0 ≤ fraction ≤ 1.

        Example:

        >>> batch = ConsistencyBatch({"labels": torch.tensor([0, 1, 2, 3])}, 4)
        >>> batch.sample_rows(0.5).num_repeated, batch.sample_rows(1.0).num_repeated
        (2, 4)
        """
        if fraction == 1:
            return self
        device = next(value.device for value in self.inputs.values() if isinstance(value, Tensor))
        if fraction == 0:
            return replace(self, rows=torch.empty(0, dtype=torch.long, device=device))
        number = int(fraction * self.batch_size + torch.rand(()).item())
        if number == self.batch_size:
            return replace(self, fraction=fraction)
        return replace(self, fraction=fraction, rows=torch.randperm(self.batch_size)[:number].to(device))

    @property
    def repeated(self) -> dict[str, Any]:
        """The inputs of `B + n` rows, see [`repeat_rows`]. A new dict each time: the Trainer may pop the labels."""
        return repeat_rows(self.inputs, self.batch_size, self.rows, self.main_input_name)

    @property
    def num_repeated(self) -> int:
        """The number of rows that run twice, `n`."""
        return self.batch_size if self.rows is None else len(self.rows)

    @cached_property
    def num_items(self) -> Tensor:
        """The number of items, a scalar, or `(2,)` for question answering, see [`LabelAlignment.count_items`]."""
        return self.alignment.count_items(self.inputs, self.batch_size)

    @cached_property
    def num_repeated_items(self) -> Tensor:
        """The number of items in the rows that run twice, shaped like `num_items`."""
        if self.rows is None:
            return self.num_items
        labels = {
            name: self._repeated_rows(value)
            for name, value in self.inputs.items()
            if name in LABEL_NAMES and isinstance(value, Tensor)
        }
        return self.alignment.count_items({**self.inputs, **labels}, self.num_repeated)

    @property
    def num_task_items(self) -> Tensor:
        """The number of items in both passes, shaped like `num_items`."""
        return self.num_items + self.num_repeated_items

    @property
    def item_weights(self) -> tuple[Tensor, Tensor]:
        """For how many items task loss and divergence count in an optimizer step, each shaped like `num_items`.

        Both are means over sampled rows. Times these numbers they equal in expectation the sums over all rows: on
        average a row occurs `1 + n / B` times in both passes, and `fraction` times among the rows that run twice.
        """
        passes = 1 + self.num_repeated / self.batch_size
        return self.num_task_items / passes, self.num_repeated_items / self.fraction

    def first_pass(self, outputs: Any) -> Any:
        """The outputs of the first pass, from those of both."""
        return first_pass(outputs, self.batch_size, self.num_repeated)

    def divergence(self, outputs: Any, divergence: str = "symmetric_kl") -> Tensor:
        """The mean divergence between the two passes over the rows that run twice, 0 without any.

        Args:
            outputs: The outputs of the model for `repeated`.
            divergence (`str`, defaults to `"symmetric_kl"`): See [`consistency_loss`].

        Returns:
            `torch.Tensor`: a scalar, or `(2,)` for question answering, of the start and of the end positions.

        Raises:
            ValueError: if there are no logits, or if the logits do not line up with the labels.
        """
        outputs = outputs if isinstance(outputs, Mapping) else {}
        if outputs.get("start_logits") is not None and has_answers(self.inputs):
            return self._divergence_of_answers(outputs["start_logits"], outputs["end_logits"], divergence)
        logits, labels = outputs.get("logits"), self.inputs.get("labels")
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"Expected the model to return a tensor `logits` in training, got {sorted(outputs) or 'no mapping'}: "
                "without logits there is nothing to compare. Disable fused losses that never build logits (Liger's "
                "`fused_linear_cross_entropy`), keep `return_dict=True`, or set `consistency_weight=0`."
            )
        if isinstance(labels, Tensor):
            is_float = labels.is_floating_point()
            if logits.dim() == 2 and (is_float or labels.numel() == self.batch_size):
                return self._divergence_of_rows(logits, labels, divergence)
            if logits.dim() == 3 and labels.dim() == 2 and len(labels) == self.batch_size and not is_float:
                targets = self.alignment.targets(self.inputs, logits.shape[1])
                weights = self._repeated_rows(targets.ne(IGNORE_INDEX))
                return consistency_loss(logits, weights, divergence, rows=self.rows)
        got = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            "Expected logits of shape (N, C) with labels (B,), or logits (N, L, C) with labels (B, L), for the N rows "
            f"of both passes, got logits {tuple(logits.shape)} and labels of {got}: the consistency term must average "
            "over the same logits as the task loss, and those are unknown here. Set `consistency_weight=0` for this "
            "task."
        )

    def task_loss(self, loss: Tensor, outputs: Mapping[str, Any], share: Tensor) -> Tensor:
        """Corrects the task loss where a mean over both passes is not enough.

        Args:
            loss (`torch.Tensor`): The loss that the Trainer computed, a scalar.
            outputs (`Mapping[str, Any]`): The outputs of the model for `repeated`.
            share (`torch.Tensor`): Share of the task loss in that of the optimizer step, shaped like `num_items`.

        Returns:
            `torch.Tensor`: `loss` itself; 0 for a batch without items; or `(2,)` for question answering whose start
            and end positions have unequal shares, because the mean of their two means hides the two.
        """
        if self.num_items.dim() > 0:
            start, end = self.num_task_items
            has_equal_parts = start == end > 0 and share[0] == share[1]
            return loss if has_equal_parts else self._answer_losses(outputs)
        return loss if self.num_items.any() else _zero_of(loss, outputs)

    def _repeated_rows(self, value: Tensor) -> Tensor:
        """The rows of a tensor that run twice."""
        return value if self.rows is None else value[self.rows]

    def _divergence_of_answers(self, start_logits: Tensor, end_logits: Tensor, divergence: str) -> Tensor:
        length = self.alignment.logits_length(self.inputs)
        if start_logits.shape[1] != length:
            raise ValueError(
                f"Expected answers among {length} positions, the length of the text, got logits of shape "
                f"{tuple(start_logits.shape)}: the consistency term must ignore the same answers as the task loss, "
                "and those are unknown here. Set `consistency_weight=0` for this task."
            )
        masks = [self._repeated_rows(mask) for mask in self.alignment.answer_mask(self.inputs)]
        pairs = zip((start_logits, end_logits), masks, strict=True)
        return torch.stack([consistency_loss(logits, mask, divergence, rows=self.rows) for logits, mask in pairs])

    def _divergence_of_rows(self, logits: Tensor, labels: Tensor, divergence: str) -> Tensor:
        problem_type = self.problem_type
        if problem_type is None and logits.shape[-1] == 1:
            problem_type = "regression"
        elif problem_type is None:
            is_multi_label = labels.is_floating_point()
            problem_type = "multi_label_classification" if is_multi_label else "single_label_classification"
        is_categorical = problem_type == "single_label_classification"
        # Floating-point labels are probabilities, of every row.
        has_classes = is_categorical and not labels.is_floating_point()
        weights = self._repeated_rows(labels.reshape(-1).ne(IGNORE_INDEX)) if has_classes else None
        return consistency_loss(logits, weights, divergence, problem_type, self.rows)

    def _answer_losses(self, outputs: Mapping[str, Any]) -> Tensor:
        """The mean losses over the start and over the end positions of both passes, `(2,)`; 0 for a mean over none."""
        losses = []
        for name, mask in zip(("start", "end"), self.alignment.answer_mask(self.inputs), strict=True):
            # Like the heads: a position before the text counts as its first position.
            targets = self.inputs[f"{name}_positions"].reshape(-1).clamp(min=0).masked_fill(~mask, IGNORE_INDEX)
            targets, mask = (torch.cat((value, self._repeated_rows(value))) for value in (targets, mask))
            loss = nn.functional.cross_entropy(outputs[f"{name}_logits"].float(), targets, reduction="sum")
            losses.append(loss / mask.sum().clamp(min=1))
        return torch.stack(losses)


def _zero_of(loss: Tensor, outputs: Mapping[str, Any]) -> Tensor:
    """Replaces the loss of a batch without items, NaN as a mean over none, by 0.

    The gradients of other parts of the loss remain, such as the load balancing loss of experts. The logits get no
    gradient: a sum divided by 0 items would send NaN.
    """
    logits = outputs.get("logits")
    if logits is not None and logits.requires_grad:
        logits.register_hook(torch.zeros_like)
    return _ZeroValue.apply(loss)


class _ZeroValue(torch.autograd.Function):
    """0 in the forward pass, the identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return torch.zeros_like(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
