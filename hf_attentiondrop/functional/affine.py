"""Affine-Scaled Attention (arXiv 2602.23057): attention weights times a learned scale, plus a bias that balances it.

The weights are `α·P + β` on visible keys, with `P` the softmax, `β = (α_ma - α) / N` and `α_ma` a moving average of
`α`. What they do to the values is an epilogue on any attention output `O`: `α·O + (α_ma - α)·(n / N)·V̄`, where `V̄` is
the mean of the `n` visible values.
"""

import torch


ACTIVATIONS = ("linear_clip", "sigmoid")
INITS = ("identity", "paper")
BIAS_LENGTHS = ("visible", "keys")


def affine_scale(logits: torch.Tensor, *, activation: str = "linear_clip", init: str = "identity") -> torch.Tensor:
    """The scale `α` of every query and head.

    Args:
        logits: `W_a x`, of any shape.
        activation: `φ`: `"linear_clip"` is `clamp(0.1x + 0.5, 0, 1)`, `"sigmoid"` the logistic function.
        init: `"identity"` is `1 + φ(logits) - φ(0)`, exactly 1 for logits of zero; `"paper"` is `φ(logits)`.

    Returns:
        `α` in at least float32, in the shape of the logits: [0, 1] for `"paper"`, [0.5, 1.5] for `"identity"`.

    Raises:
        ValueError: if `activation` or `init` is none of the above.

    Source: arXiv 2602.23057; `"identity"` shifts `φ` for models that were trained without it.

    Example:

    >>> affine_scale(torch.tensor([0.0, 1.0, -9.0]))
    tensor([1.0000, 1.1000, 0.5000])
    """
    for name, choice, choices in (("activation", activation, ACTIVATIONS), ("init", init, INITS)):
        if choice not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {choice!r}: it decides what the scale is.")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scale = (0.1 * logits + 0.5).clamp(0.0, 1.0) if activation == "linear_clip" else logits.sigmoid()
    return scale if init == "paper" else 1.0 + (scale - 0.5)  # φ(0) is 0.5 for both.


def rescale_output(
    output: torch.Tensor, mean: torch.Tensor, alpha: torch.Tensor, alpha_average: torch.Tensor
) -> torch.Tensor:
    """Attention output under affine-scaled weights. With `α = α_ma = 1` it is the output, bit for bit.

    Args:
        output: `O`, `(B, Q, H, D)`.
        mean: `(n / N)·V̄`, `(B, Hkv|H, Q|1, D)`, see [`~functional.visible_mean`].
        alpha: `(B, Q, H)`.
        alpha_average: `α_ma`, `(H,)`.

    Returns:
        `(B, Q, H, D)` in the output's dtype, computed in the scale's.

    Source: arXiv 2602.23057. In the form `α·(O - V̄) + α_ma·V̄` it would not be exact at the identity.

    Example:

    >>> rescale_output(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0), torch.tensor([[[0.5]]]), torch.ones(1))
    tensor([[[[2.]]]])
    """
    heads = mean.shape[1]
    grouped = output.unflatten(2, (heads, -1))  # (B, Q, Hkv, G, D)
    scale = alpha.unflatten(2, (heads, -1)).unsqueeze(-1)
    bias = (alpha_average - alpha).unflatten(2, (heads, -1)).unsqueeze(-1)
    rescaled = scale * grouped + bias * mean.transpose(1, 2).unsqueeze(3)
    return rescaled.flatten(2, 3).to(output.dtype)


def rescale_weights(
    weights: torch.Tensor, visible: torch.Tensor | None, alpha: torch.Tensor, alpha_average: torch.Tensor, length: int
) -> torch.Tensor:
    """The affine-scaled weights themselves, for those who want to see them.

    Args:
        weights: `P`, `(B, H, Q, K)`.
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all.
        alpha: `(B, Q, H)`.
        alpha_average: `α_ma`, `(H,)`.
        length: `N`, integer or `(B|1, H|1, Q|1, 1)`.

    Returns:
        `(B, H, Q, K)` in the dtype of the weights. A row sums to `α_ma` for `N` = visible keys.

    Example:

    >>> rescale_weights(torch.tensor([[[[0.75, 0.25]]]]), None, torch.tensor([[[0.5]]]), torch.ones(1), 2)
    tensor([[[[0.6250, 0.3750]]]])
    """
    alpha, alpha_average = alpha.transpose(1, 2).unsqueeze(-1), alpha_average.view(1, -1, 1, 1)
    bias = (alpha_average - alpha) / length
    bias = bias if visible is None else bias.where(visible, 0.0)
    return (alpha * weights + bias).to(weights.dtype)
