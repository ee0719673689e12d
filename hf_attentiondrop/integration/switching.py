"""Switching a whole model to another attention implementation, or raising without any change.

A module runs the implementation that its own config names. `set_attn_implementation` changes the configs of the
Transformers models inside a model, but not those that only a layer holds (older releases miss even more).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from transformers import PreTrainedModel

from ..attention.parts import configs_of, holders_of
from .implementations import FUNCTIONS


@contextmanager
def all_or_nothing(model: PreTrainedModel) -> Iterator[None]:
    """Restores the configs and module states of a model if the block raises."""
    modules = [holder.module for holder in holders_of(model)]
    configs = {id(config): config for config in [*configs_of(model.config), *(module.config for module in modules)]}
    entries = [(config, dict(config.__dict__)) for config in configs.values()]
    states = {module: module.__dict__.get("attention_drop_state") for module in modules}
    before_states = [(state, dict(state.__dict__)) for state in states.values() if state is not None]
    try:
        yield
    except BaseException:
        for config, before in entries:
            config.__dict__.clear()
            config.__dict__.update(before)
        for module, state in states.items():
            module.__dict__.pop("attention_drop_state", None)
            if state is not None:
                module.attention_drop_state = state
        for state, attributes in before_states:
            state.restore(attributes)
        raise


def switch_remaining(model: PreTrainedModel, requested: Mapping[int, str]) -> None:
    """Switches the modules that Transformers left unchanged, if the old or new implementation is of this package.

    Args:
        model: the whole model, after Transformers has switched it.
        requested: requested attention implementation, by `id` of the model's config and sub-configs.

    Raises:
        RuntimeError: if a module still runs another implementation.
    """
    holders = [holder for holder in holders_of(model) if id(holder.governing) in requested]
    for config in configs_of(model.config):
        name = requested.get(id(config), config._attn_implementation)
        if _differs(config._attn_implementation, name):
            part = next((h.module for h in holders if h.module is h.owner and h.governing is config), model)
            config._attn_implementation_internal = part._check_and_adjust_attn_implementation(name)
    for holder in holders:
        config, name = holder.module.config, holder.governing._attn_implementation
        if _differs(config._attn_implementation, name):
            config._attn_implementation_internal = name
    for holder in holders:
        name, wanted = holder.module.config._attn_implementation, requested[id(holder.governing)]
        if _differs(name, wanted):
            raise RuntimeError(
                f"{type(model).__name__} was switched to attn_implementation={wanted!r}, but its module "
                f"{holder.name!r} ({type(holder.module).__name__}) still runs {name!r}: part of the model would "
                "silently run another implementation. The model is unchanged. Load it again with "
                f"from_pretrained(..., attn_implementation={wanted!r})."
            )


def _differs(name: str, wanted: str) -> bool:
    """Returns whether two implementations differ and one of them is of this package."""
    return name != wanted and (name in FUNCTIONS or wanted in FUNCTIONS)
