"""The training of a recipe, from the checkpoint to resume from to the saved model."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from transformers import Trainer

from hf_attentiondrop.evaluation.gradients import gradient_norms

from .checkpoints import delete_checkpoints, delete_model, step_of
from .output import describe_attention


def train(trainer: Trainer, checkpoint: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Trains the model and saves it in the output folder, unless `--save_model false` asks not to.

    Args:
        trainer ([`~transformers.Trainer`]): with the arguments of a recipe.
        checkpoint (`str`, *optional*): folder of the checkpoint to resume from.

    Returns:
        `tuple`: the training metrics, and rows for the table of results. Those of a resumed run cover the steps since
        the checkpoint, and say so. `gradient_norms` summarizes the norms that were logged, of all steps with
        `--logging_steps 1`.
    """
    folder = trainer.args.output_dir
    overwrites = trainer.args.overwrite_output_dir and checkpoint is None and trainer.is_world_process_zero()
    if overwrites:
        delete_checkpoints(folder)
    # Before training, which deletes old checkpoints.
    first = step_of(checkpoint)
    # Each checkpoint would print its own progress bar into that of the training.
    transformers.utils.logging.disable_progress_bar()
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    transformers.utils.logging.enable_progress_bar()
    if overwrites and Path(trainer.model.config._name_or_path).resolve() != Path(folder).resolve():
        # Unless it is the one that was trained further, which an adapter still needs.
        delete_model(folder)
    if trainer.args.save_model:
        # Otherwise it would upload the run before its metrics and card are written.
        trainer.save_model(_internal_call=True)
    trainer.save_state()
    num_processes = trainer.args.world_size
    processes = f"{num_processes} process{'es' if num_processes > 1 else ''}"
    last = trainer.state.global_step
    steps = f"{last} steps" if first == 0 else f"steps {first + 1} to {last}, resumed,"
    norms = [
        entry["grad_norm"] for entry in trainer.state.log_history if math.isfinite(entry.get("grad_norm", math.nan))
    ]
    summary = {"gradient_norms": asdict(gradient_norms(norms))} if len(norms) > 1 else {}
    return _metrics_since(first, trainer, metrics) | summary, {
        "training": f"{steps} in {metrics['train_runtime']:.0f} s on {processes}",
        "attention": describe_attention(trainer.model),
    }


def _metrics_since(first: int, trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of the steps after `first`, with that step if the run was resumed."""
    steps = trainer.state.global_step - first
    if first == 0 or steps <= 0:
        return metrics | ({"resumed_from_step": first} if first else {})
    if not hasattr(trainer, "_initial_global_step"):
        # Transformers before 5.17 divides the time and the loss of these steps by the number of all steps.
        share = steps / trainer.state.global_step
        rates = ("train_samples_per_second", "train_steps_per_second")
        metrics |= {name: metrics[name] * share for name in rates} | {"train_loss": metrics["train_loss"] / share}
    return metrics | {"resumed_from_step": first}
