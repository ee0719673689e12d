"""Values of a setting that differ between layers or heads.

A setting is a number, a list with one value per layer of the stack, or `{"from": a, "to": b}`, a line from the first
layer of the stack to the last. A value per head is `{"heads": [...]}` or `{"heads": {"from": a, "to": b}}`, for all
layers or as an element of the list.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..attention.modules import Place


EXAMPLES = "a list with one per layer, {'from': 0.2, 'to': 0.0} or {'heads': [...]}"


@dataclass(frozen=True)
class Line:
    """Values that change linearly from the first to the last layer, or head."""

    start: float
    end: float

    def values(self, length: int) -> tuple[float, ...]:
        """Returns the values of `length` layers or heads; `start` if there is only one.

        >>> Line(0.3, 0.0).values(4)
        (0.3, 0.2, 0.1, 0.0)
        """
        last = max(length - 1, 1)
        # Rounded for the eye: 0.2 instead of 0.19999999999999998.
        return tuple(round((self.start * (last - i) + self.end * i) / last, 12) for i in range(length))

    def __repr__(self) -> str:
        return repr(to_plain(self))


@dataclass(frozen=True)
class PerHead:
    """One value per head, the same for all layers that it is given for."""

    values: tuple[float, ...] | Line

    def __repr__(self) -> str:
        return repr(to_plain(self))


# What users write, and what a configuration stores: immutable, comparable and hashable.
ProfileLike = float | Sequence[Any] | Mapping[str, Any]
Profile = float | Line | PerHead | tuple["float | PerHead", ...]
Value = float | tuple[float, ...]
"""The value at one attention module: a number, or one number per head."""


def profile_from(value: Any) -> Any:
    """Returns a profile, or what cannot be one unchanged.

    >>> profile_from([0.1, {"heads": [0.0, 0.2]}])
    (0.1, {'heads': [0.0, 0.2]})
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping) and value.keys() == {"from", "to"}:
        return Line(value["from"], value["to"])
    if isinstance(value, Mapping) and value.keys() == {"heads"}:
        return PerHead(profile_from(value["heads"]))
    return tuple(map(profile_from, value)) if isinstance(value, (list, tuple)) else value


def to_plain(profile: Any) -> Any:
    """Returns a profile as plain JSON types."""
    if isinstance(profile, Line):
        return {"from": profile.start, "to": profile.end}
    if isinstance(profile, PerHead):
        return {"heads": to_plain(profile.values)}
    return list(map(to_plain, profile)) if isinstance(profile, tuple) else profile


def is_profile(profile: Any, is_valid: Callable[[Any], bool]) -> bool:
    """Returns whether this is a profile and all of its numbers are valid."""
    if isinstance(profile, tuple):
        return len(profile) > 0 and all(_is_value(item, is_valid) for item in profile)
    return _is_numbers(profile, is_valid) or _is_value(profile, is_valid)


def numbers_of(profile: Profile) -> Iterator[float]:
    """Yields the numbers of a profile; a line lies between its two."""
    if isinstance(profile, Line):
        yield from (profile.start, profile.end)
    elif isinstance(profile, PerHead):
        yield from numbers_of(profile.values)
    elif isinstance(profile, tuple):
        for item in profile:
            yield from numbers_of(item)
    else:
        yield profile


def profile_at(profile: Profile, place: Place) -> float | PerHead:
    """Returns the part of a profile for an attention module, see [`check_place`] for the profiles that fit."""
    if isinstance(profile, Line):
        return profile.values(place.num_layers)[place.layer]
    if isinstance(profile, tuple):
        # Modules get their values before all of them are checked together.
        return profile[place.layer] if place.layer < len(profile) else 0.0
    return profile


def value_at(profile: Profile, place: Place) -> Value:
    """Returns the value at an attention module."""
    part = profile_at(profile, place)
    if not isinstance(part, PerHead):
        return part
    return part.values.values(place.num_heads or 1) if isinstance(part.values, Line) else part.values


def check_place(name: str, profile: Profile, place: Place) -> None:
    """Checks that a profile has a value for an attention module and each of its heads.

    Raises:
        ValueError: if a list has another length than the stack, or the heads are unknown or of another number.
    """
    if isinstance(profile, tuple) and len(profile) != place.num_layers:
        raise ValueError(
            f"`{name}` must have one value per layer, got {len(profile)} values, and the stack {place.stack!r} has "
            f"{place.num_layers} layers: the values cannot be assigned. A line such as {{'from': 0.2, 'to': 0.0}} "
            "fits any depth, and `attentions` can select one stack."
        )
    part = profile_at(profile, place)
    if not isinstance(part, PerHead):
        return
    if place.num_heads is None:
        raise ValueError(
            f"`{name}` has values per head, but the attention in {place.stack!r} has no attribute with its number of "
            "heads: they cannot be assigned. Use one value per layer."
        )
    if isinstance(part.values, tuple) and len(part.values) != place.num_heads:
        raise ValueError(
            f"`{name}` must have one value per head, got {len(part.values)} values, and layer {place.layer} of "
            f"{place.stack!r} has {place.num_heads} heads: the values cannot be assigned."
        )


def _is_value(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return _is_numbers(value.values, is_valid) if isinstance(value, PerHead) else is_valid(value)


def _is_numbers(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    if isinstance(value, Line):
        return is_valid(value.start) and is_valid(value.end)
    return isinstance(value, tuple) and len(value) > 0 and all(map(is_valid, value))
