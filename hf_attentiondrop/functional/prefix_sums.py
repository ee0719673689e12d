"""Sums over the visible keys of each query, without a weight matrix.

The sums are a linear map of the values that only the mask determines. `PrefixSums` holds this map, made once per mask,
and applies it to values in the forward pass and its adjoint to gradients in the backward pass.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .scores import expand_heads
from .visibility import boolean_mask, once_per_mask, visible_keys


# Rows that one product with a triangular matrix of ones turns into prefix sums; sequences up to twice as long are a
# single chunk. With smaller chunks the sums over chunks would dominate.
CHUNK = 32


class _LinearMap(Protocol):
    """Sums over the keys, in newly allocated memory, and their adjoint, on `(B, heads, K, X)`. Under a mask that all
    heads share, heads may be part of `X`."""

    def sums(self, states: Tensor) -> Tensor: ...

    def adjoint(self, gradient: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PrefixSums:
    """Sums of values over the visible keys of each query, made by [`~PrefixSums.from_mask`].

    Args:
        lengths: number of visible keys of each query, float32 `(B|1, Q|1, H|1)`; infinite for fully masked rows, so
            that quotients by it vanish.
        linear_map: the map from values to sums.
    """

    lengths: Tensor
    linear_map: _LinearMap

    @classmethod
    def from_mask(
        cls,
        attention_mask: Tensor | None,
        *,
        is_causal: bool,
        query_length: int,
        key_length: int,
        device: torch.device,
    ) -> "PrefixSums":
        """Finds the cheapest map for a mask.

        If all queries see the same keys there is one sum, `O(K·D)`. Under causal, window and packed masks, padded or
        not, each query sees one interval of keys, so its sum is a difference of two prefix sums, also `O(K·D)`. Any
        other mask costs a matrix product with the mask, shared by heads as the mask is; so does every mask in a
        compiled graph, which cannot branch on its values.

        Args:
            attention_mask: as in [`~functional.visible_keys`].
            is_causal: whether a missing mask means causal.
            query_length: `Q`.
            key_length: `K`.
            device: device of index tensors.

        Source: the term `β·Σ_j v_j` of arXiv 2602.23057, over visible keys.

        Example:

        >>> device = torch.device("cpu")
        >>> sums = PrefixSums.from_mask(None, is_causal=True, query_length=3, key_length=3, device=device)
        >>> sums.total(torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1)).flatten(), sums.lengths.flatten()
        (tensor([1., 3., 9.]), tensor([1., 2., 3.]))
        """
        if attention_mask is None:
            if not is_causal or query_length == 1:
                lengths = torch.full((1, 1, 1), key_length, dtype=torch.float32, device=device)
                return cls(lengths, _AllKeys(key_length))
            if query_length == key_length:
                lengths = torch.arange(1, query_length + 1, dtype=torch.float32, device=device).view(1, -1, 1)
                return cls(lengths, _Intervals(_PrefixDifferences(), _PrefixDifferences(from_the_end=True)))
            attention_mask = visible_keys(
                None, is_causal=True, query_length=query_length, key_length=key_length, device=device
            )
        structured = None if torch.compiler.is_compiling() else _structured_sums(attention_mask)
        return structured or _product(boolean_mask(attention_mask))

    # Not `__call__`: before torch 2.13 Dynamo finds no fields in a frozen dataclass that is called.
    def total(self, value: Tensor) -> Tensor:
        """The sums, `(B, Q|1, Hkv, D)`, or `(B, Q|1, H, D)` with one mask per query head; arbitrary for fully masked
        rows."""
        value = value.to(self._precision(value.dtype))
        num_heads = self.lengths.shape[-1]
        if num_heads > 1:
            return self.linear_map.sums(expand_heads(value, num_heads)).transpose(1, 2)
        if value.is_contiguous() and not isinstance(self.linear_map, _MatrixProduct):
            return self.linear_map.sums(value).transpose(1, 2)
        # Heads that share a mask become components of the same rows, which is how models store them.
        sums = self.linear_map.sums(value.transpose(1, 2).flatten(2).unsqueeze(1))
        return sums.squeeze(1).unflatten(-1, (value.shape[1], -1))

    def adjoint(self, gradient: Tensor, value: Tensor) -> Tensor:
        """The gradient of the values, `(B, Hkv, K, D)`, from that of the sums, which must be zero for fully masked
        rows."""
        gradient, num_kv_heads = gradient.to(self._precision(value.dtype)), value.shape[1]
        if self.lengths.shape[-1] > 1:
            return self.linear_map.adjoint(gradient.transpose(1, 2)).unflatten(1, (num_kv_heads, -1)).sum(dim=2)
        states = self.linear_map.adjoint(gradient.flatten(2).unsqueeze(1))
        return states.squeeze(1).unflatten(-1, (num_kv_heads, -1)).transpose(1, 2)

    def _precision(self, dtype: torch.dtype) -> torch.dtype:
        # Matrix products accumulate in float32, so bfloat16 can hold their results; float16 could overflow.
        if isinstance(self.linear_map, _MatrixProduct) and dtype == torch.bfloat16:
            return dtype
        return torch.promote_types(dtype, torch.float32)


@once_per_mask
def _structured_sums(attention_mask: Tensor) -> PrefixSums | None:
    """The sums for a shared row or intervals, `None` for other masks. Holds no reference to the mask."""
    bits = boolean_mask(attention_mask).view(torch.uint8)
    count = bits.sum(dim=-1, keepdim=True, dtype=torch.int32)
    seen = bits.amax(dim=-2, keepdim=True)  # (B|1, H|1, 1, K)
    # Sums of fully masked rows are multiplied by zero, so any structure fits these rows.
    if ((count == 0) | (count == seen.sum(dim=-1, keepdim=True))).all():
        return PrefixSums(_lengths(count), _SharedRow(seen))
    forward, backward = _interval_sums(bits), _interval_sums(bits.mT, from_the_end=True)
    if forward is None or backward is None:
        return None
    return PrefixSums(_lengths(count), _Intervals(forward, backward, None if seen.all() else seen.mT == 0))


def _product(visible: Tensor) -> PrefixSums:
    count = visible.sum(dim=-1, keepdim=True, dtype=torch.int32)
    return PrefixSums(_lengths(count), _SharedRow(visible) if visible.shape[-2] == 1 else _MatrixProduct(visible))


def _lengths(count: Tensor) -> Tensor:
    return count.float().masked_fill(count == 0, torch.inf).squeeze(-1).transpose(1, 2)


@dataclass(frozen=True)
class _AllKeys:
    """All queries see all keys."""

    length: int

    def sums(self, states: Tensor) -> Tensor:
        return states.sum(dim=-2, keepdim=True)

    def adjoint(self, gradient: Tensor) -> Tensor:
        return gradient.expand(-1, -1, self.length, -1)


@dataclass(frozen=True)
class _SharedRow:
    """All queries see the same keys, `(B|1, H|1, 1, K)`, so there is one row of sums."""

    seen: Tensor

    def sums(self, states: Tensor) -> Tensor:
        return self.seen.to(states.dtype) @ states

    def adjoint(self, gradient: Tensor) -> Tensor:
        return self.seen.mT.to(gradient.dtype) * gradient


@dataclass(frozen=True)
class _MatrixProduct:
    """Any mask, `(B|1, H|1, Q, K)`."""

    visible: Tensor

    def sums(self, states: Tensor) -> Tensor:
        return self.visible.to(states.dtype) @ states

    def adjoint(self, gradient: Tensor) -> Tensor:
        return self.visible.mT.to(gradient.dtype) @ gradient


@dataclass(frozen=True)
class _PrefixDifferences:
    """Sums over one interval per row, as differences of prefix sums, which start at the first state or the last.

    Args:
        end: last state of each row's interval in the direction of the sums, `(B|1, H|1, rows)`; `None` if it is the
            row itself, or only zeros lie between them.
        before: last state before the interval, `(B|1, H|1, rows)`; `None` if every interval begins where the sums do.
        has_before: whether there is such a state, `(B|1, H|1, rows)`.
        from_the_end: whether the sums start at the last state.
    """

    end: Tensor | None = None
    before: Tensor | None = None
    has_before: Tensor | None = None
    from_the_end: bool = False

    def sums(self, states: Tensor) -> Tensor:
        prefix_sums = _prefix_sums(states, self.from_the_end)
        sums = prefix_sums if self.end is None else _rows(prefix_sums, self.end)
        if self.before is None or self.has_before is None:
            return sums
        return sums.addcmul_(_rows(prefix_sums, self.before), self.has_before.unsqueeze(-1).to(sums.dtype), value=-1)


@dataclass(frozen=True)
class _Intervals:
    """Each query sees one interval of keys, and each key is seen by one interval of queries, unseen ones left out."""

    forward: _PrefixDifferences
    backward: _PrefixDifferences
    unseen: Tensor | None = None  # (B|1, H|1, K, 1), true for keys that no query sees

    def sums(self, states: Tensor) -> Tensor:
        return self.forward.sums(states if self.unseen is None else states.masked_fill(self.unseen, 0.0))

    def adjoint(self, gradient: Tensor) -> Tensor:
        of_states = self.backward.sums(gradient)
        return of_states if self.unseen is None else of_states.masked_fill_(self.unseen, 0.0)


def _interval_sums(bits: Tensor, from_the_end: bool = False) -> _PrefixDifferences | None:
    """The sums over the ones of each row, `(B|1, H|1, rows, N)`, or `None` if the ones of any row are not an interval.

    Columns without a one (padding, at any position) hold zeros, so they do not interrupt an interval.
    """
    if from_the_end:
        bits = bits.flip(-1, -2)
    rows, length = bits.shape[-2:]
    count = bits.sum(dim=-1, dtype=torch.int32)
    first = bits.max(dim=-1).indices  # The first of equal values.
    end = length - bits.flip(-1).max(dim=-1).indices
    rank = F.pad(bits.amax(dim=-2).cumsum(dim=-1), (1, 0))
    rank_before, rank_end = rank.gather(-1, first), rank.gather(-1, end)
    empty = count == 0
    if not (empty | (rank_end - rank_before == count)).all():
        return None
    ends_at_itself = rows == length and bool((empty | (rank_end == rank[..., 1:])).all())
    starts_at_the_start = bool((empty | (rank_before == 0)).all())
    last, before, has_before = end - 1, (first - 1).clamp_min(0), first > 0
    if from_the_end:
        last, before, has_before = length - 1 - last.flip(-1), length - 1 - before.flip(-1), has_before.flip(-1)
    last = None if ends_at_itself else last
    if starts_at_the_start:
        before = has_before = None
    return _PrefixDifferences(last, before, has_before, from_the_end)


def _prefix_sums(states: Tensor, from_the_end: bool) -> Tensor:
    """Prefix sums over the rows of `(B, H, N, X)`, chunk by chunk: `cumsum` accesses memory in strides, and in half
    precision its error would reach the size of the values after a few thousand rows."""
    length = states.shape[-2]
    size = length if length <= 2 * CHUNK else CHUNK
    if length % size:
        states = F.pad(states, (0, 0, 0, -length % size))
    chunks = states.unflatten(-2, (-1, size))
    ones = torch.ones(size, size, dtype=states.dtype, device=states.device).tril()
    if from_the_end:
        ones = ones.mT
    sums = ones @ chunks
    if length == size:
        return sums.squeeze(-3)
    if from_the_end:
        sums[..., :-1, :, :] += sums[..., 1:, :1, :].flip(-3).cumsum(dim=-3).flip(-3)
    else:
        sums[..., 1:, :, :] += sums[..., :-1, -1:, :].cumsum(dim=-3)
    return sums.flatten(-3, -2)[..., :length, :]


def _rows(states: Tensor, index: Tensor) -> Tensor:
    """Rows of `(B, H, N, X)` by index `(B|1, H|1, rows)`. `gather` would need one index per component."""
    batch_size, num_heads, length, _ = states.shape
    start = torch.arange(0, batch_size * num_heads * length, length, device=index.device)
    index = index.expand(batch_size, num_heads, -1) + start.view(batch_size, num_heads, 1)
    return states.flatten(0, 2).index_select(0, index.flatten()).unflatten(0, index.shape)
