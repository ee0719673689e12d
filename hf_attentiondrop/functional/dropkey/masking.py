"""DropKey (CVPR 2023): which keys each query keeps, on materialized masks."""

import torch
from torch import Tensor

from ..visibility import visible_keys


AXES = ("score", "column")


@torch.no_grad()
def sample_key_mask(
    shape: torch.Size,
    mask: Tensor | None = None,
    *,
    p: float | Tensor,
    axis: str = "score",
    is_causal: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Samples an attention mask that drops each visible key with probability `p` and leaves every row at least one.

    Args:
        shape: shape of the scores, `(B, H, Q, K)`.
        mask: boolean (true = may attend) or additive, `(B|1, H|1, Q|1, K)`, see [`~functional.visible_keys`]; `None`
            leaves causality alone to decide.
        p: drop probability in [0, 1], a number or a tensor `()`, or `(H, 1, 1)` for one per head.
        axis: `"score"` draws for every query and key, `"column"` once per key, sample and head for all queries.
        is_causal: without a mask, query `i` sees keys `0..i`.
        device: device of the result.

    Returns:
        Boolean `(B, H, Q, K)`, or `(B, H, 1, K)` where all queries see and keep the same keys: true where a key is
        visible and kept. A row that would lose all its visible keys keeps one of them, drawn uniformly. Draws one
        uniform number per score, or per key, sample and head, from the global generator.

    Raises:
        ValueError: if `axis` is neither `"score"` nor `"column"`.

    Source: DropKey (CVPR 2023).

    Example:

    >>> sample_key_mask((1, 1, 4, 9), p=1.0).sum(dim=-1)
    tensor([[[1, 1, 1, 1]]])
    >>> sample_key_mask((1, 1, 4, 9), p=0.5, axis="column").shape
    torch.Size([1, 1, 1, 9])
    """
    check_axis(axis)
    batch_size, num_heads, num_queries, num_keys = shape
    lengths = {"query_length": num_queries, "key_length": num_keys, "device": device}
    visible = visible_keys(mask, is_causal=is_causal, **lengths)
    rows = num_queries if axis == "score" else 1
    uniform = torch.rand(batch_size, num_heads, rows, num_keys, dtype=torch.float32, device=device)
    if visible is None:
        highest = uniform.amax(dim=-1, keepdim=True)
    elif axis == "column" and mask is None:
        highest = _running_maximum(uniform, num_queries)
    else:
        highest = uniform.where(visible, -1.0).amax(dim=-1, keepdim=True)
    # Where all numbers of a row are below p, any of its keys has the highest one with equal probability.
    kept = uniform >= highest.clamp_max(p)
    return kept if visible is None else kept & visible


def check_axis(axis: str) -> None:
    """Raises a `ValueError` if the axis is unknown."""
    if axis not in AXES:
        raise ValueError(f"`axis` must be one of {AXES}, got {axis!r}: it decides which scores share a draw.")


def _running_maximum(uniform: Tensor, num_queries: int) -> Tensor:
    """Highest number among the keys that each causal query sees: `(B, H, 1, K)` to `(B, H, Q, 1)`."""
    last_key = torch.arange(num_queries, device=uniform.device).clamp_max(uniform.shape[-1] - 1)
    return uniform.cummax(dim=-1).values[..., last_key].mT
