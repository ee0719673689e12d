"""The command line of a recipe: dataclasses as flags, a YAML file under them, and errors of one line."""

import argparse
import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.reweighting_configuration import REWEIGHTINGS


ATTENTION_DROP_FIELDS = tuple(field.name for field in fields(AttentionDropConfig))
# What transformers, datasets and torch raise for a path, a name or a value that the user got wrong.
BAD_INPUT_ERRORS = (ValueError, OSError, RuntimeError, ImportError)


@dataclass
class ModelArguments:
    """Which model to train, and how it attends."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model on the Hub, or folder, to start from. Without it a small one is trained from scratch."
        },
    )
    attn_implementation: str = field(
        default="attentiondrop",
        metadata={
            "help": "Attention to train with: attentiondrop; or one that learns, affine_scaled, attention_sink or "
            "gated_attention, which AttentionDrop perturbs where one of its flags is given; or the baseline, sdpa, "
            "which those flags do not touch."
        },
    )
    base_attention: str | None = field(
        default=None,
        metadata={
            "help": "Kernel to compute the attention that is blurred, reweighted, or left alone: flash_attention_2, 3 "
            "or 4, flex_attention. Without it, and where it cannot express a mask, SDPA does."
        },
    )
    attention_reweighting: str | None = field(
        default=None,
        metadata={
            "help": "Configuration of an attention that learns, as YAML: '{init: paper, gate: true}'. init: paper is "
            "for training from scratch. The class of its configuration documents the keys."
        },
    )


@dataclass
class RunArguments:
    """What a recipe adds to Transformers' training arguments; to be mixed into them."""

    _argument_group_name = "training"

    do_train: bool = field(default=True, metadata={"help": "Train; false evaluates the model as it is."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate at the end."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate during training."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint."})
    save_total_limit: int | None = field(default=1, metadata={"help": "How many checkpoints to keep."})
    logging_steps: float = field(
        default=0.05, metadata={"help": "Steps between two logs of the loss; below 1 as a share of all steps."}
    )
    # Without it several processes on a machine that has no accelerator would not find each other.
    use_cpu: bool = field(
        default=not torch.accelerator.is_available(), metadata={"help": "Leave the accelerator alone."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Write into an output folder that is not empty; checkpoints found in it are deleted."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint folder to continue from; without a value, the last one in the output folder.",
            "nargs": "?",
            "const": "last",
        },
    )


def attention_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` and the config of a new model need to be told about attention.

    Args:
        values (`Mapping[str, Any]`): those of [`ModelArguments`], and the fields of [`AttentionDropConfig`] given.

    Raises:
        ValueError: for values out of range, and for a configuration that the attention would ignore.
    """
    name, reweighting = values["attn_implementation"], values["attention_reweighting"]
    drop = {field_: values[field_] for field_ in ATTENTION_DROP_FIELDS if field_ in values}
    is_dropping = name == "attentiondrop" or (name in REWEIGHTINGS and bool(drop))
    options = {"attn_implementation": name, "attention_drop": AttentionDropConfig(**drop) if is_dropping else None}
    if reweighting is not None:
        if name not in REWEIGHTINGS:
            raise ValueError(
                f"--attention_reweighting configures {', '.join(REWEIGHTINGS)}, and --attn_implementation is {name}, "
                "which learns nothing. Name one of them, or leave the configuration out."
            )
        try:
            options["attention_reweighting"] = REWEIGHTINGS[name].from_dict(yaml.safe_load(reweighting))
        except (TypeError, yaml.YAMLError) as error:
            raise ValueError(
                f"--attention_reweighting must be a YAML mapping such as '{{init: paper}}', got {reweighting!r}."
            ) from error
    return options


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class RecipeParser(HfArgumentParser):
    """[`~transformers.HfArgumentParser`] for a recipe.

    Adds the fields of [`AttentionDropConfig`] as flags, and `--config` with a YAML file of flags, which those on the
    command line override. Whatever is wrong ends in one line on stderr and exit code 2.

    Args:
        description (`str`): text for `--help`, usually the recipe's docstring.
        dataclass_types (`Sequence[type]`): dataclasses whose fields become flags.
    """

    def __init__(self, description: str, dataclass_types: Sequence[type]) -> None:
        super().__init__(dataclass_types, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
        self.add_argument("--config", help="YAML file of arguments; flags on the command line override it.")
        self.values: dict[str, Any] = {}
        group = self.add_argument_group("AttentionDrop")
        types, helps = get_type_hints(AttentionDropConfig), _documented_arguments(AttentionDropConfig)
        for field_ in fields(AttentionDropConfig):
            hint = types[field_.name]
            items = next((get_args(option) for option in (hint, *get_args(hint)) if get_origin(option) is tuple), None)
            options = {"type": items[0], "nargs": "+"} if items else {"type": hint}
            if get_args(hint) == (int, float):
                options = {"type": _number}
            # Only flags that were given are among the values: that turns AttentionDrop on beside a learned method.
            help_ = f"{helps[field_.name]} (default: {field_.default})"
            group.add_argument(f"--{field_.name}", default=argparse.SUPPRESS, help=help_, **options)

    def parse(
        self,
        argv: Sequence[str] | None = None,
        defaults: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {},
    ) -> tuple[Any, ...]:
        """Reads the flags over the YAML file over the defaults.

        Args:
            argv (`Sequence[str]`, *optional*): the flags; those of the process by default.
            defaults (`Callable`, *optional*):
                Gives, for the values read, defaults that depend on them; they stand below the file and the flags.

        Returns:
            `tuple`: one object per dataclass, then the [`attention_options`]. The plain values stay in `values`.

        Raises:
            SystemExit: with code 2, for anything that is wrong.
        """
        flags = list(sys.argv[1:] if argv is None else argv)
        flags = self._flags_of_config(self._read(flags)["config"]) + flags
        self.set_defaults(**defaults(self._read(flags)))
        self.values = self._read(flags)
        with self.refusing_bad_input():
            attention = attention_options(self.values)
            arguments = self.parse_dict(self.values, allow_extra_keys=True)
        if attention["attention_drop"] is not None:
            self.values |= attention["attention_drop"].to_dict()
        return (*arguments, attention)

    def error(self, message: str) -> None:
        """Ends the process with exit code 2 and one line on stderr, of several on a machine from the first only."""
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {line}\n" if is_first else None)

    @contextmanager
    def refusing_bad_input(self) -> Iterator[None]:
        """Turns what a library raises for bad input into [`RecipeParser.error`]."""
        try:
            yield
        except BAD_INPUT_ERRORS as error:
            self.error(str(error))

    def _read(self, flags: list[str]) -> dict[str, Any]:
        namespace, unknown = self.parse_known_args(flags)
        if unknown:
            name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
            self.error(f"unknown argument {unknown[0]}.{_suggestion(name, self._names, '--')}")
        return vars(namespace)

    @property
    def _names(self) -> list[str]:
        return [action.dest for action in self._actions]

    def _flags_of_config(self, path: str | None) -> list[str]:
        """The contents of the YAML file as flags, so that both are checked by the same rules."""
        if path is None:
            return []
        try:
            contents = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            self.error(f"--config {path} cannot be read: {error}")
        if not isinstance(contents, dict):
            self.error(f"--config {path} must hold `argument: value` lines, got {type(contents).__name__}.")
        known = [name for name in self._names if name != "config"]
        flags: list[str] = []
        for name, value in contents.items():
            if name not in known:
                self.error(f"unknown key {name!r} in --config {path}.{_suggestion(str(name), known)}")
            if isinstance(value, list):
                flags += [f"--{name}", *map(str, value)]
            elif value is not None:
                flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
        return flags


def check_path(flag: str, name: str | None, is_local: bool = False) -> None:
    """Refuses a path with nothing at it.

    Args:
        flag (`str`): the flag that gave it.
        name (`str`, *optional*): a path, or where `is_local` is false perhaps the name of something on the Hub.
        is_local (`bool`, defaults to `False`): whether it can only be a path.

    Raises:
        FileNotFoundError: if it can only be a path, and nothing is there.
    """
    if name is None or Path(name).exists():
        return
    if is_local or name.startswith((".", "~")) or Path(name).is_absolute() or len(Path(name).parts) > 2:
        raise FileNotFoundError(f"{flag}: expected an existing path, there is nothing at {name!r}.")


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _suggestion(name: str, known: Sequence[str], prefix: str = "") -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {prefix}{nearest[0]}?" if nearest else " See --help for those there are."


def _documented_arguments(documented: type) -> dict[str, str]:
    """The descriptions under `Args:` of a docstring in Hugging Face style."""
    entries = re.findall(r"^    (\w+) \(.*\):\n((?: {8}.+\n)+)", inspect.getdoc(documented), flags=re.MULTILINE)
    return {name: " ".join(text.split()).replace("%", "%%") for name, text in entries}
