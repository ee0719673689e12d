"""The configuration of AttentionDrop."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from ..functional import FILLS


CONFIG_KEY = "attention_drop"
# The fields that each variant uses; the others have no effect under it.
FIELDS_OF_VARIANTS = {"hard": ("p", "k", "fill"), "blur": ("sigma_max", "width")}
VARIANTS = tuple(FIELDS_OF_VARIANTS)
ATTENTION_KINDS = ("encoder_self", "decoder_self", "cross")
# How much a key must resemble a field to be taken for a slip of the pen; a wrong guess is worse than none.
SIMILARITY = 0.7


class Configuration:
    """What all configurations share: checked values of plain Python types, and the way to plain dicts and back."""

    key: ClassVar[str]
    """The entry of config.json that holds it."""

    def _require(self, name: str, is_valid: Callable[[Any], bool], expected: str, why: str) -> None:
        value = getattr(self, name)
        if not is_valid(value):
            raise ValueError(f"{type(self).__name__}: `{name}` must be {expected}, got {value!r}. {why}")

    def _require_layers(self) -> None:
        self._require(
            "layers",
            lambda layers: layers is None or is_filled_tuple(layers, is_integer),
            "None or a non-empty list of integers",
            "It numbers the layers to act on within each stack, negative from the end; None is all of them.",
        )

    def _make_plain(self, *sequences: str) -> None:
        """Turns numbers and arrays of NumPy and torch into Python's, and the named fields into tuples.

        Plain values can be written to config.json, and tuples keep the configuration immutable and comparable.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if hasattr(value, "tolist"):
                value = value.tolist()
            if field.name in sequences and isinstance(value, (list, tuple, range)):
                value = tuple(item.tolist() if hasattr(item, "tolist") else item for item in value)
            object.__setattr__(self, field.name, value)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types, as config.json holds it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: "Mapping[str, Any] | Self") -> Self:
        """Builds the configuration from a mapping, refusing unknown keys.

        Raises:
            ValueError: for a key that is no field, naming the fields there are.
            TypeError: if `values` is no mapping.
        """
        if isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            raise TypeError(
                f"`{cls.key}` must be an {cls.__name__} or a dict of its fields, got {values!r}: "
                f"for example {cls.key}={cls.__name__}()."
            )
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=SIMILARITY)
                suggestion = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(
                    f"Unknown key {key!r} in `{cls.key}`: it would have no effect.{suggestion} "
                    f"The keys are {', '.join(names)}."
                )
        return cls(**values)


