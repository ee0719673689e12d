"""Threat model, attack settings and the result of an attack."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..validation import Config, is_integer, is_number


class Ball(NamedTuple):
    """The perturbations with a norm of at most `epsilon`. All functions treat each sample of `(B, ...)` separately.

    Args:
        direction: from a gradient to the step of norm 1 that increases the loss most.
        project: from a perturbation and `epsilon` to the nearest perturbation in the ball.
        sample: from a mask (1 for values that may change, else 0) and `epsilon` to a uniform sample from the ball.
    """

    direction: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, float], Tensor]
    sample: Callable[[Tensor, float], Tensor]


def _lengths(values: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(values, dim=tuple(range(1, values.dim())), keepdim=True)
    return lengths.clamp(min=torch.finfo(values.dtype).tiny)  # Zeros stay zero.


def _unit(values: Tensor) -> Tensor:
    return values / _lengths(values)


def _shorten(values: Tensor, epsilon: float) -> Tensor:
    return values * (epsilon / _lengths(values)).clamp(max=1.0)


def _sample_linf(is_free: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(is_free).uniform_(-epsilon, epsilon) * is_free


def _sample_l2(is_free: Tensor, epsilon: float) -> Tensor:
    # The fraction r^d of a d-dimensional ball lies within the fraction r of its radius.
    dimensions = is_free.flatten(1).sum(-1).clamp(min=1).view(-1, *[1] * (is_free.dim() - 1))
    radius = torch.rand_like(dimensions) ** (1 / dimensions)
    return _unit(torch.randn_like(is_free) * is_free) * (epsilon * radius)


BALLS: dict[str, Ball] = {
    "linf": Ball(torch.sign, lambda values, epsilon: values.clamp(-epsilon, epsilon), _sample_linf),
    "l2": Ball(_unit, _shorten, _sample_l2),
}
NORMS = tuple(BALLS)


@dataclass(frozen=True)
class Attack(Config):
    """Settings of an attack: PGD by default, FGSM from [`Attack.fgsm`].

    Every step follows the sign of the gradient (`"linf"`) or the normalized gradient (`"l2"`) of each sample; then the
    perturbation is clipped to valid pixels, and projected onto the ball. Random starts are uniform in the ball and use
    torch's global generator.

    Args:
        norm (`str`, defaults to `"linf"`):
            `"linf"` bounds the largest change of any value, `"l2"` the Euclidean norm of a sample's perturbation.
        epsilon (`float`, defaults to 8/255):
            The bound, at least 0, in units of pixels in [0, 1], or of embeddings. The default is common for `"linf"`
            on images; `"l2"` needs a larger one, such as 0.5 on small images, and embeddings one that fits their
            scale.
        step_size (`float`, *optional*, defaults to `epsilon / 4`):
            The norm of a step: 2/255 for the default `epsilon`.
        steps (`int`, defaults to 10):
            Number of steps, at least 1. 20 is also common.
        random_start (`bool`, defaults to `True`):
            Whether to start at a random point of the ball instead of at the sample.
        restarts (`int`, defaults to 1):
            Number of starts, at least 1; more than one needs random starts.

    Raises:
        ValueError: if a value has the wrong type or is out of range.

    Example:

    >>> Attack.pgd(epsilon=0.5, norm="l2", steps=20)
    Attack(norm='l2', epsilon=0.5, step_size=0.125, steps=20, random_start=True, restarts=1)
    """

    key = "attack"

    norm: str = "linf"
    epsilon: float = 8 / 255
    step_size: float | None = None
    steps: int = 10
    random_start: bool = True
    restarts: int = 1

    def __post_init__(self) -> None:
        self._check("norm", NORMS.__contains__, f"one of {NORMS}", "It measures perturbations.")
        self._check(
            "epsilon",
            lambda epsilon: is_number(epsilon) and 0 <= epsilon < math.inf,
            "a finite number >= 0",
            "It bounds the perturbation; 8 gray levels of 255 are 8/255.",
        )
        if self.step_size is None:
            object.__setattr__(self, "step_size", self.epsilon / 4)
        self._check(
            "step_size",
            lambda size: is_number(size) and 0 <= size < math.inf and (size > 0 or self.epsilon == 0),
            "a finite number > 0",
            "It is the norm of a step; steps of 0 attack nothing.",
        )
        self._check("steps", lambda steps: is_integer(steps) and steps >= 1, "an integer >= 1", "FGSM takes one.")
        self._check(
            "random_start", lambda start: isinstance(start, bool), "True or False", "False starts at the sample."
        )
        self._check(
            "restarts",
            lambda restarts: is_integer(restarts) and restarts >= 1 and (restarts == 1 or self.random_start),
            "an integer >= 1, and 1 if random_start is False",
            "Without random starts every restart would repeat the first.",
        )

    @classmethod
    def fgsm(cls, epsilon: float = 8 / 255, norm: str = "linf") -> "Attack":
        """The fast gradient sign method: one step of norm `epsilon` from the sample.

        >>> Attack.fgsm(epsilon=0.1)
        Attack(norm='linf', epsilon=0.1, step_size=0.1, steps=1, random_start=False, restarts=1)
        """
        return cls(norm=norm, epsilon=epsilon, step_size=epsilon, steps=1, random_start=False)

    @classmethod
    def pgd(cls, epsilon: float = 8 / 255, **values: Any) -> "Attack":
        """Projected gradient descent; `values` are further fields."""
        return cls(epsilon=epsilon, **values)

    def scaled_to(self, epsilon: float) -> "Attack":
        """The same attack with another `epsilon` and a proportional step size.

        Raises:
            ValueError: if the `epsilon` of this attack is 0.
        """
        if self.epsilon == 0:
            raise ValueError(
                "An attack with epsilon=0 cannot be scaled: the ratio of step size to epsilon is undefined. Pass an "
                "attack with the largest epsilon that you need."
            )
        assert self.step_size is not None  # set by __post_init__
        return replace(self, epsilon=epsilon, step_size=self.step_size * (epsilon / self.epsilon))


@dataclass(frozen=True)
class AttackResult:
    """The result of an attack on a batch of `B` samples.

    Args:
        inputs: the model's inputs with the highest loss: the batch with perturbed `pixel_values`, or with
            `inputs_embeds` instead of `input_ids`; without labels.
        perturbation: their difference from the samples, in pixels of [0, 1] or in embeddings, in at least float32.
        clean_loss: cross-entropy of the samples, `(B,)`, in nats.
        loss: the highest cross-entropy found, `(B,)`, at least `clean_loss`.
        was_correct: whether the sample is classified correctly, `(B,)`.
        is_correct: whether the sample and every input that was tried are, `(B,)`. An input with a lower loss can be
            misclassified even if the input with the highest loss is not.
    """

    inputs: dict[str, Any]
    perturbation: Tensor
    clean_loss: Tensor
    loss: Tensor
    was_correct: Tensor
    is_correct: Tensor
