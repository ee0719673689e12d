"""The parts of a whole model: its configs, and the modules that hold a config."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def configs_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yields a config and its sub-configs, at any depth."""
    yield config
    for name in config.sub_configs:
        if isinstance(sub_config := getattr(config, name, None), PreTrainedConfig):
            yield from configs_of(sub_config)


class Holder(NamedTuple):
    """A module that holds a config.

    Args:
        name: name of the module in the whole model.
        module: the module; its own config names the attention implementation that it runs.
        governing: the config of the whole model that the module should follow: its own, or that of `owner`.
        owner: the nearest enclosing Transformers model, possibly the module itself, with a config of the whole model.
    """

    name: str
    module: nn.Module
    governing: PreTrainedConfig
    owner: PreTrainedModel


def holders_of(model: PreTrainedModel) -> Iterator[Holder]:
    """Yields the modules of a whole model that hold a config.

    It may be a copy that the model's own config does not contain: T5 copies the config for its stacks, a composite of
    two models replaces their configs but not those of their layers, and copying a module copies its config.
    """
    registered = {id(config) for config in configs_of(model.config)}
    seen = set()

    def look(name: str, module: nn.Module, owner: PreTrainedModel) -> Iterator[Holder]:
        if module in seen:
            return
        seen.add(module)
        config = getattr(module, "config", None)
        if id(config) in registered and isinstance(module, PreTrainedModel):
            owner = module
        if isinstance(config, PreTrainedConfig):
            yield Holder(name, module, config if id(config) in registered else owner.config, owner)
        for child_name, child in module.named_children():
            yield from look(f"{name}.{child_name}" if name else child_name, child, owner)

    return look("", model, model)


def transformers_models(model: Any) -> dict[str, PreTrainedModel]:
    """Returns the outermost Transformers models in a wrapper (PEFT, DDP, a plain module), by name.

    Raises:
        TypeError: if there is none.
    """
    found: dict[str, PreTrainedModel] = {}
    for name, module in getattr(model, "named_modules", tuple)():
        is_inside = any(f".{name}".startswith(f".{other}." if other else ".") for other in found)
        if isinstance(module, PreTrainedModel) and not is_inside:
            found[name] = module
    if not found:
        raise TypeError(
            f"Expected a Transformers model or a module that holds one, got {type(model).__name__}: only Transformers "
            "models dispatch their attention through the interface that AttentionDrop plugs into."
        )
    return found


def transformers_model(model: Any) -> PreTrainedModel:
    """Returns the first of [`transformers_models`].

    Raises:
        TypeError: if there is none.
    """
    return next(iter(transformers_models(model).values()))
