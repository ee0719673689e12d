"""The attention function, with the signature that Transformers calls.

Hard perturbs the mask and blur perturbs the keys; the base attention then does the rest, so everything that it honours
(bias, softcap, sinks, dropout, fused kernels) holds for the perturbed attention too. Only `fill="zero"`, which no
mask can express, computes its own softmax, and so does hard on long sequences, to spare the mask.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .base import AttentionCall, attend_if_any_key, base_attention, is_recomputing
from .configuration import AttentionDropConfig
from .functional import (
    blur_keys,
    draw_hits,
    expand_heads,
    flex_hard_attention,
    hard_attention,
    mask_top_scores,
    visible_neighbours,
)


NAME = "attentiondrop"

HONOURED = ("position_bias", "softcap", "s_aux", "sinks")
# Tensors that travel along in `**kwargs` without a say in attention: positions are in the keys and the mask by now,
# and the rest is for the loss.
BYSTANDERS = ("position_ids", "cache_position", "num_items_in_batch", "labels", "shift_labels")
# Scores of one head up to which a processor is as fast with the whole score matrix as with blocks of it.
FEW_SCORES = 256 * 256
# Scores of one head up to which the score matrix does, on devices where FlexAttention trains. At 512 x 512 a batch of
# 32 with 12 heads has 0.4 GB of them, and the dozens of small kernels around FlexAttention cost as much time as some
# passes over that. It grows with the square of the length, and they do not.
FLEX_ATTENTION_BEYOND = {"cuda": 512 * 512}
FLEX_ATTENTION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLEX_ATTENTION_SIZES = range(16, 129)
HAS_TRITON = find_spec("triton") is not None
# Where packed documents begin and end, for kernels that take no mask. Here a mask says so.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k")


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
    call = AttentionCall(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    return _attend(call, _perturbation(module, by_default=True))


def reweighted_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    reweighting_states: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention under what the module's `reweighting` has learned, in training and in evaluation.

    Args:
        reweighting_states: `(B, Q, hidden_size)`, the hidden states that entered the module; a hook hands them over.
        others: as in [`attention_drop_forward`]. Attention is perturbed in training if the config has an
            `attention_drop` entry, and the base attention otherwise, before it is reweighted.

    Returns:
        As [`attention_drop_forward`]; the weights are the reweighted ones.

    Raises:
        ValueError: as [`attention_drop_forward`], and for hidden states that do not fit the queries.
        RuntimeError: if nothing was attached to the module, or no hidden states arrived.
    """
    _refuse_unknown_arguments(module, attention_mask, kwargs)
    call = AttentionCall(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    if not hasattr(module, "reweighting"):
        raise RuntimeError(
            f"{type(module).__name__} runs {module.config._attn_implementation!r} without learned weights: it would "
            "be plain attention under another name. Build the whole model with it, or call "
            "model.set_attn_implementation instead of changing the config."
        )
    attend = functools.partial(_attend, drop=_perturbation(module, by_default=False))
    if module.reweighting is None:
        return attend(call)
    _refuse_misplaced_states(call, reweighting_states)
    return module.reweighting(reweighting_states, call, attend)


def _attend(call: AttentionCall, drop: AttentionDropConfig | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The base attention, perturbed or not."""
    if drop is None:
        return base_attention(call)
    if not is_recomputing():
        call.module.attention_drop_site.calls.add_(1)
    return _PERTURBED_ATTENTIONS[drop.variant](call, drop)


def _strength(call: AttentionCall) -> torch.Tensor:
    """The `p` or `sigma_max` of the module."""
    return call.module.attention_drop_site.strength


def _hard_attention(call: AttentionCall, drop: AttentionDropConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    if _runs_in_blocks(call):
        return _hard_attention_in_blocks(call, drop), None
    if _runs_on_flex_attention(call):
        return _hard_attention_in_blocks(call, drop, flex_hard_attention), None
    if drop.fill == "zero":
        return _zero_filled_attention(call, drop)
    visible = call.visible
    with torch.no_grad():
        kept = ~draw_hits(call.scores(), visible, p=_strength(call), k=drop.k, fill=drop.fill)
    if visible is not None:
        kept &= visible
    is_additive = call.mask is not None and call.mask.dtype != torch.bool
    mask = call.mask.masked_fill(~kept, -torch.inf) if is_additive else kept
    return attend_if_any_key(replace(call, mask=mask))


def _runs_in_blocks(call: AttentionCall) -> bool:
    """Whether a processor does better without the score matrix, and nothing but masks shapes the scores."""
    if call.query.device.type != "cpu" or call.query.shape[-2] * call.key.shape[-2] <= FEW_SCORES:
        return False
    if call.wants_eager or call.sink is not None or call.extras.get("position_bias") is not None or call.dropout > 0:
        return False
    return call.mask is None or call.mask.dtype == torch.bool


def _runs_on_flex_attention(call: AttentionCall) -> bool:
    """Whether a device does better without the score matrix, and FlexAttention can do without it.

    FlexAttention has no dropout of attention weights.
    """
    few_scores = FLEX_ATTENTION_BEYOND.get(call.query.device.type, math.inf)
    if not HAS_TRITON or call.query.shape[-2] * call.key.shape[-2] <= few_scores:
        return False
    if call.wants_eager or call.sink is not None or call.extras.get("position_bias") is not None or call.dropout > 0:
        return False
    if any(states.shape[-1] not in FLEX_ATTENTION_SIZES for states in (call.query, call.value)):
        return False
    return call.value.dtype in FLEX_ATTENTION_DTYPES and (call.mask is None or call.mask.dtype == torch.bool)


def _hard_attention_in_blocks(
    call: AttentionCall, drop: AttentionDropConfig, attend: Callable[..., torch.Tensor] = hard_attention
) -> torch.Tensor:
    shape = *call.query.shape[:-1], min(drop.k, call.key.shape[-2])
    drawn = torch.rand(shape, device=call.query.device) < _strength(call)
    states = (call.query, call.key, call.value)
    return attend(*states, drawn, call.mask, is_causal=call.causal, scaling=call.scaling, fill=drop.fill)


def _blurred_attention(call: AttentionCall, drop: AttentionDropConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
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
    sigma = _strength(call) * torch.rand(call.key.shape[0], dtype=dtype, device=call.key.device)
    key = blur_keys(call.key, sigma, neighbours)
    if key.shape[1] == call.key.shape[1]:
        return attend_if_any_key(replace(call, key=key))
    # One mask per query head took one key per query head: the base attention must not repeat them once more.
    ungrouped = copy.copy(call.module)
    ungrouped.num_key_value_groups = 1
    value = expand_heads(call.value, key.shape[1])
    return attend_if_any_key(replace(call, module=ungrouped, key=key, value=value))


_PERTURBED_ATTENTIONS = {"hard": _hard_attention, "blur": _blurred_attention}


def _zero_filled_attention(call: AttentionCall, drop: AttentionDropConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hard with hit scores at 0: they stay in the softmax, as constants, which takes a softmax of our own."""
    visible = call.visible
    scores = mask_top_scores(call.scores(), visible, p=_strength(call), k=drop.k, fill="zero")
    blind = None if visible is None else ~visible.any(dim=-1, keepdim=True)
    if blind is not None:
        scores = scores.masked_fill(blind, 0.0)
    per_head = [sink.view(1, -1, 1, 1) for sink in (call.extras.get("s_aux"), call.sink) if sink is not None]
    for sinks in (call.extras.get("sinks"), *per_head):
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : call.key.shape[-2]]
    weights = F.dropout(weights, p=call.dropout, training=call.module.training).to(call.value.dtype)
    if blind is not None:
        weights = weights.masked_fill(blind, 0.0)
    output = (weights @ expand_heads(call.value, weights.shape[1])).transpose(1, 2).contiguous()
    return output, weights if call.extras.get("output_attentions") else None


def _perturbation(module: nn.Module, *, by_default: bool) -> AttentionDropConfig | None:
    """What AttentionDrop does to the module now; where its config has no entry, the defaults or nothing."""
    if not module.training:
        return None
    site = getattr(module, "attention_drop_site", None)
    if site is None:
        name = module.config._attn_implementation or NAME
        raise RuntimeError(
            f"{type(module).__name__} runs {name!r} in training without belonging to a model that was built with "
            "it, so its layer and kind are unknown. Build the whole model with "
            f'attn_implementation="{name}", or call model.set_attn_implementation("{name}") after adding modules.'
        )
    return site.perturbation if by_default or site.is_configured else None


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
                f"{type(module).__name__} passes `{name}` to its attention, which hf_attentiondrop does not honour: "
                f"ignoring it would give wrong outputs. Arguments that are honoured: {', '.join(HONOURED)}, "
                f"is_causal, output_attentions. {remedy}"
            )


def _refuse_misplaced_states(call: AttentionCall, states: torch.Tensor | None) -> None:
    name = type(call.module).__name__
    if states is None:
        raise RuntimeError(
            f"{name} did not pass the hidden states on to its attention function, so nothing learned could act. Its "
            "forward must hand its keyword arguments over; load the model with another attn_implementation."
        )
    batch_size, _, queries, _ = call.query.shape
    if states.shape[:2] != (batch_size, queries):
        raise ValueError(
            f"{name} received hidden states of shape {tuple(states.shape)} and made queries of shape "
            f"{tuple(call.query.shape)} from them: expected ({batch_size}, {queries}, hidden_size), one state for "
            "each query. The learned weights cannot act on this model; load it with another attn_implementation."
        )
