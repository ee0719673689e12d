"""Blurred Attention Smoothing (AttentionDrop, arXiv 2504.12088, variant 2), computed on the keys.

The paper convolves every row of attention scores with a Gaussian along the keys. Scores are linear in the keys and the
blend weights do not depend on the query, so blending the keys gives the same scores, in `O(K·W·D)` instead of
`O(Q·K·W)` and without a score matrix. Any fused attention works on the result.
"""

from collections.abc import Iterator
from typing import Any

import torch

from .scores import expand_heads


def gaussian_window(sigma: torch.Tensor, neighbors: torch.Tensor) -> torch.Tensor:
    """Gaussian weights, normalized over the neighbors that count.

    Args:
        sigma: `(B|1,)` or `(B|1, H)`, standard deviations in tokens, `>= 0`; zero is the identity.
        neighbors: boolean `(B|1, H|1, K, W)`, see [`~functional.visible_neighbors`].

    Returns:
        `(B, H|1, K, W)` in sigma's dtype, each row summing to 1. A key always counts itself, even if its token may not
        attend to it: otherwise sigma = 0 would not be the identity.

    Example:

    >>> gaussian_window(torch.tensor([1.0]), torch.ones(1, 1, 1, 3, dtype=torch.bool))
    tensor([[[[0.2741, 0.4519, 0.2741]]]])
    """
    width = neighbors.shape[-1]
    offset = torch.arange(-(width // 2), width // 2 + 1, device=sigma.device)
    neighbors = neighbors | (offset == 0)
    # The floor keeps sigma = 0 from dividing by zero.
    sharpness = -0.5 * (offset / sigma[..., None].clamp_min(1e-6)).square()  # (B|1, W) or (B|1, H, W)
    sharpness = sharpness[:, None] if sigma.dim() == 1 else sharpness
    return sharpness[:, :, None].masked_fill(~neighbors, -torch.inf).softmax(dim=-1)


def blur_keys(key: torch.Tensor, sigma: torch.Tensor, neighbors: torch.Tensor) -> torch.Tensor:
    """Blends each key with its visible neighbors. Attention over the result equals attention with blurred scores.

    Args:
        key: `(B, Hkv, K, D)`, after rotary embedding.
        sigma: `(B|1,)` or `(B|1, H)`, standard deviations in tokens, `>= 0`.
        neighbors: boolean `(B|1, H|1, K, W)`, `W` odd. With one mask or sigma per query head the keys are expanded to
            `H` heads first.

    Returns:
        `(B, Hkv, K, D)` in the key's dtype (`(B, H, K, D)` if expanded); accumulated in at least float32.

    Source: arXiv 2504.12088, variant 2, with the window renormalized over the visible neighbors.

    Example:

    >>> from hf_attentiondrop.functional import visible_neighbors
    >>> key = torch.tensor([0.0, 1.0, 0.0]).view(1, 1, 3, 1)
    >>> all_neighbors = visible_neighbors(
    ...     None, width=3, is_causal=False, is_cross=False, query_length=3, key_length=3, device=key.device
    ... )
    >>> blur_keys(key, torch.tensor([1.0]), all_neighbors).flatten()
    tensor([0.3775, 0.4519, 0.3775])
    """
    num_heads = max(neighbors.shape[1], sigma.shape[1] if sigma.dim() > 1 else 1)
    if num_heads > key.shape[1]:
        key = expand_heads(key, num_heads)
    dtype = torch.promote_types(key.dtype, torch.float32)
    weights = gaussian_window(sigma.to(dtype), neighbors).unsqueeze(-1)  # (B, H|1, K, W, 1)
    return _Blend.apply(key, weights).to(key.dtype)


class _Blend(torch.autograd.Function):
    """Accumulates weighted neighbors in place, forward and backward; autograd would save a padded copy per shift."""

    @staticmethod
    def forward(ctx: Any, key: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weights)
        ctx.dtype = key.dtype
        key = key.to(weights.dtype)
        blurred = torch.zeros_like(key)
        for weight, keys, shifted in _shifts(weights, key.shape[-2]):
            blurred[..., keys, :].addcmul_(weight, key[..., shifted, :])
        return blurred

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weights,) = ctx.saved_tensors
        of_key = torch.zeros_like(gradient)
        for weight, keys, shifted in _shifts(weights, gradient.shape[-2]):
            of_key[..., shifted, :].addcmul_(weight, gradient[..., keys, :])
        return of_key.to(ctx.dtype), None


def _shifts(weights: torch.Tensor, length: int) -> Iterator[tuple[torch.Tensor, slice, slice]]:
    """For each offset: its weights, the keys that have a neighbor there, and those neighbors."""
    half = weights.shape[-2] // 2
    for offset in range(-min(half, length - 1), min(half, length - 1) + 1):
        keys = slice(max(0, -offset), length - max(0, offset))
        shifted = slice(max(0, offset), length - max(0, -offset))
        yield weights[..., keys, half + offset, :], keys, shifted
