"""Which modules of a model attend through Transformers' attention interface, and what governs each of them."""

import copy
import functools
import inspect
import io
import tokenize
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention.parts import holders_of
from ..attention.places import kind_of, positions_of
from ..integration.config_entries import attention_drop_of
from .configuration import CONFIG_KEY, AttentionDropConfig, Configuration


# What model files call the attention interface.
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# What computes the base attention where nothing else was asked for.
SDPA = "sdpa"
# What they call the dropout of attention weights, the plainest name last: it may be that of other dropout.
DROPOUT_NAMES = ("attention_dropout", "attn_dropout", "attn_drop", "dropout_prob", "dropout_p", "dropout")
# What they call the cap of their attention scores.
SOFTCAP_NAME = "attn_logit_softcapping"


def _number(dtype: torch.dtype) -> torch.Tensor:
    # Models are often built under a meta device; a number needs storage.
    return torch.zeros((), dtype=dtype, device="cpu")


@dataclass(eq=False)
class AttentionSite:
    """One attention module's place in its model, kept on the module as `attention_drop_site`.

    Args:
        config: the config whose `attention_drop` entry governs the module: its own model's, or the nearest around it
            that belongs to the whole model's config (T5 gives its stacks copies, which no later change would reach).
        kind: `"encoder_self"`, `"decoder_self"` or `"cross"`.
        stack: name of the stack of layers the module belongs to, such as `"model.decoder.layers"`.
        layer: position in that stack.
        num_layers: length of that stack.
        calls: how many of its attention calls were perturbed.
        base: the attention implementation that computes the base attention.
        softcap: what the module caps its scores by; `None` if it does not.
        strength: the `p` or `sigma_max` that governs the module now.
        scheduled: what a schedule set it to; `None` for the configured value.
        governor: a weak reference to the Transformers model that `config` belongs to; `None` after unpickling.
        owner: the class of the whole model.
        peers: the sites of that model which run, this one included: an entry is right or wrong for all of them.

    `calls` and `strength` are tensors, because numbers would be constants to `torch.compile`: it would compile anew
    when they change.

    A module that is copied out of its model (a layer that is stacked twice, a module that PEFT trains a copy of) stays
    governed by the model's config; a copy of the whole model is governed by the config that is copied with it.
    """

    config: PreTrainedConfig
    kind: str
    stack: str
    layer: int
    num_layers: int
    calls: torch.Tensor = field(default_factory=lambda: _number(torch.int64))
    base: str = SDPA
    softcap: float | None = None
    strength: torch.Tensor = field(default_factory=lambda: _number(torch.float64))
    scheduled: float | None = None
    governor: Callable[[], PreTrainedModel | None] | None = None
    owner: str = ""
    peers: "list[AttentionSite]" = field(default_factory=list, repr=False)
    _entry: dict | None = None
    _drop: AttentionDropConfig | None = None
    _is_active: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "governor": None}  # Weak references cannot be pickled.

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionSite":
        governor = None if self.governor is None else self.governor()
        is_alone = governor is not None and id(governor) not in memo
        other = memo[id(self)] = object.__new__(type(self))  # Known to its peers, which are copied on the way.
        for name, value in self.__getstate__().items():
            is_shared = is_alone and name not in ("calls", "strength")
            other.__dict__[name] = value if is_shared else copy.deepcopy(value, memo)
        if governor is not None:
            other.governor = weakref.ref(governor if is_alone else memo[id(governor)])
        return other

    @property
    def place(self) -> tuple[Any, ...]:
        """Kind, stack, layer, length of the stack and softcap."""
        return self.kind, self.stack, self.layer, self.num_layers, self.softcap

    @property
    def is_configured(self) -> bool:
        """Whether the config that governs the module has an entry of its own."""
        return self.config.__dict__.get(CONFIG_KEY) is not None

    @property
    def drop(self) -> AttentionDropConfig:
        """The configuration that governs the module, the defaults if none was set."""
        # Parsing is for once, not for every forward pass: an entry is replaced, or changed by `configure`.
        if not self.is_current:
            check_peers(self)
            if self._drop is not None:
                self.scheduled = None  # It belonged to the old entry, perhaps to another variant.
            self.refresh()
        return self._drop

    @property
    def is_current(self) -> bool:
        """Whether what was taken over from the config's entry still is what it holds."""
        return self._drop is not None and self._entry is self.config.__dict__.get(CONFIG_KEY)

    def refresh(self) -> None:
        """Takes over what the config's entry holds now."""
        self._entry = self.config.__dict__.get(CONFIG_KEY)
        self._drop = attention_drop_of(self.config)
        self.schedule(self.scheduled)

    def schedule(self, value: float | None) -> None:
        """Sets `strength` to a value, or with `None` to the configured one."""
        drop = self.drop
        self.scheduled = value
        # At a scheduled zero the module stays active: a compiled model would compile anew for every change.
        self._is_active = drop.is_active if value is None else drop.can_act
        self.strength.fill_(drop.strength if value is None else value)

    @property
    def perturbation(self) -> AttentionDropConfig | None:
        """What happens to the module in training, or `None` for nothing."""
        drop = self.drop
        return drop if self._is_active and self.is_selected_by(drop) else None

    def is_selected_by(self, config: Configuration) -> bool:
        """Whether a configuration names this module's kind and layer."""
        if self.kind not in config.attentions:
            return False
        layers = config.layers
        return layers is None or self.layer in layers or self.layer - self.num_layers in layers


