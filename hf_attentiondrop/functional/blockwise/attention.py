"""Attention on perturbed scores without the score matrix: block by block, forward and backward, on CPU.

A method passes a function that perturbs a block of scores in place. The loops belong inside custom operators:
`torch.compile` would unroll them, and which blocks they skip depends on the values of the mask.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .blocks import Block, each_block


# Changes scores, or their gradients, `(kv_heads, rows, keys)`, in place.
Perturb = Callable[[Block, Tensor], None]


def attend_blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    perturb: Perturb,
    *,
    mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Attention on perturbed scores, computed in at least float32.

    Args:
        query: `(B, H, Q, D)`.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, Dv)`.
        perturb: changes the scores of a block; masked keys have -inf, and a row must keep a finite score if it sees
            any key.
        mask: boolean or additive, `(B|1, H|1, Q|1, K)`, or `None`.
        seed: int64 `()`, seeds all random numbers of the blocks; `None` if there are none.
        is_causal: without a mask, query `i` sees keys `0..i`.
        scaling: factor of the scores.
        dropout: dropout probability of the weights, in [0, 1]; above 0 it takes a seed.

    Returns:
        `(B, Q, H, Dv)` in the dtype of the values, zeros for fully masked rows.
    """
    output = empty_output(query, value)
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Autocast would run the products in half precision.
    with torch.autocast(query.device.type, enabled=False):
        for block in each_block(query, key, mask, is_causal, seed, dropout):
            values = block.keys_of(value).to(dtype)
            scores = block.scores(block.rows_of(query).to(dtype) * scaling, block.keys_of(key).to(dtype))
            perturb(block, scores)
            weights = block.weights(scores)
            block.store(block.apply_dropout(weights, out=weights) @ values, output.transpose(1, 2))
    return output


def differentiate_blockwise(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    perturb: Perturb,
    perturb_gradient: Perturb | None = None,
    *,
    mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; computes the scores of each block again.

    Args:
        grad_output, output: `(B, Q, H, Dv)`.
        perturb: must change the scores as it did in the forward pass.
        perturb_gradient: sets the gradient of scores that the perturbation replaced by a finite constant to zero.
        query, key, value, mask, seed, is_causal, scaling, dropout: as in [`attend_blockwise`].
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Gradients of keys and values are sums over blocks, so they accumulate in the precision of the computation.
    grad_query, grad_key, grad_value = (_empty_gradient(states, dtype) for states in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        for block in each_block(query, key, mask, is_causal, seed, dropout):
            queries = block.rows_of(query).to(dtype) * scaling
            keys, values = block.keys_of(key).to(dtype), block.keys_of(value).to(dtype)
            grad = block.rows_of(grad_output.transpose(1, 2)).to(dtype)
            scores = block.scores(queries, keys)
            perturb(block, scores)
            weights = block.weights(scores)
            # The scores are no longer needed, so their buffer is reused.
            block.keys_of(grad_value).baddbmm_(block.apply_dropout(weights, out=scores).mT, grad)
            grad_weights = torch.bmm(grad, values.mT, out=scores)
            # Gradient of the softmax: weight * (gradient - weighted mean of the row's gradients). That mean is
            # grad · output, with or without dropout.
            mean = (grad * block.rows_of(output.transpose(1, 2))).sum(dim=-1, keepdim=True)
            grad_scores = block.apply_dropout(grad_weights, out=grad_weights).sub_(mean).mul_(weights)
            if perturb_gradient is not None:
                perturb_gradient(block, grad_scores)
            block.store(grad_scores @ keys * scaling, grad_query)
            block.keys_of(grad_key).baddbmm_(grad_scores.mT, queries)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def check_constant_mask(mask: Tensor | None, remedy: str) -> None:
    """Raises a `ValueError` that ends in the remedy if the mask requires a gradient."""
    if mask is not None and mask.requires_grad:
        raise ValueError(
            "Blockwise attention expected a constant mask, got one that requires a gradient. The mask would get no "
            f"gradient, because that would be as large as the score matrix that blocks avoid. {remedy}"
        )


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """Zeros `(B, Q, H, Dv)`."""
    batch_size, num_heads, num_queries, _ = query.shape
    return value.new_zeros(batch_size, num_queries, num_heads, value.shape[-1])


def empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros in the shapes, dtypes and memory layouts that [`differentiate_blockwise`] returns."""
    return _empty_gradient(query, query.dtype), _empty_gradient(key, key.dtype), _empty_gradient(value, value.dtype)


def _empty_gradient(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros `(B, H, N, D)`, stored as `(B, N, H, D)`, which is how models store heads."""
    batch_size, num_heads, length, size = states.shape
    return states.new_zeros(batch_size, length, num_heads, size, dtype=dtype).transpose(1, 2)
