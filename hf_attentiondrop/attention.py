"""The attention function, with the signature that Transformers calls.

Hard perturbs the mask and blur perturbs the keys; the base attention then does the rest, so everything that it honours
(bias, softcap, sinks, dropout, fused kernels) holds for the perturbed attention too. Only `fill="zero"`, which no
mask can express, computes its own softmax.
"""

import copy
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .configuration import AttentionDropConfig
from .functional import (
    attention_scores,
    blur_keys,
    draw_hits,
    expand_heads,
    mask_top_scores,
    visible_keys,
    visible_neighbours,
)


NAME = "attentiondrop"

HONOURED = ("position_bias", "softcap", "s_aux", "sinks")
# Tensors that travel along in `**kwargs` without a say in attention: positions are in the keys and the mask by now,
# and the rest is for the loss.
BYSTANDERS = ("position_ids", "cache_position", "num_items_in_batch", "shift_labels")
# Where packed documents begin and end, for kernels that take no mask. Here a mask says so.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k")


@dataclass(frozen=True)
class _Call:
    """The arguments of one attention call."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    scaling: float | None
    is_causal: bool | None
    extras: dict[str, Any]

    @property
    def causal(self) -> bool:
        """Whether a missing mask means causal, decided as SDPA decides it."""
        return getattr(self.module, "is_causal", True) if self.is_causal is None else self.is_causal

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


def attention_drop_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention that is perturbed while `module.training` is true, and the base attention bit for bit otherwise.

    Args:
        module: the attention module; its config's `attention_drop` entry says what to do.
        query: `(B, H, Q, D)`.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, D)`.
        attention_mask: `(B|1, H|1, Q, K)`, boolean (true = may attend) or additive; or `None`.
        dropout: rate of dropout on the attention weights.
        scaling: factor of the scores, `D ** -0.5` by default.
        is_causal: whether a missing mask means causal; by default as the module says.
        kwargs: `position_bias`, `softcap`, `s_aux` or `sinks`, and `output_attentions` are honoured.

    Returns:
        The output, `(B, Q, H, D)`, and the weights used, `(B, H, Q, K)`, if `output_attentions` is true, else `None`.
        A query that sees no key gets zeros where attention is perturbed.

    Raises:
        ValueError: for a tensor argument that is not honoured, or a softcap under blur.
        RuntimeError: if the module never got its place in a model.
    """
    _refuse_unknown_arguments(module, attention_mask, kwargs)
    call = _Call(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    drop = _perturbation(module) if module.training else None
    if drop is None:
        return _base_attention(call)
    _count(module)
    return _PERTURBED_ATTENTIONS[drop.variant](call, drop)


def _hard_attention(call: _Call, drop: AttentionDropConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    if drop.fill == "zero":
        return _zero_filled_attention(call, drop)
    visible = call.visible
    with torch.no_grad():
        kept = ~draw_hits(call.scores(), visible, p=drop.p, k=drop.k, fill=drop.fill)
    if visible is not None:
        kept &= visible
    is_additive = call.mask is not None and call.mask.dtype != torch.bool
    mask = call.mask.masked_fill(~kept, -torch.inf) if is_additive else kept
    return _attend_if_any_key(replace(call, mask=mask))


def _blurred_attention(call: _Call, drop: AttentionDropConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    if call.extras.get("softcap") is not None:
        raise ValueError(
            f"AttentionDrop's blur cannot act on {type(call.module).__name__}, which caps its scores (softcap="
            f"{call.extras['softcap']}): blurring the keys no longer blurs the scores once tanh stands between "
            "them. Use "
            'variant="hard", or set the softcap of the model config to None.'
        )
    neighbours = visible_neighbours(
        call.mask,
        width=drop.width,
        is_causal=call.causal,
        is_cross=call.module.attention_drop_site.kind == "cross",
        **call.lengths,
    )
    dtype = torch.promote_types(call.key.dtype, torch.float32)
    sigma = drop.sigma_max * torch.rand(call.key.shape[0], dtype=dtype, device=call.key.device)
    key = blur_keys(call.key, sigma, neighbours)
    if key.shape[1] == call.key.shape[1]:
        return _attend_if_any_key(replace(call, key=key))
    # One mask per query head took one key per query head: the base attention must not repeat them once more.
    ungrouped = copy.copy(call.module)
    ungrouped.num_key_value_groups = 1
    value = expand_heads(call.value, key.shape[1])
    return _attend_if_any_key(replace(call, module=ungrouped, key=key, value=value))


_PERTURBED_ATTENTIONS = {"hard": _hard_attention, "blur": _blurred_attention}


def _zero_filled_attention(call: _Call, drop: AttentionDropConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hard with hit scores at 0: they stay in the softmax, as constants, which takes a softmax of our own."""
    visible = call.visible
    scores = mask_top_scores(call.scores(), visible, p=drop.p, k=drop.k, fill="zero")
    blind = None if visible is None else ~visible.any(dim=-1, keepdim=True)
    if blind is not None:
        scores = scores.masked_fill(blind, 0.0)
    sinks = call.extras.get("sinks")
    if call.extras.get("s_aux") is not None:
        sinks = call.extras["s_aux"].view(1, -1, 1, 1)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : call.key.shape[-2]]
    weights = F.dropout(weights, p=call.dropout, training=call.module.training).to(call.value.dtype)
    if blind is not None:
        weights = weights.masked_fill(blind, 0.0)
    output = (weights @ expand_heads(call.value, weights.shape[1])).transpose(1, 2).contiguous()
    return output, weights if call.extras.get("output_attentions") else None


def _attend_if_any_key(call: _Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The base attention, with zeros for queries that see no key, forward and backward."""
    if call.mask is None:
        return _base_attention(call)
    if call.mask.dtype == torch.bool and not call.wants_eager and call.extras.get("position_bias") is None:
        return _base_attention(call)  # SDPA gives zeros where a boolean mask hides every key.
    blind = ~call.visible.any(dim=-1, keepdim=True)  # (B|1, H|1, Q|1, 1)
    # Anything finite will do for these rows: what becomes of them is thrown away.
    output, weights = _base_attention(replace(call, mask=call.mask.masked_fill(blind, call.mask.dtype == torch.bool)))
    output = output.masked_fill(blind.transpose(1, 2), 0.0)
    return output, None if weights is None else weights.masked_fill(blind, 0.0)


def _base_attention(call: _Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What stock Transformers would run: SDPA, or the model file's own eager function."""
    attend, mask = sdpa_attention_forward, call.mask
    if call.wants_eager:
        attend, mask = _eager_attention(call.module), _additive(call)
    return attend(
        call.module,
        call.query,
        call.key,
        call.value,
        mask,
        dropout=call.dropout,
        scaling=call.scaling,
        is_causal=call.is_causal,
        **call.extras,
    )


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


def _additive(call: _Call) -> torch.Tensor | None:
    """The mask as eager functions expect it, added to the scores."""
    visible = call.visible
    if visible is None or (call.mask is not None and call.mask.dtype != torch.bool):
        return call.mask
    hidden = torch.finfo(call.query.dtype).min
    return torch.zeros(visible.shape, dtype=call.query.dtype, device=visible.device).masked_fill(~visible, hidden)


def _perturbation(module: nn.Module) -> AttentionDropConfig | None:
    site = getattr(module, "attention_drop_site", None)
    if site is None:
        raise RuntimeError(
            f"{type(module).__name__} runs {NAME!r} in training without belonging to a model that was built with "
            "it, so its layer and kind are unknown. Build the whole model with "
            f'attn_implementation="{NAME}", or call model.set_attn_implementation("{NAME}") after adding modules.'
        )
    return site.perturbation


def _count(module: nn.Module) -> None:
    # Inside the backward pass a forward is activation checkpointing's recomputation, which was counted before.
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        module.attention_drop_site.calls.add_(1)


def _refuse_unknown_arguments(module: nn.Module, mask: torch.Tensor | None, extras: dict[str, Any]) -> None:
    for name, value in extras.items():
        if name in HONOURED or name in BYSTANDERS:
            continue
        if name in PACKING and (value is None or mask is not None or value.numel() <= 2):
            continue
        if isinstance(value, torch.Tensor) or (name == "cache" and value is not None):
            remedy = (
                "Pass position_ids that start anew with each document: Transformers makes the mask from them."
                if name in PACKING
                else 'Load this model with attn_implementation="sdpa" or "eager", or drop an argument of your own.'
            )
            raise ValueError(
                f"{type(module).__name__} passes `{name}` to its attention, which {NAME!r} does not honour: ignoring "
                f"it would give wrong outputs. Arguments that are honoured: {', '.join(HONOURED)}, is_causal, "
                f"output_attentions. {remedy}"
            )
