"""Loading a saved classifier with the tokenizer or image processor that it was trained with."""

from collections.abc import Mapping
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

from ..evaluation.hub_access import check_path
from ..evaluation.pretrained import (
    SHOWN_WEIGHTS,
    AutoImageProcessor,
    Processor,
    check_channels,
    describe_wrappers,
    first_of,
    load_processor,
    load_weights,
    longest_text,
)


AUTO_CLASSES = {
    "ForImageClassification": (AutoModelForImageClassification, AutoImageProcessor),
    "ForSequenceClassification": (AutoModelForSequenceClassification, AutoTokenizer),
}


def load_config(name: str, expected: str) -> PreTrainedConfig:
    """Loads only the config of a model.

    Args:
        name (`str`): a folder, the path of a config.json, or a model on the Hub.
        expected (`str`): what the name should stand for, in words.

    Raises:
        ValueError: if the config does not exist or cannot be read.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        is_adapter = (path / "adapter_config.json").is_file()
        hint = " It holds a PEFT adapter: check the model that the adapter was trained on." if is_adapter else ""
        raise ValueError(f"expected {expected}; the folder {name!r} has no config.json.{hint}")
    check_path(name, expected)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # A file can hold anything, and every config class has its own errors.
        missing = "" if path.exists() else "is no folder here, and "
        raise ValueError(f"expected {expected}; {name!r} {missing}cannot be read as one: {error}") from error


def load_classifier(name: str) -> tuple[PreTrainedModel, Processor]:
    """Loads an image or text classifier, and its image processor or tokenizer.

    A checkpoint whose config has an `attention_drop` entry runs `"attentiondrop"`, so that its report can name it.

    Args:
        name (`str`): a folder, or a model on the Hub.

    Raises:
        ValueError: if the checkpoint does not exist or is not such a classifier; if its tokenizer or image processor
            is missing or belongs to another model; if weights cannot be read or are missing.
    """
    config = _load_classifier_config(name)
    architecture = next(iter(config.architectures or []), "")
    classes = [classes for suffix, classes in AUTO_CLASSES.items() if architecture.endswith(suffix)]
    if not classes or config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
        raise ValueError(
            f"expected a classifier of images or texts with one label per sample, got {architecture or 'none'} "
            f"with problem_type={config.problem_type!r} and {config.num_labels} labels: without one right class per "
            "sample there is no calibration to measure. Name a classifier."
        )
    model_class, processor_class = classes[0]
    processor = load_processor(name, processor_class)
    if isinstance(processor, BaseImageProcessor):
        check_channels(processor, config)
    is_perturbed = config.attention_drop is not None and config.attention_reweighting is None
    options = {"attn_implementation": "attentiondrop"} if is_perturbed else {}
    model, loaded = load_weights(name, model_class, **options)
    _check_weights(name, loaded)
    if isinstance(processor, PreTrainedTokenizerBase):
        processor.model_max_length = min(processor.model_max_length, longest_text(model))
    return model, processor


def _load_classifier_config(name: str) -> PreTrainedConfig:
    if Path(name, "adapter_config.json").exists():
        raise ValueError(
            f"{name} holds a PEFT adapter, expected a whole model. Load it with PEFT, call merge_and_unload(), and "
            "save the merged model."
        )
    expected = "a folder with a saved classifier, or a classifier on the Hub"
    if Path(name).is_file():
        raise ValueError(
            f"expected {expected}; {name!r} is a file, and weights and tokenizer or image processor are needed "
            "as well. Name its folder."
        )
    return load_config(name, expected)


def _check_weights(name: str, loaded: Mapping[str, Any]) -> None:
    """Raises for weights that Transformers initialized randomly, about which it only warns."""
    if missing := sorted(loaded["missing_keys"]):
        remedy = (
            describe_wrappers(loaded["unexpected_keys"])
            or "Measure a checkpoint with all weights: a base model has no head before it is fine-tuned."
        )
        raise ValueError(
            f"expected all weights of the model in {name!r}, {len(missing)} are missing, "
            f"{first_of(missing, SHOWN_WEIGHTS)}: they would be initialized randomly, and random weights would be "
            f"measured. {remedy}"
        )
    if mismatched := sorted(loaded["mismatched_keys"]):
        shapes = (f"{key} {tuple(saved)} instead of {tuple(built)}" for key, saved, built in mismatched)
        raise ValueError(
            f"expected weights of the shapes in the config of {name!r}, got {first_of(shapes, SHOWN_WEIGHTS)}: they "
            "would be initialized randomly, and random weights would be measured. Restore the config.json that was "
            "saved with them; if the classes differ, its id2label."
        )
