"""Memory-efficient divergences between two passes over the same items.

The logits of the two passes come stacked on the first dimension, `(B + n, ..., C)` with `C` classes: rows `0 … B-1`
are the first pass, rows `B … B+n-1` the second one, as one forward over a concatenated batch returns them. `n` is `B`
if every row runs twice.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


# Elements of one pass per chunk: few enough for a CPU cache, enough to keep a GPU busy.
CHUNK_ELEMENTS = {"cpu": 2**17, "cuda": 2**22}
# Divergence up to which two passes count as equal: rounding stays below it, dropout far above, even at initialization.
NO_DIVERGENCE = 1e-9


class Divergence(NamedTuple):
    """A divergence of two categorical distributions, and its gradient.

    Both functions take the probabilities `p` and `q` of the two passes and `d = log p - log q`, each `(rows, C)`.

    Args:
        value: Returns the divergences, `(rows,)`.
        gradient: Returns the gradients with respect to the logits of `p` and of `q`, each `(rows, C)`; may overwrite
            `d`.
    """

    value: Callable[[Tensor, Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _through_softmax(p: Tensor, score: Tensor) -> Tensor:
    """`p * (score - E_p[score])`, the gradient with respect to the logits of `p`; overwrites `score`."""
    return score.sub_((p * score).sum(-1, keepdim=True)).mul_(p)


def _kl(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    return (p * d).sum(-1)


def _kl_gradient(p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return _through_softmax(p, d), q - p


def _symmetric_kl(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    return (p - q).mul_(d).sum(-1).mul_(0.5)


def _symmetric_kl_gradient(p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    difference = p - q
    of_q = _through_softmax(q, d.clone()).add_(difference).mul_(-0.5)
    of_p = _through_softmax(p, d).add_(difference).mul_(0.5)
    return of_p, of_q


def _log_ratios_to_mixture(d: Tensor) -> tuple[Tensor, Tensor]:
    """`log(p / m)` and `log(q / m)` for the mixture `m = (p + q) / 2`.

    With `x = d / 2` they are `x - log cosh x` and `-x - log cosh x`. The form `log cosh x = log1p(2 sinh²(x / 2))` is
    precise near 0, where `p` and `q` are nearly the same; beyond |x| = 20 the smaller probability is negligible.
    """
    x = (0.5 * d).clamp_(-20.0, 20.0)
    log_cosh = torch.sinh(0.5 * x).square_().mul_(2.0).log1p_()
    return x - log_cosh, x.neg_().sub_(log_cosh)


def _js(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    of_p, of_q = _log_ratios_to_mixture(d)
    return of_p.mul_(p).add_(of_q.mul_(q)).sum(-1).mul_(0.5)


def _js_gradient(p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    of_p, of_q = _log_ratios_to_mixture(d)
    return _through_softmax(p, of_p).mul_(0.5), _through_softmax(q, of_q).mul_(0.5)


DIVERGENCES: dict[str, Divergence] = {
    "symmetric_kl": Divergence(_symmetric_kl, _symmetric_kl_gradient),
    "kl": Divergence(_kl, _kl_gradient),
    "js": Divergence(_js, _js_gradient),
}


PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


def _distributions(logits: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`p`, `q` and `d = log p - log q` of the pairs `(2, N)` of rows of `logits` `(rows, C)`, in float32 at least."""
    log_probs = logits[pairs].log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    # -inf in both passes (a masked vocabulary entry) gives NaN, which becomes 0. An infinite difference becomes the
    # largest finite number: 0 times it is 0, and any other probability makes the divergence huge.
    d = (log_probs[0] - log_probs[1]).nan_to_num_(0.0)
    p, q = log_probs.exp_()
    return p, q, d


def _pairs(logits: Tensor, rows: Tensor | None) -> Tensor:
    """The same items in both passes, `(2, N)`, as indices into the items of `logits` `(B + n, I, C)`."""
    items = torch.arange(logits.shape[0] * logits.shape[1], device=logits.device).view(logits.shape[:2])
    if rows is None:
        return items.view(2, -1)
    return torch.stack((items[rows], items[len(items) - len(rows) :])).flatten(1)


def _chunks(logits: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Indices of the pairs with nonzero weight, in chunks."""
    size = CHUNK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS["cuda"]) // logits.shape[-1]
    return weights.nonzero().squeeze(-1).split(max(1, size))


class _WeightedDivergence(torch.autograd.Function):
    """Sum over pairs of weight times divergence. Saves only the logits and allocates one buffer for their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weights: Tensor, pairs: Tensor, divergence: Divergence) -> Tensor:
        ctx.save_for_backward(logits, weights, pairs)
        ctx.divergence = divergence
        total = weights.new_zeros(())
        for chunk in _chunks(logits, weights):
            total += (divergence.value(*_distributions(logits, pairs[:, chunk])) * weights[chunk]).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        logits, weights, pairs = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for chunk in _chunks(logits, weights):
            scale = (grad_output * weights[chunk]).unsqueeze(-1)
            both = pairs[:, chunk]
            for rows, of_rows in zip(both, ctx.divergence.gradient(*_distributions(logits, both)), strict=True):
                gradient[rows] = of_rows.mul_(scale).to(gradient.dtype)
        return gradient, None, None, None


