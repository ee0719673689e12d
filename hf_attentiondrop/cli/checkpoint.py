"""A saved classifier, with the tokenizer or image processor that it was trained with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor

from ..evaluation.pretrained import (
    SHOWN_WEIGHTS,
    AutoImageProcessor,
    Processor,
    describe_wrappers,
    first_of,
    load_processor,
    load_weights,
)


AUTO_CLASSES = {
    "ForImageClassification": (AutoModelForImageClassification, AutoImageProcessor),
    "ForSequenceClassification": (AutoModelForSequenceClassification, AutoTokenizer),
}


def load_config(name: str, expected: str) -> PreTrainedConfig:
    """Loads the config of a model, and nothing else of it.

    Args:
        name: a folder, the path of a config.json, or a model on the Hub.
        expected: what the user was asked for, in words.

    Raises:
        ValueError: if there is none, or none that can be read.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        is_adapter = (path / "adapter_config.json").is_file()
        hint = " It holds a PEFT adapter: check the model that the adapter was trained on." if is_adapter else ""
        raise ValueError(f"MODEL: expected {expected}; the folder {name!r} has no config.json.{hint}")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2):
        raise ValueError(f"MODEL: expected {expected}; there is nothing at {name!r}.")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # A file can hold anything, and every config class has its own way to fail on it.
        missing = "" if path.exists() else "is no folder here, and "
        raise ValueError(f"MODEL: expected {expected}; {name!r} {missing}cannot be read as one: {error}") from error


def load_classifier(name: str) -> tuple[PreTrainedModel, Processor]:
    """Loads a classifier of images or texts, and its image processor or tokenizer.

    A checkpoint whose config has an `attention_drop` entry runs `"attentiondrop"`, so that its report can name it.

    Args:
        name: a folder, or a model on the Hub.

    Raises:
        ValueError: if there is none, for a checkpoint that is no such classifier, and for a tokenizer or an image
            processor that is missing or another model's, and for weights that cannot be read, or are not all there.
    """
    config = _load_classifier_config(name)
    architecture = next(iter(config.architectures or []), "")
    classes = [classes for suffix, classes in AUTO_CLASSES.items() if architecture.endswith(suffix)]
    if not classes or config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
        raise ValueError(
            f"MODEL: expected a classifier of images or texts with one label per sample, got {architecture or 'none'} "
            f"with problem_type={config.problem_type!r} and {config.num_labels} labels: without one right class per "
            "sample there is no calibration to measure."
        )
    model_class, processor_class = classes[0]
    processor = load_processor("MODEL", name, processor_class)
    if isinstance(processor, BaseImageProcessor):
        check_channels("MODEL", processor, config)
    is_dropping = config.attention_drop is not None and config.attention_reweighting is None
    options = {"attn_implementation": "attentiondrop"} if is_dropping else {}
    model, loaded = load_weights("MODEL", name, model_class, **options)
    _check_weights(name, loaded)
    if isinstance(processor, PreTrainedTokenizerBase):
        processor.model_max_length = min(processor.model_max_length, longest_text(model))
    return model, processor


def longest_text(model: PreTrainedModel) -> int:
    """How many tokens a model has positions for; one that counts no positions has no limit of its own.

    Models after RoBERTa begin to count behind their padding token, and can use that many positions less than their
    config says.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    offsets = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return limit - max(offsets, default=0)


def pads_alike(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model takes for padding what its tokenizer pads with."""
    padding = config.get_text_config().pad_token_id
    return padding is not None and padding == tokenizer.pad_token_id


def _load_classifier_config(name: str) -> PreTrainedConfig:
    if Path(name, "adapter_config.json").exists():
        raise ValueError(
            f"MODEL: {name} holds a PEFT adapter, expected a whole model. Load it with PEFT, call "
            "merge_and_unload(), and save what that returns."
        )
    expected = "a folder with a saved classifier, or a classifier on the Hub"
    if Path(name).is_file():
        raise ValueError(
            f"MODEL: expected {expected}; {name!r} is a file, and weights and tokenizer or image processor are needed "
            "as well. Name the folder that it lies in."
        )
    return load_config(name, expected)


def _check_weights(name: str, loaded: Mapping[str, Any]) -> None:
    """Refuses weights that Transformers replaced by random ones, of which it only warns."""
    if missing := sorted(loaded["missing_keys"]):
        remedy = (
            describe_wrappers(loaded["unexpected_keys"])
            or "Measure a checkpoint that holds them all: a base model has no head before it is fine-tuned."
        )
        raise ValueError(
            f"MODEL: expected all weights of the model in {name!r}, {len(missing)} of them are not there, "
            f"{first_of(missing, SHOWN_WEIGHTS)}: random numbers would stand for them, and be measured. {remedy}"
        )
    if mismatched := sorted(loaded["mismatched_keys"]):
        shapes = (f"{key} {tuple(got)} where the config makes it {tuple(made)}" for key, got, made in mismatched)
        raise ValueError(
            f"MODEL: expected weights of the shapes that the config of {name!r} says, got "
            f"{first_of(shapes, SHOWN_WEIGHTS)}: random numbers would stand for them, and be measured. Put "
            "the config.json beside them that they were saved with; where the classes differ, its id2label."
        )


def check_channels(flag: str, processor: BaseImageProcessor, config: PreTrainedConfig) -> None:
    """Refuses an image processor that makes other images than the model takes.

    Args:
        flag: what the user named the model by.
        processor: of the model.
        config: of the model.

    Raises:
        ValueError: if they differ, or the model takes images of other than 1 or 3 channels.
    """
    kind, channels = type(processor).__name__, channels_of(config)
    mean = getattr(processor, "image_mean", None)
    makes_colours = getattr(processor, "do_convert_rgb", False) or (isinstance(mean, Sequence) and len(mean) == 3)
    if channels not in (1, 3) or (channels == 1 and makes_colours):
        raise ValueError(
            f"{flag}: expected a model and an image processor for images of 3 channels each, or of 1 each, got a "
            f"model for {channels} and a {kind} with image_mean={mean}, do_convert_rgb="
            f"{getattr(processor, 'do_convert_rgb', None)}: it would not make the pixels that the model was trained "
            "on. Save the model with the processor that it was trained with."
        )


def channels_of(config: PreTrainedConfig) -> int:
    """How many channels the images of a model have."""
    return getattr(config, "num_channels", 3)
