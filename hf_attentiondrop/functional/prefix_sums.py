"""The sums of the values that each query sees, without a weight matrix.

They are a linear map of the values, which the mask alone decides: `VisibleSums` holds what there is to know of it,
found once for each mask, and applies it forward, to values, and backward, to the gradients of the sums.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .scores import expand_heads
from .visibility import once_per_mask, shown_keys, visible_keys


# Keys of which one product with a triangle of ones makes running sums: shorter, and the sums over chunks take over.
# Up to twice as many are one chunk.
CHUNK = 32


class _Map(Protocol):
    """Sums over the keys, in memory of their own, and their adjoint, on `(B, heads, K, X)`; under a shared mask, heads
    may be part of `X`."""

    def sums(self, states: Tensor) -> Tensor: ...

    def adjoint(self, gradient: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class VisibleSums:
    """What each query sums, made by [`visible_sums`].

    Args:
        lengths: how many keys each query sees, float32 `(B|1, Q|1, H|1)`; infinite for those that see none, so that
            what is divided by it vanishes.
        rule: the map that makes the sums.
    """

    lengths: Tensor
    rule: _Map

    # Under a name of its own: Dynamo before torch 2.13 finds no fields in a frozen dataclass that is called.
    def total(self, value: Tensor) -> Tensor:
        """The sums, `(B, Q|1, Hkv, D)`, or `(B, Q|1, H, D)` with one mask for each query head.

        Anything for a query that sees nothing.
        """
        value = value.to(self._precision(value.dtype))
        num_heads = self.lengths.shape[-1]
        if num_heads > 1:
            return self.rule.sums(expand_heads(value, num_heads)).transpose(1, 2)
        if value.is_contiguous() and not isinstance(self.rule, _Product):
            return self.rule.sums(value).transpose(1, 2)
        # Where all heads see the same, they are more components of the same rows: the way models hold them in memory.
        sums = self.rule.sums(value.transpose(1, 2).flatten(2).unsqueeze(1))
        return sums.squeeze(1).unflatten(-1, (value.shape[1], -1))

    def adjoint(self, gradient: Tensor, value: Tensor) -> Tensor:
        """The gradient of the values, `(B, Hkv, K, D)`, from that of the sums, zero for queries that see nothing."""
        gradient, num_kv_heads = gradient.to(self._precision(value.dtype)), value.shape[1]
        if self.lengths.shape[-1] > 1:
            return self.rule.adjoint(gradient.transpose(1, 2)).unflatten(1, (num_kv_heads, -1)).sum(dim=2)
        states = self.rule.adjoint(gradient.flatten(2).unsqueeze(1))
        return states.squeeze(1).unflatten(-1, (num_kv_heads, -1)).transpose(1, 2)

    def _precision(self, dtype: torch.dtype) -> torch.dtype:
        # Products are summed in float32 inside, and bfloat16 holds the results. In float16 they might overflow.
        if isinstance(self.rule, _Product) and dtype == torch.bfloat16:
            return dtype
        return torch.promote_types(dtype, torch.float32)


def visible_sums(
    attention_mask: Tensor | None, *, is_causal: bool, query_length: int, key_length: int, device: torch.device
) -> VisibleSums:
    """How to sum, for every query, the values that it sees.

    Where all queries see the same keys there is one sum, `O(K·D)`. Causal, window and packed masks, padded or not,
    show each query one interval of keys, so that its sum is a difference of two running sums, `O(K·D)` too. Any other
    mask costs a product with the mask, shared by heads as the mask is; and so does every mask in a compiled graph,
    which cannot choose by what a mask holds.

    Args:
        attention_mask: as in [`~functional.visible_keys`].
        is_causal: whether a missing mask means causal.
        query_length: `Q`.
        key_length: `K`.
        device: where index tensors are made.

    Returns:
        The map from values to their sums, and how many there are.

    Source: the term `β·Σ_j v_j` of arXiv 2602.23057, over visible keys.

    Example:

    >>> sums = visible_sums(None, is_causal=True, query_length=3, key_length=3, device=torch.device("cpu"))
    >>> sums.total(torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1)).flatten(), sums.lengths.flatten()
    (tensor([1., 3., 9.]), tensor([1., 2., 3.]))
    """
    if attention_mask is None:
        if not is_causal or query_length == 1:
            lengths = torch.full((1, 1, 1), key_length, dtype=torch.float32, device=device)
            return VisibleSums(lengths, _Everything(key_length))
        if query_length == key_length:
            lengths = torch.arange(1, query_length + 1, dtype=torch.float32, device=device).view(1, -1, 1)
            return VisibleSums(lengths, _Intervals(_Runs(), _Runs(from_the_end=True)))
        attention_mask = visible_keys(
            None, is_causal=True, query_length=query_length, key_length=key_length, device=device
        )
    found = None if torch.compiler.is_compiling() else _look_at(attention_mask)
    return found or _product(shown_keys(attention_mask))


@once_per_mask
def _look_at(attention_mask: Tensor) -> VisibleSums | None:
    """What a mask allows short of a product, if it does. Keeps nothing that would keep the mask itself alive."""
    bits = shown_keys(attention_mask).view(torch.uint8)
    count = bits.sum(dim=-1, keepdim=True, dtype=torch.int32)
    seen = bits.amax(dim=-2, keepdim=True)  # (B|1, H|1, 1, K)
    # A query that sees nothing weighs its sum with zero, and so fits in everywhere.
    if ((count == 0) | (count == seen.sum(dim=-1, keepdim=True))).all():
        return VisibleSums(_lengths(count), _OneForAll(seen))
    forward, backward = _runs(bits), _runs(bits.mT, from_the_end=True)
    if forward is None or backward is None:
        return None
    return VisibleSums(_lengths(count), _Intervals(forward, backward, None if seen.all() else seen.mT == 0))


def _product(visible: Tensor) -> VisibleSums:
    count = visible.sum(dim=-1, keepdim=True, dtype=torch.int32)
    return VisibleSums(_lengths(count), _OneForAll(visible) if visible.shape[-2] == 1 else _Product(visible))


def _lengths(count: Tensor) -> Tensor:
    return count.float().masked_fill(count == 0, torch.inf).squeeze(-1).transpose(1, 2)


@dataclass(frozen=True)
class _Everything:
    """All queries see all keys."""

    length: int

    def sums(self, states: Tensor) -> Tensor:
        return states.sum(dim=-2, keepdim=True)

    def adjoint(self, gradient: Tensor) -> Tensor:
        return gradient.expand(-1, -1, self.length, -1)


@dataclass(frozen=True)
class _OneForAll:
    """All queries see the same keys, `(B|1, H|1, 1, K)`: there is one row of sums."""

    seen: Tensor

    def sums(self, states: Tensor) -> Tensor:
        return self.seen.to(states.dtype) @ states

    def adjoint(self, gradient: Tensor) -> Tensor:
        return self.seen.mT.to(gradient.dtype) * gradient


@dataclass(frozen=True)
class _Product:
    """Anything, `(B|1, H|1, Q, K)`."""

    visible: Tensor

    def sums(self, states: Tensor) -> Tensor:
        return self.visible.to(states.dtype) @ states

    def adjoint(self, gradient: Tensor) -> Tensor:
        return self.visible.mT.to(gradient.dtype) @ gradient


@dataclass(frozen=True)
class _Runs:
    """Sums over an interval for each row, as differences of running sums, which start at the first state or the last.

    Args:
        near: the state at which each row's interval ends, in the direction of the sums, `(B|1, H|1, rows)`; `None`
            where it ends at the row itself, or nothing lies between them.
        beyond: the last state that the sums reach before the interval, `(B|1, H|1, rows)`; `None` where they reach
            none for any row.
        is_beyond: whether there is one, `(B|1, H|1, rows)`.
        from_the_end: whether the sums start at the last state.
    """

    near: Tensor | None = None
    beyond: Tensor | None = None
    is_beyond: Tensor | None = None
    from_the_end: bool = False

    def sums(self, states: Tensor) -> Tensor:
        running = _running_sums(states, self.from_the_end)
        sums = running if self.near is None else _rows(running, self.near)
        if self.beyond is None:
            return sums
        return sums.addcmul_(_rows(running, self.beyond), self.is_beyond.unsqueeze(-1).to(sums.dtype), value=-1)


@dataclass(frozen=True)
class _Intervals:
    """Each query sees one interval of the keys that are seen at all, and each key is seen by one of queries."""

    forward: _Runs
    backward: _Runs
    unseen: Tensor | None = None  # (B|1, H|1, K, 1), true for keys that nobody sees

    def sums(self, states: Tensor) -> Tensor:
        return self.forward.sums(states if self.unseen is None else states.masked_fill(self.unseen, 0.0))

    def adjoint(self, gradient: Tensor) -> Tensor:
        of_states = self.backward.sums(gradient)
        return of_states if self.unseen is None else of_states.masked_fill_(self.unseen, 0.0)


def _runs(bits: Tensor, from_the_end: bool = False) -> _Runs | None:
    """The interval of each row of ones, `(B|1, H|1, rows, N)`, or `None` if they are not intervals all.

    Columns without a one (padding, wherever it stands) are worth zero, and so do not interrupt an interval.
    """
    if from_the_end:
        bits = bits.flip(-1, -2)
    rows, length = bits.shape[-2:]
    count = bits.sum(dim=-1, dtype=torch.int32)
    first = bits.max(dim=-1).indices  # The first of several.
    end = length - bits.flip(-1).max(dim=-1).indices
    rank = F.pad(bits.amax(dim=-2).cumsum(dim=-1), (1, 0))
    before, until = rank.gather(-1, first), rank.gather(-1, end)
    empty = count == 0
    if not (empty | (until - before == count)).all():
        return None
    ends_at_itself = rows == length and bool((empty | (until == rank[..., 1:])).all())
    starts_at_the_start = bool((empty | (before == 0)).all())
    near, beyond, is_beyond = end - 1, (first - 1).clamp_min(0), first > 0
    if from_the_end:
        near, beyond, is_beyond = length - 1 - near.flip(-1), length - 1 - beyond.flip(-1), is_beyond.flip(-1)
    near = None if ends_at_itself else near
    if starts_at_the_start:
        beyond = is_beyond = None
    return _Runs(near, beyond, is_beyond, from_the_end)


def _running_sums(states: Tensor, from_the_end: bool) -> Tensor:
    """Cumulative sums over the rows of `(B, H, N, X)`, chunk by chunk: `cumsum` goes through memory in strides, and in
    half precision would be off by its own size after a few thousand rows."""
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
    """Rows of `(B, H, N, X)` by index `(B|1, H|1, rows)`. `gather` would want an index for every component."""
    batch_size, num_heads, length, _ = states.shape
    start = torch.arange(0, batch_size * num_heads * length, length, device=index.device)
    index = index.expand(batch_size, num_heads, -1) + start.view(batch_size, num_heads, 1)
    return states.flatten(0, 2).index_select(0, index.flatten()).unflatten(0, index.shape)
