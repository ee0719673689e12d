"""Attaching learned weights to the attention modules of a model.

The weights are child modules named `reweighting`. They exist from construction on, so optimizers, checkpoints, PEFT
and FSDP treat them like the model's own parameters.
"""

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention.modules import HEADS_NAMES, first_integer, num_heads_of
from ..attention.parts import configs_of
from ..methods import LEARNED_METHODS
from ..methods.learned import LEARNED_KEY, Dimensions, LearnedMethod, LearnedWeights
from ..methods.method import check_selection
from .implementations import PREFIX


HEAD_DIM_NAMES = ("v_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "dim_head")


def resolve_entries(config: PreTrainedConfig, inherited: Any = None) -> None:
    """Resolves the entry of every config that runs a learned method: its own, its parent's, or the defaults.

    Args:
        config: the config of a whole model; its sub-configs are resolved too.
        inherited: the entry of the parent config.

    Raises:
        ValueError: if an entry and the `attn_implementation` name different methods, or an entry would be ignored.
    """
    own, method = config.attention_reweighting, config._attn_implementation
    sub_configs = [sub_config for sub_config in configs_of(config) if sub_config is not config]
    entry = own or inherited
    if method in LEARNED_METHODS:
        entry = entry or LEARNED_METHODS[method]()
        if entry.method != method:
            raise ValueError(
                f"`{LEARNED_KEY}` is {entry!r}, which belongs to attn_implementation={entry.method!r}, but the "
                f"requested implementation is {method!r}. Name the same method in both."
            )
        config.attention_reweighting = entry
    elif own is not None:
        if not any(sub_config._attn_implementation == own.method for sub_config in sub_configs):
            raise ValueError(
                f"The config describes learned attention weights, {own!r}, which attn_implementation={method!r} would "
                "ignore: the outputs of the model would be silently wrong. Load it with attn_implementation="
                f"{own.method!r}, or leave the argument out if the checkpoint was saved with these weights. The "
                f"checkpoint of the base model, without a `{LEARNED_KEY}` entry, loads with any implementation."
            )
        config.attention_reweighting = None
    for name in config.sub_configs:
        if isinstance(sub_config := getattr(config, name, None), PreTrainedConfig):
            resolve_entries(sub_config, entry)


def attach(model: PreTrainedModel, modules: Iterable[nn.Module]) -> None:
    """Attaches learned weights to the attention modules that their configuration selects and that have none yet.

    Args:
        model: the whole model, after [`place_running`] and [`resolve_entries`].
        modules: its attention modules that run a learned method.

    Raises:
        ValueError: if a module cannot have learned weights, or the configuration selects layers that do not exist.
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
    # Make all weights before attaching any, so that an error does not leave some modules with weights.
    for module, reweighting in [(module, _make(module)) for module in new]:
        module.reweighting = reweighting
        if reweighting is not None:
            hook = functools.partial(_pass_states, name=_states_name(type(module)))
            module.register_forward_pre_hook(hook, with_kwargs=True)


def record_implementations(config: PreTrainedConfig) -> str | dict[str, Any] | None:
    """Writes `attn_implementation` into the configs of a model with learned weights, so that config.json names it.

    Transformers reads this entry but never writes it. With it a checkpoint loads without an `attn_implementation`
    argument, and loading without this package raises an error that names the package.

    Returns:
        The recorded value: a name, a dict of names if sub-configs differ, or `None` without learned weights.
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
    """Initializes learned weights that were not loaded from a checkpoint."""
    for module in model.modules():
        if isinstance(module, LearnedWeights) and not getattr(module, "_is_hf_initialized", False):
            module.reset_parameters()
            module._is_hf_initialized = True


def check_can_leave(model: PreTrainedModel, modules: Iterable[nn.Module], requested: Any) -> None:
    """Checks that no module with learned weights is switched to an implementation that would ignore them.

    Raises:
        ValueError: if one of the modules has learned weights.
    """
    learned = [module for module in modules if getattr(module, "reweighting", None) is not None]
    if learned:
        raise ValueError(
            f"{type(model).__name__} has learned attention weights ({learned[0].config._attn_implementation!r}, "
            f"{len(learned)} modules) which attn_implementation={requested!r} would ignore: its outputs would be "
            "silently wrong. To get the base model, load the checkpoint that it was made from."
        )


def _check_described(model: nn.Module, module: nn.Module) -> None:
    """Checks that the whole model's config describes the learned weights of a module."""
    if module.attention_drop_state.config.attention_reweighting is None:
        raise ValueError(
            f"A {type(module).__name__} of {type(model).__name__} runs {module.config._attn_implementation!r}, but "
            f"the config of the whole model has no `{LEARNED_KEY}` for it: a checkpoint would load without the "
            "learned weights. Set this attn_implementation on the whole model."
        )


def _check_same_method(model: nn.Module, module: nn.Module) -> None:
    """Checks that the learned weights of a module match the whole model's config."""
    existing = getattr(module, "reweighting", None)
    found, expected = getattr(existing, "config", None), _configuration(module)
    if hasattr(module, "reweighting") and found != expected:
        raise ValueError(
            f"A {type(module).__name__} of {type(model).__name__} has learned weights for {found!r}, but the config "
            f"of the whole model says {expected!r}: a checkpoint would load as a different model. Give both the same "
            f"`{LEARNED_KEY}`."
        )


def _configuration(module: nn.Module) -> LearnedMethod | None:
    """Returns the learned method that the governing config selects for the module."""
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
    # A quantized weight has a dtype that cannot be trained.
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    return config.weights(config, _dimensions(module, hidden_size), device=weight.device, dtype=dtype)


def _pass_states(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Both are passed as arguments: stored on the module they would break recomputation and compilation. The memory is
    # shared by all attention calls in one forward of the module.
    states = args[0] if args else kwargs[name]
    return args, {**kwargs, "reweighting_states": states, "reweighting_memory": {}}


def _states_name(module_class: type[nn.Module]) -> str:
    return list(inspect.signature(module_class.forward).parameters)[1]


def _projection(module: nn.Module) -> tuple[torch.Tensor, int]:
    """Returns weight and input size of the query projection, which may also produce keys and values."""
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
    num_heads = num_heads_of(module)
    if num_heads is None:
        raise ValueError(
            f"{type(module).__name__} has no attribute with its number of heads (one of {HEADS_NAMES}), so the size "
            "of its learned weights is unknown. Load this model with another attn_implementation."
        )
    head_dim = first_integer(HEAD_DIM_NAMES, module) or first_integer(HEAD_DIM_NAMES[:2], module.config)
    initializer_range = getattr(module.config, "initializer_range", None)
    head_dim = head_dim or hidden_size // num_heads
    return Dimensions(hidden_size, num_heads, head_dim, 0.02 if initializer_range is None else initializer_range)


@functools.cache
def _check_passes_kwargs(module_class: type[nn.Module]) -> None:
    parameters = inspect.signature(module_class.forward).parameters.values()
    keywords = [parameter.name for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
    # One occurrence is the signature, the other the call of the attention function.
    if not keywords or inspect.getsource(module_class.forward).count(f"**{keywords[0]}") < 2:
        raise ValueError(
            f"{module_class.__name__} does not pass its keyword arguments on to its attention function, so the "
            "hidden states that learned weights act on cannot reach it. Load this model with another "
            "attn_implementation."
        )


def _check_parallelism(config: PreTrainedConfig) -> None:
    size = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
    if size > 1:
        raise ValueError(
            f"Learned attention weights do not support tensor parallelism (tp_size={size}): they act on all heads, "
            "but each device would hold only some of them. Use data parallelism (DDP) or FSDP."
        )
