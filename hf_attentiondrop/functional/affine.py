"""Affine-Scaled Attention (arXiv 2602.23057): attention weights times a learned scale, plus a compensating bias.

The weights are `α·P + β` on visible keys, with `P` the softmax, `β = (α_ma - α) / N` and `α_ma` a moving average of
`α`. The output follows from any attention output `O` as `α·O + β·Σ_j v_j`, summed over the visible values.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .prefix_sums import PrefixSums


ACTIVATIONS = ("linear_clip", "sigmoid")
INITS = ("identity", "paper")
BIAS_LENGTHS = ("visible", "keys")


def affine_scale(logits: torch.Tensor, *, activation: str = "linear_clip", init: str = "identity") -> torch.Tensor:
    """The scale `α` of every query and head.

    Args:
        logits: `W_a x`, of any shape.
        activation: `φ`, `"linear_clip"`: `clamp(0.1x + 0.5, 0, 1)`; `"sigmoid"`: the logistic function.
        init: `"identity"`: `1 + φ(logits) - φ(0)`, exactly 1 for zero logits; `"paper"`: `φ(logits)`.

    Returns:
        `α` in at least float32, in the shape of the logits: [0, 1] for `"paper"`, [0.5, 1.5] for `"identity"`.

    Raises:
        ValueError: if `activation` or `init` is not one of these.

    Source: arXiv 2602.23057; `"identity"` shifts `φ` for models pretrained without it.

    Example:

    >>> affine_scale(torch.tensor([0.0, 1.0, -9.0]))
    tensor([1.0000, 1.1000, 0.5000])
    """
    for name, choice, choices in (("activation", activation, ACTIVATIONS), ("init", init, INITS)):
        if choice not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {choice!r}: it selects the formula.")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # φ(x) - φ(0) is exactly zero at zero. φ(0) is 0.5 for both activations.
    shift = (0.1 * logits).clamp(-0.5, 0.5) if activation == "linear_clip" else logits.sigmoid() - 0.5
    return shift + (1.0 if init == "identity" else 0.5)


def affine_bias(
    alpha: torch.Tensor, alpha_average: torch.Tensor, lengths: torch.Tensor, key_length: int | None = None
) -> torch.Tensor:
    """The bias `β` of every query and head, zero for fully masked rows.

    Args:
        alpha: `(B, Q, H)`.
        alpha_average: `α_ma`, `(H,)`.
        lengths: number of visible keys of each query, infinite for fully masked rows, `(B|1, Q|1, H|1)`, see
            [`~functional.PrefixSums`].
        key_length: `N` of all queries that see any key; by default the number of visible keys of each query.

    Returns:
        `(α_ma - α) / N`, `(B, Q, H)`.

    Example:

    >>> affine_bias(torch.tensor([[[0.5]]]), torch.ones(1), torch.tensor([[[2.0]]]))
    tensor([[[0.2500]]])
    """
    if key_length is not None:
        lengths = lengths.where(lengths.isinf(), key_length)
    return (alpha_average - alpha) / lengths


def rescale_output(
    output: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, sums: PrefixSums
) -> torch.Tensor:
    """Attention output under affine-scaled weights. With `α = 1` and `β = 0` it equals `output`, bit for bit.

    Args:
        output: `O`, `(B, Q, H, D)`.
        value: `(B, Hkv, K, D)`.
        alpha: `α`, `(B, Q, H)`.
        beta: `β`, `(B, Q, H)`, zero for fully masked rows.
        sums: the sums over the visible keys of each query, see [`~functional.PrefixSums`].

    Returns:
        `(B, Q, H, D)` in the output's dtype, computed in the dtype of the scale. Outside of compiled graphs it saves
        no tensors for the backward pass except those that attention saves already, and has no second derivative.

    Source: arXiv 2602.23057. The form `α·(O - V̄) + α_ma·V̄`, with the mean `V̄` of the visible values, would not be
    exact at the identity.

    Example:

    >>> from hf_attentiondrop.functional import PrefixSums
    >>> sums = PrefixSums.from_mask(None, is_causal=False, query_length=1, key_length=2, device=torch.device("cpu"))
    >>> value = torch.tensor([2.0, 4.0]).view(1, 1, 2, 1)
    >>> rescale_output(torch.ones(1, 1, 1, 1), value, torch.tensor([[[0.5]]]), torch.tensor([[[0.25]]]), sums)
    tensor([[[[2.]]]])
    """
    # A compiled graph decides itself which tensors to save, and torch 2.11 would lose the gradient in there.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Rescale.apply(output, value, alpha, beta, sums)
    return _rescaled(output, value, alpha, beta, sums)


def _rescaled(
    output: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, sums: PrefixSums
) -> torch.Tensor:
    with torch.autocast(output.device.type, enabled=False):
        total = sums.total(value)
    dtype = torch.promote_types(output.dtype, alpha.dtype)
    if _can_reuse(total, output):
        rescaled = total.to(dtype).mul_(beta.unsqueeze(-1)).addcmul_(output, alpha.unsqueeze(-1))
    else:
        groups = total.shape[2], -1  # (Hkv, G)
        rescaled = output * alpha.unsqueeze(-1)
        grouped = rescaled.unflatten(2, groups)
        grouped.addcmul_(beta.unflatten(2, groups).unsqueeze(-1), total.unsqueeze(3).to(dtype))
    return rescaled.to(output.dtype)


def _can_reuse(total: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether the result can overwrite the sums: allocating memory takes longer than the products."""
    return total.shape == output.shape and total.is_contiguous()


