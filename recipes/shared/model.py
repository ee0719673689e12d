"""The model of a recipe, from a checkpoint or from scratch, with the dropout and the kernel of the flags."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from hf_attentiondrop import set_base_attention
from hf_attentiondrop.cli.flags import naming_flag
from hf_attentiondrop.evaluation.pretrained import SHOWN_WEIGHTS, describe_wrappers, first_of, load_weights
from hf_attentiondrop.evaluation.pretrained import load_processor as load_saved_processor
from hf_attentiondrop.training.checks import has_dropout

from .arguments import ModelArguments, check_path
from .dropout import dropout_options


MODEL_FLAG = "--model_name_or_path"
# A pooler belongs to the head, and learned reweighting starts with the fine-tuning.
NEW_IN_FINE_TUNING = ("pooler", "reweighting")


def load_processor(processor_class: Any, arguments: ModelArguments) -> Any:
    """Loads the tokenizer or processor of `--model_name_or_path`.

    Args:
        processor_class: such as [`~transformers.AutoTokenizer`].
        arguments ([`ModelArguments`]): which model.

    Raises:
        FileNotFoundError: if there is nothing at a local path.
        ValueError: if the model has none, or it cannot be read.
    """
    check_path(MODEL_FLAG, arguments.model_name_or_path)
    with naming_flag(MODEL_FLAG):
        return load_saved_processor(arguments.model_name_or_path, processor_class)


def saved_config(arguments: ModelArguments) -> PreTrainedConfig | None:
    """The config of `--model_name_or_path`; `None` without a model, and for an adapter, which has none.

    Raises:
        FileNotFoundError: if there is nothing at a local path.
        ValueError: if it cannot be read.
    """
    name = arguments.model_name_or_path
    check_path(MODEL_FLAG, name)
    if name is None or find_adapter_config_file(name) is not None:
        return None
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{MODEL_FLAG}: expected the model's own settings in {name!r}, and they cannot be read: {error}"
        ) from error


def load_pretrained(
    model_class: Any, arguments: ModelArguments, *, has_new_head: bool = False, **options: Any
) -> PreTrainedModel:
    """Loads the model of `--model_name_or_path`.

    Args:
        model_class: such as [`~transformers.AutoModelForCausalLM`].
        arguments ([`ModelArguments`]): which model, its dropout and its kernel.
        has_new_head (`bool`, defaults to `False`): whether the head may be initialized anew, as for other classes.
        options: of `from_pretrained`.

    Raises:
        ValueError: if weights cannot be read, some are missing and would be initialized at random, or the model has no
            dropout to set.
    """
    name = arguments.model_name_or_path
    if arguments.sets_dropout:
        # The config of an adapter is that of its base.
        adapter = Path(name, ADAPTER_CONFIG_NAME)
        settings = json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else {}
        base = settings.get("base_model_name_or_path", name)
        options |= dropout_options(arguments, AutoConfig.from_pretrained(base))
    with naming_flag(MODEL_FLAG):
        model, loaded = load_weights(name, model_class, dtype=arguments.dtype, **options)
    changed = [f"{key} {tuple(got)} for {tuple(made)}" for key, got, made in loaded["mismatched_keys"]]
    missing = sorted({*loaded["missing_keys"], *changed})
    if has_new_head:
        missing = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
    missing = [key for key in missing if not any(part in key for part in NEW_IN_FINE_TUNING)]
    if missing:
        remedy = (
            describe_wrappers(loaded["unexpected_keys"])
            or "Name a checkpoint that holds them, with the config.json that they were saved with."
        )
        raise ValueError(
            f"{MODEL_FLAG}: expected all weights in {name!r}, {len(missing)} of them are missing or of another shape, "
            f"{first_of(missing, SHOWN_WEIGHTS)}: they would be initialized at random. {remedy}"
        )
    return _prepared(model, arguments)


def from_scratch(model_class: Any, arguments: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a model with random weights, see [`load_pretrained`]."""
    for name, value in dropout_options(arguments, config).items():
        setattr(config, name, value)
    return _prepared(model_class.from_config(config), arguments)


def _prepared(model: PreTrainedModel, arguments: ModelArguments) -> PreTrainedModel:
    """Sets the kernel, and checks that the dropout has an effect: some models ignore the one in their config."""
    if max(arguments.dropout or 0, arguments.attention_dropout or 0) > 0 and not has_dropout(model):
        raise ValueError(
            f"--dropout: {type(model).__name__} ignores the dropout in its config, so the flag would have no effect. "
            "Leave it out."
        )
    if arguments.base_attention:
        set_base_attention(model, arguments.base_attention)
    return model
