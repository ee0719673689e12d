"""What a whole model is made of: its configs, and the modules that hold one."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def configs_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and its sub-configs, at any depth."""
    yield config
    for name in config.sub_configs:
        if isinstance(sub_config := getattr(config, name, None), PreTrainedConfig):
            yield from configs_of(sub_config)


class Holder(NamedTuple):
    """A module that holds a config.

    Args:
        name: its name in the whole model.
        module: the module; what it runs is what its own config says.
        governing: the config that it is to follow, one of the whole model's: its own, or that of `owner`.
        owner: the nearest Transformers model around it, itself included, whose config is one of the whole model's.
    """

    name: str
    module: nn.Module
    governing: PreTrainedConfig
    owner: PreTrainedModel


def holders_of(model: PreTrainedModel) -> Iterator[Holder]:
    """The modules of a whole model that hold a config.

    The config need not be one of the whole model's: T5 gives its stacks copies, a composite that is made of two models
    replaces the config of each but not those of their layers, and a copied module brings a copied config along.
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
    """The Transformers models in a wrapper, by name: each [`~transformers.PreTrainedModel`] that is in no other.

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
    """The first of [`transformers_models`].

    Raises:
        TypeError: if there is none.
    """
    return next(iter(transformers_models(model).values()))
