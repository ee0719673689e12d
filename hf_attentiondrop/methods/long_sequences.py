"""Conditions for computing attention without a score matrix: blockwise on CPU, by FlexAttention on CUDA."""

import math
from importlib.util import find_spec

import torch

from ..attention.call import Attend, AttentionCall, attend_if_any_key


# Scores per head up to which the full score matrix is as fast as blocks on the CPU.
FEW_SCORES = 256 * 256
# Scores per head up to which the full score matrix is used on devices where FlexAttention trains. At 512 x 512 a batch
# of 32 with 12 heads has 0.4 GB of them, and the dozens of small kernels around FlexAttention take as long as several
# passes over that. The matrix grows with the square of the length, and the kernels do not.
FLEX_ATTENTION_BEYOND = {"cuda": 512 * 512}
FLEX_ATTENTION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLEX_ATTENTION_SIZES = range(16, 129)
HAS_TRITON = find_spec("triton") is not None


def can_replace(attend: Attend, call: AttentionCall) -> bool:
    """Returns whether a kernel can replace `attend`.

    It can if `attend` contains no other method, and only a mask changes the scores.
    """
    is_plain = not call.wants_eager and call.zeroed is None and call.extras.get("position_bias") is None
    return attend is attend_if_any_key and is_plain


def prefers_blocks(call: AttentionCall) -> bool:
    """Returns whether blocks are faster than a score matrix. They do not support a gradient of the mask."""
    has_constant_mask = call.mask is None or not call.mask.requires_grad
    return call.query.device.type == "cpu" and _num_scores(call) > FEW_SCORES and has_constant_mask


def prefers_flex_attention(call: AttentionCall) -> bool:
    """Returns whether FlexAttention, which has no dropout of attention weights, can compute a call this long."""
    is_long = _num_scores(call) > FLEX_ATTENTION_BEYOND.get(call.query.device.type, math.inf)
    has_size = all(states.shape[-1] in FLEX_ATTENTION_SIZES for states in (call.query, call.value))
    is_boolean = call.mask is None or call.mask.dtype == torch.bool
    has_dtype = call.value.dtype in FLEX_ATTENTION_DTYPES
    return HAS_TRITON and is_long and has_size and is_boolean and has_dtype and call.dropout == 0


def _num_scores(call: AttentionCall) -> int:
    return call.query.shape[-2] * call.key.shape[-2]
