"""Attention under Hard Attention Masking without the score matrix: block by block, forward and backward.

Which scores are hit depends on the scores, so the mask that a fused kernel would need takes a score matrix to make.
Here a block of scores is ranked, hit and put through the softmax while it is in the cache, and thrown away. The
backward pass computes it again and finds the hits by their indices: ranked again, near ties might fall otherwise.

The loops stand in custom operators. `torch.compile` would unroll them, and could not follow them where they leave out
keys that no query of a block sees, which only the values of a mask can tell.
"""

from typing import Any

import torch
from torch import Tensor

from .blocks import each_block
from .masking import fill_hits, hit_top_scores


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
        drawn: boolean `(B, H, Q, k)`, true where the visible score of that rank is to be hit. With `fill="mask"` it
            must leave every query one of the keys that it sees, as [`draw_ranks`] does.
        mask: boolean (true = may attend) or additive, `(B|1, H|1, Q|1, K)`, see [`visible_keys`]; `None` leaves
            causality alone to decide.
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
            "Hard attention in blocks expected a mask that is not trained, and got one that requires a gradient. It "
            "would get none, as that would be as large as the scores that blocks are there to avoid. Detach the mask, "
            "or add it to attention_scores and perturb those by mask_top_scores."
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
        for block in each_block(query, key, mask, is_causal, seed, dropout):
            values = block.keys_of(value).to(dtype)
            scores = block.scores(block.rows_of(query).to(dtype) * scaling, block.keys_of(key).to(dtype))
            ranks = slice(min(drawn.shape[-1], scores.shape[-1]))
            candidates = hit_top_scores(scores, block.rows_of(drawn)[..., ranks])
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
        for block in each_block(query, key, mask, is_causal, seed, dropout):
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
