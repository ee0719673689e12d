"""DropKey with one draw per score without the score matrix, on CUDA: FlexAttention under a random bit mask."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..bit_mask import BITS_PER_WORD, attend_with_bit_mask, compiled, num_words
from ..visibility import num_visible_keys, once_per_mask


def flex_dropkey_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    *,
    p: float | Tensor,
    is_causal: bool = False,
    scaling: float | None = None,
) -> Tensor:
    """[`dropkey_attention`] by FlexAttention, for CUDA devices, without dropout of weights.

    Args:
        query: `(B, H, Q, D)` in float16, bfloat16 or float32, `D` from 16 to 128.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, Dv)`, `Dv` from 16 to 128. Queries and keys are cast to its dtype.
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all.
        p, is_causal, scaling: as in [`dropkey_attention`].

    Returns:
        `(B, Q, H, Dv)` in the dtype of the values. Rows keep a key as in [`dropkey_attention`], and fully masked rows
        give zeros. No gradient flows into a masked score, and there is no second derivative.

    Source: DropKey (CVPR 2023).
    """
    # Under autocast, rotary embeddings may have cast queries and keys to float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    is_causal = is_causal and visible is None and query.shape[-2] > 1
    shape = torch.Size([*query.shape[:-1], key.shape[-2]])
    words = sample_dropped_bits(shape, visible, p=p, is_causal=is_causal, device=query.device)
    return attend_with_bit_mask(query, key, value, words, visible, is_causal=is_causal, scaling=scaling, fill="mask")


@torch.no_grad()
def sample_dropped_bits(
    shape: torch.Size,
    visible: Tensor | None = None,
    *,
    p: float | Tensor,
    is_causal: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Samples dropped keys as bits, without a score matrix.

    Args:
        shape: shape of the scores, `(B, H, Q, K)`.
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all.
        p: drop probability in [0, 1], rounded to multiples of 2^-16; a number or a tensor `()`, or `(H, 1, 1)` for
            one per head.
        is_causal: without `visible`, query `i` sees keys `0..i`.
        device: device of the result.

    Returns:
        int32 `(B, H, Q, ceil(K / 32))`: bit `j % 32` of word `j // 32` is set where key `j` is dropped. A row that
        would lose all its visible keys keeps one of them, drawn uniformly. Bits of masked keys are arbitrary.
    """
    *rows, num_keys = shape
    if visible is None:
        lengths = {"query_length": rows[-1], "key_length": num_keys, "device": device}
        num_visible = num_visible_keys(None, is_causal=is_causal, **lengths)
        num_visible = torch.full((1, 1, 1, 1), num_keys, device=device) if num_visible is None else num_visible
        start = torch.arange(0, num_keys, BITS_PER_WORD, device=device)
        visible_words = ((1 << (num_visible - start).clamp(0, BITS_PER_WORD)) - 1).to(torch.int32)
        counts = torch.minimum(num_visible, start + BITS_PER_WORD)
    else:
        visible_words, counts = _pack(visible)
    threshold = torch.as_tensor(p, dtype=torch.float64, device=device).mul(2**16).round().to(torch.int32)
    dropped = compiled(_bernoulli_words)([*rows, num_words(num_keys)], threshold)
    loses_all = (~dropped & visible_words == 0).all(dim=-1, keepdim=True)
    rank = (torch.rand(*rows, 1, dtype=torch.float32, device=device) * counts[..., -1:]).long()
    kept = _key_of_rank(rank, visible_words, counts)
    is_word = torch.arange(num_words(num_keys), device=device) == kept // BITS_PER_WORD
    kept_bit = (1 << (kept % BITS_PER_WORD)).to(torch.int32) * is_word
    return torch.where(loses_all, dropped & ~kept_bit, dropped)


@once_per_mask
def _pack(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Visible keys as bits, and how many keys are visible up to each word, `(B|1, H|1, Q|1, words)`."""
    bits = F.pad(visible, (0, -visible.shape[-1] % BITS_PER_WORD)).view(torch.uint8)
    octets = bits.unflatten(-1, (-1, 8))
    words = sum(octets[..., bit] << bit for bit in range(8)).contiguous().view(torch.int32)
    return words, bits.unflatten(-1, (-1, BITS_PER_WORD)).sum(dim=-1).cumsum(dim=-1)


def _bernoulli_words(shape: list[int], threshold: Tensor) -> Tensor:
    """int32 words whose bits are set with probability `threshold / 2**16`.

    Each binary digit of the probability, from the lowest up, halves the rate so far: a random half of the bits is
    replaced by the digit.
    """
    words = torch.zeros(shape, dtype=torch.int32, device=threshold.device)
    for place in range(16):
        digit = -(threshold >> place & 1)  # All bits of the word.
        words = digit ^ (torch.randint_like(words, -(2**31), 2**31) & (words ^ digit))
    return torch.where(threshold == 2**16, -1, words)


def _key_of_rank(rank: Tensor, visible_words: Tensor, counts: Tensor) -> Tensor:
    """The visible key of each rank `(B, H, Q, 1)`, counted from zero."""
    word = (counts <= rank).sum(dim=-1, keepdim=True).clamp_max(counts.shape[-1] - 1)
    before = F.pad(counts, (1, 0))
    found, before = (states.expand(*rank.shape[:-1], -1).gather(-1, word) for states in (visible_words, before))
    bits = found >> torch.arange(BITS_PER_WORD, device=rank.device) & 1
    bit = (bits.cumsum(dim=-1) <= rank - before).sum(dim=-1, keepdim=True).clamp_max(BITS_PER_WORD - 1)
    return word * BITS_PER_WORD + bit
