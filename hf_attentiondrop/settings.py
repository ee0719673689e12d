"""What can be changed of a model that is loaded already."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .attention import NAME
from .configuration import CONFIG_KEY, AttentionDropConfig
from .kernels import can_be_base, serves_cross_attention
from .parts import configs_of
from .registration import FUNCTIONS
from .sites import SDPA, AttentionSite, attention_modules, check_selection, place_sites, refuse_capped_blur
from .switching import whole_or_nothing


def configure(model: Any, drop: AttentionDropConfig | Mapping[str, Any]) -> None:
    """Changes what AttentionDrop does to a model that is loaded already, from its next forward pass on.

    Args:
        model: a Transformers model that uses `attn_implementation="attentiondrop"` or a learned method, or a
            wrapper around one (PEFT, DDP). A compiled one is not compiled anew for another `p` or `sigma_max`, so
            that they can be scheduled.
        drop: an [`AttentionDropConfig`] or a dict of its fields. It is written to the model's config, sub-configs
            included.

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
    drop = AttentionDropConfig.from_dict(drop)
    bases = _running_models(model, "the configuration")
    with ExitStack() as stack:
        for base in bases:
            stack.enter_context(whole_or_nothing(base))
        previous = [(config, config.__dict__.get(CONFIG_KEY)) for base in bases for config in configs_of(base.config)]
        for base in bases:
            place_sites(base)
            base.config.attention_drop = drop
            sites = _running_sites(base)
            check_selection(base, CONFIG_KEY, [(site, site.drop) for site in sites])
            refuse_capped_blur(base, sites)
    for config, entry in previous:
        # A compiled model compiles anew where it finds another entry, but not where it finds the same with another p.
        if entry is not None:
            entry.update(config.__dict__[CONFIG_KEY])
            config.__dict__[CONFIG_KEY] = entry
    for base in bases:
        for site in _running_sites(base):
            site.refresh()


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
    return [module for _, module in attention_modules(model) if module.config._attn_implementation in FUNCTIONS]


def _running_sites(model: PreTrainedModel) -> list[AttentionSite]:
    """Those of the modules that run an implementation of this package, copied modules included."""
    modules = _running_modules(model)
    if any(not hasattr(module, "attention_drop_site") for module in modules):
        place_sites(model)
    return [module.attention_drop_site for module in modules]
