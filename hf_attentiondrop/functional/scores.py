"""Attention scores before the softmax, in at least float32."""

import torch


def expand_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Repeats key/value heads until there is one for every query head: `(B, Hkv, K, D)` to `(B, H, K, D)`.

    Example:

    >>> expand_heads(torch.zeros(1, 2, 3, 4), num_heads=6).shape
    torch.Size([1, 6, 3, 4])
    """
    repeats = num_heads // states.shape[1]
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Final scores: scaled products of queries and keys, then softcap, then bias. No mask is applied except `bias`.

    Args:
        query: `(B, H, Q, D)`.
        key: `(B, Hkv, K, D)`.
        scaling: factor of the products; `D ** -0.5` by default.
        softcap: `softcap * tanh(scores / softcap)` before the bias, as in Gemma 2.
        bias: `(B|1, H|1, Q, K)`, added.

    Returns:
        `(B, H, Q, K)` in float32, or float64 for float64 inputs: half precision would round different scores to ties.

    Example:

    >>> attention_scores(torch.ones(1, 4, 2, 16), torch.ones(1, 2, 3, 16))[0, 0, 0]
    tensor([4., 4., 4.])
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Autocast would run the product in half precision.
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(dtype) * scaling) @ expand_heads(key, query.shape[1]).to(dtype).transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if bias is None else scores + bias.to(dtype)
