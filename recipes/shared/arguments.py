"""The arguments that the recipes share, and what they say about attention."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.methods import LEARNED_METHODS, PERTURBATIONS


ATTENTION_DROP = "attentiondrop"
SETTINGS = {variant: method.settings() for variant, method in PERTURBATIONS.items()}
ATTENTION_DROP_FIELDS = ("variant", *dict.fromkeys(name for names in SETTINGS.values() for name in names))


@dataclass
class ModelArguments:
    """Which model to train, and how it attends."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model on the Hub, or folder, to start from. Without it a small one is trained from scratch."
        },
    )
    attn_implementation: str = field(
        default=ATTENTION_DROP,
        metadata={
            "help": "Attention to train with: attentiondrop; or one that learns, affine_scaled, attention_sink or "
            "gated_attention, which AttentionDrop perturbs where one of its flags is given as well; or the baseline, "
            "sdpa, which takes none of those flags. Where it is on the command line, what --config sets of another "
            "method does not apply."
        },
    )
    base_attention: str | None = field(
        default=None,
        metadata={
            "help": "Kernel to compute the attention that is blurred, reweighted, or left alone: flash_attention_2, 3 "
            "or 4, flex_attention. Without it, and where it cannot express a mask, SDPA does."
        },
    )
    attention_reweighting: str | None = field(
        default=None,
        metadata={
            "help": "Configuration of an attention that learns, as YAML: '{init: paper, gate: true}'. init: paper is "
            "for training from scratch. The class of its configuration documents the keys."
        },
    )
    dropout: float | None = field(
        default=None,
        metadata={
            "help": "Probability of every dropout in the model: of hidden states, attention weights and the head. "
            "Without it, those of its config."
        },
    )
    attention_dropout: float | None = field(
        default=None,
        metadata={"help": "Probability of the dropout of attention weights alone; overrides --dropout."},
    )
    dropconnect: float = field(
        default=0.0,
        metadata={
            "help": "DropConnect: probability that a weight of a linear layer is zeroed in a training step, of LoRA "
            "adapters too."
        },
    )

    def __post_init__(self) -> None:
        for name in ("dropout", "attention_dropout", "dropconnect"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"--{name}: expected a probability in [0, 1), got {value}.")

    @property
    def sets_dropout(self) -> bool:
        return self.dropout is not None or self.attention_dropout is not None


@dataclass
class RunArguments:
    """What a recipe adds to Transformers' training arguments; to be mixed into them."""

    _argument_group_name = "training"

    do_train: bool = field(default=True, metadata={"help": "Train; false evaluates the model as it is."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate at the end."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate during training."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint."})
    save_total_limit: int | None = field(default=1, metadata={"help": "How many checkpoints to keep."})
    logging_steps: float = field(
        default=0.05, metadata={"help": "Steps between two logs of the loss; below 1 as a share of all steps."}
    )
    # Without it several processes on a machine that has no accelerator would not find each other.
    use_cpu: bool = field(
        default=not torch.accelerator.is_available(), metadata={"help": "Leave the accelerator alone."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Write into an output folder that is not empty; checkpoints found in it are deleted."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint folder to continue from; without a value, the last one in the output folder.",
            "nargs": "?",
            "const": "last",
        },
    )

    def __post_init__(self) -> None:
        check_at_least_one(self, "per_device_train_batch_size", "per_device_eval_batch_size")
        super().__post_init__()


def attention_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` and the config of a new model need to be told about attention.

    Args:
        values (`Mapping[str, Any]`): those of [`ModelArguments`], and the fields of [`AttentionDropConfig`] given.

    Raises:
        ValueError: for values out of range, and for a configuration that the attention would ignore.
    """
    name, reweighting = values["attn_implementation"], values["attention_reweighting"]
    drop = {field_: values[field_] for field_ in ATTENTION_DROP_FIELDS if field_ in values}
    is_dropping = name == ATTENTION_DROP or (name in LEARNED_METHODS and bool(drop))
    if drop and not is_dropping:
        flags = ", ".join(f"--{field_}" for field_ in drop)
        raise ValueError(
            f"{flags}: settings of AttentionDrop need --attn_implementation {ATTENTION_DROP} or one of "
            f"{', '.join(LEARNED_METHODS)}, got {name}, where they would have no effect. Leave them out, or name one "
            "of those."
        )
    options = {"attn_implementation": name, "attention_drop": AttentionDropConfig(**drop) if is_dropping else None}
    if reweighting is not None:
        if name not in LEARNED_METHODS:
            raise ValueError(
                f"--attention_reweighting configures {', '.join(LEARNED_METHODS)}, and --attn_implementation is "
                f"{name}, which learns nothing. Name one of them, or leave the configuration out."
            )
        try:
            options["attention_reweighting"] = LEARNED_METHODS[name].from_dict(yaml.safe_load(reweighting))
        except (TypeError, yaml.YAMLError) as error:
            raise ValueError(
                f"--attention_reweighting must be a YAML mapping such as '{{init: paper}}', got {reweighting!r}."
            ) from error
    return options


def settings_left_out(of_file: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, list[str]]:
    """Finds what a file of arguments sets for another method than the one that the command line names.

    A file describes a run with its own method, so that the same file with another method on the command line must not
    train both. Settings on the command line always apply, and so combine methods on purpose, as one file does.

    Args:
        of_file (`Mapping[str, Any]`): the values given in the file.
        typed (`Mapping[str, Any]`): the values given on the command line.

    Returns:
        `dict[str, list[str]]`: flag on the command line to the names of what it makes inapplicable in the file.

    Example:

    >>> settings_left_out({"p": 0.2, "k": 3, "seed": 1}, {"attn_implementation": "affine_scaled", "k": 4})
    {'attn_implementation': ['p']}
    """
    groups: dict[str, set[str]] = {}
    old, new = (values.get("attn_implementation", ATTENTION_DROP) for values in (of_file, {**of_file, **typed}))
    if new != old:
        # AttentionDrop alone is what remains of a learned method that it perturbs.
        drop = set() if new == ATTENTION_DROP else set(ATTENTION_DROP_FIELDS)
        groups["attn_implementation"] = {"attention_reweighting"} | drop
    default = AttentionDropConfig().variant
    old, new = (values.get("variant", default) for values in (of_file, {**of_file, **typed}))
    if new != old:
        groups["variant"] = {name for names in SETTINGS.values() for name in names} - {*SETTINGS.get(new, ())}
    left_out = {flag: [name for name in of_file if name in groups[flag] - typed.keys()] for flag in groups}
    return {flag: names for flag, names in left_out.items() if names}


def check_at_least_one(arguments: Any, *names: str) -> None:
    """Refuses counts below 1, some of which would show only when the trained model is evaluated.

    Args:
        arguments: the dataclass that holds them.
        names (`str`): of the arguments; `None` is not checked.

    Raises:
        ValueError: naming the flag and what was given.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}.")


def check_path(flag: str, name: str | None, is_local: bool = False) -> None:
    """Refuses a path with nothing at it.

    Args:
        flag (`str`): the flag that gave it.
        name (`str`, *optional*): a path, or where `is_local` is false perhaps the name of something on the Hub.
        is_local (`bool`, defaults to `False`): whether it can only be a path.

    Raises:
        FileNotFoundError: if it can only be a path, and nothing is there.
    """
    if name is None or Path(name).exists():
        return
    if is_local or name.startswith((".", "~")) or Path(name).is_absolute() or len(Path(name).parts) > 2:
        raise FileNotFoundError(f"{flag}: expected an existing path, there is nothing at {name!r}.")
