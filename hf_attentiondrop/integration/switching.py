"""Switching all of a model to another attention implementation, or nothing of it.

What a module runs is what its own config says when it is called. `set_attn_implementation` changes the configs of the
Transformers models that it finds; those that only layers hold, and in older releases more of them, stay as they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from transformers import PreTrainedModel

from ..attention.parts import configs_of, holders_of
from .implementations import FUNCTIONS


@contextmanager
def whole_or_nothing(model: PreTrainedModel) -> Iterator[None]:
    """Restores the configs and module states of a model if anything is raised."""
    modules = [holder.module for holder in holders_of(model)]
    configs = {id(config): config for config in [*configs_of(model.config), *(module.config for module in modules)]}
    entries = [(config, dict(config.__dict__)) for config in configs.values()]
    states = {module: module.__dict__.get("attention_drop_state") for module in modules}
    before_states = [(state, dict(state.__dict__), state.values) for state in states.values() if state is not None]
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
        for state, attributes, values in before_states:
            state.restore(attributes, values)
        raise


def switch_the_rest(model: PreTrainedModel, requested: Mapping[int, str]) -> None:
    """Switches what Transformers left behind, as far as implementations of this package come or go.

    Args:
        model: the whole model, after Transformers has switched it.
        requested: attention implementation that was asked for, by `id` of the model's config and sub-configs.

    Raises:
        RuntimeError: if a module still runs something else, naming it.
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
                f"{type(model).__name__} was asked for attn_implementation={wanted!r}, and its module {holder.name!r} "
                f"({type(holder.module).__name__}) still runs {name!r}: half of the model would run something else, "
                "in silence. The model is left as it was. Build it anew with the implementation, "
                f"from_pretrained(..., attn_implementation={wanted!r})."
            )


def _differs(name: str, wanted: str) -> bool:
    """Whether a module runs another implementation than it should, and one of the two is of this package."""
    return name != wanted and (name in FUNCTIONS or wanted in FUNCTIONS)
