"""The search of a study: which arguments of which method are tried before the test, and with which values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..validation import Config, is_number
from .parsing import is_directions, is_mapping, is_nested, is_positive, is_recordable
from .results import Direction


SCALARS = (bool, int, float, str)


@dataclass(frozen=True)
class Space:
    """The values that a search may give to one argument: a range of numbers, or a list.

    Args:
        low, high (`int` or `float`): the ends of the range, both included; integers if both are integers.
        log (`bool`): whether to sample the range on a logarithmic scale.
        choices (`tuple`): the values, if they are a list.
    """

    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[Any, ...] = ()

    @classmethod
    def parse(cls, value: Any) -> "Space":
        """Reads `[low, high]`, `[low, high, log]` or `{choices: [...]}`.

        Raises:
            ValueError: for anything else, and for an empty space.

        Example:

        >>> Space.parse([1, 10])
        Space(low=1, high=10, log=False, choices=())
        """
        if isinstance(value, Mapping) and set(value) == {"choices"} and isinstance(value["choices"], list):
            choices = tuple(value["choices"])
            if choices and all(isinstance(choice, SCALARS) and is_recordable(choice) for choice in choices):
                return cls(choices=choices)
        elif isinstance(value, list) and value[2:] in ([], ["log"]):
            ends = [_number(end) for end in value[:2]]
            is_log = len(value) == 3
            if len(ends) == 2 and None not in ends and ends[0] < ends[1] and (ends[0] > 0 or not is_log):
                return cls(ends[0], ends[1], is_log)
        raise ValueError(
            "expected a range [low, high] with low < high, both finite, [low, high, log] with 0 < low < high, or "
            f"{{choices: [...]}} with at least one number or text, got {value!r}."
        )

    def at(self, position: float) -> Any:
        """The value at a position between 0, the low end or first choice, and 1, the high end or last choice.

        Example:

        >>> Space(0.01, 1.0, log=True).at(0.5), Space(1, 4).at(0.9), Space(choices=("mask", "zero")).at(0.2)
        (0.1, 4, 'mask')
        """
        if self.choices:
            return self.choices[min(int(position * len(self.choices)), len(self.choices) - 1)]
        # An integer stands for the interval up to the next one.
        high = self.high + isinstance(self.low, int) * isinstance(self.high, int)
        value = self.low * (high / self.low) ** position if self.log else self.low + position * (high - self.low)
        return value if high == self.high else min(math.floor(value), self.high)

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        return f"{self.low} to {self.high}{', log' if self.log else ''}"


@dataclass(frozen=True, repr=False)
class Search(Config):
    """How the arguments of each method are chosen before the test.

    Args:
        trials (`int`): tuning runs of each method, also of those without a space.
        metric (`str` or `dict`):
            What to choose by, measured on a validation part of the training data: the name of one of the study's
            metrics, or `{name: "higher"}`.
        spaces (`dict`): method to argument to what [`Space.parse`] reads.
        arguments (`dict`): of the tuning runs only, such as one that skips the test.
    """

    key = "search"

    trials: int
    metric: str | dict[str, Direction]
    spaces: dict[str, dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check("trials", is_positive, "an integer of at least 1", "Every method gets that many tuning runs.")
        self._check(
            "metric",
            lambda value: isinstance(value, str) or (is_directions(value) and len(value) == 1),
            "the name of a metric, or {name: higher} or {name: lower}",
            "The tuning run that is best by it gives the arguments of the test runs.",
        )
        self._check(
            "spaces",
            lambda value: is_nested(value) and len(value) > 0 and all(value.values()),
            "a mapping from methods to arguments and their spaces, none of them empty",
            "Without a space there is nothing to search; leave out the methods without one.",
        )
        self._check("arguments", is_mapping, "a mapping from arguments to values", "The script gets them.")
        for method, spaces in self.spaces.items():
            for name, space in spaces.items():
                try:
                    Space.parse(space)
                except ValueError as error:
                    raise ValueError(f"Search: `spaces.{method}.{name}`: {error}") from error

    def space(self, method: str) -> dict[str, Space]:
        """The space of each argument of a method that is searched."""
        return {name: Space.parse(value) for name, value in self.spaces.get(method, {}).items()}


def _number(value: Any) -> Any:
    """A finite number, or `None` for others. YAML reads 1e-5 as a text, because it has no point."""
    if not is_number(value):
        try:
            value = float(value) if isinstance(value, str) else math.nan
        except ValueError:
            return None
    return value if math.isfinite(value) else None
