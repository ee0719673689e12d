"""Attention under Hard Attention Masking without the score matrix, on CUDA: what is hit is a bit for each score.

FlexAttention is a fused kernel with a function of ours in it, which sees one score at a time. Which scores are hit is
therefore found first, by a kernel of its own, and left where that function can look it up: in a bit mask, 1/32 of the
size of a score matrix in float32. Ranking again in the backward pass could hit other scores where two almost tie.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from ..block_mask import block_mask


BITS_PER_WORD = 32
# Compiled functions that a model may need: self- and cross-attention, with and without masks or gradients, of lengths
# that stay and lengths that change. Beyond their number FlexAttention would raise.
COMPILED_FUNCTIONS = 64


def flex_hard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    drawn: Tensor,
    visible: Tensor | None = None,
    *,
    is_causal: bool = False,
    scaling: float | None = None,
    fill: str = "mask",
) -> Tensor:
    """[`hard_attention`] by FlexAttention, for CUDA devices: same arguments, same hits.

    Args:
        query: `(B, H, Q, D)` in float16, bfloat16 or float32, `D` from 16 to 128.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, Dv)`, `Dv` from 16 to 128. Queries and keys are taken in its dtype.
        drawn, visible, is_causal, scaling, fill: as in [`hard_attention`].

    Returns:
        `(B, Q, H, Dv)` in the dtype of the values. Zeros for queries that see no key. No gradient flows into a hit
        score, and there is no second derivative.

    Source: arXiv 2504.12088, Hard Attention Masking.
    """
    # Triton comes with the CUDA builds of torch, and the rest of this package does without.
    from .top_scores import top_score_indices

    # Under autocast, rotary embeddings may have made float32 of queries and keys.
    query, key = query.to(value.dtype), key.to(value.dtype)
    is_causal = is_causal and visible is None and query.shape[-2] > 1
    index = top_score_indices(query.detach(), key.detach(), drawn.shape[-1], visible, is_causal)
    hit = drawn & (index >= 0)
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    output = attend(
        query,
        key,
        value,
        score_mod=_fill_hits(pack_hits(index, hit, key.shape[-2]), fill),
        block_mask=block_mask(visible, is_causal, query.shape[-2], key.shape[-2], query.device),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"BACKEND": "TRITON"} | _tiles(value.dtype),
    )
    return output.transpose(1, 2).contiguous()


def pack_hits(index: Tensor, hit: Tensor, num_keys: int) -> Tensor:
    """Packs hits into words of 32 keys.

    Args:
        index: `(..., k)`, the candidates among the keys, each at most once.
        hit: boolean `(..., k)`, which of them are hit.
        num_keys: how many keys there are.

    Returns:
        int32 `(..., ceil(num_keys / 32))`: bit `j % 32` of word `j // 32` is set where key `j` is hit.

    Example:

    >>> pack_hits(torch.tensor([[0, 33, 2]]), torch.tensor([[True, True, False]]), num_keys=40)
    tensor([[1, 2]], dtype=torch.int32)
    """
    words = hit.new_zeros(*hit.shape[:-1], -(-num_keys // BITS_PER_WORD), dtype=torch.int32)
    index = index.clamp_min(0)
    bits = hit.to(torch.int32) << (index % BITS_PER_WORD).to(torch.int32)
    # No two hits of a row share a bit, so that a sum is as good as an "or", and no order of adding changes it.
    return words.scatter_add_(-1, (index // BITS_PER_WORD).long(), bits)


def _tiles(dtype: torch.dtype) -> dict[str, int]:
    """Tiles that leave room in shared memory for the words and masks which the kernels' pipelines fetch besides.

    FlexAttention's own choice does not: at head size 64 it takes 272 kB, and a Hopper GPU has 227. With these it takes
    76 kB at head size 128, and smaller GPUs have 99.
    """
    if dtype == torch.float32:
        # Its choice for the backward pass is small enough.
        return {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, "fwd_num_stages": 1, "fwd_num_warps": 4}
    forward = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 2, "fwd_num_warps": 4}
    keys, queries = {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64}, {"bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32}
    return forward | keys | queries | {"bwd_num_stages": 2, "bwd_num_warps": 4}


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    # Uncompiled it would hold all scores.
    return compile_for_many_calls(flex_attention, fullgraph=True)


def compile_for_many_calls(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """`torch.compile` with room for `COMPILED_FUNCTIONS` versions of the function."""
    if "recompile_limit" in torch.compile.__kwdefaults__:
        return torch.compile(function, recompile_limit=COMPILED_FUNCTIONS, **options)
    compiled = torch.compile(function, **options)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        # torch 2.11 has one limit for all functions.
        with torch._dynamo.config.patch(recompile_limit=COMPILED_FUNCTIONS):
            return compiled(*args, **kwargs)

    return run


def _fill_hits(words: Tensor, fill: str) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # The kernel counts in 32 bits, whatever the size of a tensor that it does not know.
        word = words[b.long(), h.long(), q.long(), k >> 5]  # k // 32 and k % 32 would take tens of instructions
        is_hit = (word >> (k & 31)) & 1 == 1
        # Not a number from outside, which the compiler might take for an argument.
        return torch.where(is_hit, -torch.inf if fill == "mask" else 0.0, score)

    return score_mod
