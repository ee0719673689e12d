"""The task loss of a Trainer as a mean over both passes, and the outputs of the forward that computes it."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from .alignment import IGNORE_INDEX, LabelAlignment


class ForwardRecorder:
    """Context manager that records the outputs of every call of `model` with gradients.

    TRL's trainers call the model with `fused_lm_head=True` and get only the log-probabilities of the labels. The
    recorder runs such a call without the fused head, because the consistency term needs the logits, and returns the
    same fields.

    Args:
        model (`torch.nn.Module`): The module that the Trainer calls.
        alignment ([`LabelAlignment`]): Which label the logits at each position predict.

    Example:

    >>> model = nn.Linear(2, 2)
    >>> with ForwardRecorder(model, LabelAlignment()) as recorder:
    ...     outputs = model(torch.ones(1, 2))
    >>> recorder.output is outputs
    True
    """

    def __init__(self, model: nn.Module, alignment: LabelAlignment) -> None:
        self.model = model
        self.alignment = alignment
        self.outputs: list[Any] = []
        self._fused_labels: dict[str, Tensor] | None = None

    def __enter__(self) -> "ForwardRecorder":
        self._handles = (
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def output(self) -> Any:
        """The outputs of the only recorded call.

        Raises:
            ValueError: if there were several calls or none.
        """
        if len(self.outputs) != 1:
            raise ValueError(
                f"Expected one forward with gradients for one loss, got {len(self.outputs)}: the consistency term "
                "compares the two passes in a single forward. Set `consistency_weight=0` for this Trainer."
            )
        return self.outputs[0]

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not (torch.is_grad_enabled() and kwargs.get("fused_lm_head")):
            return None
        # The fused call computes no loss. Without labels the ordinary call computes none either.
        self._fused_labels = {name: kwargs[name] for name in ("labels", "shift_labels") if name in kwargs}
        return args, {name: kwargs[name] for name in kwargs if name not in ("fused_lm_head", *self._fused_labels)}

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        self.outputs.append(output)
        labels, self._fused_labels = self._fused_labels, None
        if labels is None:
            return None
        targets = self.alignment.targets(labels, output.logits.shape[1])
        return fused_fields(output.logits, targets, getattr(output, "aux_loss", None))


@contextmanager
def averaging_over(num_items: Tensor, trainer: Trainer) -> Iterator[None]:
    """Context manager that passes the number of items of both passes to the custom loss function of a Trainer, if it
    has one, so that the function returns their mean.

    Args:
        num_items (`torch.Tensor`): The number of items, a scalar.
        trainer ([`~transformers.Trainer`]): The Trainer.
    """
    compute_loss_func = trainer.compute_loss_func
    if compute_loss_func is None:
        yield
        return

    def mean_loss(outputs: Any, labels: Any, num_items_in_batch: Tensor | None = None) -> Tensor:
        return compute_loss_func(outputs, labels, num_items_in_batch=num_items.clamp(min=1))

    trainer.compute_loss_func = mean_loss
    try:
        yield
    finally:
        trainer.compute_loss_func = compute_loss_func


def fused_fields(logits: Tensor, targets: Tensor, aux_loss: Tensor | None = None) -> SimpleNamespace:
    """The fields that TRL's fused head returns, computed from ordinary logits.

    Args:
        logits (`torch.Tensor` of shape `(B, L, C)`): Logits over `C` tokens.
        targets (`torch.Tensor` of shape `(B, L)`): The label that each position predicts, -100 for none.
        aux_loss (`torch.Tensor`, *optional*): The load balancing loss of a mixture of experts.

    Returns:
        `log_probs` (nats) and, without gradient, `entropy` (nats), `is_top1` and `label_mask`, each of shape `(B, L)`;
        `log_probs` and `entropy` are 0 where there is no target.

    Example:

    >>> fields = fused_fields(torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), torch.tensor([[1, -100]]))
    >>> fields.log_probs
    tensor([[-0.6931, -0.0000]])
    """
    mask = targets.ne(IGNORE_INDEX)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    entropy = logits.new_zeros(targets.shape, dtype=torch.float32)
    with torch.no_grad():
        # One row at a time: all rows at once would need as much memory as the logits, only for a logged metric.
        for row, row_entropy, row_mask in zip(logits, entropy, mask, strict=True):
            row_entropy[row_mask] = torch.special.entr(row[row_mask].softmax(-1, dtype=torch.float32)).sum(-1)
        is_top1 = logits.argmax(-1).eq(targets)
    return SimpleNamespace(
        log_probs=-losses.view(targets.shape), entropy=entropy, is_top1=is_top1, label_mask=mask, aux_loss=aux_loss
    )
