"""Which modules of a model attend through Transformers' attention interface, and where each of them stands."""

import functools
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration import CONFIG_KEY, AttentionDropConfig, Configuration


# What computes the base attention where nothing else was asked for.
SDPA = "sdpa"
# What model files call cross-attention, and the arguments that hand it the other sequence.
CROSS_NAMES = ("cross", "encoder_attn", "encdecattention", "encoder_decoder")
OTHER_STATES = ("context", "cross_attention_states", "encoder_hidden_states", "key_value_states")
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

    `calls` and `strength` are tensors, because numbers would be constants to `torch.compile`: it would compile anew
    when they change.
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
    _entry: dict | None = None
    _drop: AttentionDropConfig | None = None
    _is_active: bool = False

    @property
    def is_configured(self) -> bool:
        """Whether the config that governs the module has an entry of its own."""
        return self.config.__dict__.get(CONFIG_KEY) is not None

    @property
    def drop(self) -> AttentionDropConfig:
        """The configuration that governs the module, the defaults if none was set."""
        # Parsing is for once, not for every forward pass: an entry is replaced, or changed by `configure`.
        if self._drop is None or self._entry is not self.config.__dict__.get(CONFIG_KEY):
            self.refresh()
        return self._drop

    def refresh(self) -> None:
        """Takes over what the config's entry holds now."""
        self._entry = self.config.__dict__.get(CONFIG_KEY)
        self._drop = AttentionDropConfig.from_dict(self._entry or {})
        self._is_active = self._drop.is_active
        self.strength.fill_(self._drop.strength)

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
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(module_class.forward)
    except (OSError, TypeError):
        return False


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The named modules of a model that attend through the interface."""
    return ((name, module) for name, module in model.named_modules() if uses_attention_interface(type(module)))


def attention_dropout(module: nn.Module) -> float:
    """The rate at which a module drops attention weights in training."""
    dropout = next((getattr(module, name) for name in DROPOUT_NAMES if hasattr(module, name)), 0.0)
    return getattr(dropout, "p", dropout)


def place_sites(model: PreTrainedModel) -> None:
    """Gives every attention module of a whole model its site, keeping what was counted and chosen before."""
    modules = dict(attention_modules(model))
    positions = _positions(model, list(modules))
    for name, module in modules.items():
        previous = getattr(module, "attention_drop_site", None)
        kept = {} if previous is None else {"calls": previous.calls, "base": previous.base}
        kept["softcap"] = getattr(module, SOFTCAP_NAME, None)
        governing = _governing_config(model, name, module)
        module.attention_drop_site = AttentionSite(governing, _kind(name, module), *positions[name], **kept)


def check_selection(
    model: PreTrainedModel, key: str, selections: Iterable[tuple[AttentionSite, Configuration]]
) -> None:
    """Refuses a configuration that names layers or attentions which the model does not have.

    Args:
        model: the whole model.
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
                    f"`{key}` names layer {layer}, and {type(model).__name__} has no such layer: it would "
                    "have no effect. Layers count from 0 within each stack, or from the end if negative; the "
                    f"stacks are {lengths}."
                )
        if not any(site.is_selected_by(config) for site in sites):
            kinds = sorted({site.kind for site in sites})
            raise ValueError(
                f"`{key}` selects attentions={list(config.attentions)} in layers={config.layers}, and no "
                f"attention of {type(model).__name__} matches: nothing would happen. Its attentions are "
                f"{kinds}, its stacks {lengths}."
            )


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


def configs_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and its sub-configs, at any depth."""
    yield config
    for name in config.sub_configs:
        if isinstance(sub_config := getattr(config, name, None), PreTrainedConfig):
            yield from configs_of(sub_config)


def _governing_config(model: PreTrainedModel, name: str, module: nn.Module) -> PreTrainedConfig:
    registered = {id(config) for config in configs_of(model.config)}
    while id(module.config) not in registered:
        name = name.rpartition(".")[0]
        while not isinstance(model.get_submodule(name), PreTrainedModel):
            name = name.rpartition(".")[0]
        module = model.get_submodule(name)
    return module.config


def _positions(model: PreTrainedModel, names: list[str]) -> dict[str, tuple[str, int, int]]:
    """Stack, layer number and stack length for the name of every attention module.

    A stack is the path up to the first number, and that number is the layer. A stack may be made of stages that hold
    numbered blocks themselves (Swin): there the blocks that attend are counted through.
    """
    paths = {name: _stack_and_block(model, name) for name in names}
    blocks = defaultdict(list)
    for stack, block in paths.values():
        if block not in blocks[stack]:
            blocks[stack].append(block)

    positions = {}
    for name, (stack, block) in paths.items():
        number = block.removeprefix(f"{stack}.")
        if number.isdigit():
            positions[name] = (stack, int(number), len(model.get_submodule(stack)))
        else:
            positions[name] = (stack, blocks[stack].index(block), len(blocks[stack]))
    return positions


def _stack_and_block(model: PreTrainedModel, name: str) -> tuple[str, str]:
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return name, name
    # Numbered siblings of different classes (T5's self-attention, cross-attention and feed-forward) are the inside of
    # one layer, not layers.
    while len(numbers) > 1 and len({type(m) for m in model.get_submodule(".".join(parts[: numbers[-1]]))}) > 1:
        numbers.pop()
    return ".".join(parts[: numbers[0]]), ".".join(parts[: numbers[-1] + 1])


def _kind(name: str, module: nn.Module) -> str:
    """The kind of an attention, by what the model file calls it: at call time cross and self-attention look alike."""
    path = name.lower().split(".")
    labels = (type(module).__name__.lower(), *path[-2:])
    parameters = inspect.signature(type(module).forward).parameters
    if (
        getattr(module, "is_cross_attention", False)
        or any(mark in label for label in labels for mark in CROSS_NAMES)
        or any(other in parameters and parameters[other].default is inspect.Parameter.empty for other in OTHER_STATES)
    ):
        return "cross"
    is_decoder = _is_causal(module) or getattr(module, "is_decoder", False) or "decoder" in path
    return "decoder_self" if is_decoder else "encoder_self"


def _is_causal(module: nn.Module) -> bool:
    if hasattr(module, "is_causal"):
        return bool(module.is_causal)
    # A module that says nothing is causal to SDPA.
    return "is_causal" not in inspect.getsource(type(module).forward)
