"""The modules that hold what is learned: one stands on every attention module, and attends in its stead.

Each is called with the hidden states that entered the attention module, the attention call, and the function that
attends, perturbed or not; it returns what an attention function returns. None of them is an `nn.Linear`, which model
files initialise, quantise and adapt in their own ways.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ..attention.call import AttentionCall, is_recomputing
from ..functional import affine_bias, affine_scale, gate_output, rescale_output, rescale_weights, visible_sums
from .reweighting_configuration import AffineScaledConfig, AttentionSinkConfig, GatedAttentionConfig, ReweightingConfig


Attended = tuple[torch.Tensor, torch.Tensor | None]
Attend = Callable[[AttentionCall], Attended]


@dataclass(frozen=True)
class Dimensions:
    """What an attention module's learned weights must fit, and the standard deviation of its model's new weights."""

    hidden_size: int
    num_heads: int
    head_dim: int
    initializer_range: float = 0.02


class Reweighting(nn.Module, ABC):
    """What is learned on top of one attention module.

    Args:
        config: its configuration.
        dimensions: those of the attention module.
        factory: `device` and `dtype` of the weights.
    """

    def __init__(self, config: ReweightingConfig, dimensions: Dimensions, **factory: Any) -> None:
        super().__init__()
        self.config, self.dimensions = config, dimensions

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialises what was not loaded from a checkpoint."""

    @abstractmethod
    def forward(self, states: torch.Tensor, call: AttentionCall, attend: Attend) -> Attended:
        """Attends through `attend`, and reweights the result by the hidden states, `(B, Q, hidden_size)`."""

    @property
    def summary(self) -> str:
        """What is attached, in a few words."""
        return self.config.summary

    def _reset_projection(self, weight: torch.Tensor) -> None:
        # At zero the model is what it was before; trained from scratch, it starts as its other projections do.
        if self.config.init == "identity":
            init.zeros_(weight)
        else:
            init.normal_(weight, std=self.dimensions.initializer_range)


class GatedAttention(Reweighting):
    """The attention output times a gate that the hidden states open and close, component by component."""

    def __init__(self, config: ReweightingConfig, dimensions: Dimensions, **factory: Any) -> None:
        super().__init__(config, dimensions)
        size = dimensions.num_heads * dimensions.head_dim
        self.weight = nn.Parameter(torch.empty(size, dimensions.hidden_size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._reset_projection(self.weight)

    def forward(self, states: torch.Tensor, call: AttentionCall, attend: Attend) -> Attended:
        output, weights = attend(call)
        return gate_output(output, _project(states, self.weight), init=self.config.init), weights


class AttentionSink(Reweighting):
    """One more score in every softmax, for a key that is not there."""

    def __init__(self, config: ReweightingConfig, dimensions: Dimensions, **factory: Any) -> None:
        super().__init__(config, dimensions)
        self.weight = nn.Parameter(torch.empty(dimensions.num_heads, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.constant_(self.weight, self.config.init)

    def forward(self, states: torch.Tensor, call: AttentionCall, attend: Attend) -> Attended:
        return attend(replace(call, sink=self.weight))


class AffineScaling(Reweighting):
    """Attention weights times a scale of the hidden states, plus a bias that holds their sum near an average.

    The average is a buffer in float32, whatever the dtype of the model: in half precision it would stop moving.
    """

    def __init__(self, config: ReweightingConfig, dimensions: Dimensions, **factory: Any) -> None:
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

    def forward(self, states: torch.Tensor, call: AttentionCall, attend: Attend) -> Attended:
        if self.gate is not None:
            return self.gate(states, call, lambda call: self._rescaled(states, call, attend))
        return self._rescaled(states, call, attend)

    def _rescaled(self, states: torch.Tensor, call: AttentionCall, attend: Attend) -> Attended:
        if self.average.dtype != torch.float32:
            raise RuntimeError(
                f"The moving average of {type(call.module).__name__} must stay float32, and something cast it to "
                f"{self.average.dtype}, in which it would stop moving. Under FSDP set buffer_dtype=torch.float32 in "
                "MixedPrecision; FSDP2 and autocast leave buffers alone."
            )
        logits = _project(states, self.weight)  # (B, Q, H)
        alpha = affine_scale(logits, activation=self.config.activation, init=self.config.init)
        # Once in a pass: DiffLlama attends twice, to the two halves of the values, with the same weights.
        if call.module.training and not is_recomputing() and "has_moved" not in call.memory:
            self._update_average(alpha.detach(), call.real_queries)
            call.memory["has_moved"] = True
        average = self.average.clone()  # A later update must not change what the backward pass finds.
        output, weights = attend(call)
        sums = visible_sums(call.mask, is_causal=call.causal, **call.lengths)
        key_length = call.lengths["key_length"] if self.config.bias_length == "keys" else None
        beta = affine_bias(alpha, average, sums.lengths, key_length)
        if weights is not None:
            weights = rescale_weights(weights, call.visible, alpha, beta)
        return rescale_output(output, call.value, alpha, beta, sums), weights

    @torch.no_grad()
    def _update_average(self, alpha: torch.Tensor, real_queries: torch.Tensor | None) -> None:
        """Moves the average towards the mean scale `(H,)` of the real queries of all processes."""
        is_real = torch.ones_like(alpha)
        if real_queries is not None:
            is_real = is_real * real_queries.transpose(1, 2)
        total = torch.stack([(alpha * is_real).sum(dim=(0, 1)), is_real.sum(dim=(0, 1))]).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        mean = torch.where(total[1] > 0, total[0] / total[1], self.average)
        self.average.lerp_(mean, 1.0 - self.config.momentum)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "AffineScaling":
        average = self.average
        super()._apply(fn, recurse)
        if self.average.dtype != torch.float32:
            self.average = average.to(self.average.device)
        return self


def _project(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # Learned weights may be float32 on a model in half precision, as adapters are.
    return F.linear(states.to(weight.dtype), weight)


MODULES: dict[type[ReweightingConfig], type[Reweighting]] = {
    AffineScaledConfig: AffineScaling,
    AttentionSinkConfig: AttentionSink,
    GatedAttentionConfig: GatedAttention,
}
