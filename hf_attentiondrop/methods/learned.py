"""The interface of learned methods: their settings, and the weights that they add to an attention module."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers import initialization as init

from ..attention.call import Attend, AttentionCall, AttentionOutput
from ..functional import INITS
from .method import Method


LEARNED_KEY = "attention_reweighting"


class Dimensions(NamedTuple):
    """Sizes of an attention module, and the standard deviation of its model's new weights."""

    hidden_size: int
    num_heads: int
    head_dim: int
    initializer_range: float = 0.02


class LearnedWeights(nn.Module, ABC):
    """The weights that a learned method adds to one attention module, as its child `reweighting`.

    They must not be an `nn.Linear`, which model classes, quantizers and PEFT treat specially.

    Args:
        config: the method.
        dimensions: those of the attention module.
        factory: `device` and `dtype` of the weights.
    """

    acts_on_scores: ClassVar[bool] = False
    """Whether the perturbations wrap the method, instead of the method wrapping them."""

    def __init__(self, config: Any, dimensions: Dimensions, **factory: Any) -> None:
        super().__init__()
        self.config, self.dimensions = config, dimensions

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initializes weights that were not loaded from a checkpoint."""

    @abstractmethod
    def forward(self, states: Tensor, call: AttentionCall, attend: Attend) -> AttentionOutput:
        """Computes attention through `attend` and the learned weights.

        Args:
            states: hidden states that entered the attention module, `(B, Q, hidden_size)`.
            call: the attention call.
            attend: computes attention without this method.
        """

    @property
    def summary(self) -> str:
        """The method and its learned state in one line."""
        return self.config.summary

    def _reset_projection(self, weight: Tensor) -> None:
        # With zeros the model equals the base model. For training from scratch use the initialization of the model.
        if self.config.init == "identity":
            init.zeros_(weight)
        else:
            init.normal_(weight, std=self.dimensions.initializer_range)


def project(states: Tensor, weight: Tensor) -> Tensor:
    """Returns `states @ weight.T` in the dtype of the weight, which may be float32 on a model in half precision."""
    return nn.functional.linear(states.to(weight.dtype), weight)


class LearnedMethod(Method):
    """A method with learned weights, which acts in training and in evaluation.

    A subclass is one row of the table in `methods/__init__.py`.

    Args:
        layers (`list[int]`, *optional*):
            Layers to act on, counted within each stack (encoder, decoder); negative from the end. All by default.
    """

    key = LEARNED_KEY
    method: ClassVar[str]
    """Name of the attention implementation, and of the method in configurations."""
    weights: ClassVar[type[LearnedWeights]]
    """The module that holds the weights."""

    def _check_init(self) -> None:
        self._check(
            "init",
            INITS.__contains__,
            f"one of {INITS}",
            '"identity" starts exactly as the base model, "paper" is for training from scratch.',
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the method and its settings as plain JSON types."""
        return {"method": self.method, **super().to_dict()}
