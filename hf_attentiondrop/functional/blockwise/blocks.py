"""Splits attention into blocks of queries and keys, each small enough that its scores stay in the CPU cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..visibility import boolean_mask


# Few queries, so that a causal or sliding-window mask lets a block skip many keys; and 2 MB of scores in float32, so
# that the two buffers in use (three with dropout) fit in the cache of one core.
QUERIES_PER_BLOCK = 128
SCORES_PER_BLOCK = 2**19


@dataclass(frozen=True)
class Block:
    """Some queries of some heads of one sample, with the keys that at least one of them sees.

    Queries that share a key head are rows of one matrix product, so grouped-query attention copies no keys.
    """

    sample: int
    heads: slice
    kv_heads: slice
    queries: slice
    keys: slice
    visible: Tensor | None  # (heads, queries, last keys); all earlier keys are visible; None if all keys are
    bias: Tensor | None  # (heads, queries, keys), added to the scores
    buffers: Tensor  # (2|3, scores of the largest block): newly allocated memory would not be in the cache
    generator: torch.Generator | None

    def rows_of(self, states: Tensor) -> Tensor:
        """Selects the block's queries: `(B, H, Q, X)` to `(kv_heads, rows, X)`."""
        states = states[self.sample, self.heads, self.queries]
        return states.reshape(_length(self.kv_heads), -1, states.shape[-1])

    def keys_of(self, states: Tensor) -> Tensor:
        """Selects the block's keys: `(B, Hkv, K, X)` to a view `(kv_heads, keys, X)`."""
        return states[self.sample, self.kv_heads, self.keys]

    def store(self, rows: Tensor, states: Tensor) -> None:
        """Writes rows to `(B, H, Q, X)`; the inverse of `rows_of`."""
        target = states[self.sample, self.heads, self.queries]
        target.copy_(rows.view(target.shape))

    def buffer(self, number: int) -> Tensor:
        """A preallocated buffer in the shape of the scores, `(kv_heads, rows, keys)`."""
        kv_heads, keys = _length(self.kv_heads), _length(self.keys)
        rows = _length(self.heads) // kv_heads * _length(self.queries)
        return self.buffers[number, : kv_heads * rows * keys].view(kv_heads, rows, keys)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Scores `(kv_heads, rows, keys)` of scaled queries in the first buffer, -inf for masked keys."""
        scores = torch.bmm(queries, keys.mT, out=self.buffer(0))
        if self.bias is not None:
            scores.view(self.bias.shape).add_(self.bias)
        if self.visible is not None:
            by_head = scores.view(*self.visible.shape[:2], -1)
            by_head[..., -self.visible.shape[-1] :].masked_fill_(~self.visible, -torch.inf)
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        """Softmax of the scores in the second buffer, zeros for fully masked rows."""
        weights = torch.softmax(scores, dim=-1, out=self.buffer(1))
        if self.visible is not None and self.visible.shape[-1] == scores.shape[-1]:
            sees_key = _any(self.visible, dim=-1)
            if not sees_key.all():
                weights.view(self.visible.shape).masked_fill_(~sees_key[..., None], 0.0)
        return weights

    def random_words(self) -> Tensor:
        """Uniform int16, `(kv_heads, rows, keys)`. Each 64-bit number drawn serves four scores: a call of
        `bernoulli_` takes four times as long."""
        shape = self.buffer(0).shape
        numbers = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=self.buffers.device)
        numbers.random_(-(2**63), None, generator=self.generator)
        return numbers.view(torch.int16)[: shape.numel()].view(shape)

    def sample_dropout(self, dropout: float) -> None:
        """Fills the third buffer with dropout factors, 0 or the inverse of the rate of kept weights.

        The rate is exact to 1 in 131072; the factor is that of the actual rate.
        """
        dropped, factors = round(dropout * 2**16), self.buffer(2)
        torch.ge(self.random_words(), min(dropped - 2**15, 2**15 - 1), out=factors)
        factors.mul_(2**16 / (2**16 - dropped) if dropped < 2**16 else 0.0)

    def apply_dropout(self, weights: Tensor, out: Tensor) -> Tensor:
        """Multiplies weights, or their gradient, by the dropout factors, if there are any."""
        return weights if len(self.buffers) == 2 else torch.mul(weights, self.buffer(2), out=out)


def each_block(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Iterator[Block]:
    """Yields the blocks that cover all queries, except fully masked blocks. Equal seeds give equal random numbers."""
    batch_size, num_heads, num_queries, _ = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    group = num_heads // num_kv_heads
    step = min(num_queries, QUERIES_PER_BLOCK, max(1, SCORES_PER_BLOCK // (group * num_keys)))
    kv_step = min(num_kv_heads, max(1, SCORES_PER_BLOCK // (group * step * num_keys)))
    dtype = torch.promote_types(query.dtype, torch.float32)
    buffers = query.new_empty(3 if dropout > 0 else 2, kv_step * group * step * num_keys, dtype=dtype)
    generator = None if seed is None else torch.Generator(query.device).manual_seed(int(seed))
    visible = bias = None
    if mask is not None:
        shape = batch_size, num_heads, num_queries, num_keys
        visible, bias = boolean_mask(mask).expand(shape), None if mask.dtype == torch.bool else mask.expand(shape)
    is_causal = is_causal and mask is None and num_queries > 1
    for sample in range(batch_size):
        for kv_heads in _slices(num_kv_heads, kv_step):
            heads = slice(group * kv_heads.start, group * kv_heads.stop)
            for queries in _slices(num_queries, step):
                keys, block_visible = slice(0, num_keys), None
                if is_causal:
                    keys, block_visible = _causal_keys(queries, num_keys)
                    block_visible = None if block_visible is None else block_visible.expand(_length(heads), -1, -1)
                elif visible is not None:
                    keys, block_visible = _visible_keys(visible[sample, heads, queries])
                if not _length(keys):
                    continue
                block_bias = None if bias is None else bias[sample, heads, queries, keys]
                block = Block(sample, heads, kv_heads, queries, keys, block_visible, block_bias, buffers, generator)
                if dropout > 0:
                    block.sample_dropout(dropout)
                yield block


def _any(mask: Tensor, dim: int) -> Tensor:
    """`mask.any(dim)`, which is many times slower on CPU."""
    return mask.view(torch.uint8).amax(dim).bool()


def _causal_keys(queries: slice, num_keys: int) -> tuple[slice, Tensor | None]:
    """The keys up to the last query, and the visibility of those after the first query, `(1, queries, keys)`."""
    keys = slice(0, min(queries.stop, num_keys))
    later = keys.stop - queries.start
    return keys, torch.ones(1, _length(queries), later, dtype=torch.bool).tril() if later > 1 else None


def _visible_keys(visible: Tensor) -> tuple[slice, Tensor | None]:
    """The range from the first to the last visible key, and the visibility within it; `None` if all are visible."""
    index = _any(_any(visible, 0), 0).nonzero()
    if not len(index):
        return slice(0, 0), None
    keys = slice(int(index[0]), int(index[-1]) + 1)
    visible = visible[..., keys]
    return keys, None if visible.view(torch.uint8).amin() else visible


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _length(part: slice) -> int:
    return part.stop - part.start
