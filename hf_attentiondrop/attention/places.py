"""Where an attention module stands in its model: stack, layer and kind, read off its name and its source."""

import inspect
from collections import defaultdict

from torch import nn


# What model files call cross-attention, and the arguments that hand it the other sequence.
CROSS_NAMES = ("cross", "encoder_attn", "encdecattention", "encoder_decoder")
OTHER_STATES = ("context", "cross_attention_states", "encoder_hidden_states", "key_value_states")


def positions_of(model: nn.Module, names: list[str]) -> dict[str, tuple[str, int, int]]:
    """Stack, layer number and stack length for the name of every attention module.

    A stack is the path up to the first number, and that number is the layer. A stack may be made of stages that hold
    numbered blocks themselves (Swin): there the blocks that attend are counted through.
    """
    paths = {name: _stack_and_block(model, name) for name in names}
    blocks = defaultdict(list)
    for stack, block in paths.values():
        if block not in blocks[stack]:
            blocks[stack].append(block)

    positions = {}
    for name, (stack, block) in paths.items():
        number = block.removeprefix(f"{stack}.")
        if number.isdigit():
            positions[name] = (stack, int(number), len(model.get_submodule(stack)))
        else:
            positions[name] = (stack, blocks[stack].index(block), len(blocks[stack]))
    return positions


def _stack_and_block(model: nn.Module, name: str) -> tuple[str, str]:
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return name, name
    # Numbered siblings of different classes (T5's self-attention, cross-attention and feed-forward) are the inside of
    # one layer, not layers.
    while len(numbers) > 1 and len({type(m) for m in model.get_submodule(".".join(parts[: numbers[-1]]))}) > 1:
        numbers.pop()
    return ".".join(parts[: numbers[0]]), ".".join(parts[: numbers[-1] + 1])


def kind_of(name: str, module: nn.Module) -> str:
    """The kind of an attention, by what the model file calls it: at call time cross and self-attention look alike."""
    path = name.lower().split(".")
    numbers = [index for index, part in enumerate(path) if part.isdigit()]
    # Below the layer's number: adapters wrap a module, and put names of their own behind the model file's.
    first = min(len(path) - 2, numbers[-1] + 1 if numbers else len(path))
    labels = (type(module).__name__.lower(), *path[max(first, 0) :])
    parameters = inspect.signature(type(module).forward).parameters
    if (
        getattr(module, "is_cross_attention", False)
        or any(mark in label for label in labels for mark in CROSS_NAMES)
        or any(other in parameters and parameters[other].default is inspect.Parameter.empty for other in OTHER_STATES)
    ):
        return "cross"
    is_decoder = _is_causal(module) or getattr(module, "is_decoder", False) or "decoder" in path
    return "decoder_self" if is_decoder else "encoder_self"


def _is_causal(module: nn.Module) -> bool:
    if hasattr(module, "is_causal"):
        return bool(module.is_causal)
    # A module that says nothing is causal to SDPA.
    return "is_causal" not in inspect.getsource(type(module).forward)
