"""A learned attention sink: `exp(s)` in the denominator of the softmax and nothing in the numerator, one `s` per head.

The sink lets a query attend to no key at all. It is one more key with a value of zero. Its score needs no bias matrix:
it is one more component of the queries, which only the sink's key multiplies. Any fused attention works on the result.
"""

import torch
from torch.nn import functional as F


def prepend_sink(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink: torch.Tensor, *, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value with the sink as key 0. Slice off the last component of the attention output.

    Args:
        query: `(B, H, Q, D)`.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, D)`.
        sink: `s`, `(H,)`, scores.
        scaling: factor of the scores.

    Returns:
        Query `(B, H, Q, D + 1)`, key and value `(B, Hkv, K + 1, D + 1)`.

    Source: the learned sinks in the comparison of arXiv 2602.23057.

    Example:

    >>> query, key, value = (torch.ones(1, 1, 1, 1) for _ in range(3))
    >>> query, key, value = prepend_sink(query, key, value, torch.zeros(1), scaling=1.0)
    >>> F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :1]  # e / (e + 1)
    tensor([[[[0.7311]]]])
    """
    score = (sink / scaling).to(query.dtype).view(1, -1, 1, 1).expand(*query.shape[:-1], 1)
    sink_key = F.pad(key.new_ones(1), (key.shape[-1], 0)).expand(*key.shape[:2], 1, -1)
    key = torch.cat([sink_key, F.pad(key, (0, 1))], dim=-2)
    return torch.cat([query, score], dim=-1), key, F.pad(value, (0, 1, 1, 0))


def prepend_sink_to_mask(mask: torch.Tensor) -> torch.Tensor:
    """A boolean or additive mask with one more column at the front, in which every query sees the sink.

    Example:

    >>> prepend_sink_to_mask(torch.tensor([[[[False, True]]]]))
    tensor([[[[ True, False,  True]]]])
    """
    return F.pad(mask, (1, 0), value=mask.dtype == torch.bool)