def consistency_loss(
    logits: Tensor,
    weights: Tensor | None = None,
    divergence: str = "symmetric_kl",
    problem_type: str = "single_label_classification",
    rows: Tensor | None = None,
) -> Tensor:
    """The divergence between two passes over the same items, as a weighted mean over the items.

    Let `P1` and `P2` be the distributions of the two passes. The divergences are `"symmetric_kl"`,
    ½[KL(P1‖P2) + KL(P2‖P1)], `"kl"`, KL(P1‖P2), and `"js"`, ½[KL(P1‖M) + KL(P2‖M)] with M = ½(P1 + P2). The gradient
    flows into both passes. The computation runs in float32 or float64, on chunks of rows: apart from the logits and
    their gradient it needs only a few megabytes.

    Args:
        logits (`torch.Tensor` of shape `(B + n, ..., C)`):
            Logits of both passes, stacked on the first dimension: `B` rows, then the `n` rows that ran again, by
            default all. An entry that is -inf in both passes contributes 0.
        weights (`torch.Tensor` of shape `(n, ...)`, *optional*):
            Weight of each item, ≥ 0; a boolean mask works. Items of weight 0 are skipped, and if all weights are 0
            the result is 0. By default all items have the same weight. No gradient flows into the weights.
        divergence (`str`, defaults to `"symmetric_kl"`):
            `"symmetric_kl"`, `"kl"` or `"js"`.
        problem_type (`str`, defaults to `"single_label_classification"`):
            As in Transformers' configs. With `"single_label_classification"` every vector of `C` logits is an item,
            with a softmax. With `"multi_label_classification"` every row is an item, and the divergences of its
            independent labels are summed. With `"regression"` every row is an item, and the mean squared difference
            replaces the divergence.
        rows (`torch.Tensor` of shape `(n,)`, *optional*):
            Which of the `B` rows ran again, without repetition, in the order of the second pass. By default all.

    Returns:
        `torch.Tensor`: a scalar, float32 (float64 for float64 logits), in nats except for regression.

    Raises:
        ValueError: for an unknown `divergence` or `problem_type`, and for shapes that do not fit.

    Source: R-Drop (arXiv 2106.14448), equation 2; Consistency-Regularized AttentionDrop (arXiv 2504.12088).

    Example:

    >>> import torch
    >>> first, second = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> consistency_loss(torch.cat((first, second)))
    tensor(1.5232)
    >>> consistency_loss(torch.cat((first, second)), divergence="js")
    tensor(0.3278)
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"`divergence` must be one of {tuple(DIVERGENCES)}, got {divergence!r}.")
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"`problem_type` must be one of {PROBLEM_TYPES}, got {problem_type!r}.")
    if logits.dim() < 2 or (rows is None and logits.shape[0] % 2):
        raise ValueError(
            f"`logits` must stack two passes as (2B, ..., C), got shape {tuple(logits.shape)}: without an even first "
            "dimension there are no two halves to compare. Stack them with torch.cat((first, second)), or pass the "
            "`rows` of the second pass."
        )
    rows = None if rows is None else rows.to(logits.device)
    repeated = logits.shape[0] // 2 if rows is None else len(rows)
    is_categorical = problem_type == "single_label_classification"
    items = (repeated, *logits.shape[1:-1]) if is_categorical else (repeated,)
    if weights is None:
        weights = torch.ones(items, device=logits.device)
    if weights.shape != items:
        raise ValueError(
            f"`weights` must have one entry per item, shape {items}, got {tuple(weights.shape)}: the two passes of "
            f"logits {tuple(logits.shape)} share the weight of an item. Pass a mask or weights of that shape."
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weights = weights.detach().to(logits.device, dtype)
    weights = weights / weights.sum().clamp(min=torch.finfo(dtype).tiny)
    if problem_type == "regression":
        values = logits.to(dtype).flatten(1)
        first, second = values.chunk(2) if rows is None else (values[rows], values[len(values) - repeated :])
        return ((first - second).square().mean(-1) * weights).sum()
    if problem_type == "multi_label_classification":
        # A Bernoulli distribution with logit z is the categorical one with logits (z, 0).
        logits = torch.stack((logits, torch.zeros_like(logits)), dim=-1)
        weights = weights.view(repeated, *[1] * (logits.dim() - 2)).expand(repeated, *logits.shape[1:-1])
    logits = logits.reshape(len(logits), math.prod(logits.shape[1:-1]), logits.shape[-1])
    return _WeightedDivergence.apply(
        logits.flatten(0, 1), weights.reshape(-1), _pairs(logits, rows), DIVERGENCES[divergence]
    )
