"""Which models can run AttentionDrop, and the refusal of those that cannot.

Transformers accepts any registered name for any model and checks nothing. What a class does with its attention is read
off its source, as Transformers itself does in `_can_set_attn_implementation`.
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
_CLASSES_BY_IMPLEMENTATION = re.compile(r"_CLASSES\[\s*(self\.)?config\._attn_implementation")


def check_class(model_class: type[PreTrainedModel], name: str) -> None:
    """Refuses a model class by its source, before any module or weight exists.

    Args:
        model_class: the class.
        name: the attention implementation that was asked for.

    Raises:
        ValueError: naming the class, the reason and what does work.
    """
    if not model_class._can_set_attn_implementation():
        raise _refusal(
            model_class,
            name,
            "does not dispatch its attention through Transformers' attention interface",
            "would be ignored, or masked wrongly, without a word",
        )
    source = _module_source(model_class.__module__)
    if _CLASSES_BY_IMPLEMENTATION.search(source):
        raise _refusal(
            model_class,
            name,
            "picks an attention class by the name of the implementation, from a fixed list",
            "is a name that it does not know",
        )


def check_modules(model: PreTrainedModel, modules: Iterable[nn.Module], name: str) -> None:
    """Refuses a built model by its attention modules.

    Args:
        model: the whole model.
        modules: those of its attention modules that are to run one of our implementations.
        name: the one that was asked for.

    Raises:
        ValueError: if there are none, or if a missing mask would mean that a decoder sees later tokens.
    """
    modules = list(modules)
    if not modules and (others := {module.config._attn_implementation for _, module in attention_modules(model)}):
        parts = ", ".join(model.config.sub_configs)
        raise ValueError(
            f"{type(model).__name__} was asked for attn_implementation={name!r}, and no attention module of its parts "
            f"({parts}) runs it, but {', '.join(map(repr, sorted(others)))}: it would have no effect. Build the parts "
            f'with it, or call model.set_attn_implementation("{name}") once the model is built without it.'
        )
    if not modules:
        raise _refusal(
            type(model),
            name,
            "has no attention that goes through Transformers' attention interface",
            "would have no effect on it",
        )
    if any(map(_is_unmarked_decoder, modules)):
        raise _refusal(
            type(model),
            name,
            "has a decoder that is not marked causal and relies on a mask that only eager attention is given",
            "would let it see later tokens",
        )


def _is_unmarked_decoder(module: nn.Module) -> bool:
    is_decoder = module.attention_drop_state.place.kind == "decoder_self" and getattr(module, "is_decoder", False)
    return is_decoder and getattr(module, "is_causal", None) is False


def _refusal(model_class: type, name: str, reason: str, consequence: str) -> ValueError:
    return ValueError(f"{model_class.__name__} {reason}, so attn_implementation={name!r} {consequence}. {_REMEDY}")


@functools.cache
def _module_source(name: str) -> str:
    try:
        return inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):
        return ""
