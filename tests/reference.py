"""Reference implementations on full score matrices, as close to the formulas as possible; float64 in the tests."""

import math
from fractions import Fraction

import torch
from torch.nn import functional as F


def final_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    return scores if bias is None else scores + bias


def attend(
    scores: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the visible keys, zeros for queries that see none; `visible` is `(B, H, Q, K)`."""
    fully_masked = ~visible.any(dim=-1, keepdim=True)
    powers = scores.masked_fill(~visible, -torch.inf).masked_fill(fully_masked, 0.0)
    powers = (powers - powers.amax(dim=-1, keepdim=True).detach()).exp()
    total = powers.sum(dim=-1, keepdim=True)
    if sinks is not None:
        visible_scores = scores.masked_fill(~visible, -torch.inf).masked_fill(fully_masked, 0.0)
        highest = visible_scores.amax(dim=-1, keepdim=True).detach()
        total = total + (sinks.view(1, -1, 1, 1) - highest).exp()
    weights = F.dropout(powers / total, p=dropout)
    weights = weights.masked_fill(fully_masked, 0.0)
    value = value.repeat_interleave(scores.shape[1] // value.shape[1], dim=1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value), weights


def masked_scores(
    scores: torch.Tensor, visible: torch.Tensor, uniform: torch.Tensor, *, p: float, k: float, fill: str
) -> torch.Tensor:
    """Hard: which scores are masked, row by row; `uniform` `(B, H, Q, k)` has one random number per rank."""
    masked = torch.zeros_like(visible)
    for row in torch.cartesian_prod(*map(torch.arange, scores.shape[:-1])).tolist():
        row = tuple(row)
        ranked = [j for j in scores[row].argsort(descending=True).tolist() if visible[row][j]]
        candidates = min(k, len(ranked)) if k >= 1 else math.ceil(Fraction(str(k)) * len(ranked))
        chosen = [rank for rank in range(candidates) if uniform[row][rank] < p]
        if fill == "mask" and chosen and len(chosen) == len(ranked):
            chosen.remove(max(chosen, key=lambda rank: uniform[row][rank].item()))
        for rank in chosen:
            masked[(*row, ranked[rank])] = True
    return masked


def with_masked_scores(
    scores: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor, fill: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hard: scores and visibility after masking."""
    if fill == "mask":
        return scores, visible & ~masked
    return torch.where(masked, torch.zeros_like(scores), scores), visible


def dropped_keys(visible: torch.Tensor, uniform: torch.Tensor, p: float) -> torch.Tensor:
    """DropKey: the dropped keys, row by row; `uniform` `(B, H, Q|1, K)` holds the number drawn for each key."""
    dropped, uniform = torch.zeros_like(visible), uniform.expand(visible.shape)
    for row in torch.cartesian_prod(*map(torch.arange, visible.shape[:-1])).tolist():
        row = tuple(row)
        keys = visible[row].nonzero().flatten().tolist()
        below = [key for key in keys if uniform[row][key] < p]
        if below and len(below) == len(keys):
            below.remove(max(below, key=lambda key: uniform[row][key].item()))
        for key in below:
            dropped[(*row, key)] = True
    return dropped


def blurred_scores(scores: torch.Tensor, own_view: torch.Tensor, sigma: torch.Tensor, width: int) -> torch.Tensor:
    """Blur: every content score blended with those of the neighbours that its key may attend to, itself included.

    `own_view` is `(B, H, K, K)`: which keys the token of each key may attend to.
    """
    half, length = width // 2, scores.shape[-1]
    blurred = scores.clone()
    for sample in range(scores.shape[0]):
        window = {t: torch.exp(-0.5 * (t / sigma[sample].clamp_min(1e-6)) ** 2) for t in range(-half, half + 1)}
        for head in range(scores.shape[1]):
            for j in range(length):
                seen = [t for t in window if 0 <= j + t < length and (t == 0 or own_view[sample, head, j, j + t])]
                total = sum(window[t] for t in seen)
                blurred[sample, head, :, j] = sum(window[t] / total * scores[sample, head, :, j + t] for t in seen)
    return blurred


def affine_scales(states: torch.Tensor, weight: torch.Tensor, *, activation: str, init: str) -> torch.Tensor:
    """`(B, H, Q, 1)` from states `(B, Q, hidden_size)` and weights `(H, hidden_size)`."""
    logits = torch.einsum("bqx,hx->bhq", states, weight).unsqueeze(-1)
    scale = torch.sigmoid(logits) if activation == "sigmoid" else torch.clamp(0.1 * logits + 0.5, 0, 1)
    return scale if init == "paper" else 1 + scale - 0.5


def affine_weights(
    weights: torch.Tensor, visible: torch.Tensor, alpha: torch.Tensor, average: torch.Tensor, bias_length: str
) -> torch.Tensor:
    """`alpha * weights + beta` on visible keys, `visible` `(B, H, Q, K)` and `average` `(H,)`."""
    length = visible.sum(dim=-1, keepdim=True).clamp_min(1) if bias_length == "visible" else weights.shape[-1]
    beta = (average.to(weights.dtype).view(1, -1, 1, 1) - alpha) / length
    return torch.where(visible, alpha * weights + beta, 0.0)
