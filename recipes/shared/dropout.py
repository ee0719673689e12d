"""The dropout probabilities that the flags ask for, under the names that the model family gives them."""

import re

from transformers import PreTrainedConfig

from hf_attentiondrop.attention.dropout import dropout_of

from .arguments import ModelArguments


ATTENTION = re.compile(r"att(entio)?n")


def dropout_options(arguments: ModelArguments, config: PreTrainedConfig) -> dict[str, float]:
    """Finds the fields of a config that `--dropout` and `--attention_dropout` set.

    Args:
        arguments ([`ModelArguments`]): with the probabilities; `None` keeps those of the config.
        config ([`~transformers.PreTrainedConfig`]): of the model.

    Returns:
        `dict[str, float]`: field of the config to probability, for `from_pretrained` or the config.

    Raises:
        ValueError: if the model has no such dropout.
    """
    names = list(dropout_of(config))
    of_attention = [name for name in names if ATTENTION.search(name)]
    values: dict[str, float] = {}
    for flag, value, fields in (
        ("dropout", arguments.dropout, names),
        ("attention_dropout", arguments.attention_dropout, of_attention),
    ):
        if value is None:
            continue
        if not fields:
            there = f"; it has {', '.join(names)}" if names else ""
            raise ValueError(
                f"--{flag}: {type(config).__name__} has no {flag.replace('_', ' ')} to set{there}. Leave the flag "
                "out: it would have no effect."
            )
        values |= dict.fromkeys(fields, value)
    return values
