"""One attention call, and the base attention: what stock Transformers would compute for it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..functional import attention_scores, boolean_mask, expand_heads, query_offset, visible_keys
from .kernels import attend_with


# The default base attention.
SDPA = "sdpa"

AttentionOutput = tuple[Tensor, Tensor | None]
"""The output, `(B, Q, H, D)`, and the attention weights, `(B, H, Q, K)`, if requested."""
Attend = Callable[["AttentionCall"], AttentionOutput]


class KnownScores(NamedTuple):
    """Final scores, and the arguments of the call that they were computed from."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scores: Tensor


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one attention call.

    Args:
        module: the attention module.
        query: `(B, H, Q, D)`.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, D)`.
        mask: `(B|1, H|1, Q|1, K)`, boolean (true = may attend) or additive; or `None`.
        dropout: probability of dropout on the attention weights.
        scaling: factor of the scores, `D ** -0.5` by default.
        is_causal: whether a missing mask means causal; by default the module decides.
        extras: further arguments that the model passed.
        kind: `"encoder_self"`, `"decoder_self"` or `"cross"`.
        base: attention implementation that computes the base attention.
        model_mask: the mask that the model passed; `mask` also masks what a method has masked.
        zeroed: boolean `(B, H, Q, K)`, scores that are replaced by 0 before the softmax; none by default.
        known_scores: spares computing the scores again, as long as no method changes what they depend on.
        memory: shared by all calls during one forward of the module.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    scaling: float | None
    is_causal: bool | None
    extras: dict[str, Any]
    kind: str = "encoder_self"
    base: str = SDPA
    model_mask: Tensor | None = None
    zeroed: Tensor | None = None
    known_scores: KnownScores | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        """Whether a missing mask means causal, decided as SDPA decides it."""
        return getattr(self.module, "is_causal", True) if self.is_causal is None else self.is_causal

    @property
    def lengths(self) -> dict[str, Any]:
        """Arguments of the functions that derive visibility from a mask."""
        return {
            "query_length": self.query.shape[-2],
            "key_length": self.key.shape[-2],
            "device": self.query.device,
        }

    @property
    def visible(self) -> Tensor | None:
        """Which keys each query may attend to, boolean `(B|1, H|1, Q|1, K)`; `None` for all."""
        return visible_keys(self.mask, is_causal=self.causal, **self.lengths)

    @property
    def real_queries(self) -> Tensor | None:
        """Which queries attend to themselves and so are not padding, `(B|1, H|1, Q)`; `None` if unknown."""
        queries, keys = self.query.shape[-2], self.key.shape[-2]
        if self.mask is None or self.kind == "cross" or queries > keys:
            return None
        own_keys = query_offset(self.mask, query_length=queries, key_length=keys)
        own_keys = own_keys + torch.arange(queries, device=self.mask.device)
        rows = boolean_mask(self.mask).expand(-1, -1, queries, -1)
        return rows.gather(-1, own_keys.expand(*rows.shape[:2], -1).unsqueeze(-1)).squeeze(-1)

    @property
    def wants_eager(self) -> bool:
        """Whether the model file's eager function is the base: SDPA has no softcap, sinks or returned weights."""
        return bool(self.extras.get("output_attentions")) or any(
            self.extras.get(name) is not None for name in ("softcap", "s_aux", "sinks")
        )

    @property
    def additive_mask(self) -> Tensor | None:
        """The mask, if it is added to the scores."""
        return None if self.mask is None or self.mask.dtype == torch.bool else self.mask

    def scores(self) -> Tensor:
        """Computes the final scores, `(B, H, Q, K)`."""
        known, mask = self.known_scores, self.additive_mask
        if known is not None and known.query is self.query and known.key is self.key and known.mask is mask:
            return known.scores
        bias = self.extras.get("position_bias")
        if mask is not None:
            bias = mask if bias is None else bias + mask
        return attention_scores(
            self.query, self.key, scaling=self.scaling, softcap=self.extras.get("softcap"), bias=bias
        )

    def zeroing(self, zeroed: Tensor, scores: Tensor) -> "AttentionCall":
        """Returns the call with some of its final scores replaced by 0, boolean `(B, H, Q, K)`."""
        known = KnownScores(self.query, self.key, self.additive_mask, scores)
        zeroed = zeroed if self.zeroed is None else zeroed | self.zeroed
        return replace(self, zeroed=zeroed, known_scores=known, base=SDPA)

    def keeping(self, kept: Tensor) -> "AttentionCall":
        """Returns the call with all keys masked but those kept, boolean `(B, H, Q|1, K)`."""
        if self.additive_mask is not None:
            mask = self.additive_mask.masked_fill(~kept, -torch.inf)
        else:
            visible = self.visible
            mask = kept if visible is None else kept & visible
        # Kernels other than SDPA cannot express a mask for each query.
        return replace(self, mask=mask, base=SDPA)


def attend_if_any_key(call: AttentionCall, attend: Attend | None = None) -> AttentionOutput:
    """Computes attention with zeros for fully masked queries, in the output and in the gradients.

    Args:
        call: the attention call.
        attend: computes attention for all other queries; [`base_attention`] by default.
    """
    attend = attend or base_attention
    if call.mask is None:
        return attend(call)
    is_plain = not call.wants_eager and call.zeroed is None and call.extras.get("position_bias") is None
    if call.mask.dtype == torch.bool and is_plain:
        return attend(call)  # SDPA gives zeros where a boolean mask masks every key.
    fully_masked = ~boolean_mask(call.mask).any(dim=-1, keepdim=True)  # (B|1, H|1, Q|1, 1)
    # Any finite scores will do for these queries, because their output is overwritten.
    mask = call.mask.masked_fill(fully_masked, call.mask.dtype == torch.bool)
    output, weights = attend(replace(call, mask=mask))
    output = output.masked_fill(fully_masked.transpose(1, 2), 0.0)
    return output, None if weights is None else weights.masked_fill(fully_masked, 0.0)


def base_attention(call: AttentionCall) -> AttentionOutput:
    """Computes attention by SDPA, another selected kernel, or the model file's eager function."""
    if call.zeroed is not None:
        return _softmax_attention(call, call.zeroed)
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
    """Returns whether this forward runs inside a backward pass, as activation checkpointing does to recompute."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _softmax_attention(call: AttentionCall, zeroed: Tensor) -> AttentionOutput:
    """Computes attention with some scores at 0. They stay in the softmax as constants, which no mask can express."""
    scores = call.scores().masked_fill(zeroed, 0.0)
    # The scores include an additive mask, and a method may have masked a score that another one has set to 0.
    visible = call.visible if call.additive_mask is None else call.additive_mask > -torch.inf
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    sinks = call.extras.get("sinks")
    if call.extras.get("s_aux") is not None:
        sinks = call.extras["s_aux"].view(1, -1, 1, 1)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : call.key.shape[-2]]
    weights = F.dropout(weights, p=call.dropout, training=call.module.training).to(call.value.dtype)
    output = (weights @ expand_heads(call.value, weights.shape[1])).transpose(1, 2).contiguous()
    return output, weights if call.extras.get("output_attentions") else None


def _eager_attention(module: nn.Module) -> Any:
    for kind in type(module).__mro__:  # A class of one's own inherits from one of a model file.
        eager = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise ValueError(
        f"{type(module).__name__} needs attention weights, a softcap or sinks, which SDPA does not support, and its "
        f"model file {type(module).__module__} has no eager_attention_forward to compute them. Call the model without "
        'output_attentions=True, or switch it to attn_implementation="eager".'
    )


def _additive(call: AttentionCall) -> Tensor | None:
    """Returns the mask as eager functions expect it, added to the scores."""
    visible = call.visible
    if visible is None or call.additive_mask is not None:
        return call.mask
    masked = torch.finfo(call.query.dtype).min
    return torch.zeros(visible.shape, dtype=call.query.dtype, device=visible.device).masked_fill(~visible, masked)
