"""Hard Attention Masking (AttentionDrop, arXiv 2504.12088, variant 1)."""

import math

import torch


FILLS = ("mask", "zero")


def draw_hits(
    scores: torch.Tensor, visible: torch.Tensor | None, *, p: float | torch.Tensor, k: float, fill: str = "mask"
) -> torch.Tensor:
    """Draws which of each query's `k` highest visible scores are hit, each with probability `p`.

    Args:
        scores: `(B, H, Q, K)`, final scores (see [`~functional.attention_scores`]), best in float32: ties in half
            precision are broken anyhow.
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all. Hidden keys are never hit.
        p, k, fill: as in [`draw_ranks`].

    Returns:
        Boolean `(B, H, Q, K)`, true where hit.

    Example:

    >>> draw_hits(torch.tensor([[[[3.0, 1.0, 2.0]]]]), None, p=1.0, k=2)
    tensor([[[[ True, False,  True]]]])
    """
    num_visible = None
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
        num_visible = visible.sum(dim=-1, keepdim=True)
    drawn = draw_ranks(scores.shape, num_visible, p=p, k=k, fill=fill, device=scores.device)
    index, hit = hit_top_scores(scores, drawn)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, hit)


def draw_ranks(
    shape: torch.Size,
    num_visible: torch.Tensor | None,
    *,
    p: float | torch.Tensor,
    k: float,
    fill: str = "mask",
    device: torch.device | None = None,
) -> torch.Tensor:
    """Draws which ranks are hit, each of the `k` highest with probability `p`: it takes no scores to know.

    Args:
        shape: that of the scores, `(B, H, Q, K)`.
        num_visible: how many keys each query sees, `(B|1, H|1, Q|1, 1)`; `None` if all see all.
        p: hit probability in [0, 1].
        k: how many scores of a row are candidates, at least 1; below 1 a share of the keys that the row sees, rounded
            up.
        fill: with `"mask"` a row that would lose every visible key keeps one of them, drawn uniformly.
        device: where to draw.

    Returns:
        Boolean `(B, H, Q, k)`, with the `k` of a row that sees all keys: true where the visible score of that rank is
        hit, from the highest down. So it means the same scores however many hidden ones stand beside them; ranks that
        a row does not have mean nothing. Draws as many uniform numbers from the global generator.

    Example:

    >>> draw_ranks((1, 1, 2, 4), torch.tensor([4, 2]).view(1, 1, 2, 1), p=1.0, k=2).sum(dim=-1)
    tensor([[[2, 1]]])
    """
    *rows, num_keys = shape
    num_ranks = num_candidates(k, num_keys)
    uniform = torch.rand(*rows, num_ranks, device=device)
    drawn = uniform < p
    rank, limit = torch.arange(num_ranks, device=device), num_ranks
    if k < 1 and num_visible is not None:
        limit = num_candidates(k, num_visible)
        drawn = drawn & (rank < limit)
    if fill == "zero" or (num_visible is None and num_ranks < num_keys):
        return drawn
    num_visible = num_keys if num_visible is None else num_visible
    # Where all were hit, their numbers are uniform below p, and the highest of them is any one's with equal chance.
    highest, spared = uniform.masked_fill(rank >= num_visible, -1.0).max(dim=-1, keepdim=True)
    loses_all = (highest < p) & (num_visible <= limit)
    return drawn & ~(loses_all & (rank == spared))


def num_candidates(k: float, num_keys: int | torch.Tensor) -> int | torch.Tensor:
    """How many of a row's highest scores can be hit: `k`, or below 1 that share of the keys, rounded up.

    >>> num_candidates(5, 3), num_candidates(0.1, 30), num_candidates(0.1, torch.tensor([31, 1, 0]))
    (3, 3, tensor([4., 1., 0.], dtype=torch.float64))
    """
    if k >= 1:
        return min(k, num_keys)
    # 0.1 * 30 is a little above 3 in floating point.
    share = k * (1 - 1e-12)
    return torch.ceil(num_keys.double() * share) if isinstance(num_keys, torch.Tensor) else math.ceil(num_keys * share)


def hit_top_scores(scores: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which scores a draw hits.

    Args:
        scores: `(..., rows, K)`, hidden ones at -inf.
        drawn: boolean `(..., rows, k)`, see [`draw_ranks`].

    Returns:
        The indices of the `k` highest scores of each row, and which of them are hit: `(..., rows, k)` both.
    """
    top = scores.topk(drawn.shape[-1], dim=-1)
    return top.indices, drawn & (top.values > -torch.inf)


def fill_hits(scores: torch.Tensor, index: torch.Tensor, hit: torch.Tensor, fill: float) -> torch.Tensor:
    """Puts a number in the place of the scores that [`hit_top_scores`] found hit, in place."""
    return scores.scatter_(-1, index, scores.gather(-1, index).masked_fill(hit, fill))


def mask_top_scores(
    scores: torch.Tensor,
    visible: torch.Tensor | None = None,
    *,
    p: float | torch.Tensor = 0.1,
    k: float = 5,
    fill: str = "mask",
) -> torch.Tensor:
    """Perturbs scores by Hard Attention Masking: the definition, on a materialised score matrix.

    Args:
        scores: `(B, H, Q, K)`, final scores.
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all.
        p: hit probability in [0, 1].
        k: candidates per row, at least 1; below 1 a share of the visible keys of each row, rounded up.
        fill: `"mask"` replaces a hit score by -inf: the key is dropped and the others are renormalised; where every
            visible key of a row was hit, one of them, drawn uniformly, is kept. `"zero"` replaces it by 0, the paper's
            formula `L' = M·L`: this *raises* the weight of a key whose score was negative, and it depends on a
            constant shift of the scores.

    Returns:
        `(B, H, Q, K)`: hit scores replaced, hidden ones -inf. No gradient flows into either.

    Raises:
        ValueError: if `fill` is neither `"mask"` nor `"zero"`.

    Source: arXiv 2504.12088, Hard Attention Masking.

    Example:

    >>> mask_top_scores(torch.tensor([[[[3.0, 1.0, 2.0]]]]), p=1.0, k=1)
    tensor([[[[-inf, 1., 2.]]]])
    """
    if fill not in FILLS:
        raise ValueError(f"`fill` must be one of {FILLS}, got {fill!r}: it decides what a hit score becomes.")
    hits = draw_hits(scores.detach(), visible, p=p, k=k, fill=fill)
    scores = scores.masked_fill(hits, -torch.inf if fill == "mask" else 0.0)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)
