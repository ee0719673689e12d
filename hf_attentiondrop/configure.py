"""Changing a loaded model: its perturbations, their schedule, and the base attention."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .attention.call import SDPA
from .attention.kernels import can_be_base, serves_cross_attention
from .attention.parts import configs_of, transformers_models
from .integration.config_entries import accept_given_entries
from .integration.functions import ATTENTION_DROP, check_perturbed, is_perturbable
from .integration.implementations import FUNCTIONS, place_running, running_modules
from .integration.switching import all_or_nothing
from .methods.method import ADAPTIVE_KEY, ATTENTION_DROP_KEY, SCHEDULE_KEY, Perturbation
from .methods.parsing import PerturbationLike, perturbations_from
from .methods.state import ModuleState
from .validation import is_number


logger = logging.getLogger(__name__)


def configure(model: Any, attention_drop: PerturbationLike | Sequence[PerturbationLike]) -> None:
    """Replaces the perturbations of a loaded model, effective from its next forward pass.

    The new configuration replaces the old one completely: `layers=[3]` after `layers=[0]` perturbs only layer 3, and
    settings that it does not name go back to their defaults. A warning lists the settings that change this way; lists
    are taken without one. To keep them, change a copy:
    `configure(model, dataclasses.replace(model.config.attention_drop, layers=(0, 3)))`.

    To vary `p` or `sigma_max` during training use [`scale_attention_drop`], which does not change config.json.

    Args:
        model: a Transformers model that uses `attn_implementation="attentiondrop"` or a learned method, or a
            wrapper around one (PEFT, DDP). A compiled model does not recompile for another `p` or `sigma_max`.
        attention_drop: a perturbation such as [`HardMasking`], a dict of its settings, or a list of these, where the
            first one wraps the others. It is stored in the model's config, including sub-configs, and ends a factor of
            [`scale_attention_drop`]. The schedule of a running Trainer goes on, with the new values.

    Raises:
        ValueError: if no part of the model uses this package, if the configuration selects no attention module, if a
            perturbation cannot act on a selected one, or if `model` is a part that shares its config with the rest.
        TypeError: if `model` contains no Transformers model.

    Example:

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> model = BertModel._from_config(config, attn_implementation="attentiondrop")
    >>> configure(model, {"variant": "blur", "layers": [-1]})
    >>> model.config.attention_drop
    BlurredSmoothing(sigma_max=1.0, width=5, layers=(-1,), attentions=('encoder_self', 'decoder_self'))
    """
    perturbations = perturbations_from(attention_drop)  # Raises for bad input, before anything changes.
    bases = _running_models(model, "the configuration")
    for base in bases:
        _check_shares_no_config(base)
    configs = [config for base in bases for config in configs_of(base.config)]
    previous = [config.__dict__.get(ATTENTION_DROP_KEY) for config in configs]
    with ExitStack() as stack:
        for base in bases:
            stack.enter_context(all_or_nothing(base))
        for base in bases:
            modules = place_running(base)
            base.config.attention_drop = attention_drop
            check_perturbed(modules)
            for key in (SCHEDULE_KEY, ADAPTIVE_KEY):
                base.config.__dict__.pop(key, None)
        accept_given_entries(configs)
    if not isinstance(attention_drop, (list, tuple)):
        # The class of an object names its variant.
        named = set(attention_drop) if isinstance(attention_drop, Mapping) else {"variant"}
        _warn_of_reset_settings(previous, perturbations[0], named)


def scale_attention_drop(model: Any, factor: float | None) -> None:
    """Scales the perturbations of a model during training: `p`, or `sigma_max` of `"blur"`, becomes the configured
    value times a factor, in every layer and head and for every perturbation of a list.

    The factor holds until the next call. It changes neither the configuration nor config.json, and checkpoints do not
    contain it: after a resume, set it again for the current step. [`report`] shows the resulting values. A compiled
    model does not recompile.

    Args:
        model: a Transformers model that is perturbed in training, or a wrapper around one (PEFT, DDP).
        factor: a number in [0, 1]; `None` ends the schedule, with the configured values.

    Raises:
        ValueError: if the factor is out of range, or no part of the model is perturbed.
        TypeError: if `model` contains no Transformers model.

    Example:

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, attention_drop={"p": 0.2})
    >>> model = BertModel._from_config(config, attn_implementation="attentiondrop")
    >>> for step in range(100):
    ...     scale_attention_drop(model, min(1.0, step / 50))  # p rises from 0 to 0.2 over 50 steps.
    ...     # loss, backward, optimizer step
    >>> model.config.attention_drop.p
    0.2
    """
    if factor is not None and not (is_number(factor) and 0 <= factor <= 1):
        raise ValueError(
            f"scale_attention_drop: `factor` must be a number in [0, 1] or None, got {factor!r}. It multiplies the "
            "configured values, which are the highest ones: for more, configure a higher value."
        )
    for state in perturbed_states(model, "a schedule"):
        state.scale(factor, state.gains)


def perturbed_states(model: Any, what: str) -> list[ModuleState]:
    """Returns the states of the attention modules that are perturbed in training.

    Args:
        model: as in [`scale_attention_drop`].
        what: what would have no effect without any, for the message.

    Raises:
        ValueError: if there are none.
        TypeError: if `model` contains no Transformers model.
    """
    bases = _running_models(model, what)
    modules = [module for base in bases for module in _running_modules(base) if is_perturbable(module)]
    if states := [module.attention_drop_state for module in modules if module.attention_drop_state.active]:
        return states
    raise ValueError(
        f"AttentionDrop is not configured for {type(bases[0]).__name__}, or perturbs nothing, so {what} would have no "
        "effect. Call configure(model, HardMasking(...)) first, with a value above 0; blur needs a width above 1."
    )


def set_base_attention(model: Any, attn_implementation: str) -> None:
    """Replaces SDPA as the kernel that computes the base attention, below the methods and in evaluation.

    The masks of SDPA are translated: FlashAttention supports padding, causal order, sliding windows and packed
    documents in self-attention, FlexAttention any boolean mask. SDPA still computes calls whose mask the kernel cannot
    express, hard masking and DropKey in training, and learned sinks. The choice is not saved, like any attention
    implementation.

    Args:
        model: a Transformers model that uses an implementation of this package, or a wrapper around one.
        attn_implementation: `"flash_attention_2"`, `"flash_attention_3"`, `"flash_attention_4"`, `"flex_attention"`,
            `"sdpa"`, or the name of your own attention function, registered with the masks of SDPA by
            `AttentionMaskInterface.register(name, sdpa_mask)`.

    Raises:
        ValueError: if the name is unknown, its kernel takes other masks, or no part of the model uses this package.
        ImportError: if the kernel is not installed.
        TypeError: if `model` contains no Transformers model.

    Example:

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> model = BertModel._from_config(config, attn_implementation="attentiondrop")
    >>> set_base_attention(model, "flex_attention")
    """
    bases = _running_models(model, "another base attention")
    # Transformers checks the installation, and the model's class, dtype and device.
    names = [base._check_and_adjust_attn_implementation(attn_implementation) for base in bases]
    for name in names:
        if name in FUNCTIONS or not can_be_base(name):
            raise ValueError(
                f"set_base_attention: {name!r} cannot compute the base attention, because it does not take the "
                "boolean masks of SDPA. Expected sdpa, flex_attention, flash_attention_2, 3 or 4, or a name "
                "registered by AttentionMaskInterface.register(name, sdpa_mask)."
            )
    for base, name in zip(bases, names, strict=True):
        for state in _running_states(base):
            state.base = name if state.place.kind != "cross" or serves_cross_attention(name) else SDPA


def _running_models(model: Any, what: str) -> list[PreTrainedModel]:
    """Returns the models that run an implementation of this package; an error without any names `what`."""
    found = list(transformers_models(model).values())
    running = [base for base in found if _running_modules(base)]
    if not running:
        uses = ", ".join(
            f"{type(base).__name__} uses attn_implementation={base.config._attn_implementation!r}" for base in found
        )
        raise ValueError(
            f'{uses}, so {what} would have no effect. Call model.set_attn_implementation("{ATTENTION_DROP}") first, '
            "or load the model with it."
        )
    return running


def _check_shares_no_config(model: PreTrainedModel) -> None:
    """Raises an error for a part of a larger model whose config governs attention modules outside of it, too."""
    states = _running_states(model)
    configs = {id(state.config) for state in states}
    for state in {id(state.peers): state for state in states}.values():
        if shared := [peer for peer in state.outside_of(model) if id(peer.config) in configs]:
            kinds = ", ".join(sorted({peer.place.kind for peer in shared}))
            raise ValueError(
                f"configure got {type(model).__name__}, a part of {state.owner}, and its config is also that of "
                f"{len(shared)} attention modules outside of it ({kinds}): it could not describe both. Configure the "
                "whole model, and select modules by `attentions` and `layers`, such as "
                f'HardMasking(attentions=["{state.place.kind}"]).'
            )


def _running_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the modules that run an implementation of this package; gives new ones, such as copies, their state."""
    running = running_modules(model)
    if any(not hasattr(module, "attention_drop_state") for module in running):
        place_running(model)
    return running


def _running_states(model: PreTrainedModel) -> list[ModuleState]:
    return [module.attention_drop_state for module in _running_modules(model)]


def _warn_of_reset_settings(entries: list[Any], perturbation: Perturbation, named: set[str]) -> None:
    """Warns of settings that go back to their defaults without being named, which may not be intended."""
    new, defaults = perturbation.to_dict(), type(perturbation)().to_dict()
    reset = {
        name: entry[name]
        for entry in entries
        if isinstance(entry, dict)  # A newer release may have another format.
        for name in new.keys() - named
        # Settings of another variant mean something else, even under the same name.
        if entry.get("variant") == perturbation.variant or name in ("variant", "layers", "attentions")
        if entry.get(name, defaults[name]) != new[name] == defaults[name]
    }
    if reset:
        changes = ", ".join(f"{name} from {reset[name]!r} to {defaults[name]!r}" for name in new if name in reset)
        logger.warning(
            f"configure: the new configuration replaces the old one, and settings go back to their defaults: "
            f"{changes}. To keep a value, pass it, or change a copy of model.config.attention_drop."
        )
