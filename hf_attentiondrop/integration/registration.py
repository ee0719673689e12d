"""Registration with Transformers. Importing the package

- registers its attention functions and their mask function under their names,
- adds the properties `attention_drop` and `attention_reweighting` to `PreTrainedConfig`,
- wraps the setter of `PreTrainedConfig._attn_implementation` and four methods of `PreTrainedModel`, `CHECKED_METHODS`.

The wrappers do nothing for models that do not use this package. The first model that uses it and can generate also
wraps `GenerationMixin.generate`, to add a warning, and that of Gemma 4 a method that asks for the name of SDPA.
"""

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from ..attention.parts import configs_of, holders_of
from ..methods import LEARNED_METHODS
from ..methods.method import ATTENTION_DROP_KEY, check_selection
from .attach import attach, check_can_leave, record_implementations, reset_missing, resolve_entries
from .config_entries import accept_given_entries, check_given_entries, register_config_entries
from .functions import check_perturbed, is_perturbable
from .generation import warn_of_training_mode
from .implementations import (
    FUNCTIONS,
    check_parts,
    is_known,
    place_running,
    requests,
    resolve,
    unknown_name,
    uses_any,
)
from .kv_sharing import keep_queries_as_sdpa
from .support import check_class, check_modules
from .switching import all_or_nothing, switch_remaining
from .wrapping import wrapped


def register() -> None:
    """Registers the attention implementations of this package with Transformers. Called once, on import.

    Raises:
        RuntimeError: if another package has registered one of the names.
    """
    # Without a mask function of the same name, Transformers passes no mask at all.
    masks = dict.fromkeys(FUNCTIONS, sdpa_mask)
    for interface, functions in ((AttentionInterface, FUNCTIONS), (AttentionMaskInterface, masks)):
        for name, function in functions.items():
            existing = interface._global_mapping.get(name)
            if existing not in (None, function):
                raise RuntimeError(
                    f"{interface.__name__} already has {name!r} ({existing.__module__}.{existing.__qualname__}), "
                    "registered by another package: models would silently run one of the two. Import only one of "
                    "them in a process."
                )
    register_config_entries()
    for name, function in FUNCTIONS.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
    for name, method in CHECKED_METHODS.items():
        setattr(PreTrainedModel, name, wrapped(getattr(PreTrainedModel, name), method))
    # All requests for an implementation, including config.json, go through this property.
    requested: Any = PreTrainedConfig._attn_implementation
    PreTrainedConfig._attn_implementation = requested.setter(wrapped(requested.fset, _request))


def _request(self: PreTrainedConfig, original: Any, value: str | dict | None) -> None:
    """Checks the parts that a request names, and resolves names with the package's prefix."""
    value = resolve(value)
    check_parts(self, value)
    original(self, value)


def _check_class(self: PreTrainedModel, original: Any, requested: str | None, *args: Any, **kwargs: Any) -> str:
    """Checks that a class supports the implementation, before its modules and weights exist."""
    try:
        implementation = original(self, requested, *args, **kwargs)
    except ValueError as error:
        if is_known(requested):
            raise
        raise unknown_name(error, requested) from None
    if implementation in FUNCTIONS:
        check_class(type(self), implementation)
    return implementation


def _complete_construction(self: PreTrainedModel, original: Any) -> None:
    """Prepares a whole model once its modules exist."""
    original(self)
    is_ours = uses_any(self.config) or any(config.attention_reweighting for config in configs_of(self.config))
    if _is_part_of_a_model_being_built(self):
        return
    if is_ours:
        with all_or_nothing(self):
            _activate(self)
        record_implementations(self.config)
    else:
        check_given_entries(type(self).__name__, configs_of(self.config))


def _initialize_learned_weights(self: PreTrainedModel, original: Any) -> None:
    """Initializes learned weights by their own rule instead of the model's."""
    reset_missing(self)
    original(self)


def _switch(self: PreTrainedModel, original: Any, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
    """Switches the whole model or raises; Transformers warns and leaves some modules unchanged."""
    attn_implementation = resolve(attn_implementation)
    check_parts(self.config, attn_implementation)
    requested = {id(config): name for config, name in requests(self.config, attn_implementation)}
    modules = [(h.module, requested[id(h.governing)]) for h in holders_of(self) if id(h.governing) in requested]
    running = {module.config._attn_implementation for module, _ in modules}
    if not FUNCTIONS.keys() & {*requested.values(), *running} and not uses_any(self.config):
        original(self, attn_implementation, *args, **kwargs)
        return
    leaving = [module for module, name in modules if name != module.config._attn_implementation]
    check_can_leave(self, leaving, attn_implementation)
    for module, name in modules:
        if isinstance(module, PreTrainedModel) and name in FUNCTIONS:
            check_class(type(module), name)
    with all_or_nothing(self):
        original(self, attn_implementation, *args, **kwargs)
        switch_remaining(self, requested)
        if uses_any(self.config):
            _activate(self)
    record_implementations(self.config)


# Methods of `PreTrainedModel` and the functions that wrap them.
CHECKED_METHODS: dict[str, Callable[..., Any]] = {
    "get_correct_attn_implementation": _check_class,
    "post_init": _complete_construction,
    "initialize_weights": _initialize_learned_weights,
    "set_attn_implementation": _switch,
}


def _parts(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Returns the Transformers models inside a model, including itself."""
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def _is_part_of_a_model_being_built(model: PreTrainedModel) -> bool:
    # Checks apply to whole models only: a convolutional backbone has no attention, and that is no error. A part has no
    # reference to the model around it, but the constructor of that model is on the call stack.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        builder = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if isinstance(builder, PreTrainedModel) and builder is not model:
            return True
        frame = frame.f_back
    return False


def _activate(model: PreTrainedModel) -> None:
    """Prepares a whole model for the implementations in its configs.

    Raises:
        ValueError: if it does not support them.
    """
    resolve_entries(model.config)
    configs = list(configs_of(model.config))
    entries = [
        config.__dict__.get(ATTENTION_DROP_KEY) for config in configs if config._attn_implementation in FUNCTIONS
    ]
    # A composite config shares its entry with its sub-configs.
    idle = [config for config in configs if config.__dict__.get(ATTENTION_DROP_KEY) not in entries]
    check_given_entries(type(model).__name__, idle)
    accept_given_entries(configs)
    for part in _parts(model):
        if part.config._attn_implementation in FUNCTIONS:
            check_class(type(part), part.config._attn_implementation)
            keep_queries_as_sdpa(type(part))
    running = [(module, module.config._attn_implementation) for module in place_running(model)]
    name = next(config._attn_implementation for config in configs if config._attn_implementation in FUNCTIONS)
    check_modules(model, [module for module, _ in running], name)
    perturbed = [module for module, _ in running if is_perturbable(module)]
    states = [module.attention_drop_state for module in perturbed]
    selections = [(state.place, state.perturbations) for state in states]
    check_selection(type(model).__name__, ATTENTION_DROP_KEY, selections)
    check_perturbed(perturbed)
    if learned := [module for module, name in running if name in LEARNED_METHODS]:
        attach(model, learned)
    warn_of_training_mode(type(model))
