"""Affine-Scaled Attention (arXiv 2602.23057): a learned scale and bias on the attention weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import initialization as init

from ..attention.call import Attend, AttentionCall, AttentionOutput, is_recomputing
from ..functional import (
    ACTIVATIONS,
    BIAS_LENGTHS,
    PrefixSums,
    affine_bias,
    affine_scale,
    rescale_output,
    rescale_weights,
)
from ..validation import is_probability
from .card import MethodCard
from .gated_attention import GatedAttention, gate_card
from .learned import Dimensions, LearnedMethod, LearnedWeights, project
from .papers import AFFINE_SCALED


ACTIVATION_FORMULAS = {"linear_clip": "φ(z) = clamp(0.1 z + 0.5, 0, 1)", "sigmoid": "φ(z) = 1 / (1 + exp(-z))"}


@torch.library.custom_op("hf_attentiondrop::move_average", mutates_args=("average",))
def move_average(average: Tensor, mean: Tensor, weight: float) -> Tensor:
    """Moves an average `(H,)` in place towards a mean `(H,)`, unless in a backward pass, and returns a copy: a later
    move must not change what the backward pass uses.

    In a backward pass, activation checkpointing repeats the forward. Compiled code knows only when it runs whether it
    does so, and this is opaque to the compiler.
    """
    if torch._C._current_graph_task_id() == -1:
        average.lerp_(mean, weight)
    return average.clone()


@move_average.register_fake
def _(average: Tensor, mean: Tensor, weight: float) -> Tensor:
    return torch.empty_like(average)


class AffineScaling(LearnedWeights):
    """The weights of the scale, and its moving average, which determines the bias.

    The average is a float32 buffer in models of any dtype, because in half precision small updates would be lost.
    """

    average: Tensor

    def __init__(self, config: Any, dimensions: Dimensions, **factory: Any) -> None:
        super().__init__(config, dimensions)
        self.weight = nn.Parameter(torch.empty(dimensions.num_heads, dimensions.hidden_size, **factory))
        average = torch.empty(dimensions.num_heads, dtype=torch.float32, device=factory.get("device"))
        self.register_buffer("average", average)
        self.gate = GatedAttention(config, dimensions, **factory) if config.gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._reset_projection(self.weight)
        init.constant_(self.average, 1.0 if self.config.init == "identity" else 0.0)

    @property
    def summary(self) -> str:
        if self.average.is_meta:  # Built without weights: there is no average yet.
            return super().summary
        return f"{super().summary} average={self.average.mean().item():.4f}"

    def forward(self, states: Tensor, call: AttentionCall, attend: Attend) -> AttentionOutput:
        if self.gate is not None:
            return self.gate(states, call, lambda call: self._rescaled(states, call, attend))
        return self._rescaled(states, call, attend)

    def _rescaled(self, states: Tensor, call: AttentionCall, attend: Attend) -> AttentionOutput:
        if self.average.dtype != torch.float32:
            raise RuntimeError(
                f"The moving average of {type(call.module).__name__} must stay float32, but it was cast to "
                f"{self.average.dtype}, which would lose small updates. Under FSDP set buffer_dtype=torch.float32 in "
                "MixedPrecision; FSDP2 and autocast do not cast buffers."
            )
        logits = project(states, self.weight)  # (B, Q, H)
        alpha = affine_scale(logits, activation=self.config.activation, init=self.config.init)
        # Once per forward of the module: DiffLlama calls attention twice, once for each half of the values.
        if call.module.training and not is_recomputing() and "has_moved" not in call.memory:
            average = self._moved_average(alpha.detach(), call.real_queries)
            call.memory["has_moved"] = True
        else:
            average = self.average.clone()
        output, weights = attend(call)
        sums = PrefixSums.from_mask(call.mask, is_causal=call.causal, **call.lengths)
        key_length = call.lengths["key_length"] if self.config.bias_length == "keys" else None
        beta = affine_bias(alpha, average, sums.lengths, key_length)
        if weights is not None:
            weights = rescale_weights(weights, call.visible, alpha, beta)
        return rescale_output(output, call.value, alpha, beta, sums), weights

    @torch.no_grad()
    def _moved_average(self, alpha: Tensor, real_queries: Tensor | None) -> Tensor:
        """Moves the average towards the mean scale `(H,)` of the real queries of all processes, and returns a copy."""
        is_real = torch.ones_like(alpha)
        if real_queries is not None:
            is_real = is_real * real_queries.transpose(1, 2)
        total = torch.stack([(alpha * is_real).sum(dim=(0, 1)), is_real.sum(dim=(0, 1))]).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        mean = torch.where(total[1] > 0, total[0] / total[1], self.average)
        return move_average(self.average, mean, 1.0 - self.config.momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AffineScaling":
        average = self.average
        super()._apply(fn, recurse)
        if self.average.dtype != torch.float32:
            self.average = average.to(self.average.device)
        return self


@dataclass(frozen=True, repr=False)
class AffineScaledConfig(LearnedMethod):
    """Affine-Scaled Attention: a learned scale and bias on the attention weights (arXiv 2602.23057).

    The settings of `attn_implementation="affine_scaled"`. Weights become `α · softmax + β` on the visible keys, where
    `α` is a scale per query and head, and `β` spreads the difference between `α` and its moving average over the keys.

    Args:
        activation (`str`, defaults to `"linear_clip"`):
            Activation φ of the scale `φ(W_a x)`: `"linear_clip"`, `clamp(0.1x + 0.5, 0, 1)`, the paper's choice, or
            `"sigmoid"`.
        init (`str`, defaults to `"identity"`):
            `"identity"` starts exactly at the base model: the scale is `1 + φ(W_a x) - φ(0)`, with `W_a` initially 0
            and the moving average 1. `"paper"` is for training from scratch: the scale is `φ(W_a x)`, with a random
            `W_a` and an initial average of 0.
        momentum (`float`, defaults to 0.9):
            Momentum of the moving average of the scale, in [0, 1].
        bias_length (`str`, defaults to `"visible"`):
            Divisor of the bias: `"visible"`, the number of keys that the query sees, which is the same in training
            and in cached decoding, or `"keys"`, the number of all keys, as in the paper.
        gate (`bool`, defaults to `False`):
            Whether to add the gate of `"gated_attention"` on the output.
        layers (`list[int]`, *optional*):
            Layers to act on, counted within each stack (encoder, decoder); negative from the end. All by default.

    Raises:
        ValueError: if a value is of the wrong type or out of range.

    Example:

    >>> AffineScaledConfig(gate=True).summary
    'activation=linear_clip init=identity momentum=0.9 bias_length=visible gate=True'
    """

    method = "affine_scaled"
    weights = AffineScaling

    activation: str = "linear_clip"
    init: str = "identity"
    momentum: float = 0.9
    bias_length: str = "visible"
    gate: bool = False

    def __post_init__(self) -> None:
        self._make_plain("layers")
        self._check(
            "activation",
            ACTIVATIONS.__contains__,
            f"one of {ACTIVATIONS}",
            "It turns a hidden state into a scale.",
        )
        self._check_init()
        self._check(
            "momentum",
            is_probability,
            "a number in [0, 1]",
            "It is the share of the old average that an update keeps; 0.9 is the paper's.",
        )
        self._check(
            "bias_length",
            BIAS_LENGTHS.__contains__,
            f"one of {BIAS_LENGTHS}",
            "It is the divisor of the bias.",
        )
        self._check(
            "gate",
            lambda gate: isinstance(gate, bool),
            "True or False",
            "It adds a gate on the attention output.",
        )
        self._check_layers()

    def cards(self) -> tuple[MethodCard, ...]:
        settings = {name: value for name, value in self.to_dict().items() if name not in ("method", "gate")}
        card = MethodCard(
            "Affine-Scaled Attention",
            "Attention weights are the softmax times a learned scale per query and head, plus a bias that balances it "
            "against a moving average of the scale.",
            "weights = α · softmax(L) + β on the keys that a query sees,   β = (α_ma - α) / N\n"
            f"α = {'φ(W_a x)' if self.init == 'paper' else '1 + φ(W_a x) - φ(0)'},   "
            f"{ACTIVATION_FORMULAS[self.activation]}\n"
            "α_ma ← momentum · α_ma + (1 - momentum) · mean(α) in training,   "
            f"N: the number of {'keys that the query sees' if self.bias_length == 'visible' else 'keys'}",
            "affine-scaled-attention",
            AFFINE_SCALED,
            settings,
        )
        return (card, gate_card(self.init, {"init": self.init})) if self.gate else (card,)
