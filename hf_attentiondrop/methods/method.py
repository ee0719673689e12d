"""The interface of methods: settings, selection of modules, the change to an attention call, and the model card."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from ..attention.call import Attend, AttentionCall, AttentionOutput
from ..attention.modules import ATTENTION_KINDS, Place
from ..validation import Config, is_filled_tuple, is_integer, is_number
from .card import MethodCard
from .profile import (
    EXAMPLES,
    Profile,
    Value,
    check_place,
    is_profile,
    numbers_of,
    profile_at,
    profile_from,
    to_plain,
    value_at,
)


ATTENTION_DROP_KEY = "attention_drop"
# Entries of config.json that describe how the training varied the values; nothing reads them but model cards.
SCHEDULE_KEY = "attention_drop_schedule"
ADAPTIVE_KEY = "attention_drop_adaptive"


@dataclass(frozen=True, repr=False)
class Method(Config, ABC):
    """Base class of all methods: frozen dataclasses whose fields are the settings of the method."""

    layers: tuple[int, ...] | None = field(default=None, kw_only=True)

    @abstractmethod
    def cards(self) -> tuple[MethodCard, ...]:
        """Returns the sections about the method in a model card, usually one [`MethodCard`]."""

    @property
    def summary(self) -> str:
        """The settings in one line, without `layers` and `attentions`."""
        names = (name for name in self.settings() if name not in ("layers", "attentions"))
        return " ".join(f"{name}={getattr(self, name)}" for name in names)

    def selects(self, place: Place) -> bool:
        """Returns whether the method acts on an attention module at this place."""
        return self.layers is None or place.layer in self.layers or place.layer - place.num_layers in self.layers

    def _check_layers(self) -> None:
        self._check(
            "layers",
            lambda layers: layers is None or is_filled_tuple(layers, is_integer),
            "None or a non-empty list of integers",
            "It numbers the layers to act on within each stack, negative from the end; None selects all.",
        )


@dataclass(frozen=True, repr=False)
class Perturbation(Method):
    """A method that perturbs attention in training; evaluation is unchanged.

    A subclass is one row of the table in `methods/__init__.py`. Its fields are its settings; `layers` and `attentions`
    are shared by all perturbations.

    Args:
        layers (`list[int]`, *optional*):
            Layers to act on, counted within each stack (encoder, decoder); negative from the end. All by default.
        attentions (`list[str]`, defaults to `("encoder_self", "decoder_self")`):
            Kinds of attention to act on: `"encoder_self"`, `"decoder_self"`, `"cross"`.
    """

    key = ATTENTION_DROP_KEY
    variant: ClassVar[str]
    """Name in configurations, as in `attention_drop={"variant": "blur"}`."""
    scheduled: ClassVar[str]
    """The setting that may differ between layers and heads and that schedules scale, 0 for no perturbation."""
    scales_output: ClassVar[bool] = False
    """Whether the method only multiplies the attention output. It then wraps the methods that change the scores, with
    which it commutes, and learned methods."""

    attentions: tuple[str, ...] = field(default=("encoder_self", "decoder_self"), kw_only=True)

    def __post_init__(self) -> None:
        self._make_plain("layers", "attentions")
        self._check_layers()
        self._check(
            "attentions",
            lambda attentions: is_filled_tuple(attentions, ATTENTION_KINDS.__contains__),
            f"a non-empty list from {ATTENTION_KINDS}",
            "It selects the kinds of attention to act on.",
        )

    def _check_profile(self, is_valid: Callable[[Any], bool], expected: str, why: str) -> None:
        """Checks the scheduled setting, see `methods/profile.py`."""
        object.__setattr__(self, self.scheduled, profile_from(getattr(self, self.scheduled)))
        expected += "" if is_number(self.profile) else f", or {EXAMPLES}"
        self._check(self.scheduled, lambda profile: is_profile(profile, is_valid), expected, why)
        if self.layers is not None and isinstance(self.profile, tuple):
            raise ValueError(
                f"{type(self).__name__}: `{self.scheduled}` has one value per layer, and `layers` selects "
                f"{list(self.layers)}: the other values would have no effect. Leave `layers` out and set 0 for layers "
                "that stay unperturbed."
            )

    @abstractmethod
    def attend(self, call: AttentionCall, attend: Attend, value: Tensor, /) -> AttentionOutput:
        """Computes perturbed attention.

        Args:
            call: the attention call.
            attend: computes attention without this method, with zeros for fully masked queries.
            value: the scheduled setting in this module: a float64 scalar on the CPU, or float32 `(H, 1, 1)` on the
                device of the call if it differs between heads. Use it instead of the field. As a tensor it can change
                without recompiling a compiled model.

        Returns:
            The output `(B, Q, H, D)`, and the weights `(B, H, Q, K)` where `attend` returns some.
        """

    def selects(self, place: Place) -> bool:
        """Returns whether the method acts on an attention module at this place."""
        return place.kind in self.attentions and super().selects(place)

    def check_module(self, module: nn.Module) -> None:  # noqa: B027  # Most methods act on every module.
        """Checks whether the method can act on an attention module.

        Raises:
            ValueError: if it cannot.
        """

    def needs_score_matrix(self, dropout: float) -> bool:
        """Returns whether the method stores all scores on CUDA, at any length, under this attention dropout."""
        return False

    @property
    def profile(self) -> Profile:
        """The scheduled setting, for all layers and heads."""
        return getattr(self, self.scheduled)

    def value_at(self, place: Place) -> Value:
        """Returns the scheduled setting of an attention module, or one value per head."""
        return value_at(self.profile, place)

    def at(self, place: Place) -> Self:
        """Returns the perturbation with the scheduled setting of an attention module."""
        settings: dict[str, Any] = {self.scheduled: profile_at(self.profile, place)}
        return replace(self, **settings)

    def check_place(self, place: Place) -> None:
        """Checks that the scheduled setting has a value for an attention module.

        Raises:
            ValueError: if it has not, see [`~methods.profile.check_place`].
        """
        check_place(self.scheduled, self.profile, place)

    @property
    def can_act(self) -> bool:
        """Whether some scheduled setting perturbs attention."""
        return True

    @property
    def is_active(self) -> bool:
        """Whether the configured setting perturbs attention in some layer."""
        return self.can_act and any(number > 0 for number in numbers_of(self.profile))

    def acts_at(self, place: Place) -> bool:
        """Returns whether the configured setting perturbs an attention module."""
        return self.selects(place) and self.can_act and any(number > 0 for number in numbers_of(self.value_at(place)))

    @property
    def summary(self) -> str:
        """The perturbation in one line.

        >>> from hf_attentiondrop import BlurredSmoothing
        >>> BlurredSmoothing().summary
        'blur sigma_max=1.0 width=5'
        """
        return f"{self.variant} {super().summary}"

    def card_settings(self) -> dict[str, Any]:
        """Returns the settings as a model card shows them."""
        return {"variant": self.variant, **{name: getattr(self, name) for name in self.settings()}}

    def to_dict(self) -> dict[str, Any]:
        """Returns the variant and its settings as plain JSON types."""
        return {"variant": self.variant, **super().to_dict(), self.scheduled: to_plain(self.profile)}

    @classmethod
    def from_dict(cls, values: Any) -> Any:
        """Builds the perturbation from a mapping of its settings, with or without its `variant`."""
        if not isinstance(values, cls) and hasattr(values, "items"):
            values = {name: value for name, value in values.items() if name != "variant"}
        return super().from_dict(values)


def check_selection(owner: str, key: str, selections: Iterable[tuple[Place, Sequence[Method]]]) -> None:
    """Checks that every method acts on some attention module, and every layer number exists.

    Args:
        owner: class of the whole model.
        key: config entry that holds the methods.
        selections: places of the attention modules that the entry governs, each with its methods.

    Raises:
        ValueError: if a layer exists in no stack, a method selects no module, or a setting has no value for one.
    """
    places: dict[Method, list[Place]] = {}
    for place, methods in selections:
        for method in methods:
            places.setdefault(method, []).append(place)
    for method, candidates in places.items():
        lengths = {place.stack: place.num_layers for place in candidates}
        for layer in method.layers or ():
            if not any(-length <= layer < length for length in lengths.values()):
                raise ValueError(
                    f"`{key}` names layer {layer}, and {owner} has no such layer: it would have no effect. Only "
                    "parts that run the method count. Layers count from 0 within each stack, or from the end if "
                    f"negative; the stacks are {lengths}."
                )
        for place in filter(method.selects, candidates):
            if isinstance(method, Perturbation):
                method.check_place(place)
        if not any(method.selects(place) for place in candidates):
            kinds = sorted({place.kind for place in candidates})
            selected = list(getattr(method, "attentions", ATTENTION_KINDS))
            raise ValueError(
                f"`{key}` selects attentions={selected} in layers={method.layers}, and no attention of "
                f"{owner} matches: nothing would happen. Its attentions are {kinds}, its stacks {lengths}."
            )
