"""Loading saved weights, tokenizers and image processors, with errors instead of silent replacements."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

# Older releases export a placeholder that asks for torchvision even if Pillow would do.
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: F401


Processor: TypeAlias = BaseImageProcessor | PreTrainedTokenizerBase
# Prefixes that torch.compile and DistributedDataParallel add to the names of weights.
WRAPPERS = ("_orig_mod.", "module.")
# The number of weights that a message names.
SHOWN_WEIGHTS = 3


def load_weights(name: str, model_class: Any, **options: Any) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Loads a model with its weights.

    Args:
        name (`str`): a folder, or a model on the Hub.
        model_class: such as [`~transformers.AutoModelForSequenceClassification`].
        options: passed to its `from_pretrained`.

    Returns:
        `tuple`: the model, and its loading info: which weights are missing, unexpected, or mismatched in shape.
        Transformers initializes missing and mismatched weights randomly.

    Raises:
        ValueError: if the weights cannot be read, or the config asks for something that the model does not support.
    """
    try:
        return model_class.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except ValueError:  # Raised for the config, with a message of its own.
        raise
    except Exception as error:  # Every file format has its own errors.
        reason = str(error).split(". ")[0].rstrip(".")
        raise ValueError(
            f"expected the model's weights in {name!r}, and they cannot be read: {type(error).__name__}"
            f"{f', {reason}' if reason else ''}. Copy or save them again. If Git LFS tracks the file, a checkout "
            "without LFS contains only a pointer: run `git lfs pull`."
        ) from error


def load_processor(name: str, processor_class: Any) -> Processor:
    """Loads a model's tokenizer or image processor.

    Args:
        name (`str`): a folder, or a model on the Hub.
        processor_class: [`~transformers.AutoTokenizer`] or [`~transformers.AutoImageProcessor`].

    Raises:
        ValueError: if it cannot be loaded, or its files are missing.
    """
    try:
        processor = processor_class.from_pretrained(name)
    except Exception as error:  # Every tokenizer has its own error for missing files.
        kind = processor_class.__name__.removeprefix("Auto")
        remedy = f" Save it there with {kind}.save_pretrained." if Path(name).exists() else ""
        raise ValueError(
            f"expected the model's own {kind} in {name!r}, and it cannot be loaded: {str(error).rstrip('.')}.{remedy}"
        ) from error
    if isinstance(processor, PreTrainedTokenizerBase):
        _check_vocabulary(name, processor)
    return processor


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises if Transformers created an empty tokenizer because the files are missing."""
    known = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    if len(known) < 2:  # Some families start with the word-boundary marker.
        raise ValueError(
            f"expected the model's own tokenizer in {name!r}, got a {type(tokenizer).__name__} with "
            f"{len(tokenizer)} special tokens and no others: its files are missing, and it would encode all texts "
            "alike. Save it there with tokenizer.save_pretrained."
        )


def check_channels(processor: BaseImageProcessor, config: PreTrainedConfig) -> None:
    """Checks that an image processor produces images with as many channels as the model takes.

    Raises:
        ValueError: if they differ, or the model takes neither 1 nor 3 channels.
    """
    kind, channels = type(processor).__name__, channels_of(config)
    mean = getattr(processor, "image_mean", None)
    is_rgb = getattr(processor, "do_convert_rgb", False) or (isinstance(mean, Sequence) and len(mean) == 3)
    if channels not in (1, 3) or (channels == 1 and is_rgb):
        raise ValueError(
            "expected a model and an image processor that both take 3 channels, or both 1, got a model for "
            f"{channels} and a {kind} with image_mean={mean}, do_convert_rgb="
            f"{getattr(processor, 'do_convert_rgb', None)}: its pixels would differ from those that the model was "
            "trained on. Save the model with the processor that it was trained with."
        )


def channels_of(config: PreTrainedConfig) -> int:
    """The number of channels of a model's images."""
    return getattr(config, "num_channels", 3)


def longest_text(model: PreTrainedModel) -> float:
    """The number of tokens that a model has positions for; infinite for a model without position embeddings.

    Models derived from RoBERTa number positions from after the padding index, so they take fewer tokens than
    `max_position_embeddings`.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    offsets = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return limit - max(offsets, default=0)


def describe_wrappers(unexpected: Iterable[str]) -> str | None:
    """The remedy for weights whose names have the prefix of a wrapper; `None` if none do."""
    keys = list(unexpected)
    if not (prefixes := [prefix for prefix in WRAPPERS if any(prefix in key for key in keys)]):
        return None
    return (
        f"The file has names with {' and '.join(map(repr, prefixes))} in front, which torch.compile and "
        "DistributedDataParallel add: save the unwrapped model, accelerator.unwrap_model(model)."
    )


def first_of(items: Iterable[str], shown: int) -> str:
    """The first items, separated by commas, for a message.

    >>> first_of(["a", "b", "c"], 2)
    'a, b, …'
    """
    first = list(islice(items, shown + 1))
    return ", ".join(first[:shown]) + (", …" if len(first) > shown else "")
