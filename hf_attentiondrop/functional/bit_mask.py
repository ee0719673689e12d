"""FlexAttention under a bit mask of scores, on CUDA, without a score matrix.

FlexAttention fuses a function of single scores into its kernel. This one looks up whether a score is masked in one
bit per score, which takes 1/32 of the memory of a float32 score matrix.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from .block_mask import block_mask


BITS_PER_WORD = 32
# Compiled variants that a model may need: self- and cross-attention, with and without masks or gradients, static and
# dynamic lengths. Beyond this limit FlexAttention would raise.
COMPILED_FUNCTIONS = 64


def attend_with_bit_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    words: Tensor,
    visible: Tensor | None,
    *,
    is_causal: bool,
    scaling: float | None,
    fill: str,
) -> Tensor:
    """Attention in which the scores with a set bit are replaced by the fill.

    Args:
        query: `(B, H, Q, D)` in float16, bfloat16 or float32, `D` from 16 to 128.
        key: `(B, Hkv, K, D)` in the same dtype.
        value: `(B, Hkv, K, Dv)` in the same dtype, `Dv` from 16 to 128.
        words: int32 `(B, H, Q, ceil(K / 32))`: bit `j % 32` of word `j // 32` is set where key `j` is masked.
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all.
        is_causal: whether query `i` sees only keys `0..i`, if `visible` is `None`.
        scaling: factor of the scores; `D ** -0.5` by default.
        fill: `"mask"` masks a score with a set bit, `"zero"` replaces it by 0.

    Returns:
        `(B, Q, H, Dv)` in the dtype of the values, zeros for fully masked rows.
    """
    # Without compilation FlexAttention materializes all scores.
    output = compiled(flex_attention)(
        query,
        key,
        value,
        score_mod=_fill_scores(words, fill),
        block_mask=block_mask(visible, is_causal, query.shape[-2], key.shape[-2], query.device),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"BACKEND": "TRITON"} | _tiles(value.dtype),
    )
    return output.transpose(1, 2).contiguous()


def num_words(num_keys: int) -> int:
    """Number of words that hold one bit per key."""
    return -(-num_keys // BITS_PER_WORD)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function compiled once per process, or itself inside of a compiled graph."""
    return function if torch.compiler.is_compiling() else _compile(function)


@functools.cache
def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return compile_for_many_calls(function, fullgraph=True)


def compile_for_many_calls(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """`torch.compile` with a limit of `COMPILED_FUNCTIONS` variants of the function."""
    if "recompile_limit" in torch.compile.__kwdefaults__:
        return torch.compile(function, recompile_limit=COMPILED_FUNCTIONS, **options)
    compiled = torch.compile(function, **options)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        # torch 2.11 has only a global limit.
        with torch._dynamo.config.patch(recompile_limit=COMPILED_FUNCTIONS):
            return compiled(*args, **kwargs)

    return run


def _fill_scores(words: Tensor, fill: str) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # The kernel indexes in 32 bits if it does not know the size of a tensor.
        word = words[b.long(), h.long(), q.long(), k >> 5]  # k // 32 and k % 32 would take tens of instructions
        is_masked = (word >> (k & 31)) & 1 == 1
        # A literal: the compiler could turn a captured number into an argument.
        return torch.where(is_masked, -torch.inf if fill == "mask" else 0.0, score)

    return score_mod


def _tiles(dtype: torch.dtype) -> dict[str, int]:
    """Tiles that leave room in shared memory for the words and masks that the kernels' pipelines prefetch.

    FlexAttention's defaults do not: at head size 64 they take 272 kB, and a Hopper GPU has 227 kB. These take 76 kB
    at head size 128, and smaller GPUs have 99 kB.
    """
    if dtype == torch.float32:
        # The defaults of the backward pass are small enough.
        return {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, "fwd_num_stages": 1, "fwd_num_warps": 4}
    forward = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 2, "fwd_num_warps": 4}
    keys, queries = {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64}, {"bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32}
    return forward | keys | queries | {"bwd_num_stages": 2, "bwd_num_warps": 4}
