"""The command line `hf-attentiondrop`: what a user wants to know without writing code.

A command is a function that takes the parsed arguments and returns the exit code, and one that declares it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..attention.parts import configs_of
from ..integration.config_entries import perturbations_of
from ..integration.functions import ATTENTION_DROP
from ..integration.implementations import FUNCTIONS
from ..methods.method import Perturbation
from ..methods.parsing import perturbations_from
from ..report import report
from ..version import __version__


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


ATTACKED_SAMPLES = 200
# Modules that `evaluate` imports beyond what the package requires, and the packages that they are in.
EVALUATION_NEEDS = {"datasets": "datasets", "matplotlib": "matplotlib", "PIL": "pillow"}
# What torch's generators take, on every device.
MAX_SEED = 2**63 - 1


class InputError(Exception):
    """Something that the user gave cannot be used; the message says what, and what can."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments; those of the process by default.

    Returns:
        `int`: the exit code: 0, or what the command says, or 2 for input that cannot be used.

    Raises:
        SystemExit: from argparse, with code 2 for arguments that do not parse and 0 after `--help` and `--version`.
    """
    parser = argparse.ArgumentParser(prog="hf-attentiondrop", description="AttentionDrop for Transformers models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for declare in COMMANDS:
        declare(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except InputError as error:
        _print_error(error)
        return 2


def declare_check(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "check",
        help="show what would be applied where in a model, or why it is refused",
        description="Shows what would be applied to which attention module of a model, or why it is refused (exit "
        "code 1). Reads its config alone: no weights are needed, downloaded or loaded.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a folder with a config.json, the path of one, or a model on the Hub"
    )
    parser.add_argument(
        "--attn_implementation",
        choices=list(FUNCTIONS),
        help=f"by default the one that a checkpoint with learned weights was saved with, otherwise {ATTENTION_DROP}",
    )
    parser.add_argument(
        "--attention_drop",
        type=_attention_drop,
        metavar="JSON",
        help='a perturbation, such as \'{"variant": "blur"}\'; by default those of the config',
    )
    parser.set_defaults(run=check)


def check(arguments: argparse.Namespace) -> int:
    """Prints the report of a model that is built without weights, or its refusal."""
    from transformers import logging

    logging.set_verbosity_error()  # Warnings about weights and token ids say nothing about attention.
    config = _load_config(arguments.model)
    if arguments.attention_drop is not None:
        config.attention_drop = arguments.attention_drop
    try:
        for part in configs_of(config):
            perturbations_of(part)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        model = _build_without_weights(config, arguments.attn_implementation or _own_implementation(config))
    except ValueError as refusal:
        _print_error(refusal)
        return 1
    print(report(model))
    return 0


def declare_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure accuracy, calibration, robustness and attention of a classifier",
        description="Measures a classifier of images or texts on labelled data, and writes a report: metrics.json, "
        "plots and README.md.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder with a saved classifier, or one on the Hub")
    parser.add_argument(
        "--data",
        required=True,
        help="a folder with one folder of images per class; a csv, tsv, json, jsonl or parquet file; or a data set on "
        "the Hub",
    )
    parser.add_argument("--split", help="by default test, or else validation, or else train")
    parser.add_argument("--config", help="configuration of a data set on the Hub")
    parser.add_argument("--image_column", help="column of images (default: image)")
    parser.add_argument("--text_column", help="column of texts (default: text)")
    parser.add_argument("--text_pair_column", help="column of the second texts, where pairs are classified")
    parser.add_argument("--label_column", default="label", help="column of classes (default: label)")
    parser.add_argument("--max_samples", type=_positive, help="evaluate on so many samples, drawn at random")
    parser.add_argument("--batch_size", type=_positive, default=32, help="samples per batch (default: 32)")
    parser.add_argument("--evaluate_robustness", action="store_true", help="attack the model by FGSM and PGD")
    parser.add_argument(
        "--robustness_samples", type=_positive, help=f"how many samples to attack (default: {ATTACKED_SAMPLES})"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of the samples and the attacks (default: 0)")
    parser.add_argument("--device", help="such as cuda:0; by default the accelerator, if there is one")
    parser.add_argument(
        "--output_dir", required=True, help="folder for the report; it must be empty, or not be there yet"
    )
    parser.set_defaults(run=evaluate)


def evaluate(arguments: argparse.Namespace) -> int:
    """Measures a classifier and writes its report."""
    # The plots are drawn when all was measured: too late to find out that they cannot be.
    if missing := [package for module, package in EVALUATION_NEEDS.items() if find_spec(module) is None]:
        raise InputError(f"evaluate needs {', '.join(missing)}: `pip install {' '.join(missing)}`.")
    import datasets
    from transformers import logging

    from .reporting import evaluate_checkpoint, summary

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # What it logs as an error, it raises as well.
    names = ("split", "config", "image_column", "text_column", "text_pair_column", "label_column", "max_samples")
    options = {name: getattr(arguments, name) for name in (*names, "batch_size", "seed", "device")}
    if arguments.robustness_samples is not None and not arguments.evaluate_robustness:
        raise InputError(
            f"--robustness_samples: nothing is attacked without --evaluate_robustness, so "
            f"{arguments.robustness_samples} would be ignored. Add that flag, or leave this one out."
        )
    attacked = (arguments.robustness_samples or ATTACKED_SAMPLES) if arguments.evaluate_robustness else 0
    try:
        evaluation = evaluate_checkpoint(
            arguments.model, arguments.data, arguments.output_dir, attacked_samples=attacked, **options
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise InputError(str(error)) from error
    print(summary(evaluation, arguments.output_dir))
    return 0


COMMANDS = (declare_check, declare_evaluate)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}.")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {MAX_SEED}, got {text!r}.")
    return int(text)


def _print_error(error: Exception) -> None:
    print(f"hf-attentiondrop: error: {_one_line(error)}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _attention_drop(text: str) -> tuple[Perturbation, ...]:
    try:
        return perturbations_from(json.loads(text))
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"expected JSON such as '{{\"p\": 0.2}}', got {text!r}: {error}.") from None
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(_one_line(error)) from None


def _load_config(name: str) -> "PreTrainedConfig":
    from ..evaluation.hub_access import check_path, offline_if_cut_off
    from .checkpoint import load_config

    expected = "a folder with a config.json, the path of one, or a model on the Hub"
    try:
        check_path("MODEL", name, expected)
        with offline_if_cut_off(name):
            return load_config(name, expected)
    except ValueError as error:
        raise InputError(str(error)) from error


def _own_implementation(config: "PreTrainedConfig") -> str | dict[str, str] | None:
    """The implementation to build a model with where none was asked for; `None` is the recorded one."""
    if any(part._attn_implementation in FUNCTIONS for part in configs_of(config)):
        return None
    return config.attention_reweighting.method if config.attention_reweighting else ATTENTION_DROP


def _build_without_weights(config: "PreTrainedConfig", implementation: str | None) -> "PreTrainedModel":
    """Builds a model on the meta device, where a tensor has a shape and no values.

    Raises:
        ValueError: if the model is refused.
        InputError: if there is no model to such a config.
    """
    import torch

    options = {} if implementation is None else {"attn_implementation": implementation}
    model_class = _model_class(config)
    try:
        with torch.device("meta"):
            return model_class._from_config(config, **options)
    except ValueError:
        raise
    except Exception as error:  # Wrong values fail in the middle of some layer, and as anything.
        raise InputError(
            f"MODEL: no {model_class.__name__} can be built from this config, so there is nothing to check: "
            f"{type(error).__name__}: {_one_line(error)}"
        ) from error


def _model_class(config: "PreTrainedConfig") -> "type[PreTrainedModel]":
    """The class that a checkpoint was saved from, otherwise the base model of its type."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    name = next(iter(config.architectures or []), "")
    saved = getattr(transformers, name, None)
    if isinstance(saved, type) and isinstance(config, getattr(saved, "config_class", None) or ()):
        return saved
    if type(config) not in MODEL_MAPPING:
        raise InputError(
            f"MODEL: Transformers has no model class for model_type={config.model_type!r} with architectures="
            f"{config.architectures}, so there is nothing to check. Name one of its classes under `architectures` in "
            "config.json, or upgrade Transformers."
        )
    base = MODEL_MAPPING[type(config)]
    return base[0] if isinstance(base, tuple) else base
