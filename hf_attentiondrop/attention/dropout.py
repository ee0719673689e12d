"""The model's own dropout: its probabilities in a Transformers config, whatever names the model family gives them."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


# "dropout" of Marian, "hidden_dropout_prob" of BERT, "resid_pdrop" of GPT-2. Layer drop, stochastic depth (drop_path)
# and the dropping of tokens are other methods.
DROPOUT = re.compile(r"(^|_)(dropout|pdrop)($|_)")
OTHER_METHODS = re.compile(r"path|token|layer_?drop")
ATTENTION = re.compile(r"att(entio)?n")

# Names of the dropout of attention weights in modules, the plainest last: it may belong to another dropout.
ATTENTION_DROPOUT_NAMES = ("attention_dropout", "attn_dropout", "attn_drop", "dropout_prob", "dropout_p", "dropout")


def attention_dropout(module: nn.Module) -> float:
    """Returns the probability with which a module drops attention weights in training."""
    dropout = next((getattr(module, name) for name in ATTENTION_DROPOUT_NAMES if hasattr(module, name)), 0.0)
    return getattr(dropout, "p", dropout)


def dropout_of(config: PreTrainedConfig) -> dict[str, float | None]:
    """The dropout probabilities in a config; `None` where the model falls back on another of them.

    Example:

    >>> from transformers import BertConfig
    >>> dropout_of(BertConfig())
    {'attention_probs_dropout_prob': 0.1, 'classifier_dropout': None, 'hidden_dropout_prob': 0.1}
    """
    found = {name: value for name, value in vars(config).items() if DROPOUT.search(name) and _is_probability(value)}
    return {name: found[name] for name in sorted(found) if not OTHER_METHODS.search(name)}


def with_dropout(
    config: PreTrainedConfig, dropout: float | None, attention_dropout: float | None = None
) -> dict[str, float]:
    """The dropout probabilities that a config needs for the dropout asked for.

    Args:
        config ([`~transformers.PreTrainedConfig`]): of the model.
        dropout (`float`, *optional*): probability of every dropout in the model; left as it is by default.
        attention_dropout (`float`, *optional*): that of the attention weights; goes before `dropout`.

    Returns:
        `dict[str, float]`: field of the config to probability, for `from_pretrained` or the config.

    Raises:
        ValueError: for a probability that is none, and if the model has no such dropout.

    Example:

    >>> from transformers import BertConfig
    >>> with_dropout(BertConfig(), 0.2, attention_dropout=0.0)
    {'attention_probs_dropout_prob': 0.0, 'classifier_dropout': 0.2, 'hidden_dropout_prob': 0.2}
    """
    names = list(dropout_of(config))
    values: dict[str, float] = {}
    asked: Mapping[str, tuple[float | None, list[str]]] = {
        "dropout": (dropout, names),
        "attention_dropout": (attention_dropout, [name for name in names if ATTENTION.search(name)]),
    }
    for argument, (value, fields) in asked.items():
        if value is None:
            continue
        if not 0 <= value < 1:
            raise ValueError(f"`{argument}` must be a probability in [0, 1), got {value}.")
        if not fields:
            there = f"; it has {', '.join(names)}" if names else ""
            raise ValueError(
                f"{type(config).__name__} has no {argument.replace('_', ' ')} to set{there}. Leave `{argument}` out: "
                "it would have no effect."
            )
        values |= dict.fromkeys(fields, value)
    return values


def _is_probability(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
