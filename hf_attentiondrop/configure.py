"""What can be changed of a model that is loaded already."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .attention.kernels import can_be_base, serves_cross_attention
from .attention.parts import configs_of
from .integration.config_entries import accept_given_entries, attention_drop_of
from .integration.functions import NAME, runs_attention_drop
from .integration.implementations import FUNCTIONS, place_running, running_modules
from .integration.switching import whole_or_nothing
from .methods.configuration import CONFIG_KEY, FIELDS_OF_VARIANTS, AttentionDropConfig
from .methods.sites import SDPA, AttentionSite, check_selection, refuse_capped_blur


logger = logging.getLogger(__name__)


def configure(model: Any, drop: AttentionDropConfig | Mapping[str, Any]) -> None:
    """Changes what AttentionDrop does to a model that is loaded already, from its next forward pass on.

    The new configuration replaces the earlier one, as an `attention_drop` given to `from_pretrained` replaces that of
    the checkpoint: `layers=[3]` after `layers=[0]` perturbs layer 3 alone, and a field that the new one does not name
    goes back to its default, a dict's as well as an object's. A warning names the fields that this changes. To keep
    them, change a copy: `configure(model, dataclasses.replace(model.config.attention_drop, layers=(0, 3)))`.

    To vary `p` or `sigma_max` in the course of training, use [`set_scheduled_value`]: what is configured here ends up
    in config.json.

    Args:
        model: a Transformers model that uses `attn_implementation="attentiondrop"` or a learned method, or a
            wrapper around one (PEFT, DDP). A compiled one is not compiled anew for another `p` or `sigma_max`.
        drop: an [`AttentionDropConfig`] or a dict of its fields. It is written to the model's config, sub-configs
            included, and ends a schedule.

    Raises:
        ValueError: if no part of the model uses any of them, or the configuration selects what it does not have.
        TypeError: if there is no Transformers model in `model`.

    Example:

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> model = BertModel._from_config(config, attn_implementation="attentiondrop")
    >>> configure(model, AttentionDropConfig(variant="blur", layers=[-1]))
    >>> model.config.attention_drop.variant
    'blur'
    """
    named = set(drop) if isinstance(drop, Mapping) else set()
    drop = AttentionDropConfig.from_dict(drop)
    bases = _running_models(model, "the configuration")
    with ExitStack() as stack:
        for base in bases:
            stack.enter_context(whole_or_nothing(base))
        previous = [(config, config.__dict__.get(CONFIG_KEY)) for base in bases for config in configs_of(base.config)]
        for base in bases:
            place_running(base)
            base.config.attention_drop = drop
            sites = _running_sites(base)
            selections = [(site, attention_drop_of(site.config)) for site in sites]
            check_selection(type(base).__name__, CONFIG_KEY, selections)
            refuse_capped_blur(base, sites)
        accept_given_entries(config for config, _ in previous)
    # One that a newer release wrote may be anything.
    previous = [(config, entry) for config, entry in previous if isinstance(entry, dict)]
    _warn_of_reset_fields([entry for _, entry in previous], drop, named)
    for config, entry in previous:
        # A compiled model compiles anew where it finds another entry, but not where it finds the same with another p.
        entry.clear()
        entry.update(config.__dict__[CONFIG_KEY])
        config.__dict__[CONFIG_KEY] = entry
    for base in bases:
        for site in _running_sites(base):
            site.scheduled = None
            site.refresh()


def set_scheduled_value(model: Any, value: float | None) -> None:
    """Sets what a schedule varies, `p` under `variant="hard"` and `sigma_max` under `"blur"`, until it is set again.

    The configuration stays as it is, so config.json tells what was configured, whenever a checkpoint is saved. The
    value is not part of a checkpoint: a schedule sets it anew from the step at which it resumes. [`report`] shows it
    beside the configured one. A compiled model is not compiled anew.

    Args:
        model: a Transformers model that AttentionDrop perturbs, or a wrapper around one (PEFT, DDP).
        value: of `p` or `sigma_max`, or `None` to go back to the configured one.

    Raises:
        ValueError: if the value is out of range, or if no part of the model is perturbed.
        TypeError: if there is no Transformers model in `model`.

    Example:

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, attention_drop={"p": 0.2})
    >>> model = BertModel._from_config(config, attn_implementation="attentiondrop")
    >>> for step in range(100):
    ...     set_scheduled_value(model, 0.2 * min(1.0, step / 50))  # Warm-up over 50 steps.
    ...     # loss, backward, optimizer step
    >>> model.config.attention_drop.p
    0.2
    """
    bases = _running_models(model, "a scheduled value")
    modules = [module for base in bases for module in _running_modules(base)]
    sites = [module.attention_drop_site for module in modules if runs_attention_drop(module)]
    drops = {site.drop for site in sites if site.drop.can_act and site.is_selected_by(site.drop)}
    if not drops:
        raise ValueError(
            f"AttentionDrop is not configured for {type(bases[0]).__name__}, or perturbs nothing at any value, so a "
            "scheduled one would have no effect. Call configure(model, AttentionDropConfig(...)) first; blur takes a "
            "width above 1."
        )
    if value is not None:
        for drop in drops:
            # Raises for a value that is out of range.
            value = getattr(replace(drop, **{drop.scheduled_field: value}), drop.scheduled_field)
    for site in sites:
        site.schedule(value)


def set_base_attention(model: Any, attn_implementation: str) -> None:
    """Lets another kernel than SDPA compute the attention that is blurred, reweighted, or left alone in evaluation.

    Masks stay those of SDPA, and are translated: FlashAttention takes padding, causal order, windows and packed
    documents in self-attention; FlexAttention any boolean mask. Where a kernel cannot express a mask, and for what
    drops the strongest keys (`variant="hard"`) or has a learned sink, SDPA does it. The choice is for this process:
    like any attention implementation it is not saved.

    Args:
        model: a Transformers model that uses an implementation of this package, or a wrapper around one.
        attn_implementation: `"flash_attention_2"`, `"flash_attention_3"`, `"flash_attention_4"`, `"flex_attention"`,
            `"sdpa"`, or the name of an attention function of your own that is registered with the masks of SDPA,
            `AttentionMaskInterface.register(name, sdpa_mask)`.

    Raises:
        ValueError: if the name is unknown, takes other masks, or no part of the model uses this package.
        ImportError: if the kernel is not installed.
        TypeError: if there is no Transformers model in `model`.

    Example:

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> model = BertModel._from_config(config, attn_implementation="attentiondrop")
    >>> set_base_attention(model, "flex_attention")
    """
    bases = _running_models(model, "another base attention")
    # Transformers knows what is installed, and what goes with the model's class, dtype and device.
    names = [base._check_and_adjust_attn_implementation(attn_implementation) for base in bases]
    for name in names:
        if name in FUNCTIONS or not can_be_base(name):
            raise ValueError(
                f"set_base_attention: {name!r} cannot compute the base attention, because it does not take the "
                "boolean masks of SDPA. Expected sdpa, flex_attention, flash_attention_2, 3 or 4, or a name that you "
                "registered with AttentionMaskInterface.register(name, sdpa_mask)."
            )
    for base, name in zip(bases, names, strict=True):
        for site in _running_sites(base):
            site.base = name if site.kind != "cross" or serves_cross_attention(name) else SDPA


def transformers_models(model: Any) -> dict[str, PreTrainedModel]:
    """The Transformers models in a wrapper, by name: each [`~transformers.PreTrainedModel`] that is in no other.

    Raises:
        TypeError: if there is none.
    """
    found = {}
    for name, module in getattr(model, "named_modules", tuple)():
        is_inside = any(f".{name}".startswith(f".{other}." if other else ".") for other in found)
        if isinstance(module, PreTrainedModel) and not is_inside:
            found[name] = module
    if not found:
        raise TypeError(
            f"Expected a Transformers model or a module that holds one, got {type(model).__name__}: only Transformers "
            "models dispatch their attention through the interface that AttentionDrop plugs into."
        )
    return found


def transformers_model(model: Any) -> PreTrainedModel:
    """The first of [`transformers_models`].

    Raises:
        TypeError: if there is none.
    """
    return next(iter(transformers_models(model).values()))


def _running_models(model: Any, what: str) -> list[PreTrainedModel]:
    """Those that run an implementation of this package somewhere; there must be one for `what` to act on."""
    found = list(transformers_models(model).values())
    running = [base for base in found if _running_modules(base)]
    if not running:
        uses = ", ".join(
            f"{type(base).__name__} uses attn_implementation={base.config._attn_implementation!r}" for base in found
        )
        raise ValueError(
            f'{uses}, so {what} would have no effect. Call model.set_attn_implementation("{NAME}") first, or load the '
            "model with it."
        )
    return running


def _running_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that run an implementation of this package, copied modules included; all have their site."""
    running = running_modules(model)
    if any(not hasattr(module, "attention_drop_site") for module in running):
        place_running(model)
    return running


def _running_sites(model: PreTrainedModel) -> list[AttentionSite]:
    return [module.attention_drop_site for module in _running_modules(model)]


def _warn_of_reset_fields(entries: list[dict[str, Any]], drop: AttentionDropConfig, named: set[str]) -> None:
    """Warns of fields that go back to their defaults without being named: whoever left them out may want them kept."""
    new, defaults = drop.to_dict(), AttentionDropConfig().to_dict()
    unused = {name for names in FIELDS_OF_VARIANTS.values() for name in names} - {*FIELDS_OF_VARIANTS[drop.variant]}
    reset = {
        name: entry[name]
        for entry in entries
        for name in new.keys() - named - unused
        if entry.get(name, defaults[name]) != new[name] == defaults[name]
    }
    if reset:
        changes = ", ".join(f"{name} from {reset[name]!r} to {defaults[name]!r}" for name in new if name in reset)
        logger.warning(
            f"configure: the new configuration replaces the earlier one and sets what it leaves out to the defaults: "
            f"{changes}. To keep a value, name it, or change a copy of model.config.attention_drop."
        )
