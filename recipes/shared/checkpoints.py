"""The checkpoints of a run: which to continue from, which to delete, and how they get back into the model."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def find_checkpoint(arguments: TrainingArguments) -> str | None:
    """Finds the checkpoint that `--resume_from_checkpoint` asks for.

    Returns:
        `str`, *optional*: the checkpoint folder; `None` if none is asked for.

    Raises:
        ValueError: if it is not there, or incomplete.
    """
    asked = arguments.resume_from_checkpoint
    if asked is None:
        return None
    if asked == "last":
        place, checkpoint = arguments.output_dir, last_checkpoint(arguments.output_dir)
    else:
        place, checkpoint = asked, asked if _is_complete(Path(asked)) else None
    if checkpoint is None:
        raise ValueError(
            f"--resume_from_checkpoint: expected a folder with a complete checkpoint, found none in {place}. Without "
            "the flag the run starts from the beginning."
        )
    return checkpoint


def last_checkpoint(folder: str) -> str | None:
    """Finds the last complete checkpoint of the run in a folder."""
    complete = filter(_is_complete, Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    by_step = {int(path.name.rpartition("-")[2]): path for path in complete}
    return str(by_step[max(by_step)]) if by_step else None


def step_of(checkpoint: str | None) -> int:
    """The number of optimizer steps that a checkpoint was saved after; 0 without one."""
    if checkpoint is None:
        return 0
    return json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def _is_complete(checkpoint: Path) -> bool:
    """Whether the trainer state, which is written last, is all there: a run may be killed while it saves."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def delete_checkpoints(folder: str) -> None:
    """Deletes the checkpoints of an earlier run, which the new run would otherwise take for its own."""
    for checkpoint in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(checkpoint)


def accept_saved_weights(model: PreTrainedModel) -> None:
    """Lets `load_state_dict` take weights as `save_pretrained` writes them.

    Transformers saves some models, ViT among them, in the layout of the Hub, which differs from that in memory.
    `from_pretrained` converts it back; the Trainer, when it resumes or loads the best checkpoint, does not: it would
    warn that the weights do not fit and carry on with those it has.
    """
    model.register_load_state_dict_pre_hook(_convert_saved_weights)


def _convert_saved_weights(model: PreTrainedModel, state_dict: dict[str, Tensor], *_: Any) -> None:
    if state_dict.keys() <= model.state_dict().keys():
        return
    converted = type(model).from_pretrained(None, config=model.config, state_dict=dict(state_dict), dtype=model.dtype)
    state_dict.clear()
    state_dict.update(converted.state_dict())
