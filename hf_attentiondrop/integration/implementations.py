"""The attention implementations of this package by name, and how a model or config is asked for them."""

import difflib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention.parts import configs_of
from ..methods.configuration import SIMILARITY
from ..methods.reweighting_configuration import REWEIGHTINGS
from ..methods.sites import attention_modules, place_sites
from .functions import NAME, attention_drop_forward, reweighted_attention_forward


FUNCTIONS = {NAME: attention_drop_forward, **dict.fromkeys(REWEIGHTINGS, reweighted_attention_forward)}

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
    is_dict = isinstance(requested, dict)
    if (own := requested.get("") if is_dict else requested) is not None:
        yield config, own
    for name in config.sub_configs:
        if (sub_config := getattr(config, name, None)) is not None:
            yield from requests(sub_config, requested.get(name) if is_dict else requested)


def refuse_unknown_parts(config: PreTrainedConfig, requested: Any) -> None:
    """Refuses a dict that asks for an implementation of this package and names parts which a config does not have.

    Raises:
        ValueError: naming the parts there are.
    """
    if not isinstance(requested, dict) or not FUNCTIONS.keys() & set(_names(requested)):
        return
    parts = [name for name in config.sub_configs if isinstance(getattr(config, name, None), PreTrainedConfig)]
    for key, value in requested.items():
        if key in parts:
            refuse_unknown_parts(getattr(config, key), value)
        elif key != "":
            known = f"Its parts are {parts}, and" if parts else "It has no parts;"
            raise ValueError(
                f"attn_implementation={requested!r} names {key!r}, and {type(config).__name__} has no such part: it "
                f"would be ignored in silence.{suggest(key, parts)} {known} the key '' stands for the model itself."
            )


def unknown_name(error: ValueError, name: Any) -> ValueError:
    """The refusal by Transformers of a name that is not registered, with the names of this package added."""
    names = ", ".join(f'"{known}"' for known in FUNCTIONS)
    hint = suggest(str(name).removeprefix(PREFIX), FUNCTIONS)
    if str(name).startswith(PREFIX):
        hint += " A newer release of hf_attentiondrop may have it."
    return ValueError(f"{error} hf_attentiondrop adds {names}.{hint}")


def is_known(name: Any) -> bool:
    """Whether Transformers has an attention implementation of this name."""
    return name is None or name == "eager" or name in ALL_ATTENTION_FUNCTIONS.valid_keys()


def suggest(name: str, names: Any) -> str:
    nearest = difflib.get_close_matches(name, list(names), n=1, cutoff=SIMILARITY)
    return f' Did you mean "{nearest[0]}"?' if nearest else ""


def uses_any(config: PreTrainedConfig) -> bool:
    """Whether a config or one of its sub-configs runs an implementation of this package."""
    return any(part._attn_implementation in FUNCTIONS for part in configs_of(config))


def running_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a model that run an implementation of this package."""
    return [module for _, module in attention_modules(model) if module.config._attn_implementation in FUNCTIONS]


def place_running(model: PreTrainedModel) -> list[nn.Module]:
    """Places the sites of a whole model, and tells those of the modules that run of each other.

    Returns:
        As [`running_modules`].
    """
    place_sites(model)
    running = running_modules(model)
    peers = [module.attention_drop_site for module in running]
    for site in peers:
        site.peers = peers
    return running


def _names(requested: Any) -> Iterator[str]:
    values = requested.values() if isinstance(requested, dict) else [requested]
    for value in values:
        if isinstance(value, dict):
            yield from _names(value)
        else:
            yield value
