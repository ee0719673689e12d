"""Parsing of methods from user input and config.json: names, dicts and lists."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from ..validation import suggestion
from . import LEARNED_METHODS, PERTURBATIONS
from .learned import LEARNED_KEY, LearnedMethod
from .method import ATTENTION_DROP_KEY, Perturbation


# Early releases wrote the settings of both variants to config.json and ignored those of the other variant.
EARLY_VARIANTS = ("hard", "blur")
EARLY_KEYS = {"variant", "p", "k", "fill", "sigma_max", "width", "layers", "attentions"}

PerturbationLike = Perturbation | Mapping[str, Any]


def AttentionDropConfig(variant: str = "hard", **settings: Any) -> Perturbation:  # noqa: N802
    """Builds a perturbation by the name of its variant.

    `AttentionDropConfig(variant="blur", sigma_max=0.5)` equals `BlurredSmoothing(sigma_max=0.5)`. This is a function;
    the base class of all perturbations, for `isinstance`, is `hf_attentiondrop.methods.Perturbation`.

    Args:
        variant (`str`, defaults to `"hard"`):
            `"hard"` for [`HardMasking`], `"blur"` for [`BlurredSmoothing`]; `hf_attentiondrop.methods.PERTURBATIONS`
            has all variants with their classes.
        settings: the settings of that class.

    Raises:
        ValueError: for an unknown variant, a setting that the variant does not have, or a value out of range.

    Example:

    >>> AttentionDropConfig(variant="blur", sigma_max=0.5)
    BlurredSmoothing(sigma_max=0.5, width=5, layers=None, attentions=('encoder_self', 'decoder_self'))
    """
    return perturbation_from({"variant": variant, **settings})


def perturbation_from(values: PerturbationLike) -> Perturbation:
    """Builds the perturbation that a mapping names by its `variant`, `"hard"` by default.

    Raises:
        ValueError: for an unknown variant, a setting that the variant does not have, and a value out of range.
        TypeError: if `values` is not a mapping.

    Example:

    >>> perturbation_from({"p": 0.2})
    HardMasking(p=0.2, k=5, fill='mask', layers=None, attentions=('encoder_self', 'decoder_self'))
    """
    if isinstance(values, Perturbation):
        return values
    if not isinstance(values, Mapping):
        names = ", ".join(method.__name__ for method in PERTURBATIONS.values())
        variant = getattr(values, "variant", values)
        hint = f' Write {{"variant": "{variant}"}}.' if isinstance(variant, str) and variant in PERTURBATIONS else ""
        if isinstance(values, LearnedMethod):
            hint = f' It is a learned method: use attn_implementation="{values.method}".'
        raise TypeError(
            f"`{ATTENTION_DROP_KEY}` must be one of {names}, a dict of its settings such as "
            f'{{"variant": "blur", "sigma_max": 0.5}}, or a list of these, got {values!r}.{hint}'
        )
    variant = values.get("variant", "hard")
    if not isinstance(variant, str) or variant not in PERTURBATIONS:
        raise ValueError(
            f"`{ATTENTION_DROP_KEY}`: `variant` must be one of {tuple(PERTURBATIONS)}, got {variant!r}."
            f"{suggestion(variant, PERTURBATIONS)} It names the perturbation."
        )
    method = PERTURBATIONS[variant]
    names = method.settings()
    if values.keys() == EARLY_KEYS and variant in EARLY_VARIANTS:
        values = {name: value for name, value in values.items() if name in names}
    for name in values:
        if name not in ("variant", *names):
            settings = {variant: method.settings() for variant, method in PERTURBATIONS.items()}
            owners = [owner for owner, known in settings.items() if name in known]
            if owners:
                hint = f" It is a setting of {_listed(owners)}. Leave it out, or name another variant."
            else:
                hint = suggestion(name, dict.fromkeys(chain(("variant",), names, *settings.values())))
            raise ValueError(
                f"Unknown key {name!r} in `{ATTENTION_DROP_KEY}`: variant={variant!r} does not use it, so "
                f"{values[name]!r} would have no effect.{hint} The keys of {variant} are {', '.join(names)}."
            )
    return method.from_dict(values)


def perturbations_from(values: PerturbationLike | Sequence[PerturbationLike]) -> tuple[Perturbation, ...]:
    """Builds one perturbation, or several from a list, of which the first runs around the last.

    Raises:
        ValueError: as [`perturbation_from`], and for an empty list.
        TypeError: as [`perturbation_from`].

    Example:

    >>> [method.variant for method in perturbations_from([{"variant": "blur"}, {"p": 0.2}])]
    ['blur', 'hard']
    """
    if isinstance(values, (list, tuple)):
        if not values:
            raise ValueError(
                f"`{ATTENTION_DROP_KEY}` must hold at least one perturbation, got an empty list: attention would "
                'train unperturbed. Use attn_implementation="sdpa" for that.'
            )
        return tuple(_numbered(index, item) for index, item in enumerate(values))
    return (perturbation_from(values),)  # type: ignore[arg-type]  # It raises for other types.


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _numbered(index: int, value: PerturbationLike) -> Perturbation:
    try:
        return perturbation_from(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Entry {index} of the list: {error}") from error


def learned_method_from(values: LearnedMethod | Mapping[str, Any]) -> LearnedMethod:
    """Builds the learned method that a mapping names by its `method`.

    Raises:
        ValueError: for a `method` that is missing or unknown, and as the method itself does.
        TypeError: if `values` is not a mapping.

    Example:

    >>> learned_method_from({"method": "attention_sink", "init": -2})
    AttentionSinkConfig(init=-2, layers=None)
    """
    if isinstance(values, LearnedMethod):
        return values
    if not isinstance(values, Mapping):
        names = ", ".join(method.__name__ for method in LEARNED_METHODS.values())
        raise TypeError(f"`{LEARNED_KEY}` must be one of {names} or a dict of its settings, got {values!r}.")
    if values.get("method") not in LEARNED_METHODS:
        raise ValueError(
            f"`{LEARNED_KEY}` must name its `method`, one of {list(LEARNED_METHODS)}, got {dict(values)!r}: the same "
            "keys mean different things to them."
        )
    settings = {name: value for name, value in values.items() if name != "method"}
    return LEARNED_METHODS[values["method"]].from_dict(settings)
