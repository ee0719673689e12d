"""How a model was trained, for its card."""

from typing import Any

from transformers import PreTrainedConfig, Trainer

from ..attention.dropout import dropout_of
from ..attention.parts import configs_of, transformers_model


def describe_training(trainer: Trainer) -> dict[str, str]:
    """The settings of a training, as rows of the card."""
    args, state = trainer.args, trainer.state
    epochs = state.epoch or 0
    # Transformers lowers it if it searches for one that fits the memory.
    each = getattr(trainer, "_train_batch_size", args.train_batch_size)
    times, processes = args.gradient_accumulation_steps, args.world_size
    several = f"{processes} process{'es' if processes > 1 else ''}"
    return {
        "Optimizer steps": f"{state.global_step} ({epochs:.4g} epoch{'s' * (epochs != 1)})",
        "Samples per step": f"{each * times * processes} ({each} at once, {times} accumulated, {several})",
        **_describe_optimizer(trainer),
        "Dropout of the model": describe_dropout(transformers_model(trainer.model).config),
        "Label smoothing": f"{args.label_smoothing_factor:g}",
        "Precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "that of the weights",
        "Seed": str(args.seed),
    }


def _describe_optimizer(trainer: Trainer) -> dict[str, str]:
    args = trainer.args
    warmup = f", {args.warmup_steps:g} warm-up" if args.warmup_steps else ""
    schedule = f"{args.lr_scheduler_type.value}{warmup}"
    if getattr(trainer, "has_own_scheduler", False):
        scheduler: Any = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)  # Accelerate wraps it.
        schedule = type(scheduler).__name__
    if getattr(trainer, "has_own_optimizer", False):
        optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        return {"Learning rate": schedule, "Optimizer": type(optimizer).__name__}
    return {
        "Learning rate": f"{args.learning_rate:g}, {schedule}",
        "Optimizer": str(getattr(args.optim, "value", args.optim)),
        "Weight decay": f"{args.weight_decay:g}",
    }


def describe_dropout(config: PreTrainedConfig) -> str:
    """The dropout of a model, with that of its parts where they differ."""
    parts = (dropout_of(part).items() for part in configs_of(config))
    described = (", ".join(f"{name} {value:g}" for name, value in part if value) for part in parts)
    return "; ".join(dict.fromkeys(filter(None, described))) or "none"
