"""How peaked the attention of each head is, measured during a training step."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .call import AttentionCall


@dataclass(eq=False)
class EntropyMeter:
    """Measures the entropy of each head in the next attention call.

    The entropy is that of the softmax without the perturbations of the module, divided by the entropy of uniform
    attention to the keys that a query sees: 0 for a single key, 1 for uniform attention. It is a mean over the queries
    that are not padding and see at least two keys.

    Args:
        rows: number of rows of the batch to measure; the scores of these are computed once more.
        entropy: the result, float64 `(H,)` in [0, 1]; NaN if no query counts, `None` before the call.
    """

    rows: int
    entropy: Tensor | None = None

    @torch.no_grad()
    def measure(self, call: AttentionCall) -> None:
        """Measures a call, if it is the first."""
        if self.entropy is not None:
            return
        call = _first_rows(call, self.rows)
        scores, visible = call.scores().double(), call.visible
        counts = torch.ones_like(scores[:1, :1], dtype=torch.bool) if visible is None else visible
        num_visible = counts.sum(dim=-1).double()  # (B|1, H|1, Q|1)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        shares = scores.softmax(dim=-1).nan_to_num(0.0)  # Fully masked queries.
        counted = num_visible > 1
        if (real := call.real_queries) is not None:
            counted = counted & real
        entropy = torch.special.entr(shares).sum(dim=-1) / num_visible.clamp_min(2).log()
        counted = counted.expand_as(entropy)
        total = entropy.masked_fill(~counted, 0.0).sum(dim=(0, 2))
        self.entropy = total / counted.sum(dim=(0, 2))


def _first_rows(call: AttentionCall, rows: int) -> AttentionCall:
    def cut(states: Tensor | None) -> Tensor | None:
        return states if states is None or len(states) == 1 else states[:rows]

    extras = dict(call.extras)
    if extras.get("position_bias") is not None:
        extras["position_bias"] = cut(extras["position_bias"])
    query, key, value = (states[:rows] for states in (call.query, call.key, call.value))
    mask = cut(call.mask)
    return replace(call, query=query, key=key, value=value, mask=mask, model_mask=mask, extras=extras)