@dataclass(frozen=True)
class AttentionDropConfig(Configuration):
    """What AttentionDrop (arXiv 2504.12088) does to the attention of a model in training mode.

    Args:
        variant (`str`, defaults to `"hard"`):
            `"hard"` drops some of each query's strongest keys. `"blur"` smooths the scores along the keys.
        p (`float`, defaults to 0.1):
            Hard: probability in [0, 1] with which each of the `k` highest scores of a query is hit. The paper reports
            a loss of more than two points above 0.5.
        k (`int` or `float`, defaults to 5):
            Hard: how many of the highest visible scores of a query can be hit, an integer of at least 1; or which
            share of the keys that it sees, a float between 0 and 1, rounded up for each query.
        fill (`str`, defaults to `"mask"`):
            Hard: what a hit score becomes. `"mask"` is -inf: the key is dropped. `"zero"` is 0, the paper's formula,
            which raises the weight of a key whose score was negative and depends on a constant shift of the scores.
        sigma_max (`float`, defaults to 1.0):
            Blur: each sample draws its standard deviation, in tokens, uniformly from [0, `sigma_max`] in every layer.
        width (`int`, defaults to 5):
            Blur: width of the window in tokens, odd, at least 1. The paper reports a loss of more than two points
            above 9. Images are blurred along their raster order, class token first.
        layers (`list[int]`, *optional*):
            Layers to act on, counted within each stack (encoder, decoder); negative from the end. All by default.
        attentions (`list[str]`, defaults to `("encoder_self", "decoder_self")`):
            Kinds of attention to act on, of `"encoder_self"`, `"decoder_self"` and `"cross"`.

    Raises:
        ValueError: if a value is of the wrong type or outside of its range, or set though the variant does not use it.

    Example:

    >>> AttentionDropConfig(variant="blur", sigma_max=0.5)
    AttentionDropConfig(variant='blur', p=0.1, k=5, fill='mask', sigma_max=0.5, width=5, layers=None,
    attentions=('encoder_self', 'decoder_self'))
    """  # noqa: E501

    key = CONFIG_KEY

    variant: str = "hard"
    p: float = 0.1
    k: int | float = 5
    fill: str = "mask"
    sigma_max: float = 1.0
    width: int = 5
    layers: tuple[int, ...] | None = None
    attentions: tuple[str, ...] = ("encoder_self", "decoder_self")

    def __post_init__(self) -> None:
        self._make_plain("layers", "attentions")
        self._require("variant", VARIANTS.__contains__, f"one of {VARIANTS}", "It names the perturbation.")
        self._require(
            "p",
            lambda p: is_number(p) and 0 <= p <= 1,
            "a probability in [0, 1]",
            "It is the chance that a score is hit; 0.1 is the paper's, above 0.5 it costs accuracy.",
        )
        self._require(
            "k",
            lambda k: (is_integer(k) and k >= 1) or (isinstance(k, float) and 0 < k < 1),
            "an integer >= 1 or a share between 0 and 1",
            "It is the number of highest scores that can be hit in a row, such as 5, the paper's, or the share of the "
            "row's visible keys, such as 0.1.",
        )
        self._require("fill", FILLS.__contains__, f"one of {FILLS}", "It decides what a hit score becomes.")
        self._require(
            "sigma_max",
            lambda sigma_max: is_number(sigma_max) and 0 <= sigma_max < math.inf,
            "a finite number >= 0",
            "It is the largest standard deviation of the blur in tokens; 1.0 is the paper's.",
        )
        self._require(
            "width",
            lambda width: is_integer(width) and width >= 1 and width % 2 == 1,
            "an odd integer >= 1",
            "The blur window needs a centre; 5 is the paper's, above 9 it costs accuracy.",
        )
        self._require_layers()
        self._require(
            "attentions",
            lambda attentions: is_filled_tuple(attentions, ATTENTION_KINDS.__contains__),
            f"a non-empty list from {ATTENTION_KINDS}",
            "It selects the kinds of attention to act on.",
        )
        self._refuse_unused_fields()

    def _refuse_unused_fields(self) -> None:
        # The defaults pass: config.json holds all fields.
        own = FIELDS_OF_VARIANTS[self.variant]
        defaults = {field.name: field.default for field in fields(self)}
        for variant, names in FIELDS_OF_VARIANTS.items():
            for name in names:
                if name not in own and getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{type(self).__name__}: `{name}`={getattr(self, name)!r} would have no effect, because "
                        f"variant={self.variant!r} does not use it: {variant} does. Leave `{name}` out, or use "
                        f"variant={variant!r}. The fields of {self.variant} are {', '.join(own)}, layers and "
                        "attentions."
                    )

    @property
    def scheduled_field(self) -> str:
        """The field that a schedule may change during training."""
        return "p" if self.variant == "hard" else "sigma_max"

    @property
    def strength(self) -> float:
        """The value of the field that a schedule may change: `p` of hard, `sigma_max` of blur."""
        return getattr(self, self.scheduled_field)

    @property
    def is_active(self) -> bool:
        """Whether these values perturb anything at all."""
        return self.strength > 0 and self.can_act

    @property
    def can_act(self) -> bool:
        """Whether they would, at another value of the field that a schedule may change."""
        return self.variant == "hard" or self.width > 1

    @property
    def summary(self) -> str:
        """The perturbation in a few words.

        >>> AttentionDropConfig(variant="blur").summary
        'blur sigma_max=1.0 width=5'
        """
        names = FIELDS_OF_VARIANTS[self.variant]
        return " ".join([self.variant, *(f"{name}={getattr(self, name)}" for name in names)])


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_filled_tuple(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(is_valid(item) for item in value)
