"""The attention implementations of this package by name, and how a model or config is asked for them."""

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention.modules import attention_modules, places_of
from ..attention.parts import configs_of, holders_of
from ..methods import LEARNED_METHODS
from ..methods.state import ModuleState
from ..validation import suggestion
from .config_entries import perturbations_of
from .functions import ATTENTION_DROP, attention_drop_forward, reweighted_attention_forward


FUNCTIONS = {ATTENTION_DROP: attention_drop_forward, **dict.fromkeys(LEARNED_METHODS, reweighted_attention_forward)}

# In config.json the names carry the package's: without it Transformers stops at a name that says what to install.
PREFIX = "hf_attentiondrop."


def resolve(requested: Any) -> Any:
    """An `attn_implementation` argument, or config.json's entry, with the names that are registered here.

    >>> resolve({"text_config": "hf_attentiondrop.affine_scaled", "vision_config": "sdpa"})
    {'text_config': 'affine_scaled', 'vision_config': 'sdpa'}
    """
    if isinstance(requested, dict):
        return {key: resolve(value) for key, value in requested.items()}
    name = requested.removeprefix(PREFIX) if isinstance(requested, str) else None
    return name if name in FUNCTIONS else requested


def requests(config: PreTrainedConfig, requested: str | dict | None) -> Iterator[tuple[PreTrainedConfig, str]]:
    """The config and sub-configs that an `attn_implementation` argument speaks of, each with the name it gives."""
    own = requested.get("") if isinstance(requested, dict) else requested
    if own is not None:
        yield config, own
    for name in config.sub_configs:
        if (sub_config := getattr(config, name, None)) is not None:
            yield from requests(sub_config, requested.get(name) if isinstance(requested, dict) else requested)


def check_parts(config: PreTrainedConfig, requested: Any) -> None:
    """Refuses a dict that asks for an implementation of this package and names parts which a config does not have.

    Raises:
        ValueError: naming the parts there are.
    """
    if not isinstance(requested, dict) or not FUNCTIONS.keys() & set(_names(requested)):
        return
    parts = [name for name in config.sub_configs if isinstance(getattr(config, name, None), PreTrainedConfig)]
    for key, value in requested.items():
        if key in parts:
            check_parts(getattr(config, key), value)
        elif key != "":
            known = f"Its parts are {parts}, and" if parts else "It has no parts;"
            raise ValueError(
                f"attn_implementation={requested!r} names {key!r}, and {type(config).__name__} has no such part: it "
                f"would be ignored in silence.{suggestion(key, parts)} {known} the key '' stands for the model itself."
            )


def unknown_name(error: ValueError, name: Any) -> ValueError:
    """The refusal by Transformers of a name that is not registered, with the names of this package added."""
    names = ", ".join(f'"{known}"' for known in FUNCTIONS)
    hint = suggestion(str(name).removeprefix(PREFIX), FUNCTIONS)
    if str(name).startswith(PREFIX):
        hint += " A newer release of hf_attentiondrop may have it."
    return ValueError(f"{error} hf_attentiondrop adds {names}.{hint}")


def is_known(name: Any) -> bool:
    """Whether Transformers has an attention implementation of this name."""
    return name is None or name == "eager" or name in ALL_ATTENTION_FUNCTIONS.valid_keys()


def uses_any(config: PreTrainedConfig) -> bool:
    """Whether a config or one of its sub-configs runs an implementation of this package."""
    return any(part._attn_implementation in FUNCTIONS for part in configs_of(config))


def running_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a model that run an implementation of this package."""
    return [module for _, module in attention_modules(model) if module.config._attn_implementation in FUNCTIONS]


def place_running(model: PreTrainedModel) -> list[nn.Module]:
    """Gives every attention module of a whole model its state, keeping what was counted, chosen and scheduled before.

    Returns:
        As [`running_modules`].

    Raises:
        ValueError: if a module that runs has an entry in its config that this release does not understand.
    """
    holders, modules = {holder.name: holder for holder in holders_of(model)}, dict(attention_modules(model))
    for name, place in places_of(model).items():
        module, governing = modules[name], holders[name].governing
        previous = getattr(module, "attention_drop_state", None)
        for peer in [] if previous is None else previous.peers:
            peer.peers = []  # It may belong to a module that is no longer in the model.
        # A compiled model recompiles for another state.
        if previous is None or previous.config is not governing or previous.place != place:
            state = ModuleState(governing, place)
            if previous is not None:
                state.calls, state.base = previous.calls, previous.base
                state.configure(previous.perturbations)
                state.schedule(previous.scheduled)
            module.attention_drop_state = state
        module.attention_drop_state.governor = weakref.ref(holders[name].owner)
        module.attention_drop_state.owner = type(model).__name__
    running = running_modules(model)
    peers = [module.attention_drop_state for module in running]
    for state in peers:
        state.peers = peers
        if state.perturbations != (perturbations := perturbations_of(state.config)):
            state.configure(perturbations)
    return running


def _names(requested: Any) -> Iterator[str]:
    values = requested.values() if isinstance(requested, dict) else [requested]
    for value in values:
        if isinstance(value, dict):
            yield from _names(value)
        else:
            yield value
