"""Arguments shared by all recipes, and checks of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch


ATTENTION_DROP = "attentiondrop"
DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass
class ModelArguments:
    """The model to train, its attention and its dropout."""

    _argument_group_name = "model"
    _needing: ClassVar = {"model_name_or_path": ("dtype",)}
    # The sizes of the recipes' models from scratch.
    _excluded: ClassVar = {
        "model_name_or_path": (
            "vocab_size",
            "image_size",
            "patch_size",
            "hidden_size",
            "d_model",
            "num_hidden_layers",
            "num_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
    }

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model to fine-tune, on the Hub or in a folder. By default a small one is trained from scratch."
        },
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Data type of the weights of --model_name_or_path: float32, bfloat16, float16, or auto for that "
            "of the checkpoint. Half precision rounds small updates away; --bf16 only computes in it.",
        },
    )
    attn_implementation: str = field(
        default=ATTENTION_DROP,
        metadata={
            "help": "Attention to train with: attentiondrop; affine_scaled, attention_sink or gated_attention, which "
            "have learned parameters and can be combined with the AttentionDrop flags; or the baseline, sdpa, without "
            "any of those flags. On the command line, it overrides the settings of other methods in --config."
        },
    )
    base_attention: str | None = field(
        default=None,
        metadata={
            "help": "Kernel of the underlying attention: flash_attention_2, flash_attention_3, flash_attention_4 or "
            "flex_attention. By default, and for masks that the kernel cannot express, SDPA."
        },
    )
    attention_reweighting: str | None = field(
        default=None,
        metadata={
            "help": "Configuration of an attention with learned parameters, as YAML: '{init: paper, gate: true}'. Use "
            "init: paper to train from scratch. The keys are documented in its configuration class."
        },
    )
    dropout: float | None = field(
        default=None,
        metadata={
            "help": "Probability of every dropout in the model: hidden states, attention weights and head. By "
            "default, the values in its config."
        },
    )
    attention_dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout probability of the attention weights; overrides --dropout for them."},
    )
    dropconnect: float = field(
        default=0.0,
        metadata={
            "help": "DropConnect: probability that a weight of a linear layer is zeroed in a training step, of LoRA "
            "adapters too."
        },
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {self.dtype}, which no weights have.")
        for name in ("dropout", "attention_dropout", "dropconnect"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"--{name}: expected a probability in [0, 1), got {value}.")

    @property
    def sets_dropout(self) -> bool:
        return self.dropout is not None or self.attention_dropout is not None


@dataclass
class RunArguments:
    """Mixin for Transformers' training arguments: the defaults and flags that the recipes change."""

    _argument_group_name = "training"
    _needing: ClassVar = {
        "consistency_weight": (
            "consistency_divergence",
            "consistency_warmup_steps",
            "consistency_fraction",
            "consistency_interval",
        )
    }

    do_train: bool = field(default=True, metadata={"help": "Train the model; false only evaluates it."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate at the end."})
    do_predict: bool = field(
        default=True, metadata={"help": "Test at the end, if there are test data; false only holds them out."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate during training."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint."})
    save_total_limit: int | None = field(default=1, metadata={"help": "How many checkpoints to keep."})
    save_model: bool = field(
        default=True,
        metadata={
            "help": "Save the trained model at the end; false keeps only its metrics, plots and card, for comparisons "
            "of many runs."
        },
    )
    logging_steps: float = field(
        default=0.05, metadata={"help": "Steps between two logs of the loss; below 1, a fraction of all steps."}
    )
    # Without it, processes on a machine without an accelerator could not form a group.
    use_cpu: bool = field(default=not torch.accelerator.is_available(), metadata={"help": "Use the CPU only."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Write into a folder that is not empty; the checkpoints and, after training, the model of an "
            "earlier run in it are deleted."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint folder to resume from; without a value, the last one in the output folder.",
            "nargs": "?",
            "const": "last",
        },
    )

    def __post_init__(self) -> None:
        check_at_least_one(self, "per_device_train_batch_size", "per_device_eval_batch_size")
        do_eval = self.do_eval
        super().__post_init__()
        # Transformers turns it on if it evaluates during training; here it says whether to evaluate at the end.
        self.do_eval = do_eval


def check_at_least_one(arguments: Any, *names: str) -> None:
    """Checks that counts are at least 1 before training; some would fail only in the final evaluation.

    Args:
        arguments: dataclass with the counts.
        names (`str`): their fields; `None` values are not checked.

    Raises:
        ValueError: if one is below 1.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}.")


def check_path(flag: str, name: str | None, is_local: bool = False) -> None:
    """Checks that a path exists.

    Args:
        flag (`str`): flag that set it.
        name (`str`, *optional*): a path or, unless `is_local`, possibly a name on the Hub.
        is_local (`bool`, defaults to `False`): whether it must be a local path.

    Raises:
        FileNotFoundError: if it must be a local path and nothing is there.
    """
    if name is None or Path(name).exists():
        return
    if is_local or name.startswith((".", "~")) or Path(name).is_absolute() or len(Path(name).parts) > 2:
        raise FileNotFoundError(f"{flag}: expected an existing path, there is nothing at {name!r}.")
