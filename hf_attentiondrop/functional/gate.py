"""Gated Attention: multiplies the attention output elementwise by a sigmoid of the hidden states."""

import torch


def gate_output(output: torch.Tensor, logits: torch.Tensor, *, init: str = "identity") -> torch.Tensor:
    """Multiplies the attention output elementwise by a gate.

    Args:
        output: `(B, Q, H, D)`.
        logits: `W_g x`, `(B, Q, H·D)`.
        init: `"identity"`: the gate is `2·sigmoid(logits)`, exactly 1 for zero logits; `"paper"`: `sigmoid(logits)`.

    Returns:
        `(B, Q, H, D)` in the output's dtype; the gate is computed in at least float32.

    Raises:
        ValueError: if `init` is neither `"identity"` nor `"paper"`.

    Source: the output gate in the comparison of arXiv 2602.23057.

    Example:

    >>> gate_output(torch.ones(1, 1, 1, 2), torch.tensor([[[0.0, 9.0]]]))
    tensor([[[[1.0000, 1.9998]]]])
    """
    if init not in ("identity", "paper"):
        raise ValueError(f"`init` must be one of ('identity', 'paper'), got {init!r}: it selects the formula.")
    gate = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid().view_as(output)
    return (output * (gate if init == "paper" else 2.0 * gate)).to(output.dtype)
