"""The rows of the table of methods under test.

Every method has a module `tests/methods/test_<name>.py` with

- `EXAMPLES`: settings with a clear effect, by name; all tests over the table use them;
- `IDLE`: settings without effect, for perturbations;
- `reference`: the plain float64 definition, see [`Definition`], for perturbations; the references of learned methods
  are in `tests/test_reweighting.py`, which uses their examples.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_attentiondrop.methods import METHODS, PERTURBATIONS
from hf_attentiondrop.methods.learned import LearnedMethod
from hf_attentiondrop.methods.method import Method, Perturbation

from .. import reference
from ..cases import AttentionCase


@dataclass(frozen=True)
class Definition:
    """The attention computation that a reference changes.

    Args:
        case: the attention call.
        scores: content scores `(B, H, Q, K)`, before any bias.
        bias: sum of all biases, or 0.
        visible: boolean `(B, H, Q, K)`.
        value: `(B, Hkv, K, D)`.
        zeroed: boolean `(B, H, Q, K)`, final scores to replace by 0.
        scale: factor of the output, `(B, H, 1, 1)`.
    """

    case: AttentionCase
    scores: Tensor
    bias: Tensor | float
    visible: Tensor
    value: Tensor
    zeroed: Tensor | None = None
    scale: Tensor = field(default_factory=lambda: torch.ones(1, 1, 1, 1, dtype=torch.float64))

    @property
    def final_scores(self) -> Tensor:
        return self.scores + self.bias

    def attend(self, *, dropout: float = 0.0, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns output and weights."""
        scores, visible, value = self.final_scores, self.visible, self.value
        if self.zeroed is not None:
            scores = torch.where(self.zeroed, torch.zeros_like(scores), scores)
        elif self.case.name == "static_prefill" and torch.equal(visible, self.case.visible):
            # SDPA removes the empty tail of a static cache before it samples dropout.
            keys = slice(self.case.queries)
            scores, visible, value = scores[..., keys], visible[..., keys], value[:, :, keys]
        output, weights = reference.attend(scores, value, visible, sinks=sinks, dropout=dropout)
        return output * self.scale.transpose(1, 2), weights * self.scale


Reference = Callable[[Any, Definition], Definition]


def module_of(method: type[Method]) -> ModuleType:
    """Returns the test module of a method.

    Raises:
        AssertionError: if the module or one of its attributes is missing.
    """
    name = method.method if issubclass(method, LearnedMethod) else method.variant
    needed = ["EXAMPLES", "IDLE", "reference"] if issubclass(method, Perturbation) else ["EXAMPLES"]
    try:
        module = importlib.import_module(f"{__name__}.test_{name}")
    except ModuleNotFoundError as error:
        raise AssertionError(
            f"{method.__name__} has no tests/methods/test_{name}.py with {', '.join(needed)}."
        ) from error
    for attribute in needed:
        assert hasattr(module, attribute), f"tests/methods/test_{name}.py has no {attribute}, see tests/methods."
    return module


def examples(kind: type[Method] = Perturbation) -> dict[str, Any]:
    """Returns the examples of all methods of a kind, by name."""
    rows = [module_of(method).EXAMPLES for method in METHODS if issubclass(method, kind)]
    return {name: example for row in rows for name, example in row.items()}


def one_example_each() -> dict[str, Perturbation]:
    """Returns the first example of each perturbation, by variant, for every kind of attention."""
    everywhere = ("encoder_self", "decoder_self", "cross")
    firsts = {name: next(iter(module_of(method).EXAMPLES.values())) for name, method in PERTURBATIONS.items()}
    return {name: replace(example, attentions=everywhere) for name, example in firsts.items()}


def idle_examples() -> list[Perturbation]:
    """Returns the settings without effect of all perturbations."""
    return [idle for method in PERTURBATIONS.values() for idle in module_of(method).IDLE]


def reference_of(perturbation: Perturbation) -> Reference:
    """Returns the reference of a perturbation."""
    return module_of(type(perturbation)).reference
