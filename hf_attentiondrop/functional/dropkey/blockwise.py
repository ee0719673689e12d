"""DropKey without the score matrix, on CPU.

With one draw per score, each block draws its dropped keys from a seed while its scores are in the cache, and the
backward pass draws them again.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..blockwise.attention import (
    Perturb,
    attend_blockwise,
    check_constant_mask,
    differentiate_blockwise,
    empty_gradients,
    empty_output,
)
from ..blockwise.blocks import Block
from .masking import check_axis


# Subtracted from the scores of dropped keys, which leaves them a weight of exactly 0.
FAR_BELOW = 1e30


def dropkey_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    p: float | Tensor,
    axis: str = "score",
    is_causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in which each visible key of a query is masked with probability `p`, without rescaling.

    Args:
        query: `(B, H, Q, D)`.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, Dv)`.
        mask: boolean (true = may attend) or additive, `(B|1, H|1, Q|1, K)`, see [`visible_keys`]; `None` leaves
            causality alone to decide.
        p: drop probability in [0, 1]; a number or a tensor `()`, which can change without recompilation; or
            `(H, 1, 1)` for one per head.
        axis: `"score"` draws for every query and key, with `p` rounded to multiples of 2^-16; `"column"` once per key,
            sample and head for all queries, with the random numbers of [`sample_key_mask`].
        is_causal: without a mask, query `i` sees keys `0..i`.
        scaling: factor of the scores; `D ** -0.5` by default.
        dropout: dropout probability of the weights, in [0, 1]; kept weights are scaled by `1 / (1 - dropout)`.

    Returns:
        `(B, Q, H, Dv)` in the dtype of the values, computed in at least float32. A row that would lose all its
        visible keys keeps one of them, drawn uniformly; fully masked rows give zeros. No gradient flows into a masked
        score, and there is no second derivative. The global generator seeds everything else that is drawn.

    Raises:
        ValueError: if `axis` is neither `"score"` nor `"column"`, or if the mask requires a gradient.

    Source: DropKey (CVPR 2023).

    Example:

    >>> query, key, value = torch.ones(1, 1, 1, 1), torch.tensor([[[[2.0], [1.0], [1.0]]]]), torch.eye(3)[None, None]
    >>> dropkey_attention(query, key, value, p=0.0)
    tensor([[[[0.5761, 0.2119, 0.2119]]]])
    >>> dropkey_attention(query, key, value, p=1.0).sort().values
    tensor([[[[0., 0., 1.]]]])
    """
    check_axis(axis)
    check_constant_mask(mask, "Detach the mask, or add it to attention_scores and mask those by sample_key_mask.")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    p = torch.as_tensor(p, dtype=torch.float64).clone()  # A schedule may change it before the backward pass.
    # Drawn outside of the operator, where activation checkpointing and compiled graphs can repeat it.
    columns = None
    if axis == "column":
        columns = torch.rand(*query.shape[:2], 1, key.shape[-2], dtype=torch.float32, device=query.device)
    seed = torch.randint(2**62, ())
    return _attend(query, key, value, mask, p, columns, seed, is_causal, scaling, dropout)


@torch.library.custom_op("hf_attentiondrop::dropkey_attention", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: Tensor,
    columns: Tensor | None,
    seed: Tensor,
    is_causal: bool,
    scaling: float,
    dropout: float,
) -> Tensor:
    options: dict[str, Any] = {
        "mask": mask,
        "seed": seed,
        "is_causal": is_causal,
        "scaling": scaling,
        "dropout": dropout,
    }
    return attend_blockwise(query, key, value, _drop_keys(p, columns), **options)


@_attend.register_fake
def _empty_output(query: Tensor, key: Tensor, value: Tensor, *others: object) -> Tensor:
    return empty_output(query, value)


@torch.library.custom_op("hf_attentiondrop::dropkey_attention_backward", mutates_args=())
def _differentiate(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: Tensor,
    columns: Tensor | None,
    seed: Tensor,
    output: Tensor,
    is_causal: bool,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    options: dict[str, Any] = {
        "mask": mask,
        "seed": seed,
        "is_causal": is_causal,
        "scaling": scaling,
        "dropout": dropout,
    }
    # Dropped keys have a weight of 0, so the softmax already gives their scores a gradient of 0.
    return differentiate_blockwise(grad_output, query, key, value, output, _drop_keys(p, columns), **options)


@_differentiate.register_fake
def _empty_gradients(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(query, key, value)


def _drop_keys(p: Tensor, columns: Tensor | None) -> Perturb:
    """Masks the scores of dropped keys; equal seeds, or equal numbers of the columns, drop equal keys."""
    num_dropped = (p * 2**16).round().int()  # of 2**16 words
    drops_any = bool(num_dropped.any())

    def drop_scores(block: Block, scores: Tensor) -> None:
        if not drops_any:
            return
        # int16 spans [-2**15, 2**15). Unlike masked_fill_, float arithmetic is vectorized.
        limit, words, dropped = num_dropped - 2**15 - 1, block.random_words(), block.buffer(1)
        if p.dim() == 0:
            torch.le(words, limit.item(), out=dropped)
        else:
            limit = limit[block.heads]
            torch.le(_by_head(words, len(limit)), limit, out=_by_head(dropped, len(limit)))
        loses_all = _mask(scores, dropped)
        if loses_all.any():
            lost = scores[loses_all]
            scores[loses_all] = _keep_highest(
                lost, torch.rand(lost.shape, dtype=torch.float32, generator=block.generator)
            )

    def drop_columns(columns: Tensor, block: Block, scores: Tensor) -> None:
        numbers = columns[block.sample, block.heads, :, block.keys]  # (heads, 1, keys)
        by_head = _by_head(scores, len(numbers))
        dropped = numbers < (p if p.dim() == 0 else p[block.heads])
        loses_all = _mask(by_head, dropped.to(scores.dtype))
        if loses_all.any():
            by_head[loses_all] = _keep_highest(by_head[loses_all], numbers.expand_as(by_head)[loses_all])

    return drop_scores if columns is None else partial(drop_columns, columns)


def _by_head(scores: Tensor, num_heads: int) -> Tensor:
    """A view `(heads, queries, keys)` of a block's `(kv_heads, rows, keys)`."""
    return scores.view(num_heads, -1, scores.shape[-1])


def _mask(scores: Tensor, dropped: Tensor) -> Tensor:
    """Masks scores in place where `dropped` is 1 and not 0, and returns which rows lose all their keys."""
    return scores.sub_(dropped, alpha=FAR_BELOW).amax(dim=-1) < -FAR_BELOW / 2


def _keep_highest(scores: Tensor, numbers: Tensor) -> Tensor:
    """Scores `(rows, keys)` that give the visible key with the highest number in each row a weight of 1."""
    kept = numbers.masked_fill(scores == -torch.inf, -1.0).argmax(dim=-1, keepdim=True)
    return torch.full_like(scores, -torch.inf).scatter_(-1, kept, 0.0)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, mask, p, columns, seed, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, mask, p, columns, seed, output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return *_differentiate(grad_output, *ctx.saved_tensors, *ctx.settings), *[None] * 7


_attend.register_autograd(_backward, setup_context=_save_for_backward)
