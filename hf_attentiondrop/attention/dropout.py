"""The model's own dropout: its probabilities in a Transformers config, whatever names the model family gives them."""

import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


# "dropout" of Marian, "hidden_dropout_prob" of BERT, "resid_pdrop" of GPT-2. Layer drop, stochastic depth (drop_path)
# and the dropping of tokens are other methods.
DROPOUT = re.compile(r"(^|_)(dropout|pdrop)($|_)")
OTHER_METHODS = re.compile(r"path|token|layer_?drop")

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


def _is_probability(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
