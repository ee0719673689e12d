"""Blurred Attention Smoothing (arXiv 2504.12088, variant 2) of one attention call."""

import copy
from dataclasses import replace

import torch

from ..attention.call import AttentionCall, attend_if_any_key
from ..functional import blur_keys, expand_heads, visible_neighbours
from .configuration import AttentionDropConfig
from .sites import capped_blur


def attend_blurred(call: AttentionCall, drop: AttentionDropConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The base attention on blurred keys: everything that it honours holds for the blurred attention too.

    Raises:
        ValueError: if the model caps its scores.
    """
    if call.extras.get("softcap") is not None:
        raise capped_blur(type(call.module).__name__, call.extras["softcap"])
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
