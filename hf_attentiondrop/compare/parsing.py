"""Reading the YAML file of a study: no key twice, none that YAML takes for something else than a text, no unknown one,
and none missing."""

import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..validation import Config, article, is_integer


Parsed = TypeVar("Parsed", bound=Config)


def read_yaml(path: str | Path) -> Any:
    """Reads a YAML file.

    Raises:
        ValueError: if it does not exist, is not YAML, has a key twice, or one that is no text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a YAML file, there is no file {str(path)!r}.")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"expected YAML, {str(path)!r} cannot be read: {error}") from error


def from_mapping(kind: type[Parsed], values: Any) -> Parsed:
    """Builds a dataclass from a mapping of its fields.

    Raises:
        ValueError: for anything but a mapping, and for an unknown or a missing key.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"`{kind.key}` must be a mapping of the fields of {article(kind.__name__)}, got {values!r}.")
    required = [item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING]  # type: ignore[arg-type]
    for name in values:
        if name not in kind.settings():
            raise ValueError(kind._unknown_key(name))
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"`{kind.key}` has no {' and no '.join(missing)}. It needs {', '.join(required)}.")
    return kind(**values)


def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with slashes in the names.

    >>> flatten({"a": 1, "b": {"c": 2}})
    {'a': 1, 'b/c': 2}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def is_positive(value: Any) -> bool:
    return is_integer(value) and value >= 1


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def is_nested(value: Any) -> bool:
    return is_mapping(value) and all(map(is_mapping, value.values()))


def is_recordable(value: Any) -> bool:
    """Whether a record of runs can hold a value: JSON has no infinite numbers."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def check_spellings(names: Iterable[str]) -> None:
    """Checks that no argument of a run is spelled in two ways, of which the script would take the last.

    Raises:
        ValueError: if one is.
    """
    spellings: dict[str, str] = {}
    for name in names:
        if (other := spellings.setdefault(name.replace("-", "_"), name)) != name:
            raise ValueError(
                f"Study: expected one spelling of an argument, got {other!r} and {name!r}. The script would take the "
                "last of them, whatever the report says. Write one."
            )


def is_directions(value: Any) -> bool:
    return is_mapping(value) and all(direction in ("higher", "lower") for direction in value.values())


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a date is a text. A key is an error if it is no text, or repeated: PyYAML silently keeps its last
    value."""

    yaml_implicit_resolvers = {
        start: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise yaml.MarkedYAMLError(problem=f"{repeated[0]!r} is there twice", problem_mark=node.start_mark)
        for name, (key, _) in zip(names, node.value, strict=True):
            if not isinstance(name, str):
                text = key.value if isinstance(key, yaml.ScalarNode) else "..."
                raise yaml.MarkedYAMLError(
                    problem=f"a name must be a text, and YAML reads {text} as {name!r}: write it in quotes, '{text}'",
                    problem_mark=key.start_mark,
                )
        return super().construct_mapping(node, deep)
