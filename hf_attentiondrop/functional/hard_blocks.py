"""Attention under Hard Attention Masking without the score matrix: block by block, forward and backward.

Which scores are hit depends on the scores, so the mask that a fused kernel would need takes a score matrix to make.
Here a block of scores is ranked, hit and put through the softmax while it is in the cache, and thrown away. The
backward pass computes it again and finds the hits by their indices: ranked again, near ties might fall otherwise.

The loops stand in custom operators. `torch.compile` would unroll them, and could not follow them where they leave out
keys that no query of a block sees, which only the values of a mask can tell.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hard import fill_hits, hit_top_scores
from .visibility import shown_keys


# Few queries, so that a causal mask or a window hides many keys from all of them; and 2 MB in float32, so that the two
# or, with dropout, three blocks in use stay in the cache of a core.
QUERIES_PER_BLOCK = 128
SCORES_PER_BLOCK = 2**19


def hard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    drawn: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scaling: float | None = None,
    fill: str = "mask",
    dropout: float = 0.0,
) -> Tensor:
    """Attention in which the drawn ones of each query's highest visible scores are replaced by the fill.

    Args:
        query: `(B, H, Q, D)`.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, Dv)`.
        drawn: boolean `(B, H, Q, k)`, true where the visible score of that rank is to be hit.
        mask: boolean (true = may attend) or additive, `(B|1, H|1, Q|1, K)`, which hides what [`visible_keys`] says;
            `None` leaves causality alone to decide.
        is_causal: without a mask, query `i` sees keys `0..i`.
        scaling: factor of the scores; `D ** -0.5` by default.
        fill: what a hit score becomes, as in [`mask_top_scores`].
        dropout: rate of dropout on the weights, in [0, 1]; those that stay are scaled by `1 / (1 - dropout)`. Above
            zero, one number is drawn from the global generator, and everything else from that.

    Returns:
        `(B, Q, H, Dv)` in the dtype of the values, computed in at least float32. Zeros for queries that see no key. No
        gradient flows into a hit score, and there is no second derivative.

    Raises:
        ValueError: if the mask wants a gradient.

    Source: arXiv 2504.12088, Hard Attention Masking.

    Example:

    >>> query, key, value = torch.ones(1, 1, 1, 1), torch.tensor([[[[2.0], [1.0], [1.0]]]]), torch.eye(3)[None, None]
    >>> hard_attention(query, key, value, torch.tensor([[[[True]]]]))
    tensor([[[[0.0000, 0.5000, 0.5000]]]])
    """
    if mask is not None and mask.requires_grad:
        raise ValueError(
            "Hard attention in blocks expected a mask that is not trained, and got one that requires a gradient, which "
            "would be as large as the scores that blocks are there to avoid: it would get none. Detach the mask, or "
            "add it to attention_scores and perturb those by mask_top_scores."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Drawn out here, where activation checkpointing and compiled graphs can repeat it.
    seed = torch.randint(2**62, ()) if dropout > 0 else None
    return _attend(query, key, value, drawn, mask, seed, is_causal, scaling, fill, dropout)[0]


@torch.library.custom_op("hf_attentiondrop::hard_attention", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    drawn: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scaling: float,
    fill: str,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and for the backward pass the candidates: their indices and which are hit, `(B, H, Q, k)` both."""
    output, index, hit = _empty_results(query, key, value, drawn)
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Autocast would run the products in half precision.
    with torch.autocast(query.device.type, enabled=False):
        for block in _blocks(query, key, mask, is_causal, seed, dropout):
            values = block.keys_of(value).to(dtype)
            scores = block.scores(block.rows_of(query).to(dtype) * scaling, block.keys_of(key).to(dtype))
            ranks = slice(min(drawn.shape[-1], scores.shape[-1]))
            candidates = hit_top_scores(scores, block.rows_of(drawn)[..., ranks], block.num_visible(), fill=fill)
            weights = block.weights(scores, *candidates, fill)
            block.store(block.dropped(weights, out=weights) @ values, output.transpose(1, 2))
            block.store(candidates[0], index[..., ranks])
            block.store(candidates[1], hit[..., ranks])
    return output, index, hit


@_attend.register_fake
def _empty_results(
    query: Tensor, key: Tensor, value: Tensor, drawn: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, num_heads, queries, _ = query.shape
    output = value.new_zeros(batch_size, queries, num_heads, value.shape[-1])
    return output, drawn.new_zeros(drawn.shape, dtype=torch.int64), drawn.new_zeros(drawn.shape)


@torch.library.custom_op("hf_attentiondrop::hard_attention_backward", mutates_args=())
def _differentiate(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    index: Tensor,
    hit: Tensor,
    is_causal: bool,
    scaling: float,
    fill: str,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Keys and values sum over blocks, so these are in the precision of the computation.
    grad_query, grad_key, grad_value = (_empty_gradient(states, dtype) for states in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        for block in _blocks(query, key, mask, is_causal, seed, dropout):
            queries = block.rows_of(query).to(dtype) * scaling
            keys, values = block.keys_of(key).to(dtype), block.keys_of(value).to(dtype)
            grad = block.rows_of(grad_output.transpose(1, 2)).to(dtype)
            scores = block.scores(queries, keys)
            ranks = slice(min(hit.shape[-1], scores.shape[-1]))
            candidates = block.rows_of(index)[..., ranks], block.rows_of(hit)[..., ranks]
            weights = block.weights(scores, *candidates, fill)
            # The scores have served: their place is taken.
            block.keys_of(grad_value).baddbmm_(block.dropped(weights, out=scores).mT, grad)
            grad_weights = torch.bmm(grad, values.mT, out=scores)
            # The softmax gives each score its weight times how far the gradient of that lies above the mean of its
            # row, which is that of the output, with dropout and without.
            mean = (grad * block.rows_of(output.transpose(1, 2))).sum(dim=-1, keepdim=True)
            grad_scores = block.dropped(grad_weights, out=grad_weights).sub_(mean).mul_(weights)
            fill_hits(grad_scores, *candidates, 0.0)
            block.store(grad_scores @ keys * scaling, grad_query)
            block.keys_of(grad_key).baddbmm_(grad_scores.mT, queries)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


@_differentiate.register_fake
def _empty_gradients(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_empty_gradient(states, states.dtype) for states in (query, key, value))


def _empty_gradient(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros for `(B, H, N, D)`, in memory `(B, N, H, D)`, as models hold their heads."""
    batch_size, heads, length, size = states.shape
    return states.new_zeros(batch_size, length, heads, size, dtype=dtype).transpose(1, 2)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, _, mask, seed, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, mask, seed, *output)


def _backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return *_differentiate(grad_output, *ctx.saved_tensors, *ctx.settings), *[None] * 7


_attend.register_autograd(_backward, setup_context=_remember)


@dataclass(frozen=True)
class _Block:
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

    def num_visible(self) -> Tensor | int:
        """How many keys each row sees, `(kv_heads, rows, 1)`."""
        if self.visible is None:
            return _length(self.keys)
        counts = self.visible.sum(dim=-1) + (_length(self.keys) - self.visible.shape[-1])
        return counts.reshape(_length(self.kv_heads), -1, 1)

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


def _blocks(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Iterator[_Block]:
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
        mask = mask.expand(batch_size, num_heads, num_queries, num_keys)
        visible, bias = shown_keys(mask), None if mask.dtype == torch.bool else mask
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
                block = _Block(sample, heads, kv_heads, queries, keys, shown, added, buffers)
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
