"""The training of a recipe, from the checkpoint to continue from to the saved model."""

import transformers
from transformers import Trainer

from .checkpoints import delete_checkpoints
from .output import describe_attention


def train(trainer: Trainer, checkpoint: str | None) -> tuple[dict[str, float], dict[str, str]]:
    """Trains the model and saves it in the output folder.

    Args:
        trainer ([`~transformers.Trainer`]): with the arguments of a recipe.
        checkpoint (`str`, *optional*): folder of the checkpoint to continue from.

    Returns:
        `tuple`: the metrics of the training, and its rows in the table of results.
    """
    if trainer.args.overwrite_output_dir and checkpoint is None and trainer.is_world_process_zero():
        delete_checkpoints(trainer.args.output_dir)
    # Each checkpoint would draw a bar of its own through that of the training.
    transformers.utils.logging.disable_progress_bar()
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    transformers.utils.logging.enable_progress_bar()
    # Left to itself it would upload the run, before its metrics and its card are there.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    processes = trainer.args.world_size
    duration = f"{trainer.state.global_step} steps in {metrics['train_runtime']:.0f} s"
    return metrics, {
        "training": f"{duration} on {processes} process{'es' if processes > 1 else ''}",
        "attention": describe_attention(trainer.model),
    }
