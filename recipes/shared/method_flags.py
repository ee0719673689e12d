"""The flags for perturbations of attention, derived from the dataclasses in the table of methods."""

import inspect
import re
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from hf_attentiondrop.methods import PERTURBATIONS
from hf_attentiondrop.methods.method import Perturbation


SETTINGS = {variant: method.settings() for variant, method in PERTURBATIONS.items()}
# Those that all variants use come last.
SETTING_NAMES = sorted(
    dict.fromkeys(name for names in SETTINGS.values() for name in names),
    key=lambda name: all(name in names for names in SETTINGS.values()),
)
# Settings that say where any of them acts.
SELECTION = ("layers", "attentions")
# Settings that may differ between layers and heads.
PROFILES = tuple(dict.fromkeys(method.scheduled for method in PERTURBATIONS.values()))
# Flags that describe a single perturbation, as opposed to --attention_drop.
SINGLE_METHOD_FLAGS = ("variant", *SETTING_NAMES)
EXAMPLE = "[{variant: hard, p: 0.1}, {variant: blur, sigma_max: 0.5}]"


def add_method_flags(parser: ArgumentParser) -> None:
    """Adds `--attention_drop`, `--variant`, and a flag for every setting of a perturbation.

    The parsed values contain only those of them that were passed: these combine AttentionDrop with a learned method.
    """
    group = parser.add_argument_group(
        "AttentionDrop",
        "Either a single perturbation, by --variant and the settings that it uses, or --attention_drop.",
    )
    group.add_argument(
        "--attention_drop",
        type=perturbation_entry,
        default=SUPPRESS,
        metavar="YAML",
        help=f"One perturbation or a list of them, as YAML: '{EXAMPLE}'. The first of a list runs around the last. "
        "Use it in place of the flags below.",
    )
    group.add_argument(
        "--variant", default=SUPPRESS, help=f"Perturbation, one of {', '.join(PERTURBATIONS)} (default: hard)"
    )
    for name in SETTING_NAMES:
        methods = {variant: method for variant, method in PERTURBATIONS.items() if name in SETTINGS[variant]}
        hint = get_type_hints(next(iter(methods.values())))[name]
        options = {"type": profile, "metavar": "YAML"} if name in PROFILES else _options(hint)
        group.add_argument(f"--{name}", default=SUPPRESS, help=describe_setting(name, methods), **options)


def perturbation_entry(text: str) -> dict[str, Any] | list[dict[str, Any]]:
    """Parses the YAML of `--attention_drop`.

    Raises:
        ArgumentTypeError: if it is neither a mapping nor a list of mappings.

    Example:

    >>> perturbation_entry("[{variant: hard, p: 0.2}, {variant: blur}]")
    [{'variant': 'hard', 'p': 0.2}, {'variant': 'blur'}]
    """
    try:
        entry = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArgumentTypeError(f"expected YAML such as '{EXAMPLE}', got {text!r}: {error}") from error
    if not all(isinstance(item, dict) for item in (entry if isinstance(entry, list) else [entry])):
        raise ArgumentTypeError(f"expected a YAML mapping or a list of mappings such as '{EXAMPLE}', got {text!r}.")
    return entry


def profile(text: str) -> float | list[Any] | dict[str, Any]:
    """Parses a setting that may differ between layers and heads: a number, or a YAML list or mapping.

    Raises:
        ArgumentTypeError: if it is none of them.

    Example:

    >>> profile("0.2"), profile("{from: 0.2, to: 0.0}")
    (0.2, {'from': 0.2, 'to': 0.0})
    """
    try:
        parsed = yaml.safe_load(text)
        return parsed if isinstance(parsed, (list, dict)) else float(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ArgumentTypeError(
            f"expected a number, a YAML list of numbers, or a mapping such as '{{from: 0.2, to: 0.0}}', got {text!r}."
        ) from error


def number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def describe_setting(name: str, methods: Mapping[str, type[Perturbation]]) -> str:
    """Returns the help of a setting: its documentation in each variant that uses it.

    Args:
        name (`str`): name of the setting.
        methods (`Mapping[str, type[Perturbation]]`): variant to its class, for those with the setting.
    """
    variants: dict[str, list[str]] = {}
    for variant, method in methods.items():
        default = getattr(method(), name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        variants.setdefault(f"{_documented_settings(method)[name]} (default: {shown})", []).append(variant)
    if methods.keys() == PERTURBATIONS.keys() and len(variants) == 1:
        return next(iter(variants))
    return " ".join(f"{', '.join(users)}: {text}" for text, users in variants.items())


def _options(hint: Any) -> dict[str, Any]:
    """Translates the type hint of a setting into options of `add_argument`."""
    types = [type_ for type_ in (get_args(hint) if isinstance(hint, UnionType) else [hint]) if type_ is not NoneType]
    if types == [int, float]:
        return {"type": number}
    (type_,) = types
    return {"type": get_args(type_)[0], "nargs": "+"} if get_origin(type_) is tuple else {"type": type_}


def _documented_settings(method: type[Perturbation]) -> dict[str, str]:
    """The descriptions under `Args:` in the docstrings, in Hugging Face style, of a method and its base classes."""
    described: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        entries = re.findall(r"^    (\w+) \(.*\):\n((?: {8}.+(?:\n|$))+)", inspect.getdoc(cls) or "", re.MULTILINE)
        described |= {name: " ".join(text.split()).replace("%", "%%") for name, text in entries}
    return described