class _Rescale(torch.autograd.Function):
    """Computes the sums again in the backward pass, where autograd would save them, as large as the output, and makes
    fewer passes through memory than autograd."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, sums: PrefixSums
    ) -> torch.Tensor:
        ctx.save_for_backward(output, value, alpha, beta)
        ctx.sums = sums
        return _rescaled(output, value, alpha, beta, sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        output, value, alpha, beta = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            gradient = gradient.to(alpha.dtype)
            total = ctx.sums.total(value)
            is_shared, groups = total.shape[1] == 1, (total.shape[2], -1)
            by_group = gradient.unflatten(2, groups)
            # One buffer for all products.
            if _can_reuse(total, gradient):
                product = total.to(gradient.dtype).mul_(gradient)
            else:
                product = (by_group * total.unsqueeze(3)).flatten(2, 3)
            del total
            of_beta = product.sum(dim=-1)
            of_alpha = torch.mul(gradient, output, out=product).sum(dim=-1)
            grouped = product.unflatten(2, groups)
            torch.mul(by_group, beta.unflatten(2, groups).unsqueeze(-1), out=grouped)
            of_total = product if grouped.shape[3] == 1 else grouped.sum(dim=3)
            if is_shared:
                of_total = of_total.sum(dim=1, keepdim=True)
            # Detached from its base, so that autograd can accumulate into it in place.
            of_value = ctx.sums.adjoint(of_total, value).to(value.dtype).detach()
            of_output = torch.mul(gradient, alpha.unsqueeze(-1), out=product).to(output.dtype)
        return of_output, of_value, of_alpha.to(alpha.dtype), of_beta.to(beta.dtype), None


def rescale_weights(
    weights: torch.Tensor, visible: torch.Tensor | None, alpha: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """The affine-scaled attention weights, for callers that return weights.

    Args:
        weights: `P`, `(B, H, Q, K)`.
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all.
        alpha: `(B, Q, H)`.
        beta: `(B, Q, H)`.

    Returns:
        `(B, H, Q, K)` in the dtype of the weights. A row sums to `α_ma` for `N` = visible keys.

    Example:

    >>> rescale_weights(torch.tensor([[[[0.75, 0.25]]]]), None, torch.tensor([[[0.5]]]), torch.tensor([[[0.25]]]))
    tensor([[[[0.6250, 0.3750]]]])
    """
    alpha, beta = (factor.transpose(1, 2).unsqueeze(-1) for factor in (alpha, beta))
    beta = beta if visible is None else beta.where(visible, 0.0)
    return (alpha * weights + beta).to(weights.dtype)
