"""The configurations of what is learned on top of attention, and their one place in every Transformers config."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..functional import ACTIVATIONS, BIAS_LENGTHS, INITS
from ..integration.config_entries import ConfigEntry
from .configuration import ATTENTION_KINDS, Configuration, is_number


REWEIGHTING_KEY = "attention_reweighting"


class ReweightingConfig(Configuration):
    """What the configurations of learned methods share; each names the `attn_implementation` that it belongs to."""

    key = REWEIGHTING_KEY
    method: ClassVar[str]
    # Learned methods act on every kind of attention.
    attentions: ClassVar[tuple[str, ...]] = ATTENTION_KINDS
    layers: tuple[int, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types, with its method."""
        return {"method": self.method, **super().to_dict()}

    @property
    def summary(self) -> str:
        """The configuration in a few words."""
        values = {name: value for name, value in super().to_dict().items() if name != "layers"}
        return " ".join(f"{name}={value}" for name, value in values.items())

    def _require_init(self) -> None:
        self._require(
            "init",
            INITS.__contains__,
            f"one of {INITS}",
            '"identity" starts exactly as the base model, "paper" is for training from scratch.',
        )


@dataclass(frozen=True)
class AffineScaledConfig(ReweightingConfig):
    """Affine-Scaled Attention (arXiv 2602.23057), `attn_implementation="affine_scaled"`.

    Args:
        activation (`str`, defaults to `"linear_clip"`):
            What makes a scale of `W_a x`: `"linear_clip"`, `clamp(0.1x + 0.5, 0, 1)`, the paper's choice, or
            `"sigmoid"`.
        init (`str`, defaults to `"identity"`):
            `"identity"` starts exactly as the base model: scales are `1 + φ(W_a x) - φ(0)`, `W_a` is zero and the
            moving average 1. `"paper"`, for training from scratch: scales are `φ(W_a x)`, the average is 0.
        momentum (`float`, defaults to 0.9):
            Of the moving average of the scales, in [0, 1].
        bias_length (`str`, defaults to `"visible"`):
            What the bias is divided by: the number of keys that the query sees, the same in training and in cached
            decoding, or `"keys"`, the length of the keys, as the paper puts it.
        gate (`bool`, defaults to `False`):
            Whether the output is gated as well, as under `"gated_attention"`.
        layers (`list[int]`, *optional*):
            Layers to act on, counted within each stack (encoder, decoder); negative from the end. All by default.

    Raises:
        ValueError: if a value is of the wrong type or outside of its range.

    Example:

    >>> AffineScaledConfig(gate=True).summary
    'activation=linear_clip init=identity momentum=0.9 bias_length=visible gate=True'
    """

    method = "affine_scaled"

    activation: str = "linear_clip"
    init: str = "identity"
    momentum: float = 0.9
    bias_length: str = "visible"
    gate: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._make_plain("layers")
        self._require(
            "activation", ACTIVATIONS.__contains__, f"one of {ACTIVATIONS}", "It makes a scale of a hidden state."
        )
        self._require_init()
        self._require(
            "momentum",
            lambda momentum: is_number(momentum) and 0 <= momentum <= 1,
            "a number in [0, 1]",
            "It is the share of the old average that an update keeps; 0.9 is the paper's.",
        )
        self._require(
            "bias_length", BIAS_LENGTHS.__contains__, f"one of {BIAS_LENGTHS}", "It is what the bias is divided by."
        )
        self._require(
            "gate", lambda gate: isinstance(gate, bool), "True or False", "It adds a gate on the attention output."
        )
        self._require_layers()


@dataclass(frozen=True)
class AttentionSinkConfig(ReweightingConfig):
    """A learned sink in every head's softmax, `attn_implementation="attention_sink"`.

    Args:
        init (`float`, defaults to -4.0):
            Score that the sinks start with. At -4 a model starts close to the base, not exactly there; far below,
            sinks hardly learn.
        layers (`list[int]`, *optional*):
            Layers to act on, counted within each stack (encoder, decoder); negative from the end. All by default.

    Raises:
        ValueError: if a value is of the wrong type or outside of its range.

    Example:

    >>> AttentionSinkConfig().to_dict()
    {'method': 'attention_sink', 'init': -4.0, 'layers': None}
    """

    method = "attention_sink"

    init: float = -4.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._make_plain("layers")
        self._require(
            "init",
            lambda init: is_number(init) and math.isfinite(init),
            "a finite number",
            "It is the score that the sinks start with; at minus infinity they could not learn.",
        )
        self._require_layers()


@dataclass(frozen=True)
class GatedAttentionConfig(ReweightingConfig):
    """A learned gate on the attention output, `attn_implementation="gated_attention"`.

    Args:
        init (`str`, defaults to `"identity"`):
            `"identity"` gates with `2·sigmoid(W_g x)` and `W_g = 0`: exactly the base model. `"paper"`, for training
            from scratch, with `sigmoid(W_g x)`.
        layers (`list[int]`, *optional*):
            Layers to act on, counted within each stack (encoder, decoder); negative from the end. All by default.

    Raises:
        ValueError: if a value is of the wrong type or outside of its range.

    Example:

    >>> GatedAttentionConfig(layers=[0]).to_dict()
    {'method': 'gated_attention', 'init': 'identity', 'layers': [0]}
    """

    method = "gated_attention"

    init: str = "identity"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._make_plain("layers")
        self._require_init()
        self._require_layers()


REWEIGHTINGS = {config.method: config for config in (AffineScaledConfig, AttentionSinkConfig, GatedAttentionConfig)}


def reweighting_from_dict(values: ReweightingConfig | Mapping[str, Any]) -> ReweightingConfig:
    """Builds the configuration that a mapping names by its `method`.

    Raises:
        ValueError: for a `method` that is missing or unknown, and as the configuration itself does.
        TypeError: if `values` is no mapping.

    Example:

    >>> reweighting_from_dict({"method": "attention_sink", "init": -2})
    AttentionSinkConfig(init=-2, layers=None)
    """
    if isinstance(values, ReweightingConfig):
        return values
    if not isinstance(values, Mapping):
        names = ", ".join(config.__name__ for config in REWEIGHTINGS.values())
        raise TypeError(f"`{REWEIGHTING_KEY}` must be one of {names} or a dict of its fields, got {values!r}.")
    if values.get("method") not in REWEIGHTINGS:
        raise ValueError(
            f"`{REWEIGHTING_KEY}` must name its `method`, one of {list(REWEIGHTINGS)}, got {dict(values)!r}: the same "
            "keys mean different things to them."
        )
    fields = {name: value for name, value in values.items() if name != "method"}
    return REWEIGHTINGS[values["method"]].from_dict(fields)


class ReweightingConfigEntry(ConfigEntry):
    """The entry `attention_reweighting`: it says what a model's learned weights mean, so it is fixed once they exist.

    From then on the config also names its `attn_implementation`, and config.json with it: the checkpoint needs no
    argument to load, and does not load where that name is unknown.
    """

    def __set__(self, config: PreTrainedConfig, value: ReweightingConfig | Mapping[str, Any] | None) -> None:
        existing = self.__get__(config)
        is_attached = existing is not None and "attn_implementation" in config.__dict__
        if is_attached and (value is None or self.parse(value) != existing):
            raise ValueError(
                f"`{REWEIGHTING_KEY}` cannot change to {value!r}: a model with learned weights for {existing!r} was "
                "built with this config, and they would mean something else. Build another model from a config of "
                "its own."
            )
        super().__set__(config, value)
