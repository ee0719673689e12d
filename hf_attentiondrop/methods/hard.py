"""Hard Attention Masking (arXiv 2504.12088, variant 1) of one attention call: the ways to attend under hits.

Long sequences are spared the score matrix: a processor attends block by block, and CUDA by FlexAttention. Everywhere
else a score matrix says what is hit, and the base attention does the rest under a mask, so that everything which it
honours (bias, softcap, sinks, dropout) holds too. `fill="zero"`, which no mask can express, then takes a softmax of
its own.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
from torch.nn import functional as F

from ..attention.call import AttentionCall, attend_if_any_key
from ..functional import (
    draw_hits,
    draw_ranks,
    expand_heads,
    flex_hard_attention,
    hard_attention,
    mask_top_scores,
    num_candidates,
    num_visible_keys,
)
from .configuration import AttentionDropConfig
from .sites import SDPA


# Scores of one head up to which a processor is as fast with the whole score matrix as with blocks of it.
FEW_SCORES = 256 * 256
# Scores of one head up to which the score matrix does, on devices where FlexAttention trains. At 512 x 512 a batch of
# 32 with 12 heads has 0.4 GB of them, and the dozens of small kernels around FlexAttention cost as much time as some
# passes over that. It grows with the square of the length, and they do not.
FLEX_ATTENTION_BEYOND = {"cuda": 512 * 512}
FLEX_ATTENTION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLEX_ATTENTION_SIZES = range(16, 129)
# Candidates of a row that the kernel which finds them can keep in registers.
FLEX_ATTENTION_CANDIDATES = 64
HAS_TRITON = find_spec("triton") is not None


def attend_hard(call: AttentionCall, drop: AttentionDropConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The base attention with some of each query's highest scores hit."""
    attend = _attention_without_score_matrix(call, drop)
    if attend is None:
        return _zero_filled_attention(call, drop) if drop.fill == "zero" else _masked_attention(call, drop)
    shape = *call.query.shape[:-1], call.key.shape[-2]
    num_visible = num_visible_keys(call.mask, is_causal=call.causal, **call.lengths)
    drawn = draw_ranks(shape, num_visible, p=call.strength, k=drop.k, fill=drop.fill, device=call.query.device)
    states = (call.query, call.key, call.value)
    options = {"is_causal": call.causal, "scaling": call.scaling, "fill": drop.fill}
    return attend(*states, drawn, call.mask, **options), None


def _attention_without_score_matrix(
    call: AttentionCall, drop: AttentionDropConfig
) -> Callable[..., torch.Tensor] | None:
    """What attends without a score matrix, where that is better and nothing but a mask shapes the scores."""
    if call.wants_eager or call.sink is not None or call.extras.get("position_bias") is not None:
        return None
    num_scores = call.query.shape[-2] * call.key.shape[-2]
    device, has_constant_mask = call.query.device.type, call.mask is None or not call.mask.requires_grad
    if device == "cpu" and num_scores > FEW_SCORES and has_constant_mask:
        return partial(hard_attention, dropout=call.dropout)
    if num_scores > FLEX_ATTENTION_BEYOND.get(device, math.inf) and _flex_attention_can(call, drop):
        return flex_hard_attention
    return None


def _flex_attention_can(call: AttentionCall, drop: AttentionDropConfig) -> bool:
    """Whether FlexAttention, which has no dropout of attention weights, can do it."""
    has_size = all(states.shape[-1] in FLEX_ATTENTION_SIZES for states in (call.query, call.value))
    is_boolean = call.mask is None or call.mask.dtype == torch.bool
    has_room = num_candidates(drop.k, call.key.shape[-2]) <= FLEX_ATTENTION_CANDIDATES
    has_dtype = call.value.dtype in FLEX_ATTENTION_DTYPES
    return HAS_TRITON and has_size and is_boolean and has_dtype and has_room and call.dropout == 0


def _masked_attention(call: AttentionCall, drop: AttentionDropConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    visible = call.visible
    with torch.no_grad():
        kept = ~draw_hits(call.scores(), visible, p=call.strength, k=drop.k, fill=drop.fill)
    if visible is not None:
        kept &= visible
    is_additive = call.mask is not None and call.mask.dtype != torch.bool
    mask = call.mask.masked_fill(~kept, -torch.inf) if is_additive else kept
    # A mask for every query is nothing that another kernel than SDPA would take.
    return attend_if_any_key(replace(call, mask=mask, base=SDPA))


def _zero_filled_attention(call: AttentionCall, drop: AttentionDropConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hard with hit scores at 0: they stay in the softmax, as constants, which takes a softmax of our own."""
    visible = call.visible
    scores = mask_top_scores(call.scores(), visible, p=call.strength, k=drop.k, fill="zero")
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
