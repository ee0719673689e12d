"""`check`: shows which attention modules of a model would be perturbed or reweighted, from its config alone."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..attention.parts import configs_of
from ..integration.config_entries import perturbations_of, to_entry
from ..integration.functions import ATTENTION_DROP
from ..integration.implementations import FUNCTIONS
from ..report import report
from .flags import CommandError, naming_flag, one_line


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# The exit code for a model that is not supported.
UNSUPPORTED = 1


def declare_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `check` to the parser."""
    parser = commands.add_parser(
        "check",
        help="show which attention modules would be perturbed, or why the model is not supported",
        description="Shows which attention modules of a model would be perturbed, or why the model is not supported "
        "(exit code 1). Reads only the config; weights are neither downloaded nor loaded.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a folder with a config.json, the path of one, or a model on the Hub"
    )
    parser.add_argument(
        "--attn_implementation",
        choices=list(FUNCTIONS),
        help=f"defaults to the one saved with learned reweighting, otherwise to {ATTENTION_DROP}",
    )
    parser.add_argument(
        "--attention_drop",
        type=_attention_drop,
        metavar="JSON",
        help='a perturbation, such as \'{"variant": "blur"}\', or a list of them; defaults to those of the config',
    )
    parser.set_defaults(run=check)


def check(arguments: argparse.Namespace) -> str:
    """The report on a model that is built without weights.

    Raises:
        CommandError: with code 1 for a model that is not supported, and with code 2 for invalid input.
    """
    from transformers import logging

    logging.set_verbosity_error()  # Warnings about weights and token ids say nothing about attention.
    config = _load_config(arguments.model)
    if arguments.attention_drop is not None:
        config.attention_drop = arguments.attention_drop
    try:
        for part in configs_of(config):
            perturbations_of(part)
    except ValueError as error:
        raise CommandError(str(error)) from error
    try:
        model = _build_without_weights(config, arguments.attn_implementation or _default_implementation(config))
    except ValueError as error:
        raise CommandError(str(error), UNSUPPORTED) from error
    return str(report(model))


def _attention_drop(text: str) -> dict[str, Any] | list[dict[str, Any]]:
    try:
        return to_entry(json.loads(text))
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"expected JSON such as '{{\"p\": 0.2}}', got {text!r}: {error}.") from None
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(one_line(error)) from None


def _load_config(name: str) -> "PreTrainedConfig":
    from ..evaluation.hub_access import check_path, offline_if_cut_off
    from .checkpoint import load_config

    expected = "a folder with a config.json, the path of one, or a model on the Hub"
    try:
        with naming_flag("MODEL"):
            check_path(name, expected)
            with offline_if_cut_off(name):
                return load_config(name, expected)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _default_implementation(config: "PreTrainedConfig") -> str | None:
    """The implementation to build a model with if no flag names one; `None` stands for the one in the config."""
    if any(part._attn_implementation in FUNCTIONS for part in configs_of(config)):
        return None
    return config.attention_reweighting.method if config.attention_reweighting else ATTENTION_DROP


def _build_without_weights(config: "PreTrainedConfig", implementation: str | None) -> "PreTrainedModel":
    """Builds a model on the meta device, where a tensor has a shape and no values.

    Raises:
        ValueError: if the model is not supported.
        CommandError: if no model can be built from the config.
    """
    import torch

    options = {} if implementation is None else {"attn_implementation": implementation}
    model_class = _model_class(config)
    try:
        with torch.device("meta"):
            return model_class._from_config(config, **options)
    except ValueError:
        raise
    except Exception as error:  # Invalid values fail inside some layer, with any kind of error.
        raise CommandError(
            f"MODEL: no {model_class.__name__} can be built from this config, so there is nothing to check: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error


def _model_class(config: "PreTrainedConfig") -> "type[PreTrainedModel]":
    """The class that a checkpoint was saved from, otherwise the base model of its type.

    Raises:
        CommandError: if Transformers has neither.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    name = next(iter(config.architectures or []), "")
    saved = getattr(transformers, name, None)
    if isinstance(saved, type) and isinstance(config, getattr(saved, "config_class", None) or ()):
        return saved
    if type(config) not in MODEL_MAPPING:
        raise CommandError(
            f"MODEL: Transformers has no model class for model_type={config.model_type!r} with architectures="
            f"{config.architectures}, so there is nothing to check. Name one of its classes under `architectures` in "
            "config.json, or upgrade Transformers."
        )
    base = MODEL_MAPPING[type(config)]
    return base[0] if isinstance(base, tuple) else base
