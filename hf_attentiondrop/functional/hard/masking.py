"""Hard Attention Masking (AttentionDrop, arXiv 2504.12088, variant 1)."""

import math

import torch


FILLS = ("mask", "zero")


def sample_masked_scores(
    scores: torch.Tensor, visible: torch.Tensor | None, *, p: float | torch.Tensor, k: float, fill: str = "mask"
) -> torch.Tensor:
    """Samples which of each query's `k` highest visible scores are masked, each with probability `p`.

    Args:
        scores: `(B, H, Q, K)`, final scores (see [`~functional.attention_scores`]), preferably in float32: half
            precision rounds different scores to ties.
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all. Only visible keys are sampled.
        p, k, fill: as in [`sample_masked_ranks`].

    Returns:
        Boolean `(B, H, Q, K)`, true where masked.

    Example:

    >>> sample_masked_scores(torch.tensor([[[[3.0, 1.0, 2.0]]]]), None, p=1.0, k=2)
    tensor([[[[ True, False,  True]]]])
    """
    num_visible = None
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
        num_visible = visible.sum(dim=-1, keepdim=True)
    masked_ranks = sample_masked_ranks(scores.shape, num_visible, p=p, k=k, fill=fill, device=scores.device)
    index, is_masked = select_top_scores(scores, masked_ranks)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, is_masked)


def sample_masked_ranks(
    shape: torch.Size,
    num_visible: torch.Tensor | None,
    *,
    p: float | torch.Tensor,
    k: float,
    fill: str = "mask",
    device: torch.device | None = None,
) -> torch.Tensor:
    """Samples which of the `k` highest ranks are masked, each with probability `p`. It takes no scores.

    Args:
        shape: shape of the scores, `(B, H, Q, K)`.
        num_visible: number of visible keys of each query, `(B|1, H|1, Q|1, 1)`; `None` if all are visible.
        p: mask probability in [0, 1]; a tensor `(H, 1, 1)` for one per head.
        k: number of candidates in a row, at least 1; below 1, the fraction of the row's visible keys, rounded up.
        fill: with `"mask"` a row that would lose every visible key keeps one of them, drawn uniformly.
        device: device of the result.

    Returns:
        Boolean `(B, H, Q, k)`, with the `k` of a row that sees all keys: true where the visible score of that rank is
        masked, from the highest down. Ranks count visible scores only; ranks beyond a row's candidates are arbitrary.
        Draws one uniform number per rank from the global generator.

    Example:

    >>> sample_masked_ranks((1, 1, 2, 4), torch.tensor([4, 2]).view(1, 1, 2, 1), p=1.0, k=2).sum(dim=-1)
    tensor([[[2, 1]]])
    """
    *rows, num_keys = shape
    num_ranks = num_candidates(k, num_keys)
    uniform = torch.rand(*rows, num_ranks, dtype=torch.float32, device=device)
    is_masked = uniform < p
    rank = torch.arange(num_ranks, device=device)
    limit: int | torch.Tensor = num_ranks
    if k < 1 and num_visible is not None:
        limit = num_candidates_per_row(k, num_visible)
        is_masked = is_masked & (rank < limit)
    if fill == "zero" or (num_visible is None and num_ranks < num_keys):
        return is_masked
    num_in_row: int | torch.Tensor = num_keys if num_visible is None else num_visible
    # If all numbers of a row are below p, any of its ranks has the highest one with equal probability.
    highest, kept = uniform.masked_fill(rank >= num_in_row, -1.0).max(dim=-1, keepdim=True)
    loses_all = (highest < p) & (num_in_row <= limit)
    return is_masked & ~(loses_all & (rank == kept))


def num_candidates(k: float, num_keys: int) -> int:
    """Number of a row's highest scores that can be masked: `k`, or below 1 that fraction of the keys, rounded up.

    >>> num_candidates(5, 3), num_candidates(0.1, 30)
    (3, 3)
    """
    return min(int(k), num_keys) if k >= 1 else math.ceil(num_keys * _fraction(k))


def num_candidates_per_row(k: float, num_visible: torch.Tensor) -> torch.Tensor:
    """[`num_candidates`] for `k` below 1 and rows that see different numbers of keys, as float64.

    >>> num_candidates_per_row(0.1, torch.tensor([31, 1, 0]))
    tensor([4., 1., 0.], dtype=torch.float64)
    """
    return torch.ceil(num_visible.double() * _fraction(k))


def _fraction(k: float) -> float:
    # 0.1 * 30 is slightly above 3 in floating point.
    return k * (1 - 1e-12)


def select_top_scores(scores: torch.Tensor, masked_ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the keys of the masked ranks.

    Args:
        scores: `(..., rows, K)`, -inf for masked keys.
        masked_ranks: boolean `(..., rows, k)`, see [`sample_masked_ranks`].

    Returns:
        The indices of the `k` highest scores of each row, and which of them are masked, `(..., rows, k)` both.
    """
    top = scores.topk(masked_ranks.shape[-1], dim=-1)
    return top.indices, masked_ranks & (top.values > -torch.inf)


def fill_scores(scores: torch.Tensor, index: torch.Tensor, is_masked: torch.Tensor, fill: float) -> torch.Tensor:
    """Replaces the masked scores that [`select_top_scores`] found by a number, in place."""
    return scores.scatter_(-1, index, scores.gather(-1, index).masked_fill(is_masked, fill))


def mask_top_scores(
    scores: torch.Tensor,
    visible: torch.Tensor | None = None,
    *,
    p: float | torch.Tensor = 0.1,
    k: float = 5,
    fill: str = "mask",
) -> torch.Tensor:
    """Applies Hard Attention Masking to a materialized score matrix.

    Args:
        scores: `(B, H, Q, K)`, final scores.
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all.
        p: mask probability in [0, 1].
        k: candidates per row, at least 1; below 1, the fraction of each row's visible keys, rounded up.
        fill: `"mask"` replaces a masked score by -inf, which drops the key and renormalizes the other weights; a row
            that would lose every visible key keeps one of them, drawn uniformly. `"zero"` replaces it by 0, the
            paper's formula `L' = M·L`: this *raises* the weight of a key whose score was negative, and it depends on
            a constant shift of the scores.

    Returns:
        `(B, H, Q, K)`: masked scores replaced, -inf for keys that are not visible. No gradient flows into either.

    Raises:
        ValueError: if `fill` is neither `"mask"` nor `"zero"`.

    Source: arXiv 2504.12088, Hard Attention Masking.

    Example:

    >>> mask_top_scores(torch.tensor([[[[3.0, 1.0, 2.0]]]]), p=1.0, k=1)
    tensor([[[[-inf, 1., 2.]]]])
    """
    if fill not in FILLS:
        raise ValueError(f"`fill` must be one of {FILLS}, got {fill!r}: it replaces the masked scores.")
    is_masked = sample_masked_scores(scores.detach(), visible, p=p, k=k, fill=fill)
    scores = scores.masked_fill(is_masked, -torch.inf if fill == "mask" else 0.0)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)
