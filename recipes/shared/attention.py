"""The attention options of a run, from its flags, and which settings of a file of arguments they override."""

from collections.abc import Mapping
from typing import Any

import yaml

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.cli.flags import naming_flag
from hf_attentiondrop.methods import LEARNED_METHODS
from hf_attentiondrop.methods.learned import LearnedMethod
from hf_attentiondrop.methods.method import Perturbation
from hf_attentiondrop.methods.parsing import perturbations_from

from .arguments import ATTENTION_DROP
from .method_flags import SELECTION, SETTING_NAMES, SINGLE_METHOD_FLAGS


LIST_FLAG = "attention_drop"


def attention_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The attention options for `from_pretrained`, or for the config of a new model.

    Args:
        values (`Mapping[str, Any]`):
            The fields of [`ModelArguments`], and those flags of [`add_method_flags`] that were set.

    Raises:
        ValueError: if a value is out of range, the flags contradict each other, or the attention would ignore a
            setting.
    """
    name, reweighting = values["attn_implementation"], values["attention_reweighting"]
    given = {flag: values[flag] for flag in (LIST_FLAG, *SINGLE_METHOD_FLAGS) if flag in values}
    is_dropping = name == ATTENTION_DROP or (name in LEARNED_METHODS and bool(given))
    if given and not is_dropping:
        raise ValueError(
            f"{_flags(given)}: settings of AttentionDrop need --attn_implementation {ATTENTION_DROP} or one of "
            f"{', '.join(LEARNED_METHODS)}, got {name}, where they would have no effect. Leave them out, or pass one "
            "of those."
        )
    options = {"attn_implementation": name, "attention_drop": _perturbations(given) if is_dropping else None}
    if reweighting is not None:
        options["attention_reweighting"] = _learned_method(name, reweighting)
    return options


def _perturbations(given: Mapping[str, Any]) -> Perturbation | list[Perturbation]:
    if LIST_FLAG not in given:
        return AttentionDropConfig(**given)
    entry = given[LIST_FLAG]
    if single := {flag: value for flag, value in given.items() if flag != LIST_FLAG}:
        item = yaml.safe_dump(single, default_flow_style=True, sort_keys=False).strip()
        raise ValueError(
            f"--{LIST_FLAG}, {_flags(single)}: expected either --{LIST_FLAG} or the flags of a single perturbation, "
            f"got both, and it is ambiguous which perturbation the latter configure. Write {item} into "
            f"--{LIST_FLAG}, or leave --{LIST_FLAG} out."
        )
    with naming_flag(f"--{LIST_FLAG}"):
        perturbations = perturbations_from(entry)
    return list(perturbations) if isinstance(entry, list) else perturbations[0]


def _learned_method(name: str, text: str) -> LearnedMethod:
    if name not in LEARNED_METHODS:
        raise ValueError(
            f"--attention_reweighting configures {', '.join(LEARNED_METHODS)}, but --attn_implementation is "
            f"{name}, which has no learned parameters. Pass one of them, or leave the configuration out."
        )
    try:
        return LEARNED_METHODS[name].from_dict(yaml.safe_load(text))
    except (TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"--attention_reweighting must be a YAML mapping such as '{{init: paper}}', got {text!r}."
        ) from error


def settings_left_out(of_file: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, list[str]]:
    """Finds the settings in a file of arguments that belong to another method than the one on the command line.

    A file describes a run with one method, so using it with another method on the command line must not train both.
    To combine methods on purpose, set both on the command line, or both in the file.

    Args:
        of_file (`Mapping[str, Any]`): the values given in the file.
        typed (`Mapping[str, Any]`): the values given on the command line.

    Returns:
        `dict[str, list[str]]`: flag on the command line to the settings in the file that it overrides.

    Example:

    >>> settings_left_out({"p": 0.2, "k": 3, "seed": 1}, {"attn_implementation": "affine_scaled", "k": 4})
    {'attn_implementation': ['p']}
    >>> settings_left_out({"p": 0.2, "seed": 1}, {"attention_drop": [{"variant": "hard"}, {"variant": "blur"}]})
    {'attention_drop': ['p']}
    """
    groups: dict[str, set[str]] = {}
    merged = {**of_file, **typed}
    old, new = (values.get("attn_implementation", ATTENTION_DROP) for values in (of_file, merged))
    if new != old:
        # From a learned method combined with AttentionDrop to AttentionDrop alone, its settings stay.
        drop = set() if new == ATTENTION_DROP else {LIST_FLAG, *SINGLE_METHOD_FLAGS}
        groups["attn_implementation"] = {"attention_reweighting"} | drop
    if LIST_FLAG in typed:
        groups[LIST_FLAG] = set(SINGLE_METHOD_FLAGS)
    if "variant" in typed:
        old, new = (values.get("variant", AttentionDropConfig().variant) for values in (of_file, merged))
        # A good value for one variant is none for another.
        groups["variant"] = {LIST_FLAG} | (set(SETTING_NAMES).difference(SELECTION) if new != old else set())
    left_out = {flag: [name for name in of_file if name in groups[flag] - typed.keys()] for flag in groups}
    return {flag: names for flag, names in left_out.items() if names}


def _flags(given: Mapping[str, Any]) -> str:
    return ", ".join(f"--{name}" for name in given)