@functools.cache
def uses_attention_interface(module_class: type[nn.Module]) -> bool:
    """Whether a module's forward looks its attention function up in the interface, judged by its source.

    Transformers has no flag for this: a model that ignores the interface accepts any registered name, and silently
    runs something else.
    """
    try:
        source = inspect.getsource(module_class.forward)
    except (OSError, TypeError):
        return False
    if INTERFACE not in source:
        return False
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)  # A comment may mention it, too.
    return any(token.type == tokenize.NAME and token.string == INTERFACE for token in tokens)


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The named modules of a model that attend through the interface."""
    return ((name, module) for name, module in model.named_modules() if uses_attention_interface(type(module)))


def attention_dropout(module: nn.Module) -> float:
    """The rate at which a module drops attention weights in training."""
    dropout = next((getattr(module, name) for name in DROPOUT_NAMES if hasattr(module, name)), 0.0)
    return getattr(dropout, "p", dropout)


def place_sites(model: PreTrainedModel) -> None:
    """Gives every attention module of a whole model its site, keeping what was counted and chosen before."""
    holders = {holder.name: holder for holder in holders_of(model)}
    modules = dict(attention_modules(model))
    positions = positions_of(model, list(modules))
    for name, module in modules.items():
        previous = getattr(module, "attention_drop_site", None)
        governing = holders[name].governing
        kind, softcap = kind_of(name, module), getattr(module, SOFTCAP_NAME, None)
        site = AttentionSite(governing, kind, *positions[name], softcap=softcap)
        if previous is not None and previous.config is governing and previous.place == site.place:
            site = previous  # A compiled model compiles anew for another site.
        elif previous is not None:
            site.calls, site.base = previous.calls, previous.base
            site.scheduled = previous.scheduled if previous.is_current else None
        site.governor, site.owner = weakref.ref(holders[name].owner), type(model).__name__
        module.attention_drop_site = site


def check_selection(owner: str, key: str, selections: Iterable[tuple[AttentionSite, Configuration]]) -> None:
    """Refuses a configuration that names layers or attentions which the model does not have.

    Args:
        owner: the class of the whole model.
        key: the config entry that holds the configurations.
        selections: the sites of a model that the entry governs, each with its configuration.

    Raises:
        ValueError: if a layer exists in no stack, or if nothing at all is selected.
    """
    sites_by_config = defaultdict(list)
    for site, config in selections:
        sites_by_config[config].append(site)
    for config, sites in sites_by_config.items():
        lengths = {site.stack: site.num_layers for site in sites}
        for layer in config.layers or ():
            if not any(-length <= layer < length for length in lengths.values()):
                raise ValueError(
                    f"`{key}` names layer {layer}, and {owner} has no such layer: it would "
                    "have no effect. Layers count from 0 within each stack, or from the end if negative; the "
                    f"stacks are {lengths}."
                )
        if not any(site.is_selected_by(config) for site in sites):
            kinds = sorted({site.kind for site in sites})
            raise ValueError(
                f"`{key}` selects attentions={list(config.attentions)} in layers={config.layers}, and no "
                f"attention of {owner} matches: nothing would happen. Its attentions are "
                f"{kinds}, its stacks {lengths}."
            )


def check_peers(site: AttentionSite) -> None:
    """Refuses an entry that was assigned to the config of a built model, as the model would have been refused.

    Raises:
        ValueError: as [`check_selection`].
    """
    configured = [peer for peer in site.peers if peer.is_configured]
    if site.is_configured and configured:
        check_selection(site.owner, CONFIG_KEY, [(peer, attention_drop_of(peer.config)) for peer in configured])


def refuse_capped_blur(model: PreTrainedModel, sites: Iterable[AttentionSite]) -> None:
    """Refuses to blur modules that cap their scores.

    Raises:
        ValueError: if there are any.
    """
    for site in sites:
        drop = site.perturbation
        if site.softcap is not None and drop is not None and drop.variant == "blur":
            raise capped_blur(type(model).__name__, site.softcap)


def capped_blur(name: str, softcap: float) -> ValueError:
    """The refusal to blur scores that a model or module of this name caps."""
    return ValueError(
        f"AttentionDrop's blur cannot act on {name}, which caps its scores (softcap={softcap}): blurring the keys no "
        'longer blurs the scores once tanh stands between them. Use variant="hard", or set the softcap of the model '
        "config to None."
    )
