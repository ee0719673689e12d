"""Blurred Attention Smoothing (AttentionDrop, arXiv 2504.12088, variant 2), computed on the keys.

The paper convolves every row of attention scores with a Gaussian along the keys. Scores are linear in the keys and the
blend weights do not depend on the query, so blending the keys gives the same scores, in `O(K·W·D)` instead of
`O(Q·K·W)` and without a score matrix: any fused attention can follow.
"""

from collections.abc import Iterator
from typing import Any

import torch

from .scores import expand_heads


def gaussian_window(sigma: torch.Tensor, neighbours: torch.Tensor) -> torch.Tensor:
    """Normalised Gaussian weights over the neighbours that count.

    Args:
        sigma: `(B,)` or `(1,)`, standard deviations in tokens, `>= 0`; zero is the identity.
        neighbours: boolean `(B|1, H|1, K, W)`, see [`~functional.visible_neighbours`].

    Returns:
        `(B, H|1, K, W)` in sigma's dtype, each row summing to 1. A key always counts itself, also under a mask that
        does not let its token attend to it: otherwise sigma = 0 would not be the identity.

    Example:

    >>> gaussian_window(torch.tensor([1.0]), torch.ones(1, 1, 1, 3, dtype=torch.bool))
    tensor([[[[0.2741, 0.4519, 0.2741]]]])
    """
    width = neighbours.shape[-1]
    offset = torch.arange(-(width // 2), width // 2 + 1, device=sigma.device)
    neighbours = neighbours | (offset == 0)
    # The floor keeps sigma = 0 from dividing by zero.
    sharpness = -0.5 * (offset / sigma[:, None].clamp_min(1e-6)).square()  # (B, W)
    return sharpness[:, None, None].masked_fill(~neighbours, -torch.inf).softmax(dim=-1)


def blur_keys(key: torch.Tensor, sigma: torch.Tensor, neighbours: torch.Tensor) -> torch.Tensor:
    """Blends every key with its visible neighbours; attention over the result is attention with blurred scores.

    Args:
        key: `(B, Hkv, K, D)`, after rotary embedding.
        sigma: `(B,)` or `(1,)`, standard deviations in tokens, `>= 0`.
        neighbours: boolean `(B|1, H|1, K, W)`, `W` odd. With one mask for each of the `H` query heads the keys are
            expanded to `H` first.

    Returns:
        `(B, Hkv, K, D)` in the key's dtype (`(B, H, K, D)` with masks per head); accumulated in at least float32.

    Source: arXiv 2504.12088, variant 2, with the window renormalised over the visible neighbours.

    Example:

    >>> from hf_attentiondrop.functional import visible_neighbours
    >>> key = torch.tensor([0.0, 1.0, 0.0]).view(1, 1, 3, 1)
    >>> everyone = visible_neighbours(
    ...     None, width=3, is_causal=False, is_cross=False, query_length=3, key_length=3, device=key.device
    ... )
    >>> blur_keys(key, torch.tensor([1.0]), everyone).flatten()
    tensor([0.3775, 0.4519, 0.3775])
    """
    if neighbours.shape[1] > key.shape[1]:
        key = expand_heads(key, neighbours.shape[1])
    dtype = torch.promote_types(key.dtype, torch.float32)
    weights = gaussian_window(sigma.to(dtype), neighbours).unsqueeze(-1)  # (B, H|1, K, W, 1)
    return _Blend.apply(key, weights).to(key.dtype)


class _Blend(torch.autograd.Function):
    """Adds the weighted neighbours up in place, forward and backward; autograd would keep a padded copy per shift."""

    @staticmethod
    def forward(ctx: Any, key: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weights)
        ctx.dtype = key.dtype
        key = key.to(weights.dtype)
        blurred = torch.zeros_like(key)
        for weight, here, there in _shifts(weights, key.shape[-2]):
            blurred[..., here, :].addcmul_(weight, key[..., there, :])
        return blurred

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weights,) = ctx.saved_tensors
        of_key = torch.zeros_like(gradient)
        for weight, here, there in _shifts(weights, gradient.shape[-2]):
            of_key[..., there, :].addcmul_(weight, gradient[..., here, :])
        return of_key.to(ctx.dtype), None


def _shifts(weights: torch.Tensor, length: int) -> Iterator[tuple[torch.Tensor, slice, slice]]:
    """For each neighbour: its weights, the keys that have it, and where it is."""
    half = weights.shape[-2] // 2
    for offset in range(-min(half, length - 1), min(half, length - 1) + 1):
        here, there = slice(max(0, -offset), length - max(0, offset)), slice(max(0, offset), length - max(0, -offset))
        yield weights[..., here, half + offset, :], here, there
