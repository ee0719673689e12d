"""Blurred Attention Smoothing (arXiv 2504.12088, variant 2) of one attention call."""

import copy
from dataclasses import replace

import torch

from .base import AttentionCall, attend_if_any_key
from .configuration import AttentionDropConfig
from .functional import blur_keys, expand_heads, visible_neighbours


def attend_blurred(call: AttentionCall, drop: AttentionDropConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The base attention on blurred keys: everything that it honours holds for the blurred attention too.

    Raises:
        ValueError: if the model caps its scores.
    """
    if call.extras.get("softcap") is not None:
        raise ValueError(
            f"AttentionDrop's blur cannot act on {type(call.module).__name__}, which caps its scores (softcap="
            f"{call.extras['softcap']}): blurring the keys no longer blurs the scores once tanh stands between "
            'them. Use variant="hard", or set the softcap of the model config to None.'
        )
    neighbours = visible_neighbours(
        call.mask,
        width=drop.width,
        is_causal=call.causal,
        is_cross=call.module.attention_drop_site.kind == "cross",
        **call.lengths,
    )
    dtype = torch.promote_types(call.key.dtype, torch.float32)
    sigma = call.strength * torch.rand(call.key.shape[0], dtype=dtype, device=call.key.device)
    key = blur_keys(call.key, sigma, neighbours)
    if key.shape[1] == call.key.shape[1]:
        return attend_if_any_key(replace(call, key=key))
    # One mask per query head took one key per query head: the base attention must not repeat them once more.
    ungrouped = copy.copy(call.module)
    ungrouped.num_key_value_groups = 1
    value = expand_heads(call.value, key.shape[1])
    return attend_if_any_key(replace(call, module=ungrouped, key=key, value=value))
