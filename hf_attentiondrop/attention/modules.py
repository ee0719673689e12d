"""The modules of a model that call Transformers' attention interface, and the place of each in its model."""

import functools
import inspect
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


ATTENTION_KINDS = ("encoder_self", "decoder_self", "cross")
# The attention interface as model files name it.
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# Parts of the names of cross-attention modules in model files, and arguments with the other sequence.
CROSS_NAMES = ("cross", "encoder_attn", "encdecattention", "encoder_decoder")
OTHER_STATES = ("context", "cross_attention_states", "encoder_hidden_states", "key_value_states")
HEADS_NAMES = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")


@dataclass(frozen=True)
class Place:
    """The place of an attention module in its model.

    Args:
        kind: `"encoder_self"`, `"decoder_self"` or `"cross"`.
        stack: name of the stack of layers, such as `"model.decoder.layers"`.
        layer: position in the stack.
        num_layers: length of the stack.
        num_heads: number of query heads; `None` if unknown.
    """

    kind: str
    stack: str
    layer: int
    num_layers: int
    num_heads: int | None = None


@functools.cache
def uses_attention_interface(module_class: type[nn.Module]) -> bool:
    """Returns whether the source of a module's forward looks up its attention function in the interface.

    Transformers has no flag for this: a model that ignores the interface accepts any registered name and silently
    runs another attention.
    """
    try:
        source = inspect.getsource(module_class.forward)
    except (OSError, TypeError):
        return False
    if INTERFACE not in source:
        return False
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)  # Ignores comments.
    return any(token.type == tokenize.NAME and token.string == INTERFACE for token in tokens)


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of a model that call the attention interface, with their names."""
    for name, module in model.named_modules():
        module_class: type = type(module)
        if uses_attention_interface(module_class):
            yield name, module


def places_of(model: nn.Module) -> dict[str, Place]:
    """Returns the place of every attention module, by name.

    A stack is the path up to the first number, and that number is the layer. If a stack has stages with numbered
    blocks (Swin), the layers are the blocks with attention, counted across stages.
    """
    modules = dict(attention_modules(model))
    paths = {name: _stack_and_block(model, name) for name in modules}
    blocks: dict[str, list[str]] = defaultdict(list)
    for stack, block in paths.values():
        if block not in blocks[stack]:
            blocks[stack].append(block)

    places = {}
    for name, (stack, block) in paths.items():
        number = block.removeprefix(f"{stack}.")
        if number.isdigit():
            position = int(number), len(model.get_submodule(stack))
        else:
            position = blocks[stack].index(block), len(blocks[stack])
        module = modules[name]
        places[name] = Place(_kind_of(name, module), stack, *position, num_heads_of(module))
    return places


def num_heads_of(module: nn.Module) -> int | None:
    """Returns the number of query heads of an attention module, `None` if neither it nor its config says it."""
    return first_integer(HEADS_NAMES, module, getattr(module, "config", None))


def first_integer(names: Iterable[str], *owners: Any) -> int | None:
    """Returns the first attribute of these names that is an integer."""
    values = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _stack_and_block(model: nn.Module, name: str) -> tuple[str, str]:
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return name, name
    # Numbered siblings of different classes (T5's self-attention, cross-attention and feed-forward) are parts of one
    # layer.
    while len(numbers) > 1 and len({type(m) for m in model.get_submodule(".".join(parts[: numbers[-1]]))}) > 1:
        numbers.pop()
    return ".".join(parts[: numbers[0]]), ".".join(parts[: numbers[-1] + 1])


def _kind_of(name: str, module: nn.Module) -> str:
    """Returns the kind of an attention module by the names in its model file, since the calls do not show it."""
    path = name.lower().split(".")
    numbers = [index for index, part in enumerate(path) if part.isdigit()]
    # Only names below the layer number count, and at least the last two: adapters append names to the model file's.
    first = min(len(path) - 2, numbers[-1] + 1 if numbers else len(path))
    labels = (type(module).__name__.lower(), *path[max(first, 0) :])
    parameters = inspect.signature(type(module).forward).parameters
    if (
        getattr(module, "is_cross_attention", False)
        or any(mark in label for label in labels for mark in CROSS_NAMES)
        or any(other in parameters and parameters[other].default is inspect.Parameter.empty for other in OTHER_STATES)
    ):
        return "cross"
    is_decoder = _is_causal(module, path) or getattr(module, "is_decoder", False) or "decoder" in path
    return "decoder_self" if is_decoder else "encoder_self"


def _is_causal(module: nn.Module, path: list[str]) -> bool:
    if hasattr(module, "is_causal"):
        return bool(module.is_causal)
    # Without the attribute or argument, SDPA treats a module as causal if it gets no mask. Encoders always pass one.
    return "encoder" not in path and "is_causal" not in inspect.getsource(type(module).forward)
