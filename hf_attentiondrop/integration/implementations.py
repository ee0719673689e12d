"""The attention implementations of this package by name, and the requests for them in models and configs."""

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

# Prefix of the names in config.json: without this package, the error of Transformers then shows which one is missing.
PREFIX = "hf_attentiondrop."


def resolve(requested: Any) -> Any:
    """Returns an `attn_implementation` argument or config.json entry without the package's prefix.

    >>> resolve({"text_config": "hf_attentiondrop.affine_scaled", "vision_config": "sdpa"})
    {'text_config': 'affine_scaled', 'vision_config': 'sdpa'}
    """
    if isinstance(requested, dict):
        return {key: resolve(value) for key, value in requested.items()}
    name = requested.removeprefix(PREFIX) if isinstance(requested, str) else None
    return name if name in FUNCTIONS else requested


def requests(config: PreTrainedConfig, requested: str | dict | None) -> Iterator[tuple[PreTrainedConfig, str]]:
    """Yields the config and sub-configs that an `attn_implementation` argument sets, each with its new name."""
    own = requested.get("") if isinstance(requested, dict) else requested
    if own is not None:
        yield config, own
    for name in config.sub_configs:
        if (sub_config := getattr(config, name, None)) is not None:
            yield from requests(sub_config, requested.get(name) if isinstance(requested, dict) else requested)


def check_parts(config: PreTrainedConfig, requested: Any) -> None:
    """Checks that a dict requesting an implementation of this package names only parts that the config has.

    Raises:
        ValueError: if it names another part.
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
                f"attn_implementation={requested!r} names {key!r}, but {type(config).__name__} has no such part: it "
                f"would be silently ignored.{suggestion(key, parts)} {known} the key '' selects the model itself."
            )


def unknown_name(error: ValueError, name: Any) -> ValueError:
    """Returns the error of Transformers for an unknown name, with the names of this package added."""
    names = ", ".join(f'"{known}"' for known in FUNCTIONS)
    hint = suggestion(str(name).removeprefix(PREFIX), FUNCTIONS)
    if str(name).startswith(PREFIX):
        hint += " A newer release of hf_attentiondrop may have it."
    return ValueError(f"{error} hf_attentiondrop adds {names}.{hint}")


def is_known(name: Any) -> bool:
    """Returns whether Transformers has an attention implementation of this name."""
    return name is None or name == "eager" or name in ALL_ATTENTION_FUNCTIONS.valid_keys()


def uses_any(config: PreTrainedConfig) -> bool:
    """Returns whether a config or one of its sub-configs runs an implementation of this package."""
    return any(part._attn_implementation in FUNCTIONS for part in configs_of(config))


def running_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the attention modules of a model that run an implementation of this package."""
    return [module for _, module in attention_modules(model) if module.config._attn_implementation in FUNCTIONS]


def place_running(model: PreTrainedModel) -> list[nn.Module]:
    """Sets the state of every attention module of a model; keeps counts, base attention, factors and gains.

    Returns:
        The modules that run an implementation of this package, see [`running_modules`].

    Raises:
        ValueError: if the config of such a module has an entry that this release cannot parse.
    """
    holders, modules = {holder.name: holder for holder in holders_of(model)}, dict(attention_modules(model))
    outside: dict[int, ModuleState] = {}
    for name, place in places_of(model).items():
        module, governing = modules[name], holders[name].governing
        previous = getattr(module, "attention_drop_state", None)
        if previous is not None and previous.peers:
            outside |= {id(peer): peer for peer in previous.outside_of(model)}
            for peer in previous.peers:
                peer.peers = []  # Its module may have left the model.
        # Keep the object where possible: a compiled model recompiles for a new one.
        if previous is None or previous.config is not governing or previous.place != place:
            state = ModuleState(governing, place)
            if previous is not None:
                state.take_over(previous)
            module.attention_drop_state = state
        module.attention_drop_state.governor = weakref.ref(holders[name].owner)
        module.attention_drop_state.owner = type(model).__name__
    running = running_modules(model)
    states = [module.attention_drop_state for module in running]
    # If the model is a part of a larger one, that one is still configured as a whole.
    peers = [*states, *outside.values()]
    for state in peers:
        state.peers = peers
    for state in states:
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
