"""The model's own dropout: reading its probabilities under the names of each model family."""

import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


# "dropout" in Marian, "hidden_dropout_prob" in BERT, "resid_pdrop" in GPT-2. Layer drop, stochastic depth (drop_path)
# and token dropping are other methods.
DROPOUT = re.compile(r"(^|_)(dropout|pdrop)($|_)")
OTHER_METHODS = re.compile(r"path|token|layer_?drop")

# Names of attention dropout in modules, the most specific first: plain "dropout" may mean another dropout.
ATTENTION_DROPOUT_NAMES = ("attention_dropout", "attn_dropout", "attn_drop", "dropout_prob", "dropout_p", "dropout")


def attention_dropout(module: nn.Module) -> float:
    """Returns the probability with which a module drops attention weights in training."""
    dropout = next((getattr(module, name) for name in ATTENTION_DROPOUT_NAMES if hasattr(module, name)), 0.0)
    return getattr(dropout, "p", dropout)


def dropout_of(config: PreTrainedConfig) -> dict[str, float | None]:
    """Returns the dropout probabilities in a config; `None` where the model falls back to another of them.

    Example:

    >>> from transformers import BertConfig
    >>> dropout_of(BertConfig())
    {'attention_probs_dropout_prob': 0.1, 'classifier_dropout': None, 'hidden_dropout_prob': 0.1}
    """
    found = {name: value for name, value in vars(config).items() if DROPOUT.search(name) and _is_probability(value)}
    return {name: found[name] for name in sorted(found) if not OTHER_METHODS.search(name)}


def _is_probability(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
