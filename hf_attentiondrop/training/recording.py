"""The outputs of the forward pass that a Trainer computes its task loss from."""

from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .consistency import IGNORE_INDEX, LabelAlignment


class RecordForward:
    """Context that keeps what `model` returns for each call with gradients.

    TRL's trainers call the model with `fused_lm_head=True` for the log-probabilities of the labels alone. Such a call
    is answered from the ordinary logits, which the consistency term needs.

    Args:
        model: the module that the Trainer calls.
        alignment: which label a position predicts.
    """

    def __init__(self, model: nn.Module, alignment: LabelAlignment) -> None:
        self.model = model
        self.alignment = alignment
        self.outputs: list[Any] = []
        self._fused_labels: dict[str, Tensor] | None = None

    def __enter__(self) -> "RecordForward":
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

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not (torch.is_grad_enabled() and kwargs.get("fused_lm_head")):
            return None
        # Without labels the model leaves out its own loss, which the fused call does not ask for.
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


def fused_fields(logits: Tensor, targets: Tensor, aux_loss: Tensor | None) -> SimpleNamespace:
    """What TRL's fused head returns, from ordinary logits.

    Args:
        logits: of shape `(B, L, C)`.
        targets: the label that each position predicts, `(B, L)`, -100 for none.
        aux_loss: the load balancing loss of a mixture of experts.

    Returns:
        `log_probs` and, without gradient, `entropy` (nats), `is_top1` and `label_mask`, each `(B, L)` and 0 where
        there is no target.
    """
    mask = targets.ne(IGNORE_INDEX)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    entropy = logits.new_zeros(targets.shape, dtype=torch.float32)
    with torch.no_grad():
        # Row by row of the batch, because this is for the log only and would otherwise cost the memory of the logits.
        for row, of_row, row_mask in zip(logits, entropy, mask, strict=True):
            of_row[row_mask] = torch.special.entr(row[row_mask].softmax(-1, dtype=torch.float32)).sum(-1)
        is_top1 = logits.argmax(-1).eq(targets)
    return SimpleNamespace(
        log_probs=-losses.view(targets.shape), entropy=entropy, is_top1=is_top1, label_mask=mask, aux_loss=aux_loss
    )
