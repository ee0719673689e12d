"""Hard Attention Masking without the score matrix, on CPU.

The mask depends on the scores, so a fused kernel that takes a mask would need the score matrix to make it. Here each
block of scores is ranked, masked and normalized while it is in the cache. The backward pass computes the block again
and masks the same indices: ranking again could order near ties differently.
"""

from typing import Any

import torch
from torch import Tensor

from ..blockwise.attention import (
    attend_blockwise,
    check_constant_mask,
    differentiate_blockwise,
    empty_gradients,
    empty_output,
)
from ..blockwise.blocks import Block
from .masking import fill_scores, select_top_scores


def hard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masked_ranks: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scaling: float | None = None,
    fill: str = "mask",
    dropout: float = 0.0,
) -> Tensor:
    """Attention in which some of each query's highest visible scores are replaced by the fill.

    Args:
        query: `(B, H, Q, D)`.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, Dv)`.
        masked_ranks: boolean `(B, H, Q, k)`, true where the visible score of that rank is masked. With `fill="mask"`
            every query must keep one of its visible keys, which [`sample_masked_ranks`] guarantees.
        mask: boolean (true = may attend) or additive, `(B|1, H|1, Q|1, K)`, see [`visible_keys`]; `None` leaves
            causality alone to decide.
        is_causal: without a mask, query `i` sees keys `0..i`.
        scaling: factor of the scores; `D ** -0.5` by default.
        fill: replacement of a masked score, as in [`mask_top_scores`].
        dropout: dropout probability of the weights, in [0, 1]; kept weights are scaled by `1 / (1 - dropout)`. Above
            zero, it draws one number from the global generator, which seeds the rest.

    Returns:
        `(B, Q, H, Dv)` in the dtype of the values, computed in at least float32. Zeros for fully masked rows. No
        gradient flows into a masked score, and there is no second derivative.

    Raises:
        ValueError: if the mask requires a gradient.

    Source: arXiv 2504.12088, Hard Attention Masking.

    Example:

    >>> query, key, value = torch.ones(1, 1, 1, 1), torch.tensor([[[[2.0], [1.0], [1.0]]]]), torch.eye(3)[None, None]
    >>> hard_attention(query, key, value, torch.tensor([[[[True]]]]))
    tensor([[[[0.0000, 0.5000, 0.5000]]]])
    """
    check_constant_mask(mask, "Detach the mask, or add it to attention_scores and perturb those by mask_top_scores.")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Drawn outside of the operator, where activation checkpointing and compiled graphs can repeat it.
    seed = torch.randint(2**62, ()) if dropout > 0 else None
    return _attend(query, key, value, masked_ranks, mask, seed, is_causal, scaling, fill, dropout)[0]


@torch.library.custom_op("hf_attentiondrop::hard_attention", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masked_ranks: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scaling: float,
    fill: str,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output and, for the backward pass, the indices of the top scores and which are masked, `(B, H, Q, k)`."""
    _, index, is_masked = _empty_results(query, key, value, masked_ranks)

    def mask_scores(block: Block, scores: Tensor) -> None:
        ranks = slice(min(masked_ranks.shape[-1], scores.shape[-1]))
        top_scores = select_top_scores(scores, block.rows_of(masked_ranks)[..., ranks])
        fill_scores(scores, *top_scores, _fill_value(fill))
        for found, result in zip(top_scores, (index, is_masked), strict=True):
            block.store(found, result[..., ranks])

    options: dict[str, Any] = {
        "mask": mask,
        "seed": seed,
        "is_causal": is_causal,
        "scaling": scaling,
        "dropout": dropout,
    }
    return attend_blockwise(query, key, value, mask_scores, **options), index, is_masked


@_attend.register_fake
def _empty_results(
    query: Tensor, key: Tensor, value: Tensor, masked_ranks: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    index = masked_ranks.new_zeros(masked_ranks.shape, dtype=torch.int64)
    return empty_output(query, value), index, masked_ranks.new_zeros(masked_ranks.shape)


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
    is_masked: Tensor,
    is_causal: bool,
    scaling: float,
    fill: str,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""

    def fill_block(block: Block, scores: Tensor, number: float) -> None:
        ranks = slice(min(index.shape[-1], scores.shape[-1]))
        fill_scores(scores, block.rows_of(index)[..., ranks], block.rows_of(is_masked)[..., ranks], number)

    return differentiate_blockwise(
        *(grad_output, query, key, value, output),
        lambda block, scores: fill_block(block, scores, _fill_value(fill)),
        lambda block, grad_scores: fill_block(block, grad_scores, 0.0),
        mask=mask,
        seed=seed,
        is_causal=is_causal,
        scaling=scaling,
        dropout=dropout,
    )


@_differentiate.register_fake
def _empty_gradients(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(query, key, value)


def _fill_value(fill: str) -> float:
    return -torch.inf if fill == "mask" else 0.0


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, _, mask, seed, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, mask, seed, *output)


def _backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return *_differentiate(grad_output, *ctx.saved_tensors, *ctx.settings), *[None] * 7


_attend.register_autograd(_backward, setup_context=_save_for_backward)
