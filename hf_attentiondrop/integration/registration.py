"""What importing the package changes in Transformers: registry entries, two config entries, one checked property of
configs, and four checked methods of models. The first model that may need it adds a warning to `generate`."""

import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from ..attention.parts import configs_of, holders_of
from ..methods.configuration import CONFIG_KEY
from ..methods.reweighting_configuration import (
    REWEIGHTING_KEY,
    REWEIGHTINGS,
    ReweightingConfigEntry,
    reweighting_from_dict,
)
from ..methods.sites import AttentionSite, check_selection, refuse_capped_blur
from .attach import attach, record_implementations, refuse_to_leave, reset_missing, settle_entries
from .config_entries import accept_given_entries, refuse_given_entries, register_config_entry
from .functions import NAME
from .generation import warn_of_training_mode
from .implementations import (
    FUNCTIONS,
    is_known,
    place_running,
    refuse_unknown_parts,
    requests,
    resolve,
    unknown_name,
    uses_any,
)
from .support import refuse_unsupported_class, refuse_unsupported_modules
from .switching import switch_the_rest, whole_or_nothing


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
    for name, method in CHECKED_METHODS.items():
        _wrap(name, method)
    _check_requests()


def _wrap(name: str, method: Any) -> None:
    """Puts a method of ours around one of [`~transformers.PreTrainedModel`]; it is handed the original."""
    original = getattr(PreTrainedModel, name)
    if getattr(original, "_wrapped_by_attentiondrop", False):
        return

    @functools.wraps(original)
    def wrapped(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return method(self, original, *args, **kwargs)

    wrapped._wrapped_by_attentiondrop = True
    setattr(PreTrainedModel, name, wrapped)


def _check_requests() -> None:
    """Makes every config check what it is asked to run: all ways to ask, config.json among them, end there."""
    original = PreTrainedConfig._attn_implementation
    if getattr(original.fset, "_wrapped_by_attentiondrop", False):
        return

    @functools.wraps(original.fset)
    def set_checked(self: PreTrainedConfig, value: str | dict | None) -> None:
        value = resolve(value)
        refuse_unknown_parts(self, value)
        original.fset(self, value)

    set_checked._wrapped_by_attentiondrop = True
    PreTrainedConfig._attn_implementation = original.setter(set_checked)


def _check_class(self: PreTrainedModel, original: Any, requested: str | None, *args: Any, **kwargs: Any) -> str:
    """Refuses a class that would ignore the implementation, before its modules and weights exist."""
    try:
        implementation = original(self, requested, *args, **kwargs)
    except ValueError as error:
        if is_known(requested):
            raise
        raise unknown_name(error, requested) from None
    if implementation in FUNCTIONS:
        refuse_unsupported_class(type(self), implementation)
    return implementation


def _complete_construction(self: PreTrainedModel, original: Any) -> None:
    """Prepares a whole model, now that the modules are there."""
    original(self)
    is_ours = uses_any(self.config) or any(config.attention_reweighting for config in configs_of(self.config))
    if _is_part_of_a_model_being_built(self):
        return
    if is_ours:
        with whole_or_nothing(self):
            _activate(self)
        record_implementations(self.config)
    else:
        refuse_given_entries(type(self).__name__, configs_of(self.config))


def _initialize_learned_weights(self: PreTrainedModel, original: Any) -> None:
    """Initialises learned weights as they ask for, not as the model's class would."""
    reset_missing(self)
    original(self)


def _switch(self: PreTrainedModel, original: Any, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
    """Switches a whole model or nothing: Transformers itself would warn and leave some of it as it is."""
    attn_implementation = resolve(attn_implementation)
    refuse_unknown_parts(self.config, attn_implementation)
    requested = {id(config): name for config, name in requests(self.config, attn_implementation)}
    modules = [(h.module, requested[id(h.governing)]) for h in holders_of(self) if id(h.governing) in requested]
    running = {module.config._attn_implementation for module, _ in modules}
    if not FUNCTIONS.keys() & {*requested.values(), *running} and not uses_any(self.config):
        original(self, attn_implementation, *args, **kwargs)
        return
    leaving = [module for module, name in modules if name != module.config._attn_implementation]
    refuse_to_leave(self, leaving, attn_implementation)
    for module, name in modules:
        if isinstance(module, PreTrainedModel) and name in FUNCTIONS:
            refuse_unsupported_class(type(module), name)
    with whole_or_nothing(self):
        original(self, attn_implementation, *args, **kwargs)
        switch_the_rest(self, requested)
        if uses_any(self.config):
            _activate(self)
    record_implementations(self.config)


# Methods of `PreTrainedModel`, and what is put around them.
CHECKED_METHODS = {
    "get_correct_attn_implementation": _check_class,
    "post_init": _complete_construction,
    "initialize_weights": _initialize_learned_weights,
    "set_attn_implementation": _switch,
}


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


def _activate(model: PreTrainedModel) -> None:
    """Prepares a whole model for what its modules are to run, by their configs.

    Raises:
        ValueError: if it cannot run that.
    """
    settle_entries(model.config)
    configs = list(configs_of(model.config))
    entries = [config.__dict__.get(CONFIG_KEY) for config in configs if config._attn_implementation in FUNCTIONS]
    # A composite's own entry is that of its parts.
    idle = [config for config in configs if config.__dict__.get(CONFIG_KEY) not in entries]
    refuse_given_entries(type(model).__name__, idle)
    accept_given_entries(configs)
    for part in _parts(model):
        if part.config._attn_implementation in FUNCTIONS:
            refuse_unsupported_class(type(part), part.config._attn_implementation)
    running = [(module, module.config._attn_implementation) for module in place_running(model)]
    asked = next(config._attn_implementation for config in configs if config._attn_implementation in FUNCTIONS)
    refuse_unsupported_modules(model, [module for module, _ in running], asked)
    perturbed = [module for module, name in running if name == NAME or module.attention_drop_site.is_configured]
    check_selection(type(model).__name__, CONFIG_KEY, [(site, site.drop) for site in _sites(perturbed)])
    refuse_capped_blur(model, _sites(perturbed))
    if learned := [module for module, name in running if name in REWEIGHTINGS]:
        attach(model, learned)
    warn_of_training_mode(type(model))


def _sites(modules: Iterable[nn.Module]) -> list[AttentionSite]:
    return [module.attention_drop_site for module in modules]
