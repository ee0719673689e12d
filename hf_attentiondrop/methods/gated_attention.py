"""Gated Attention (arXiv 2505.06708): multiplies the attention output by a gate computed from the hidden states."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.call import Attend, AttentionCall, AttentionOutput
from ..functional import gate_output
from .card import MethodCard
from .learned import Dimensions, LearnedMethod, LearnedWeights, project


PAPER = """@article{qiu2025gated,
  title   = {Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free},
  author  = {Qiu, Zihan and Wang, Zekun and Zheng, Bo and others},
  journal = {arXiv preprint arXiv:2505.06708},
  year    = {2025}
}"""


class GatedAttention(LearnedWeights):
    """The weights of the gate, one row per component of the attention output."""

    def __init__(self, config: Any, dimensions: Dimensions, **factory: Any) -> None:
        super().__init__(config, dimensions)
        size = dimensions.num_heads * dimensions.head_dim
        self.weight = nn.Parameter(torch.empty(size, dimensions.hidden_size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._reset_projection(self.weight)

    def forward(self, states: Tensor, call: AttentionCall, attend: Attend) -> AttentionOutput:
        output, weights = attend(call)
        return gate_output(output, project(states, self.weight), init=self.config.init), weights


@dataclass(frozen=True, repr=False)
class GatedAttentionConfig(LearnedMethod):
    """Gated Attention: a learned gate on each component of the attention output (arXiv 2505.06708).

    The settings of `attn_implementation="gated_attention"`.

    Args:
        init (`str`, defaults to `"identity"`):
            `"identity"` starts exactly at the base model: the gate is `2 · sigmoid(W_g x)`, with `W_g` initially 0.
            `"paper"` is for training from scratch: the gate is `sigmoid(W_g x)`, with a random `W_g`.
        layers (`list[int]`, *optional*):
            Layers to act on, counted within each stack (encoder, decoder); negative from the end. All by default.

    Raises:
        ValueError: if a value is of the wrong type or out of range.

    Example:

    >>> GatedAttentionConfig(layers=[0]).to_dict()
    {'method': 'gated_attention', 'init': 'identity', 'layers': [0]}
    """

    method = "gated_attention"
    weights = GatedAttention

    init: str = "identity"

    def __post_init__(self) -> None:
        self._make_plain("layers")
        self._check_init()
        self._check_layers()

    def cards(self) -> tuple[MethodCard, ...]:
        return (gate_card(self.init, {"init": self.init, "layers": self.layers}),)


def gate_card(init: str, settings: dict[str, Any]) -> MethodCard:
    """Returns the card of a gate on the attention output, which Affine-Scaled Attention can have too."""
    return MethodCard(
        "Gated attention",
        "The attention output is multiplied, component by component, by a learned gate.",
        f"output' = output · {'sigmoid(W_g x)' if init == 'paper' else '2 · sigmoid(W_g x)'}",
        "gated-attention",
        PAPER,
        settings,
    )
