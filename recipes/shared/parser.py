"""The argument parser of a recipe: dataclasses as flags, defaults in a YAML file, and one-line errors."""

import argparse
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_attentiondrop.compare.parsing import read_yaml
from hf_attentiondrop.evaluation.hub_access import offline_if_cut_off
from hf_attentiondrop.integration.config_entries import to_entry

from .attention import LIST_FLAG, attention_options, settings_left_out
from .method_flags import PROFILES, add_method_flags


# Raised by transformers, datasets and torch for a wrong path, name or value.
BAD_INPUT_ERRORS = (ValueError, OSError, RuntimeError, ImportError)
NOT_GIVEN = object()
# Flags whose values are YAML, on the command line too.
YAML_FLAGS = (LIST_FLAG, "attention_reweighting", *PROFILES)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class RecipeParser(HfArgumentParser):
    """[`~transformers.HfArgumentParser`] for a recipe.

    Adds the flags of [`add_method_flags`], and `--config`, a YAML file of arguments that flags on the
    command line override. Every error is one line on stderr, with exit code 2.

    Args:
        description (`str`): text for `--help`, usually the recipe's docstring.
        dataclass_types (`Sequence[type]`):
            Dataclasses whose fields become flags. `_needing` of one names flags that have an effect only with another,
            `_excluded` those that have one only without it.
    """

    def __init__(self, description: str, dataclass_types: Sequence[type]) -> None:
        super().__init__(dataclass_types, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
        self.add_argument("--config", help="YAML file of arguments; flags on the command line override it.")
        self.values: dict[str, Any] = {}
        self.given: set[str] = set()
        add_method_flags(self)

    def parse(
        self,
        argv: Sequence[str] | None = None,
        defaults: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {},
    ) -> tuple[Any, ...]:
        """Parses the arguments: flags override the YAML file, which overrides the defaults.

        If a flag on the command line selects another method than the file, the settings of the method in the file do
        not apply, see [`settings_left_out`]; a note on stderr says so.

        Args:
            argv (`Sequence[str]`, *optional*): the flags; by default those of the process.
            defaults (`Callable`, *optional*):
                Returns defaults that depend on the parsed values. The file and the flags override them.

        Returns:
            `tuple`: one object per dataclass, then the [`attention_options`]. The attribute `values` has all plain
            values, and `given` the names of those that a flag or the file set.

        Raises:
            SystemExit: with code 2, for any error.
        """
        typed = list(sys.argv[1:] if argv is None else argv)
        typed_values = self._given(typed)
        path = typed_values.get("config")
        from_file = self._flags_of_config(path)
        file_values = self._given(chain.from_iterable(from_file.values()))
        if left_out := settings_left_out(file_values, typed_values):
            names = dict.fromkeys(chain.from_iterable(left_out.values()))
            from_file = {name: flags for name, flags in from_file.items() if name not in names}
            self.note(
                f"{' and '.join(_shown(name, typed_values[name]) for name in left_out)}: the settings of --config "
                f"{path} for another method do not apply: {', '.join(names)}. Pass them as flags to apply them."
            )
        flags = [*chain.from_iterable(from_file.values()), *typed]
        self.given = {*from_file, *typed_values}
        self.set_defaults(**defaults(self._read(flags)))
        self.values = self._read(flags)
        self._check_effects(typed_values)
        with self.exiting_on_bad_input():
            attention = attention_options(self.values)
            arguments = self.parse_dict(self.values, allow_extra_keys=True)
        if LIST_FLAG in self.values:
            self.values[LIST_FLAG] = to_entry(attention["attention_drop"])
        elif attention["attention_drop"] is not None:
            self.values |= attention["attention_drop"].to_dict()
        return (*arguments, attention)

    def error(self, message: str) -> NoReturn:
        """Exits with code 2 and one line on stderr, see [`RecipeParser.stop`]."""
        self.stop(2, f"error: {message}")

    def stop(self, code: int, message: str) -> NoReturn:
        """Exits with one line on stderr, printed by the first process of a machine only."""
        self.exit(code, self._line(message))

    def note(self, message: str | None) -> None:
        """Prints a note to stderr, if there is one, in one line, by the first process of a machine only."""
        if message is None:
            return
        print(self._line(f"note: {message}") or "", end="", file=sys.stderr)

    def _line(self, message: str) -> str | None:
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        return f"{self.prog}: {' '.join(message.split())}\n" if is_first else None

    def cap(self, arguments: Any, name: str, longest: float) -> None:
        """Lowers the default of an argument to the limit of the model, with a note.

        Args:
            arguments: dataclass with the argument.
            name (`str`): name of the argument, a number of tokens.
            longest (`float`): maximum number of tokens of the model.

        Raises:
            ValueError: if a higher value was set explicitly.
        """
        value = getattr(arguments, name)
        if value <= longest:
            return
        if name in self.given:
            raise ValueError(f"--{name}: the model takes {longest} tokens, got {value}.")
        setattr(arguments, name, longest)
        self.values[name] = longest
        self.note(f"--{name} is {longest}, the most tokens that the model takes, and not {value} as by default.")

    @contextmanager
    def exiting_on_bad_input(self) -> Iterator[None]:
        """Turns exceptions of libraries for bad input into [`RecipeParser.error`]."""
        try:
            yield
        except BAD_INPUT_ERRORS as error:
            self.error(str(error))

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """For the code before anything is written: bad input and Ctrl-C exit with one line, and a Hub that does not
        answer is asked once, instead of half a minute for every file."""
        names = [self.values.get(name) for name in ("model_name_or_path", "dataset_name")]
        try:
            with self.exiting_on_bad_input(), ExitStack() as stack:
                for name in filter(None, names):
                    stack.enter_context(offline_if_cut_off(name))
                yield
        except KeyboardInterrupt:
            self.stop(130, "interrupted before the training; nothing was written.")

    def _check_effects(self, typed: Collection[str]) -> None:
        """Flags without effect are an error, unless the flag that decides about them was set on purpose."""
        for kind in self.dataclass_types:
            for other, names in getattr(kind, "_needing", {}).items():
                changed = self._changed(
                    name for name in names if other not in (typed if name in typed else self.given)
                )
                if changed and not self.values[other]:
                    self.error(f"{changed} would have no effect without --{other}. Add it, or leave the others out.")
            for other, names in getattr(kind, "_excluded", {}).items():
                changed = self._changed(name for name in names if name in typed or other not in typed)
                if changed and self.values[other]:
                    self.error(f"{changed} would have no effect with --{other}. Leave it out, or the others.")

    def _changed(self, names: Iterable[str]) -> str:
        """The flags whose values are not the defaults, which the file of a run has, too."""
        changed = [name for name in names if name in self.values and self.values[name] != self.get_default(name)]
        return " and ".join(_shown(name, self.values[name]) for name in changed)

    def _given(self, flags: Iterable[str]) -> dict[str, Any]:
        """The values that the flags set, without defaults."""
        values = self._read(flags, argparse.Namespace(**dict.fromkeys(self._names, NOT_GIVEN)))
        return {name: value for name, value in values.items() if value is not NOT_GIVEN}

    def _read(self, flags: Iterable[str], namespace: argparse.Namespace | None = None) -> dict[str, Any]:
        namespace, unknown = self.parse_known_args(list(flags), namespace)
        if unknown:
            name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
            self.error(f"unknown argument {unknown[0]}.{_suggestion(name, self._names, '--')}")
        return vars(namespace)

    @property
    def _names(self) -> list[str]:
        return [action.dest for action in self._actions]

    def _flags_of_config(self, path: str | None) -> dict[str, list[str]]:
        """The contents of the YAML file as flags by name, so that both are checked in the same way."""
        if path is None:
            return {}
        try:
            contents = read_yaml(path)
        except (OSError, ValueError) as error:
            self.error(f"--config {path} cannot be read: {error}")
        if not isinstance(contents, dict):
            self.error(f"--config {path} must hold `argument: value` lines, got {type(contents).__name__}.")
        known = [name for name in self._names if name != "config"]
        flags: dict[str, list[str]] = {}
        for name, value in contents.items():
            if name not in known:
                self.error(f"unknown key {name!r} in --config {path}.{_suggestion(str(name), known)}")
            if value is False and name.endswith("_strategy"):
                value = "no"  # As YAML reads it without quotes.
            if name in YAML_FLAGS and isinstance(value, dict | list):
                flags[name] = [f"--{name}={yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip()}"]
            elif isinstance(value, dict):
                flags[name] = [f"--{name}={json.dumps(value)}"]  # As Transformers reads it.
            elif isinstance(value, list):
                flags[name] = [f"--{name}", *map(str, value)]
            elif value is not None:
                flags[name] = [f"--{name}={value}"]
        return flags


def _shown(name: str, value: Any) -> str:
    return f"--{name} {value}" if isinstance(value, str) else f"--{name}"


def _suggestion(name: str, known: Sequence[str], prefix: str = "") -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {prefix}{nearest[0]}?" if nearest else " See --help for all of them."
