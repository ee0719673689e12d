"""Attention block by block: which queries and keys go together, and the steps from one to the other.

A block of scores is made, put to use while it is in the cache, and thrown away.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..visibility import shown_keys
from .masking import fill_hits


# Few queries, so that a causal mask or a window hides many keys from all of them; and 2 MB in float32, so that the two
# or, with dropout, three blocks in use stay in the cache of a core.
QUERIES_PER_BLOCK = 128
SCORES_PER_BLOCK = 2**19


@dataclass(frozen=True)
class Block:
    """Some queries of some heads of one sample, with the keys that at least one of them sees.

    Queries that share a key head are rows of one product, so that grouped queries need no copies of their keys.
    """

    sample: int
    heads: slice
    kv_heads: slice
    queries: slice
    keys: slice
    visible: Tensor | None  # (heads, queries, last keys): all see the keys before these; None where all see all
    bias: Tensor | None  # (heads, queries, keys), added to the scores
    buffers: Tensor  # (2|3, scores of the largest block): fresh memory for every block would not be in the cache

    def rows_of(self, states: Tensor) -> Tensor:
        """`(B, H, Q, X)` to `(kv_heads, rows, X)`."""
        states = states[self.sample, self.heads, self.queries]
        return states.reshape(_length(self.kv_heads), -1, states.shape[-1])

    def keys_of(self, states: Tensor) -> Tensor:
        """`(B, Hkv, K, X)` to a view `(kv_heads, keys, X)`."""
        return states[self.sample, self.kv_heads, self.keys]

    def store(self, rows: Tensor, states: Tensor) -> None:
        """The inverse of `rows_of`."""
        target = states[self.sample, self.heads, self.queries]
        target.copy_(rows.view(target.shape))

    def buffer(self, number: int) -> Tensor:
        """A place for something as large as the scores, `(kv_heads, rows, keys)`."""
        kv_heads, keys = _length(self.kv_heads), _length(self.keys)
        rows = _length(self.heads) // kv_heads * _length(self.queries)
        return self.buffers[number, : kv_heads * rows * keys].view(kv_heads, rows, keys)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """`(kv_heads, rows, keys)` from scaled queries, hidden ones -inf, in the first buffer."""
        scores = torch.bmm(queries, keys.mT, out=self.buffer(0))
        if self.bias is not None:
            scores.view(self.bias.shape).add_(self.bias)
        if self.visible is not None:
            by_head = scores.view(*self.visible.shape[:2], -1)
            by_head[..., -self.visible.shape[-1] :].masked_fill_(~self.visible, -torch.inf)
        return scores

    def weights(self, scores: Tensor, index: Tensor, hit: Tensor, fill: str) -> Tensor:
        """The softmax of the scores after the hits, zeros for rows that see no key, in the second buffer."""
        fill_hits(scores, index, hit, -torch.inf if fill == "mask" else 0.0)
        weights = torch.softmax(scores, dim=-1, out=self.buffer(1))
        if self.visible is not None and self.visible.shape[-1] == scores.shape[-1]:
            sees = _any(self.visible, dim=-1)
            if not sees.all():
                weights.view(self.visible.shape).masked_fill_(~sees[..., None], 0.0)
        return weights

    def draw_dropout(self, dropout: float, generator: torch.Generator) -> None:
        """Puts what dropout makes of a weight of 1 in the third buffer.

        One number of 64 bits decides over four weights: `bernoulli_` takes four times as long. The rate is right to
        1 in 131072, and the scale is that of the rate.
        """
        factors, dropped = self.buffer(2), round(dropout * 2**16)
        numbers = torch.empty(-(-factors.numel() // 4), dtype=torch.int64, device=factors.device)
        numbers = numbers.random_(-(2**63), None, generator=generator).view(torch.int16)[: factors.numel()]
        torch.ge(numbers.view_as(factors), min(dropped - 2**15, 2**15 - 1), out=factors)
        factors.mul_(2**16 / (2**16 - dropped) if dropped < 2**16 else 0.0)

    def dropped(self, weights: Tensor, out: Tensor) -> Tensor:
        """Weights, or their gradient, after dropout if there is any."""
        return weights if len(self.buffers) == 2 else torch.mul(weights, self.buffer(2), out=out)


def each_block(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Iterator[Block]:
    """All queries in turn, block by block, but for blocks that see no key. The same seed gives the same dropout."""
    batch_size, num_heads, num_queries, _ = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    group = num_heads // num_kv_heads
    step = min(num_queries, QUERIES_PER_BLOCK, max(1, SCORES_PER_BLOCK // (group * num_keys)))
    kv_step = min(num_kv_heads, max(1, SCORES_PER_BLOCK // (group * step * num_keys)))
    dtype = torch.promote_types(query.dtype, torch.float32)
    buffers = query.new_empty(2 if seed is None else 3, kv_step * group * step * num_keys, dtype=dtype)
    generator = None if seed is None else torch.Generator(query.device).manual_seed(int(seed))
    visible = bias = None
    if mask is not None:
        shape = batch_size, num_heads, num_queries, num_keys
        visible, bias = shown_keys(mask).expand(shape), None if mask.dtype == torch.bool else mask.expand(shape)
    is_causal = is_causal and mask is None and num_queries > 1
    for sample in range(batch_size):
        for kv_heads in _slices(num_kv_heads, kv_step):
            heads = slice(group * kv_heads.start, group * kv_heads.stop)
            for queries in _slices(num_queries, step):
                keys, shown = slice(0, num_keys), None
                if is_causal:
                    keys, shown = _causal_keys(queries, num_keys)
                    shown = None if shown is None else shown.expand(_length(heads), -1, -1)
                elif visible is not None:
                    keys, shown = _visible_keys(visible[sample, heads, queries])
                if not _length(keys):
                    continue
                added = None if bias is None else bias[sample, heads, queries, keys]
                block = Block(sample, heads, kv_heads, queries, keys, shown, added, buffers)
                if generator is not None:
                    block.draw_dropout(dropout, generator)
                yield block


def _causal_keys(queries: slice, num_keys: int) -> tuple[slice, Tensor | None]:
    """The keys that come before the last query, and who sees which of those after the first: `(1, queries, keys)`."""
    keys = slice(0, min(queries.stop, num_keys))
    later = keys.stop - queries.start
    return keys, torch.ones(1, _length(queries), later, dtype=torch.bool).tril() if later > 1 else None


def _visible_keys(visible: Tensor) -> tuple[slice, Tensor | None]:
    """From the first to the last key that a query sees, and who sees which of them, if it is not all of them."""
    seen = _any(_any(visible, 0), 0).nonzero()
    if not len(seen):
        return slice(0, 0), None
    keys = slice(int(seen[0]), int(seen[-1]) + 1)
    visible = visible[..., keys]
    return keys, None if visible.view(torch.uint8).amin() else visible


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _length(part: slice) -> int:
    return part.stop - part.start


def _any(mask: Tensor, dim: int) -> Tensor:
    # `any` takes many times as long on the processor.
    return mask.view(torch.uint8).amax(dim).bool()
