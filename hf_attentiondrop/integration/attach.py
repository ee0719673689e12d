"""Learned weights on the attention modules of a model: where they belong, how they get there, and how they stay.

They are child modules named `reweighting`, present from construction, so that everything that handles a model's own
parameters handles them too.
"""

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention.parts import configs_of
from ..methods import LEARNED_METHODS
from ..methods.method import LEARNED_KEY, Dimensions, LearnedMethod, LearnedWeights, check_selection
from .implementations import PREFIX


HEADS_NAMES = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
HEAD_DIM_NAMES = ("v_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "dim_head")


def resolve_entries(config: PreTrainedConfig, inherited: Any = None) -> None:
    """Gives every config that runs a learned method its entry: its own, the one around it, or the defaults.

    Args:
        config: the config of a whole model, and its sub-configs with it.
        inherited: the entry of the config around this one.

    Raises:
        ValueError: if an entry belongs to another method than the one that its config runs, or would be ignored.
    """
    own, method = config.attention_reweighting, config._attn_implementation
    sub_configs = [sub_config for sub_config in configs_of(config) if sub_config is not config]
    entry = own or inherited
    if method in LEARNED_METHODS:
        entry = entry or LEARNED_METHODS[method]()
        if entry.method != method:
            raise ValueError(
                f"`{LEARNED_KEY}` holds {entry!r}, which belongs to attn_implementation={entry.method!r}, and the "
                f"model was asked for {method!r}. Name the same method in both."
            )
        config.attention_reweighting = entry
    elif own is not None:
        if not any(sub_config._attn_implementation == own.method for sub_config in sub_configs):
            raise ValueError(
                f"The config has learned attention weights, {own!r}, and attn_implementation={method!r} would leave "
                "them out: the outputs of the model would silently be wrong. Load it with attn_implementation="
                f"{own.method!r}; a checkpoint that was saved with such weights names it itself. The base model's own "
                f"checkpoint, without a `{LEARNED_KEY}` entry, takes any implementation."
            )
        config.attention_reweighting = None
    for name in config.sub_configs:
        if isinstance(sub_config := getattr(config, name, None), PreTrainedConfig):
            resolve_entries(sub_config, entry)


def attach(model: PreTrainedModel, modules: Iterable[nn.Module]) -> None:
    """Puts learned weights on those attention modules that their configuration selects, once.

    Args:
        model: the whole model, with its sites placed and its entries settled.
        modules: its attention modules that run a learned method.

    Raises:
        ValueError: if a module cannot carry them, or the configuration selects layers that do not exist.
    """
    _check_parallelism(model.config)
    modules = list(modules)
    for module in modules:
        _check_described(model, module)
    states = [module.attention_drop_state for module in modules]
    selections = [(state.place, [state.config.attention_reweighting]) for state in states]
    check_selection(type(model).__name__, LEARNED_KEY, selections)
    for module in modules:
        _check_same_method(model, module)
    new = [module for module in modules if not hasattr(module, "reweighting")]
    # All or nothing: a module that is refused must not leave a model half attached.
    for module, reweighting in [(module, _make(module)) for module in new]:
        module.reweighting = reweighting
        if reweighting is not None:
            hook = functools.partial(_hand_over_states, name=_states_name(type(module)))
            module.register_forward_pre_hook(hook, with_kwargs=True)


def record_implementations(config: PreTrainedConfig) -> str | dict[str, Any] | None:
    """Writes `attn_implementation` into the configs of a model with learned weights, so that config.json names it.

    Transformers itself never saves the implementation, but reads it: the checkpoint then selects the plugin on its
    own, and stops with an error that names the plugin where it is missing.

    Returns:
        What was written: a name, a dict of names where sub-configs differ, or `None` for nothing.
    """
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    parts = {name: part for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
    recorded = {name: record_implementations(part) for name, part in parts.items()}
    own = PREFIX + config._attn_implementation if config.attention_reweighting is not None else None
    if own is not None and all(part == own for part in recorded.values()):
        config.__dict__["attn_implementation"] = own
        return own
    recorded = {name: part for name, part in {"": own, **recorded}.items() if part is not None}
    if recorded:
        config.__dict__["attn_implementation"] = recorded
    return recorded or None


def reset_missing(model: nn.Module) -> None:
    """Initialises the learned weights that no checkpoint brought; otherwise they would be uninitialised memory."""
    for module in model.modules():
        if isinstance(module, LearnedWeights) and not getattr(module, "_is_hf_initialized", False):
            module.reset_parameters()
            module._is_hf_initialized = True


def check_can_leave(model: PreTrainedModel, modules: Iterable[nn.Module], requested: Any) -> None:
    """Refuses to switch modules with learned weights to an implementation that would leave them out.

    Raises:
        ValueError: if one of the modules holds learned weights.
    """
    learned = [module for module in modules if getattr(module, "reweighting", None) is not None]
    if learned:
        raise ValueError(
            f"{type(model).__name__} has learned attention weights ({learned[0].config._attn_implementation!r}, "
            f"{len(learned)} modules) which attn_implementation={requested!r} would leave out: its outputs would "
            "silently be wrong. Load the checkpoint that it was made from to get the base model."
        )


def _check_described(model: nn.Module, module: nn.Module) -> None:
    """Refuses a module that is to learn, or has learned, what no config of the whole model describes."""
    if module.attention_drop_state.config.attention_reweighting is None:
        raise ValueError(
            f"A {type(module).__name__} of {type(model).__name__} runs {module.config._attn_implementation!r}, and "
            f"the config of the whole model has no `{LEARNED_KEY}` for it: a checkpoint would reload without the "
            "learned weights. Ask the whole model for that attn_implementation."
        )


def _check_same_method(model: nn.Module, module: nn.Module) -> None:
    """Refuses a module that came with learned weights which the whole model's config describes otherwise."""
    existing = getattr(module, "reweighting", None)
    found, said = getattr(existing, "config", None), _configuration(module)
    if hasattr(module, "reweighting") and found != said:
        raise ValueError(
            f"A {type(module).__name__} of {type(model).__name__} has learned weights for {found!r}, and the config "
            f"of the whole model says {said!r}: a checkpoint would reload as something else. Give both the same "
            f"`{LEARNED_KEY}`."
        )


def _configuration(module: nn.Module) -> LearnedMethod | None:
    """What the module is to learn, by the config that governs it."""
    state = module.attention_drop_state
    config = state.config.attention_reweighting
    return config if config.selects(state.place) else None


def _make(module: nn.Module) -> LearnedWeights | None:
    config = _configuration(module)
    if config is None:
        return None
    module_class: type = type(module)
    _check_passes_kwargs(module_class)
    weight, hidden_size = _projection(module)
    # The dtype of a quantized weight is no dtype for training.
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    return config.weights(config, _dimensions(module, hidden_size), device=weight.device, dtype=dtype)


def _hand_over_states(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Kept on the module instead, the states would break recomputation and compilation, and so would the memory of
    # this pass, which models share among several calls of the attention function.
    states = args[0] if args else kwargs[name]
    return args, {**kwargs, "reweighting_states": states, "reweighting_memory": {}}


def _states_name(module_class: type[nn.Module]) -> str:
    return list(inspect.signature(module_class.forward).parameters)[1]


def _projection(module: nn.Module) -> tuple[torch.Tensor, int]:
    """Returns weight and input size of the projection that makes queries, alone or together with keys and values."""
    projections = {
        name: (child.weight, size)
        for name, child in module.named_modules()
        if hasattr(child, "weight") and (size := getattr(child, "in_features", None) or getattr(child, "nx", None))
    }
    names = [name for name in projections if "q" in name.rpartition(".")[2].lower()] or list(projections)
    if not names:
        raise ValueError(
            f"{type(module).__name__} has no linear projection of its hidden states, so the size of its learned "
            "weights is unknown. Load this model with another attn_implementation."
        )
    return projections[names[0]]


def _dimensions(module: nn.Module, hidden_size: int) -> Dimensions:
    num_heads = _first(HEADS_NAMES, module, module.config)
    if num_heads is None:
        raise ValueError(
            f"{type(module).__name__} does not say how many heads it has (in one of {HEADS_NAMES}), so the size of "
            "its learned weights is unknown. Load this model with another attn_implementation."
        )
    head_dim = _first(HEAD_DIM_NAMES, module) or _first(HEAD_DIM_NAMES[:2], module.config) or hidden_size // num_heads
    initializer_range = getattr(module.config, "initializer_range", None)
    return Dimensions(hidden_size, num_heads, head_dim, 0.02 if initializer_range is None else initializer_range)


def _first(names: Iterable[str], *owners: Any) -> int | None:
    values = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in values if isinstance(value, int)), None)


@functools.cache
def _check_passes_kwargs(module_class: type[nn.Module]) -> None:
    parameters = inspect.signature(module_class.forward).parameters.values()
    keywords = [parameter.name for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
    # Once in the signature, and once more where the attention function is called.
    if not keywords or inspect.getsource(module_class.forward).count(f"**{keywords[0]}") < 2:
        raise ValueError(
            f"{module_class.__name__} does not hand its keyword arguments over to its attention function, so the "
            "hidden states that learned weights act on cannot reach it. Load this model with another "
            "attn_implementation."
        )


def _check_parallelism(config: PreTrainedConfig) -> None:
    size = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
    if size > 1:
        raise ValueError(
            f"Learned attention weights cannot be split by tensor parallelism (tp_size={size}): they act on all "
            "heads, and each device would hold some. Use data parallelism, DDP or FSDP."
        )
