"""What importing the package changes in Transformers: registry entries, a config entry, three checked methods."""

import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from .attention import NAME, attention_drop_forward
from .configuration import AttentionDropConfig, register_config_entry
from .sites import attention_modules, check_selection, configs_of, place_sites
from .support import refuse_unsupported_class, refuse_unsupported_modules


def register() -> None:
    """Makes `attn_implementation="attentiondrop"` known to Transformers. Called once, on import.

    Raises:
        RuntimeError: if another package holds one of the names.
    """
    for interface, function in ((AttentionInterface, attention_drop_forward), (AttentionMaskInterface, sdpa_mask)):
        existing = interface._global_mapping.get(NAME)
        if existing not in (None, function):
            raise RuntimeError(
                f"{interface.__name__} already holds {NAME!r} ({existing.__module__}.{existing.__qualname__}), "
                "registered by another package: models would silently run one of the two. Import only one of "
                "them in this process."
            )
    register_config_entry()
    # Without a mask function of the same name Transformers would hand over no mask at all.
    AttentionInterface.register(NAME, attention_drop_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for method in (_get_correct_attn_implementation, _post_init, _set_attn_implementation):
        _wrap(method)


def configure(model: Any, drop: AttentionDropConfig | Mapping[str, Any]) -> None:
    """Changes what AttentionDrop does to a model that is loaded already, from its next forward pass on.

    Args:
        model: a Transformers model that uses `attn_implementation="attentiondrop"`, or a wrapper around one (PEFT,
            DDP).
        drop: an [`AttentionDropConfig`] or a dict of its fields. It is written to the model's config, sub-configs
            included.

    Raises:
        ValueError: if no part of the model uses `"attentiondrop"`, or the configuration selects what it does not have.
        TypeError: if there is no Transformers model in `model`.

    Example:

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> model = BertModel._from_config(config, attn_implementation="attentiondrop")
    >>> configure(model, AttentionDropConfig(variant="blur", layers=[-1]))
    >>> model.config.attention_drop.variant
    'blur'
    """
    base = transformers_model(model)
    drop = AttentionDropConfig.from_dict(drop)
    running = [module for _, module in attention_modules(base) if module.config._attn_implementation == NAME]
    if not running:
        raise ValueError(
            f"{type(base).__name__} uses attn_implementation={base.config._attn_implementation!r}, so the "
            f'configuration would have no effect. Call model.set_attn_implementation("{NAME}") first, or load the '
            "model with it."
        )
    previous = {id(config): config.attention_drop for config in configs_of(base.config)}
    base.config.attention_drop = drop
    try:
        check_selection(base, running)
    except ValueError:
        for config in configs_of(base.config):
            config.attention_drop = previous[id(config)]
        raise


def transformers_model(model: Any) -> PreTrainedModel:
    """The Transformers model in a wrapper: the outermost [`~transformers.PreTrainedModel`] among its modules.

    Raises:
        TypeError: if there is none.
    """
    for module in getattr(model, "modules", tuple)():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(
        f"Expected a Transformers model or a module that holds one, got {type(model).__name__}: only Transformers "
        "models dispatch their attention through the interface that AttentionDrop plugs into."
    )


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
    if implementation == NAME:
        refuse_unsupported_class(type(self))
    return implementation


def _post_init(self: PreTrainedModel, original: Any) -> None:
    """Completes construction: now the modules are there."""
    original(self)
    is_asked = any(config._attn_implementation == NAME for config in configs_of(self.config))
    if is_asked and not _is_part_of_a_model_being_built(self):
        _activate(self, [part for part in _parts(self) if part.config._attn_implementation == NAME])


def _set_attn_implementation(
    self: PreTrainedModel, original: Any, attn_implementation: str | dict, *args: Any, **kwargs: Any
) -> None:
    """Switches a whole model or nothing: Transformers itself would warn and leave some of it as it is."""
    asked = {id(config) for config in _configs_asked_for(self.config, attn_implementation)}
    if asked:
        registered = {id(config) for config in configs_of(self.config)}
        # Transformers lets a part whose config is not among the whole model's follow the whole model.
        followed = ((part, part.config if id(part.config) in registered else self.config) for part in _parts(self))
        _activate(self, [part for part, config in followed if id(config) in asked])
    original(self, attn_implementation, *args, **kwargs)


def _configs_asked_for(config: PreTrainedConfig, requested: str | dict | None) -> Iterator[PreTrainedConfig]:
    """The config and sub-configs for which an `attn_implementation` argument asks for ours."""
    is_dict = isinstance(requested, dict)
    if (requested.get("") if is_dict else requested) == NAME:
        yield config
    for name in config.sub_configs:
        if (sub_config := getattr(config, name, None)) is not None:
            yield from _configs_asked_for(sub_config, requested.get(name) if is_dict else requested)


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


def _activate(model: PreTrainedModel, parts: list[PreTrainedModel]) -> None:
    """Prepares a whole model of which the given parts run AttentionDrop, or refuses it."""
    for part in parts:
        refuse_unsupported_class(type(part))
    configs = {id(part.config) for part in parts}
    running = [module for _, module in attention_modules(model) if id(module.config) in configs]
    place_sites(model)
    refuse_unsupported_modules(model, running)
    check_selection(model, running)
