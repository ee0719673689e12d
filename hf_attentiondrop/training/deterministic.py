"""The layers of a model that compute the same for both passes of the consistency term."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedConfig

from ..attention.modules import places_of
from ..attention.parts import configs_of
from ..integration.functions import perturbations_of_module
from .checks import random_settings
from .dropconnect import DropConnectConv1D, DropConnectLinear


KEEP_OUT = "or set `consistency_shared_trunk=False`"


def leading_layers(model: nn.Module) -> tuple[dict[str, nn.Module], ...]:
    """The leading layers of each stack of layers with attention in which nothing is random in training.

    A stack counts only if all layers of the stacks before it do: a decoder reads the output of its encoder.

    Args:
        model (`torch.nn.Module`): The model, without the wrappers of a launcher.

    Returns:
        `tuple[dict[str, torch.nn.Module], ...]`: the layers of each stack by name; no stack is empty.

    Raises:
        ValueError: if there is no such layer, if layers are dropped, or if nothing in the model is random.
    """
    _check_layer_drop(model)
    found: list[dict[str, nn.Module]] = []
    for stack in dict.fromkeys(place.stack for place in places_of(model).values()):
        container = model.get_submodule(stack)
        if not isinstance(container, nn.ModuleList):
            continue
        layers = {f"{stack}.{name}": layer for name, layer in container.named_children()}
        leading = dict(takewhile(lambda item: not any(random_parts(*item)), layers.items()))
        if not leading and not found:
            raise _first_is_random(model, *next(iter(layers.items())), num_layers=len(layers))
        found += [leading] if leading else []
        if len(leading) < len(layers):
            break
    if not found:
        raise ValueError(
            f"The shared trunk needs a stack of layers with attention, {type(model).__name__} has none: nothing can "
            "be shared. Set `consistency_shared_trunk=False` for this model."
        )
    if not any(random_parts("", model)):
        raise ValueError(
            f"The shared trunk needs passes that differ above it, but nothing in {type(model).__name__} is random, so "
            "the consistency term would be 0. Perturb the attention of the upper layers, for example with "
            f"attention_drop=AttentionDropConfig(layers={_upper_half(len(layers))}), raise a dropout of the upper "
            "layers, or set `consistency_weight=0`."
        )
    return tuple(found)


def random_parts(name: str, module: nn.Module) -> Iterator[str]:
    """Describes what is random in a module in training, or depends on the other rows of the batch.

    Args:
        name (`str`): Name of the module.
        module (`torch.nn.Module`): The module.

    Example:

    >>> list(random_parts("head", nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))))
    ['p=0.1 in head.1']
    """
    for path, part in module.named_modules(prefix=name):
        for setting, value in random_settings(part):
            yield f"{setting}={value} in {path}"
        for perturbation, _ in perturbations_of_module(part):
            yield f"the perturbation {perturbation.variant!r} in {path}"
        if isinstance(part, (DropConnectLinear, DropConnectConv1D)):
            yield f"DropConnect in {path}"
        if isinstance(part, _BatchNorm):
            yield f"batch normalization in {path}"


def settings_of_config(model: nn.Module, mark: str = "drop") -> str:
    """The settings above 0 of a model's configs whose names contain `mark`, for a message."""
    config = getattr(model, "config", None)
    values: dict[str, Any] = {}
    for part in configs_of(config) if isinstance(config, PreTrainedConfig) else ():
        values |= {k: v for k, v in vars(part).items() if mark in k and isinstance(v, float) and v > 0}
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _first_is_random(model: nn.Module, name: str, layer: nn.Module, num_layers: int) -> ValueError:
    parts = list(random_parts(name, layer))
    config = settings_of_config(model)
    return ValueError(
        f"The shared trunk needs a first layer in which nothing is random, got {', '.join(parts[:3])}"
        f"{', …' if len(parts) > 3 else ''}: the two passes differ from this layer on, so no layer can be shared. "
        f"Perturb only upper layers, for example with layers={_upper_half(num_layers)}, and set the dropout of the "
        f"lower layers to 0{f' (in the config: {config})' if config else ''}, {KEEP_OUT}."
    )


def _upper_half(num_layers: int) -> list[int]:
    return list(range(num_layers // 2, num_layers))


def _check_layer_drop(model: nn.Module) -> None:
    settings = settings_of_config(model, "layerdrop") or ", ".join(
        f"{key}={value} in {name}"
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "layerdrop" in key and isinstance(value, float) and value > 0
    )
    if settings:
        raise ValueError(
            f"The shared trunk needs a model that runs all its layers, got {settings}: rows could not be repeated "
            f"after a skipped layer. Set it to 0 in the config, {KEEP_OUT}."
        )
