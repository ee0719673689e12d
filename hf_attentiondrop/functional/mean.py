"""The mean of the values that a query sees, without a weight matrix."""

import torch
from torch.nn import functional as F

from .scores import expand_heads
from .visibility import visible_keys


def visible_mean(
    value: torch.Tensor, attention_mask: torch.Tensor | None, *, is_causal: bool, query_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform attention: for every query the mean of its visible values, and how many there are.

    Padding, causal, window and packed masks show each query one interval of keys, so that its sum is a difference of
    two cumulative sums, `O(K·D)`. Any other mask costs a product with the mask, shared by heads as the mask is. With
    one row for all queries, as in decoding, it is one pass over the values. A compiled graph, which cannot look at a
    mask, always takes the product.

    Args:
        value: `(B, Hkv, K, D)`.
        attention_mask: as in [`~functional.visible_keys`].
        is_causal: whether a missing mask means causal.
        query_length: `Q`.

    Returns:
        The means, `(B, Hkv, Q|1, D)`, or `(B, H, Q|1, D)` with one mask for each query head, in float32 (float64 for
        float64 values); zero for a query that sees nothing. And the counts, integers `(B|1, H|1, Q|1, 1)`.

    Source: the term `β·Σ_j v_j` of arXiv 2602.23057, over visible keys.

    Example:

    >>> value = torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1)
    >>> mean, count = visible_mean(value, None, is_causal=True, query_length=3)
    >>> mean.flatten(), count.flatten()
    (tensor([1.0000, 1.5000, 3.0000]), tensor([1, 2, 3]))
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    length = value.shape[-2]
    if attention_mask is None:
        if not is_causal or query_length == 1:
            count = torch.full((1, 1, 1, 1), length, device=value.device)
            return value.mean(dim=-2, keepdim=True, dtype=dtype), count
        count = torch.arange(1, query_length + 1, device=value.device).clamp_max(length).view(1, 1, -1, 1)
        return value.cumsum(dim=-2, dtype=dtype)[..., count.flatten() - 1, :] / count, count

    visible = visible_keys(
        attention_mask, is_causal=is_causal, query_length=query_length, key_length=length, device=value.device
    )
    if visible.shape[1] > value.shape[1]:
        value = expand_heads(value, visible.shape[1])
    bits = visible.to(torch.uint8)
    count = bits.sum(dim=-1, keepdim=True, dtype=torch.int32)
    if visible.shape[-2] == 1:
        total = value.masked_fill(~visible.mT, 0.0).sum(dim=-2, keepdim=True, dtype=dtype)
        return total / count.clamp_min(1), count

    if torch.compiler.is_compiling():
        return _mean_of_anything(value, visible, count), count  # A graph cannot choose by what a mask holds.
    seen = bits.amax(dim=-2, keepdim=True)  # (B|1, H|1, 1, K)
    first, end, are_intervals = _intervals(bits, count, seen)
    if not are_intervals:
        return _mean_of_anything(value, visible, count), count
    # A running sum in half precision is off by its own size after a few thousand tokens.
    sums = F.pad(value.masked_fill(seen.mT == 0, 0.0).cumsum(dim=-2, dtype=dtype), (0, 0, 1, 0))
    size = (*value.shape[:2], query_length, value.shape[-1])
    total = sums.gather(-2, end.expand(size)) - sums.gather(-2, first.expand(size))
    return total / count.clamp_min(1), count


def _intervals(
    bits: torch.Tensor, count: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First visible key and the one behind the last, `(B|1, H|1, Q, 1)` each, and whether all between are visible."""
    first = bits.max(dim=-1, keepdim=True).indices  # The first of several.
    end = bits.shape[-1] - bits.flip(-1).max(dim=-1, keepdim=True).indices
    end = torch.where(count > 0, end, first)
    # Keys that nobody sees (padding, wherever it stands) are worth zero, and so do not interrupt an interval.
    rank = F.pad(seen.cumsum(dim=-1), (1, 0)).expand(*bits.shape[:-1], -1)
    return first, end, (rank.gather(-1, end) - rank.gather(-1, first) == count).all()


def _mean_of_anything(value: torch.Tensor, visible: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(value.dtype, torch.float32)
    weights = (visible.to(dtype) / count.clamp_min(1)).to(value.dtype)
    return torch.einsum("bhqk,bhkd->bhqd", weights, value).to(dtype)
