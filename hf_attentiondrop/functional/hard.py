"""Hard Attention Masking (AttentionDrop, arXiv 2504.12088, variant 1)."""

import torch


FILLS = ("mask", "zero")


def draw_hits(
    scores: torch.Tensor, visible: torch.Tensor | None, *, p: float | torch.Tensor, k: int, fill: str = "mask"
) -> torch.Tensor:
    """Draws which of each query's `k` highest visible scores are hit, each with probability `p`.

    Args:
        scores: `(B, H, Q, K)`, final scores (see [`~functional.attention_scores`]), best in float32: ties in half
            precision are broken anyhow.
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all. Hidden keys are never hit.
        p: hit probability in [0, 1].
        k: how many scores of a row are candidates, at least 1.
        fill: with `"mask"` a row that would lose every visible key loses none, so its weights stay a distribution.

    Returns:
        Boolean `(B, H, Q, K)`, true where hit. Draws `(B, H, Q, min(k, K))` uniform numbers from the global generator.

    Example:

    >>> draw_hits(torch.tensor([[[[3.0, 1.0, 2.0]]]]), None, p=1.0, k=2)
    tensor([[[[ True, False,  True]]]])
    """
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    drawn = torch.rand(*scores.shape[:-1], min(k, scores.shape[-1]), device=scores.device) < p
    num_visible = scores.shape[-1] if visible is None else visible.sum(dim=-1, keepdim=True)
    index, hit = hit_top_scores(scores, drawn, num_visible, fill=fill)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, hit)


def hit_top_scores(
    scores: torch.Tensor, drawn: torch.Tensor, num_visible: torch.Tensor | int, *, fill: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which scores a draw hits.

    Args:
        scores: `(..., rows, K)`, hidden ones at -inf.
        drawn: boolean `(..., rows, k)`, true where the score of that rank is to be hit, from the highest down: so it
            means the same scores however many hidden ones stand beside them.
        num_visible: how many keys each row sees, `(..., rows, 1)`.
        fill: as in [`draw_hits`].

    Returns:
        The indices of the `k` highest scores of each row, and which of them are hit: `(..., rows, k)` both.
    """
    top = scores.topk(drawn.shape[-1], dim=-1)
    hit = drawn & (top.values > -torch.inf)
    if fill == "mask":
        hit = hit & (hit.sum(dim=-1, keepdim=True) < num_visible)
    return top.indices, hit


def fill_hits(scores: torch.Tensor, index: torch.Tensor, hit: torch.Tensor, fill: float) -> torch.Tensor:
    """Puts a number in the place of the scores that [`hit_top_scores`] found hit, in place."""
    return scores.scatter_(-1, index, scores.gather(-1, index).masked_fill(hit, fill))


def mask_top_scores(
    scores: torch.Tensor,
    visible: torch.Tensor | None = None,
    *,
    p: float | torch.Tensor = 0.1,
    k: int = 5,
    fill: str = "mask",
) -> torch.Tensor:
    """Perturbs scores by Hard Attention Masking: the definition, on a materialised score matrix.

    Args:
        scores: `(B, H, Q, K)`, final scores.
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all.
        p: hit probability in [0, 1].
        k: candidates per row, at least 1.
        fill: `"mask"` replaces a hit score by -inf: the key is dropped and the others are renormalised. `"zero"`
            replaces it by 0, the paper's formula `L' = M·L`: this *raises* the weight of a key whose score was
            negative, and it depends on a constant shift of the scores.

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
