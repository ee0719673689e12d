"""What importing the package changes in Transformers: registry entries, a config entry, three checked methods."""

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from .attach import attach, record_implementations, refuse_to_leave, reset_missing, settle_entries
from .attention import NAME, attention_drop_forward, reweighted_attention_forward
from .configuration import CONFIG_KEY, register_config_entry
from .reweighting_configuration import (
    REWEIGHTING_KEY,
    REWEIGHTINGS,
    ReweightingConfigEntry,
    reweighting_from_dict,
)
from .sites import AttentionSite, attention_modules, check_selection, configs_of, place_sites, refuse_capped_blur
from .support import refuse_unsupported_class, refuse_unsupported_modules


FUNCTIONS = {NAME: attention_drop_forward, **dict.fromkeys(REWEIGHTINGS, reweighted_attention_forward)}


def register() -> None:
    """Makes the attention implementations of this package known to Transformers. Called once, on import.

    Raises:
        RuntimeError: if another package holds one of the names.
    """
    # Without a mask function of the same name Transformers would hand over no mask at all.
    masks = dict.fromkeys(FUNCTIONS, sdpa_mask)
    for interface, functions in ((AttentionInterface, FUNCTIONS), (AttentionMaskInterface, masks)):
        for name, function in functions.items():
            existing = interface._global_mapping.get(name)
            if existing not in (None, function):
                raise RuntimeError(
                    f"{interface.__name__} already holds {name!r} ({existing.__module__}.{existing.__qualname__}), "
                    "registered by another package: models would silently run one of the two. Import only one of "
                    "them in this process."
                )
    register_config_entry()
    ReweightingConfigEntry(REWEIGHTING_KEY, reweighting_from_dict).register()
    for name, function in FUNCTIONS.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
    for method in (_get_correct_attn_implementation, _post_init, _initialize_weights, _set_attn_implementation):
        _wrap(method)


def _wrap(method: Any) -> None:
    """Puts a method of ours around the method of [`~transformers.PreTrainedModel`] that has its name."""
    name = method.__name__.removeprefix("_")
    original = getattr(PreTrainedModel, name)
    if getattr(original, "_wrapped_by_attentiondrop", False):
        return

    @functools.wraps(original)
    def wrapped(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return method(self, original, *args, **kwargs)

    wrapped._wrapped_by_attentiondrop = True
    setattr(PreTrainedModel, name, wrapped)


def _get_correct_attn_implementation(self: PreTrainedModel, original: Any, *args: Any, **kwargs: Any) -> str:
    """Refuses a class that would ignore the implementation, before its modules and weights exist."""
    implementation = original(self, *args, **kwargs)
    if implementation in FUNCTIONS:
        refuse_unsupported_class(type(self), implementation)
    return implementation


def _post_init(self: PreTrainedModel, original: Any) -> None:
    """Completes construction: now the modules are there."""
    original(self)
    methods = {id(config): config._attn_implementation for config in configs_of(self.config)}
    is_ours = any(method in FUNCTIONS for method in methods.values())
    is_ours = is_ours or any(config.attention_reweighting for config in configs_of(self.config))
    if is_ours and not _is_part_of_a_model_being_built(self):
        _activate(self, methods, [(part, part.config._attn_implementation) for part in _parts(self)])
        record_implementations(self.config)


def _initialize_weights(self: PreTrainedModel, original: Any) -> None:
    """Initialises learned weights as they ask for, not as the model's class would."""
    reset_missing(self)
    original(self)


def _set_attn_implementation(
    self: PreTrainedModel, original: Any, attn_implementation: str | dict, *args: Any, **kwargs: Any
) -> None:
    """Switches a whole model or nothing: Transformers itself would warn and leave some of it as it is."""
    methods = {id(config): config._attn_implementation for config in configs_of(self.config)}
    requested = {id(config): name for config, name in _requests(self.config, attn_implementation)}
    # Transformers lets a part whose config is not among the whole model's follow the whole model.
    followed = [(part, part.config if id(part.config) in methods else self.config) for part in _parts(self)]
    parts = [(part, requested[id(config)]) for part, config in followed if id(config) in requested]
    for part, name in parts:
        if name != part.config._attn_implementation:
            refuse_to_leave(self, [m for m in part.modules() if getattr(m, "config", None) is part.config], name)
    if any(name in FUNCTIONS for _, name in parts):
        _activate(self, {**methods, **requested}, parts)
    original(self, attn_implementation, *args, **kwargs)
    record_implementations(self.config)


def _requests(config: PreTrainedConfig, requested: str | dict | None) -> Iterator[tuple[PreTrainedConfig, str]]:
    """The config and sub-configs that an `attn_implementation` argument speaks of, each with the name it gives."""
    is_dict = isinstance(requested, dict)
    if (own := requested.get("") if is_dict else requested) is not None:
        yield config, own
    for name in config.sub_configs:
        if (sub_config := getattr(config, name, None)) is not None:
            yield from _requests(sub_config, requested.get(name) if is_dict else requested)


def _parts(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The Transformers models that a model is made of, itself included."""
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def _is_part_of_a_model_being_built(model: PreTrainedModel) -> bool:
    # Only the whole model can be judged: a convolutional backbone has no attention, and a decoder alone no encoder. A
    # part does not know its owner; the call stack does.
    frame = sys._getframe(1)
    while frame is not None:
        builder = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if isinstance(builder, PreTrainedModel) and builder is not model:
            return True
        frame = frame.f_back
    return False


def _activate(model: PreTrainedModel, methods: Mapping[int, str], parts: list[tuple[PreTrainedModel, str]]) -> None:
    """Prepares a whole model for what its parts are to run, or refuses it and leaves its config as it was.

    Args:
        model: the whole model.
        methods: attention implementation to come, by `id` of the model's config and sub-configs.
        parts: the Transformers models it is made of, each with its attention implementation to come.
    """
    previous = [(config, config.attention_reweighting) for config in configs_of(model.config)]
    names = {id(part.config): name for part, name in parts if name in FUNCTIONS}
    try:
        settle_entries(model.config, methods)
        for part, name in parts:
            if name in FUNCTIONS:
                refuse_unsupported_class(type(part), name)
        running = [(module, names.get(id(module.config))) for _, module in attention_modules(model)]
        running = [(module, name) for module, name in running if name is not None]
        place_sites(model)
        asked = next(name for name in methods.values() if name in FUNCTIONS)
        refuse_unsupported_modules(model, [module for module, _ in running], asked)
        perturbed = [module for module, name in running if name == NAME or module.attention_drop_site.is_configured]
        check_selection(model, CONFIG_KEY, [(site, site.drop) for site in _sites(perturbed)])
        refuse_capped_blur(model, _sites(perturbed))
        if learned := [module for module, name in running if name in REWEIGHTINGS]:
            attach(model, learned)
    except ValueError:
        for config, entry in previous:
            config.attention_reweighting = entry
        raise


def _sites(modules: Iterable[nn.Module]) -> list[AttentionSite]:
    return [module.attention_drop_site for module in modules]
