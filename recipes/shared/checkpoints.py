"""Checkpoints of a run: finding, deleting and loading them."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_CONFIG_NAME


def find_checkpoint(arguments: TrainingArguments) -> str | None:
    """Finds the checkpoint of `--resume_from_checkpoint`.

    Returns:
        `str`, *optional*: the checkpoint folder; `None` without the flag.

    Raises:
        ValueError: if it does not exist or is incomplete.
    """
    requested = arguments.resume_from_checkpoint
    if requested is None:
        return None
    if requested == "last":
        location, checkpoint = arguments.output_dir, last_checkpoint(arguments.output_dir)
    else:
        location, checkpoint = requested, requested if _is_complete(Path(requested)) else None
    if checkpoint is None:
        raise ValueError(
            f"--resume_from_checkpoint: expected a folder with a complete checkpoint, found none in {location}. "
            "Without the flag the run starts from the beginning."
        )
    return checkpoint


def last_checkpoint(folder: str) -> str | None:
    """Finds the last complete checkpoint of the run in a folder."""
    complete = filter(_is_complete, Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    by_step = {int(path.name.rpartition("-")[2]): path for path in complete}
    return str(by_step[max(by_step)]) if by_step else None


def step_of(checkpoint: str | None) -> int:
    """The optimizer step at which a checkpoint was saved; 0 for `None`."""
    if checkpoint is None:
        return 0
    return json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def _is_complete(checkpoint: Path) -> bool:
    """Whether the trainer state, which is written last, is complete: a run may be killed while saving."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def delete_checkpoints(folder: str) -> None:
    """Deletes the checkpoints of an earlier run, which the new run would otherwise resume from or rotate."""
    for checkpoint in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(checkpoint)


def delete_model(folder: str) -> None:
    """Deletes the model or adapter of an earlier run, which would be taken for that of the new one."""
    for pattern in ("*.safetensors", "*.safetensors.index.json", ADAPTER_CONFIG_NAME):
        for file in Path(folder).glob(pattern):
            file.unlink()


def accept_saved_weights(model: PreTrainedModel) -> None:
    """Lets `load_state_dict` take weights as `save_pretrained` writes them.

    Transformers saves some models, such as ViT, in the layout of the Hub, which differs from the layout in memory.
    `from_pretrained` converts it back. The Trainer does not when it resumes or loads the best checkpoint: it would
    warn about unexpected keys and keep the weights in memory.
    """
    model.register_load_state_dict_pre_hook(_convert_saved_weights)


def _convert_saved_weights(model: PreTrainedModel, state_dict: dict[str, Tensor], *_: Any) -> None:
    if state_dict.keys() <= model.state_dict().keys():
        return
    converted = type(model).from_pretrained(None, config=model.config, state_dict=dict(state_dict), dtype=model.dtype)
    state_dict.clear()
    state_dict.update(converted.state_dict())
