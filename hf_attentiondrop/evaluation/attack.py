"""What an adversary may do, the size of a perturbation and how it is searched for, and what came of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..validation import Config, is_integer, is_number


class Ball(NamedTuple):
    """The perturbations of a norm up to `epsilon`. All functions work on each sample `(B, ...)` by itself.

    Args:
        direction: of a gradient, the step of norm 1 along which the loss rises fastest.
        project: a perturbation and `epsilon`, the nearest perturbation in the ball.
        draw: where values may change (1, else 0) and `epsilon`, a perturbation drawn uniformly from the ball.
    """

    direction: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, float], Tensor]
    draw: Callable[[Tensor, float], Tensor]


def _lengths(values: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(values, dim=tuple(range(1, values.dim())), keepdim=True)
    return lengths.clamp(min=torch.finfo(values.dtype).tiny)  # What has no length stays zero.


def _unit(values: Tensor) -> Tensor:
    return values / _lengths(values)


def _shorten(values: Tensor, epsilon: float) -> Tensor:
    return values * (epsilon / _lengths(values)).clamp(max=1.0)


def _draw_linf(is_free: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(is_free).uniform_(-epsilon, epsilon) * is_free


def _draw_l2(is_free: Tensor, epsilon: float) -> Tensor:
    # A share r^d of a ball in d dimensions lies within the share r of its radius.
    dimensions = is_free.flatten(1).sum(-1).clamp(min=1).view(-1, *[1] * (is_free.dim() - 1))
    radius = torch.rand_like(dimensions) ** (1 / dimensions)
    return _unit(torch.randn_like(is_free) * is_free) * (epsilon * radius)


BALLS: dict[str, Ball] = {
    "linf": Ball(torch.sign, lambda values, epsilon: values.clamp(-epsilon, epsilon), _draw_linf),
    "l2": Ball(_unit, _shorten, _draw_l2),
}
NORMS = tuple(BALLS)


@dataclass(frozen=True)
class Attack(Config):
    """What an adversary may do: PGD by default, FGSM from [`Attack.fgsm`].

    Every step goes along the sign of the gradient (`"linf"`) or the gradient at unit length (`"l2"`), one gradient per
    sample; the perturbation is then cut to the valid pixels, and last to the ball. Random starts are uniform in the
    ball and draw from torch's global generator.

    Args:
        norm (`str`, defaults to `"linf"`):
            `"linf"` bounds the largest change of a single value, `"l2"` the Euclidean length of a sample's change.
        epsilon (`float`, defaults to 8/255):
            The bound, at least 0: of pixels in [0, 1], or of embeddings in their own units. The default is the usual
            one for `"linf"` on images; `"l2"` wants a larger one, such as 0.5 on small images, and embeddings one
            that suits their size.
        step_size (`float`, *optional*, defaults to `epsilon / 4`):
            How far a step goes, in the same norm: 2/255 for the default `epsilon`.
        steps (`int`, defaults to 10):
            Number of steps, at least 1. 20 is the other common setting.
        random_start (`bool`, defaults to `True`):
            Whether to start at a random point of the ball instead of at the sample itself.
        restarts (`int`, defaults to 1):
            How often to start, at least 1; more than once needs random starts.

    Raises:
        ValueError: if a value is of the wrong type or outside of its range.

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
        self._check("norm", NORMS.__contains__, f"one of {NORMS}", "It measures the perturbation.")
        self._check(
            "epsilon",
            lambda epsilon: is_number(epsilon) and 0 <= epsilon < math.inf,
            "a finite number >= 0",
            "It bounds the perturbation; 8 grey levels of 255 are 8/255.",
        )
        if self.step_size is None:
            object.__setattr__(self, "step_size", self.epsilon / 4)
        self._check(
            "step_size",
            lambda size: is_number(size) and 0 <= size < math.inf and (size > 0 or self.epsilon == 0),
            "a finite number > 0",
            "It is how far a step goes; without steps nothing is attacked.",
        )
        self._check("steps", lambda steps: is_integer(steps) and steps >= 1, "an integer >= 1", "FGSM takes one.")
        self._check(
            "random_start", lambda start: isinstance(start, bool), "True or False", "False starts at the sample."
        )
        self._check(
            "restarts",
            lambda restarts: is_integer(restarts) and restarts >= 1 and (restarts == 1 or self.random_start),
            "an integer >= 1, and 1 where random_start is False",
            "Without random starts every restart would repeat the first.",
        )

    @classmethod
    def fgsm(cls, epsilon: float = 8 / 255, norm: str = "linf") -> "Attack":
        """The fast gradient sign method: one step of length `epsilon` from the sample itself.

        >>> Attack.fgsm(epsilon=0.1)
        Attack(norm='linf', epsilon=0.1, step_size=0.1, steps=1, random_start=False, restarts=1)
        """
        return cls(norm=norm, epsilon=epsilon, step_size=epsilon, steps=1, random_start=False)

    @classmethod
    def pgd(cls, epsilon: float = 8 / 255, **values: Any) -> "Attack":
        """Projected gradient descent; `values` are the other fields."""
        return cls(epsilon=epsilon, **values)

    def scaled_to(self, epsilon: float) -> "Attack":
        """The same attack with another `epsilon`, its step size in proportion.

        Raises:
            ValueError: if this attack's own `epsilon` is 0, which has no proportions.
        """
        if self.epsilon == 0:
            raise ValueError(
                "An attack with epsilon=0 cannot be scaled: its step has no proportion to it. Give one with the "
                "largest epsilon that you want."
            )
        assert self.step_size is not None  # set by __post_init__
        return replace(self, epsilon=epsilon, step_size=self.step_size * (epsilon / self.epsilon))


@dataclass(frozen=True)
class AttackResult:
    """What an attack made of a batch of `B` samples.

    Args:
        inputs: what the model gets at the worst input found, the one of the highest loss: the batch with perturbed
            `pixel_values`, or with `inputs_embeds` in the place of `input_ids`; without labels.
        perturbation: its difference from the sample, in pixels of [0, 1] or in embeddings, float32 at least.
        clean_loss: cross-entropy of the samples themselves, `(B,)`, in nats.
        loss: the highest cross-entropy found, `(B,)`, never below `clean_loss`.
        was_correct: whether the sample itself is classified correctly, `(B,)`.
        is_correct: whether it is at every input that was tried, the sample itself among them, `(B,)`. An input of
            lower loss can be misclassified where the one of the highest loss is not.
    """

    inputs: dict[str, Any]
    perturbation: Tensor
    clean_loss: Tensor
    loss: Tensor
    was_correct: Tensor
    is_correct: Tensor
