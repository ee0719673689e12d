"""Hard Attention Masking without the score matrix, on CUDA.

A Triton kernel finds the highest scores of each query first, and FlexAttention looks up in a bit mask which of them
are masked. Ranking again in the backward pass could mask other scores where two almost tie.
"""

import torch
from torch import Tensor

from ..bit_mask import BITS_PER_WORD, attend_with_bit_mask, num_words


def flex_hard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masked_ranks: Tensor,
    visible: Tensor | None = None,
    *,
    is_causal: bool = False,
    scaling: float | None = None,
    fill: str = "mask",
) -> Tensor:
    """[`hard_attention`] by FlexAttention, for CUDA devices: same arguments, same masked scores.

    Args:
        query: `(B, H, Q, D)` in float16, bfloat16 or float32, `D` from 16 to 128.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, Dv)`, `Dv` from 16 to 128. Queries and keys are cast to its dtype.
        masked_ranks, visible, is_causal, scaling, fill: as in [`hard_attention`].

    Returns:
        `(B, Q, H, Dv)` in the dtype of the values. Zeros for fully masked rows. No gradient flows into a masked
        score, and there is no second derivative.

    Source: arXiv 2504.12088, Hard Attention Masking.
    """
    # Triton comes with the CUDA builds of torch only, and the rest of this package does not need it.
    from .top_scores import top_score_indices

    # Under autocast, rotary embeddings may have cast queries and keys to float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    is_causal = is_causal and visible is None and query.shape[-2] > 1
    index = top_score_indices(query.detach(), key.detach(), masked_ranks.shape[-1], visible, is_causal)
    words = pack_masked_keys(index, masked_ranks & (index >= 0), key.shape[-2])
    return attend_with_bit_mask(query, key, value, words, visible, is_causal=is_causal, scaling=scaling, fill=fill)


def pack_masked_keys(index: Tensor, is_masked: Tensor, num_keys: int) -> Tensor:
    """Packs masked keys into words of 32 keys.

    Args:
        index: `(..., k)`, key indices, each at most once.
        is_masked: boolean `(..., k)`, which of them are masked.
        num_keys: `K`.

    Returns:
        int32 `(..., ceil(K / 32))`: bit `j % 32` of word `j // 32` is set where key `j` is masked.

    Example:

    >>> pack_masked_keys(torch.tensor([[0, 33, 2]]), torch.tensor([[True, True, False]]), num_keys=40)
    tensor([[1, 2]], dtype=torch.int32)
    """
    words = is_masked.new_zeros(*is_masked.shape[:-1], num_words(num_keys), dtype=torch.int32)
    index = index.clamp_min(0)
    bits = is_masked.to(torch.int32) << (index % BITS_PER_WORD).to(torch.int32)
    # No two masked keys of a row share a bit, so the sum equals the bitwise or, in any order.
    return words.scatter_add_(-1, (index // BITS_PER_WORD).long(), bits)
