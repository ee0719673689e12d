"""One attention call, and what stock Transformers would make of it: everything else builds on this."""

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..functional import attention_scores, prepend_sink, query_offset, show_sink, visible_keys
from ..methods.sites import SDPA
from .kernels import attend_with


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one attention call, the score `(H,)` of a learned sink if there is one, the attention
    implementation that is to compute the base attention, and what the calls of one pass through the module share."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    scaling: float | None
    is_causal: bool | None
    extras: dict[str, Any]
    sink: torch.Tensor | None = None
    base: str = SDPA
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        """Whether a missing mask means causal, decided as SDPA decides it."""
        return getattr(self.module, "is_causal", True) if self.is_causal is None else self.is_causal

    @property
    def strength(self) -> torch.Tensor:
        """The `p` or `sigma_max` of the module."""
        return self.module.attention_drop_site.strength

    @property
    def lengths(self) -> dict[str, Any]:
        return {
            "query_length": self.query.shape[-2],
            "key_length": self.key.shape[-2],
            "device": self.query.device,
        }

    @property
    def visible(self) -> torch.Tensor | None:
        return visible_keys(self.mask, is_causal=self.causal, **self.lengths)

    @property
    def real_queries(self) -> torch.Tensor | None:
        """Which queries see themselves, and so are no padding, `(B|1, H|1, Q)`; `None` where that is unknown."""
        queries, keys = self.query.shape[-2], self.key.shape[-2]
        if self.mask is None or self.module.attention_drop_site.kind == "cross" or queries > keys:
            return None
        own_keys = query_offset(self.mask, query_length=queries, key_length=keys)
        own_keys = own_keys + torch.arange(queries, device=self.mask.device)
        rows = self.visible.expand(-1, -1, queries, -1)
        return rows.gather(-1, own_keys.expand(*rows.shape[:2], -1).unsqueeze(-1)).squeeze(-1)

    @property
    def wants_eager(self) -> bool:
        """Whether the base attention is the model file's own: SDPA has no softcap, no sinks and no weights to show."""
        return bool(self.extras.get("output_attentions")) or any(
            self.extras.get(name) is not None for name in ("softcap", "s_aux", "sinks")
        )

    def scores(self) -> torch.Tensor:
        """Final scores, `(B, H, Q, K)`."""
        bias = self.extras.get("position_bias")
        if self.mask is not None and self.mask.dtype != torch.bool:
            bias = self.mask if bias is None else bias + self.mask
        return attention_scores(
            self.query, self.key, scaling=self.scaling, softcap=self.extras.get("softcap"), bias=bias
        )


def attend_if_any_key(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The base attention, with zeros for queries that see no key, forward and backward."""
    if call.mask is None:
        return base_attention(call)
    if call.mask.dtype == torch.bool and not call.wants_eager and call.extras.get("position_bias") is None:
        return base_attention(call)  # SDPA gives zeros where a boolean mask hides every key.
    blind = ~call.visible.any(dim=-1, keepdim=True)  # (B|1, H|1, Q|1, 1)
    # Anything finite will do for these rows: what becomes of them is thrown away.
    output, weights = base_attention(replace(call, mask=call.mask.masked_fill(blind, call.mask.dtype == torch.bool)))
    output = output.masked_fill(blind.transpose(1, 2), 0.0)
    return output, None if weights is None else weights.masked_fill(blind, 0.0)


def base_attention(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What stock Transformers would run, SDPA, another kernel that was asked for, or the model file's own eager
    function; and the sink if there is one."""
    if call.sink is not None:
        return _attention_with_sink(call)
    arguments = (call.module, call.query, call.key, call.value)
    options = {"dropout": call.dropout, "scaling": call.scaling, **call.extras}
    if call.wants_eager:
        attend = _eager_attention(call.module)
        return attend(*arguments, _additive(call), is_causal=call.is_causal, **options)
    if call.base != SDPA:
        output = attend_with(call.base, *arguments, call.mask, is_causal=call.causal, **options)
        if output is not None:
            return output, None
    return sdpa_attention_forward(*arguments, call.mask, is_causal=call.is_causal, **options)


def is_recomputing() -> bool:
    """Whether this forward pass is activation checkpointing's repetition, inside of a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _attention_with_sink(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    if call.extras.get("softcap") is not None:
        raise ValueError(
            f"A learned sink cannot act on {type(call.module).__name__}, which caps its scores (softcap="
            f"{call.extras['softcap']}): the sink's score would be capped too. Set the softcap of the model config "
            'to None, or use attn_implementation="affine_scaled".'
        )
    scaling = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    query, key, value = prepend_sink(call.query, call.key, call.value, call.sink, scaling=scaling)
    # Where only the order of the tokens hides keys, one more query keeps it: query i + 1 sees keys 0 to i + 1.
    added = int(call.mask is None and call.causal and query.shape[-2] > 1)
    extras = call.extras
    if extras.get("position_bias") is not None:
        extras = extras | {"position_bias": F.pad(extras["position_bias"], (1, 0, added, 0))}
    output, weights = base_attention(
        replace(
            call,
            query=F.pad(query, (0, 0, added, 0)),
            key=key,
            value=value,
            mask=None if call.mask is None else show_sink(call.mask),
            scaling=scaling,
            extras=extras,
            sink=None,
            base=SDPA,
        )
    )
    return output[:, added:, :, :-1].contiguous(), None if weights is None else weights[:, :, added:, 1:]


def _eager_attention(module: nn.Module) -> Any:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(
            f"{type(module).__name__} was asked for attention weights, a softcap or sinks, which SDPA does not "
            f"give, and its model file {type(module).__module__} has no eager_attention_forward to give them. "
            "Call the model without "
            'output_attentions=True, or switch it to attn_implementation="eager".'
        )
    return eager


def _additive(call: AttentionCall) -> torch.Tensor | None:
    """The mask as eager functions expect it, added to the scores."""
    visible = call.visible
    if visible is None or (call.mask is not None and call.mask.dtype != torch.bool):
        return call.mask
    hidden = torch.finfo(call.query.dtype).min
    return torch.zeros(visible.shape, dtype=call.query.dtype, device=visible.device).masked_fill(~visible, hidden)
