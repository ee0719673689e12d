"""What can be changed of a model that is loaded already."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from .attention import NAME
from .configuration import CONFIG_KEY, AttentionDropConfig
from .kernels import can_be_base, serves_cross_attention
from .registration import FUNCTIONS
from .sites import SDPA, AttentionSite, attention_modules, check_selection, configs_of, refuse_capped_blur


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
    base = transformers_model(model)
    drop = AttentionDropConfig.from_dict(drop)
    sites = _running_sites(base, "the configuration")
    previous = [(config, config.__dict__.get(CONFIG_KEY)) for config in configs_of(base.config)]
    base.config.attention_drop = drop
    try:
        check_selection(base, CONFIG_KEY, [(site, site.drop) for site in sites])
        refuse_capped_blur(base, sites)
    except ValueError:
        for config, entry in previous:
            config.attention_drop = entry
        raise
    for config, entry in previous:
        # A compiled model compiles anew where it finds another entry, but not where it finds the same with another p.
        if entry is not None:
            entry.update(config.__dict__[CONFIG_KEY])
            config.__dict__[CONFIG_KEY] = entry
    for site in sites:
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
    base = transformers_model(model)
    sites = _running_sites(base, "another base attention")
    # Transformers knows what is installed, and what goes with the model's class, dtype and device.
    name = base._check_and_adjust_attn_implementation(attn_implementation)
    if name in FUNCTIONS or not can_be_base(name):
        raise ValueError(
            f"set_base_attention: {name!r} cannot compute the base attention, because it does not take the boolean "
            "masks of SDPA. Expected sdpa, flex_attention, flash_attention_2, 3 or 4, or a name that you registered "
            "with AttentionMaskInterface.register(name, sdpa_mask)."
        )
    for site in sites:
        site.base = name if site.kind != "cross" or serves_cross_attention(name) else SDPA


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


def _running_sites(model: PreTrainedModel, what: str) -> list[AttentionSite]:
    """Of the modules that run an implementation of this package; there must be some for `what` to act on."""
    running = [module for _, module in attention_modules(model) if module.config._attn_implementation in FUNCTIONS]
    if not running:
        raise ValueError(
            f"{type(model).__name__} uses attn_implementation={model.config._attn_implementation!r}, so {what} would "
            f'have no effect. Call model.set_attn_implementation("{NAME}") first, or load the model with it.'
        )
    return [module.attention_drop_site for module in running]
