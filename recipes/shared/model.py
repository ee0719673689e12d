"""The model of a recipe: from a checkpoint or from scratch, with the dropout asked for."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME

from hf_attentiondrop.attention.dropout import with_dropout
from hf_attentiondrop.cli.flags import naming_flag
from hf_attentiondrop.evaluation.pretrained import SHOWN_WEIGHTS, describe_wrappers, first_of, load_weights
from hf_attentiondrop.training.checks import has_dropout

from .arguments import ModelArguments


MODEL_FLAG = "--model_name_or_path"
# A pooler belongs to the head, and what attention learns starts with the fine-tuning.
STARTED_ANEW = ("pooler", "reweighting")


def load_pretrained(
    model_class: Any, arguments: ModelArguments, *, has_new_head: bool = False, **options: Any
) -> PreTrainedModel:
    """Loads the model to start from.

    Args:
        model_class: such as [`~transformers.AutoModelForCausalLM`].
        arguments ([`ModelArguments`]): which model, and its dropout.
        has_new_head (`bool`, defaults to `False`): whether the head may start anew, as for other classes.
        options: of `from_pretrained`.

    Raises:
        ValueError: if weights cannot be read, random numbers would stand for some of those to start from, or there is
            no dropout to set.
    """
    name = arguments.model_name_or_path
    if arguments.sets_dropout:
        # The config of an adapter is that of its base.
        adapter = Path(name, ADAPTER_CONFIG_NAME)
        base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else name
        options |= _asked_dropout(AutoConfig.from_pretrained(base), arguments)
    with naming_flag(MODEL_FLAG):
        model, loaded = load_weights(name, model_class, **options)
    changed = [f"{key} {tuple(got)} for {tuple(made)}" for key, got, made in loaded["mismatched_keys"]]
    lost = sorted({*loaded["missing_keys"], *changed})
    if has_new_head:
        lost = [key for key in lost if key.startswith(f"{model.base_model_prefix}.")]
    lost = [key for key in lost if not any(part in key for part in STARTED_ANEW)]
    if lost:
        remedy = (
            describe_wrappers(loaded["unexpected_keys"])
            or "Name a checkpoint that holds them, with the config.json that they were saved with."
        )
        raise ValueError(
            f"{MODEL_FLAG}: expected the weights to start from in {name!r}, {len(lost)} of them are missing or of "
            f"another shape, {first_of(lost, SHOWN_WEIGHTS)}: random numbers would stand for them. {remedy}"
        )
    _check_dropout(model, arguments)
    return model


def from_scratch(model_class: Any, arguments: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """Makes a model with random weights, see [`load_pretrained`]."""
    for name, value in _asked_dropout(config, arguments).items():
        setattr(config, name, value)
    model = model_class.from_config(config)
    _check_dropout(model, arguments)
    return model


def _asked_dropout(config: PreTrainedConfig, arguments: ModelArguments) -> dict[str, float]:
    with naming_flag("--dropout"):
        values = with_dropout(config, arguments.dropout)
    with naming_flag("--attention_dropout"):
        return values | with_dropout(config, None, arguments.attention_dropout)


def _check_dropout(model: PreTrainedModel, arguments: ModelArguments) -> None:
    """Refuses dropout that is in the config alone: some models do not read it."""
    if max(arguments.dropout or 0, arguments.attention_dropout or 0) > 0 and not has_dropout(model):
        raise ValueError(
            f"--dropout: {type(model).__name__} drops nothing, whatever its config says. Leave the flag out: it would "
            "have no effect."
        )
