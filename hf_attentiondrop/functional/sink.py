"""A learned attention sink: `exp(s)` in the denominator of the softmax and nothing in the numerator, one `s` per head.

A query may give its weight to no key at all. The sink enters as one more key with a value of zero. Its score needs no
bias matrix: it sits in one more component of the queries, which only the sink's key reads. Any fused attention can
follow.
"""

import torch
from torch.nn import functional as F


def prepend_sink(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink: torch.Tensor, *, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value with the sink as key 0. The last component of the attention output is to be cut off.

    Args:
        query: `(B, H, Q, D)`.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, D)`.
        sink: `s`, `(H,)`, scores.
        scaling: the factor of the scores.

    Returns:
        `(B, H, Q, D + 1)` and twice `(B, Hkv, K + 1, D + 1)`.

    Source: the learned sinks that arXiv 2602.23057 compares with.

    Example:

    >>> query, key, value = (torch.ones(1, 1, 1, 1) for _ in range(3))
    >>> query, key, value = prepend_sink(query, key, value, torch.zeros(1), scaling=1.0)
    >>> F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :1]  # e / (e + 1)
    tensor([[[[0.7311]]]])
    """
    score = (sink / scaling).to(query.dtype).view(1, -1, 1, 1).expand(*query.shape[:-1], 1)
    reader = F.pad(key.new_ones(1), (key.shape[-1], 0)).expand(*key.shape[:2], 1, -1)
    key = torch.cat([reader, F.pad(key, (0, 1))], dim=-2)
    return torch.cat([query, score], dim=-1), key, F.pad(value, (0, 1, 1, 0))


def show_sink(mask: torch.Tensor) -> torch.Tensor:
    """A mask, boolean or additive, with a first column in which every query sees the sink.

    Example:

    >>> show_sink(torch.tensor([[[[False, True]]]]))
    tensor([[[[ True, False,  True]]]])
    """
    return F.pad(mask, (1, 0), value=mask.dtype == torch.bool)
