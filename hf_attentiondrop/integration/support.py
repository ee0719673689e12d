"""Checks that a model supports the attention implementations of this package.

Transformers accepts any registered name for any model without a check. Whether a class uses the attention interface
shows only in its source, which Transformers' own `_can_set_attn_implementation` reads too.
"""

import functools
import inspect
import re
import sys
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from ..attention.modules import attention_modules
from .functions import ATTENTION_DROP


_REMEDY = (
    'Load it with its own attention (attn_implementation="eager"), or use a model that calls the interface: BERT, '
    "RoBERTa, ViT, DeiT, BART, Marian, T5, Whisper, GPT-2, LLaMA, Mistral, Qwen, Gemma and many more. In a composite "
    f'model, name only the parts that can: attn_implementation={{"text_config": "{ATTENTION_DROP}"}}.'
)
# A mask that is continued with scores: -inf, for a hidden key, would be true in the boolean mask of SDPA.
_CONTINUED_MASK = re.compile(r"cat\(\[attention_mask, \w+\.to\(attention_mask\.dtype\)")
_CLASSES_BY_IMPLEMENTATION = re.compile(r"_CLASSES\[\s*(self\.)?config\._attn_implementation")


def check_class(model_class: type[PreTrainedModel], name: str) -> None:
    """Checks a model class by its source, before any module or weight exists.

    Args:
        model_class: the class.
        name: the requested attention implementation.

    Raises:
        ValueError: if it does not support the implementation; the message gives the reason and alternatives.
    """
    if not model_class._can_set_attn_implementation():
        raise _unsupported(
            model_class,
            name,
            "does not dispatch its attention through Transformers' attention interface",
            "would be silently ignored or applied with the wrong mask",
        )
    source = _module_source(model_class.__module__)
    if _CLASSES_BY_IMPLEMENTATION.search(source):
        raise _unsupported(
            model_class,
            name,
            "selects its attention class by implementation name from a fixed list",
            "is unknown to it",
        )
    if not model_class._supports_sdpa and _CONTINUED_MASK.search(source):
        raise _unsupported(
            model_class,
            name,
            "continues the mask of its attention by scores, as eager attention takes them",
            "would let it see hidden keys",
        )


def check_modules(model: PreTrainedModel, modules: Iterable[nn.Module], name: str) -> None:
    """Checks the attention modules of a built model.

    Args:
        model: the whole model.
        modules: its attention modules that run an implementation of this package.
        name: the requested implementation.

    Raises:
        ValueError: if there are no such modules, or if a decoder would see later tokens for lack of a mask.
    """
    modules = list(modules)
    if not modules and (others := {module.config._attn_implementation for _, module in attention_modules(model)}):
        parts = ", ".join(model.config.sub_configs)
        raise ValueError(
            f"{type(model).__name__} got attn_implementation={name!r}, but all attention modules of its parts "
            f"({parts}) run {', '.join(map(repr, sorted(others)))}: it would have no effect. Build the parts with it, "
            f'or build the model without it and call model.set_attn_implementation("{name}").'
        )
    if not modules:
        raise _unsupported(
            type(model),
            name,
            "has no attention that goes through Transformers' attention interface",
            "would have no effect on it",
        )
    if any(map(_is_unmarked_decoder, modules)):
        raise _unsupported(
            type(model),
            name,
            "has a decoder that is not marked causal and needs a mask that only eager attention gets",
            "would let it see later tokens",
        )


def _is_unmarked_decoder(module: nn.Module) -> bool:
    is_decoder = module.attention_drop_state.place.kind == "decoder_self" and getattr(module, "is_decoder", False)
    return is_decoder and getattr(module, "is_causal", None) is False


def _unsupported(model_class: type, name: str, reason: str, consequence: str) -> ValueError:
    return ValueError(f"{model_class.__name__} {reason}, so attn_implementation={name!r} {consequence}. {_REMEDY}")


@functools.cache
def _module_source(name: str) -> str:
    try:
        return inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):
        return ""
