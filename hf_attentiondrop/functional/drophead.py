"""DropHead (EMNLP Findings 2020): which heads are dropped, and the scale of the others."""

import torch
from torch import Tensor


def sample_head_scale(
    batch_size: int,
    num_heads: int,
    *,
    p: float | Tensor,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Samples a factor for the output of every head, zero for heads that are dropped.

    Args:
        batch_size: `B`.
        num_heads: `H`.
        p: probability in [0, 1] with which a head is dropped, for each sample independently; `(H,)` for one per head.
        dtype: that of the result.
        device: device to sample on.

    Returns:
        `(B, H)`: 0 for dropped heads and `H / (heads kept)` for the others. At least one head of every sample
        is kept; where all would be dropped, it is one chosen uniformly. Takes `B · H` uniform numbers from the global
        generator.

    Source: Zhou et al., Scheduled DropHead, EMNLP Findings 2020 (arXiv 2004.13342), section 3.

    Example:

    >>> sample_head_scale(1, 4, p=0.0)
    tensor([[1., 1., 1., 1.]])
    >>> sample_head_scale(1, 4, p=1.0).sum()
    tensor(4.)
    """
    uniform = torch.rand(batch_size, num_heads, dtype=torch.float32, device=device)
    if isinstance(p, Tensor) and p.dim() > 0:
        uniform, p = torch.where(p > 0, uniform / p, torch.inf), 1.0
    # Where all numbers are below p, the largest of them belongs to each head with equal probability.
    kept = uniform >= uniform.amax(dim=-1, keepdim=True).clamp(max=p)
    return kept.to(dtype) * (num_heads / kept.sum(dim=-1, keepdim=True, dtype=dtype))
