"""Saved weights, tokenizers and image processors, refused with the reason where they cannot be used.

Messages begin with what the user named the model by, so that a program with another command line can use them.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

# Older releases export a placeholder that asks for torchvision, also where Pillow would do.
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: F401


Processor = BaseImageProcessor | PreTrainedTokenizerBase
# What torch.compile and DistributedDataParallel put before the name of a weight.
WRAPPERS = ("_orig_mod.", "module.")
# Of the weights in a message.
SHOWN_WEIGHTS = 3


def load_weights(flag: str, name: str, model_class: Any, **options: Any) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Loads a model with its weights.

    Args:
        flag: what the user named the model by.
        name: a folder, or a model on the Hub.
        model_class: such as [`~transformers.AutoModelForSequenceClassification`].
        options: of its `from_pretrained`.

    Returns:
        `tuple`: the model, and which weights are missing, unexpected, and of another shape; random numbers stand for
        the missing ones and those of another shape.

    Raises:
        ValueError: if the weights cannot be read, or the config asks for what its model does not have.
    """
    try:
        return model_class.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except ValueError:  # The config asks for what its model does not have.
        raise
    except Exception as error:  # Every format has its own way to fail on a file.
        reason = str(error).split(". ")[0].rstrip(".")
        raise ValueError(
            f"{flag}: expected the model's weights in {name!r}, and they cannot be read: {type(error).__name__}"
            f"{f', {reason}' if reason else ''}. Copy or save them again, whole; of a file that Git LFS keeps, a "
            "checkout without it holds but a few lines: fetch it by `git lfs pull`."
        ) from error


def load_processor(flag: str, name: str, processor_class: type) -> Processor:
    """Loads a model's tokenizer or image processor.

    Args:
        flag: what the user named the model by.
        name: a folder, or a model on the Hub.
        processor_class: [`~transformers.AutoTokenizer`] or [`~transformers.AutoImageProcessor`].

    Raises:
        ValueError: if there is none, or one without its files.
    """
    try:
        processor = processor_class.from_pretrained(name)
    except Exception as error:  # Every tokenizer has its own way to miss its files.
        kind = processor_class.__name__.removeprefix("Auto")
        remedy = f" Save it there: {kind}.save_pretrained." if Path(name).exists() else ""
        raise ValueError(
            f"{flag}: expected the model's own {kind} in {name!r}, and it cannot be loaded: "
            f"{str(error).rstrip('.')}.{remedy}"
        ) from error
    if isinstance(processor, PreTrainedTokenizerBase):
        _check_vocabulary(flag, name, processor)
    return processor


def _check_vocabulary(flag: str, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses what Transformers makes up where the files of a tokenizer are missing."""
    known = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    if len(known) < 2:  # Some families begin with the mark of a new word.
        raise ValueError(
            f"{flag}: expected the model's own tokenizer in {name!r}, got a {type(tokenizer).__name__} that knows "
            f"nothing but {len(tokenizer)} special tokens: its files are missing, and to it every text would be the "
            "same. Save it there: tokenizer.save_pretrained."
        )


def describe_wrappers(unexpected: Iterable[str]) -> str | None:
    """What to do about weights whose names begin with that of a wrapper; `None` where none do."""
    keys = list(unexpected)
    if not (prefixes := [prefix for prefix in WRAPPERS if any(prefix in key for key in keys)]):
        return None
    return (
        f"What is there has names with {' and '.join(map(repr, prefixes))} in front, as torch.compile and "
        "DistributedDataParallel write them: save the model inside, accelerator.unwrap_model(model)."
    )


def first_of(items: Iterable[str], shown: int) -> str:
    """The first of some items, for a message."""
    first = list(islice(items, shown + 1))
    return ", ".join(first[:shown]) + (", …" if len(first) > shown else "")
