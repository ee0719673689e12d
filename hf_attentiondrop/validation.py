"""Checked, immutable settings: the base class of every configuration."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, Self


# Similarity above which an unknown name is taken for a typo of a known one. A wrong suggestion is worse than none.
SIMILARITY = 0.7


class Config:
    """Base class of frozen dataclasses with checked fields and plain Python values.

    Subclasses call [`_check`] for each field in `__post_init__`.
    """

    key: ClassVar[str]
    """The entry of config.json that holds the configuration."""

    def _check(self, name: str, is_valid: Callable[[Any], bool], expected: str, why: str) -> None:
        value = getattr(self, name)
        if not is_valid(value):
            raise ValueError(f"{type(self).__name__}: `{name}` must be {expected}, got {value!r}. {why}")

    def _make_plain(self, *sequences: str) -> None:
        """Converts NumPy and torch numbers to Python numbers, and the named fields to tuples.

        Plain values can be written to config.json, and tuples keep the configuration immutable and comparable.
        """
        for field in fields(self):  # type: ignore[arg-type]  # Every subclass is a dataclass.
            value = plain(getattr(self, field.name))
            if field.name in sequences and isinstance(value, (list, tuple, range)):
                value = tuple(map(plain, value))
            object.__setattr__(self, field.name, value)

    @classmethod
    def settings(cls) -> list[str]:
        """Returns the names of the fields, own fields before inherited ones."""
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        inherited = {name for base in cls.__mro__[1:] for name in getattr(base, "__annotations__", ())}
        return sorted(names, key=lambda name: name in inherited)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain JSON types, as stored in config.json."""
        values = {name: getattr(self, name) for name in self.settings()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.settings())
        return f"{type(self).__name__}({values})"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | Self) -> Self:
        """Builds the configuration from a mapping of its settings.

        Raises:
            ValueError: for an unknown key.
            TypeError: if `values` is not a mapping.
        """
        if isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            raise TypeError(
                f"`{cls.key}` must be {article(cls.__name__)} or a dict of its fields, got {values!r}: "
                f"for example {cls.key}={cls.__name__}()."
            )
        for name in values:
            if name not in cls.settings():
                raise ValueError(cls._unknown_key(name))
        return cls(**values)

    @classmethod
    def _unknown_key(cls, name: str) -> str:
        names = cls.settings()
        return (
            f"Unknown key {name!r} in `{cls.key}`: it would have no effect.{suggestion(name, names)} "
            f"The keys of {cls.__name__} are {', '.join(names)}."
        )


def suggestion(name: Any, known: Iterable[str]) -> str:
    """Returns " Did you mean ...?" if a known name resembles `name`, otherwise an empty string.

    >>> suggestion("wdith", ["sigma_max", "width"])
    " Did you mean 'width'?"
    """
    nearest = difflib.get_close_matches(str(name), list(known), n=1, cutoff=SIMILARITY)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def article(name: str) -> str:
    """Returns a class name with its article.

    >>> article("AffineScaledConfig"), article("HardMasking")
    ('an AffineScaledConfig', 'a HardMasking')
    """
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """A number of NumPy or torch as one of Python, an array as a list; others as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_probability(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def is_filled_tuple(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(is_valid(item) for item in value)
