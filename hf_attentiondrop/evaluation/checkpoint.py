"""A saved classifier, and labelled data to measure it on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)


AUTO_CLASSES = {
    "ForImageClassification": (AutoModelForImageClassification, AutoImageProcessor),
    "ForSequenceClassification": (AutoModelForSequenceClassification, AutoTokenizer),
}
READERS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
# What is evaluated on where no split is named, the first of them that there is.
SPLITS = ("test", "validation", "train")
# Tokenizers that know no longest text say a number that is larger still.
NO_MAX_LENGTH = 10**9


def load_classifier(name: str) -> tuple[PreTrainedModel, Any]:
    """Loads a classifier of images or texts, and its image processor or tokenizer.

    A checkpoint whose config has an `attention_drop` entry runs `"attentiondrop"`, so that its report can name it.

    Args:
        name: a folder, or a model on the Hub.

    Raises:
        ValueError: for a checkpoint that is no such classifier.
        OSError: if there is none.
    """
    if Path(name, "adapter_config.json").exists():
        raise ValueError(
            f"MODEL: {name} holds a PEFT adapter, expected a whole model. Load it with PEFT, call "
            "merge_and_unload(), and save what that returns."
        )
    config = AutoConfig.from_pretrained(name)
    architecture = next(iter(config.architectures or []), "")
    classes = [classes for suffix, classes in AUTO_CLASSES.items() if architecture.endswith(suffix)]
    if not classes or config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
        raise ValueError(
            f"MODEL: expected a classifier of images or texts with one label per sample, got {architecture or 'none'} "
            f"with problem_type={config.problem_type!r} and {config.num_labels} labels: without one right class per "
            "sample there is no calibration to measure."
        )
    is_dropping = config.attention_drop is not None and config.attention_reweighting is None
    options = {"attn_implementation": "attentiondrop"} if is_dropping else {}
    model_class, processor_class = classes[0]
    model, processor = model_class.from_pretrained(name, **options), processor_class.from_pretrained(name)
    longest = getattr(config, "max_position_embeddings", None)
    if longest and getattr(processor, "model_max_length", 0) > NO_MAX_LENGTH:
        processor.model_max_length = longest
    return model, processor


def load_labelled(name: str, split: str | None = None, config: str | None = None) -> Any:
    """Loads one split of a data set.

    Args:
        name: a folder with one folder of images per class; a csv, tsv, json, jsonl or parquet file; or a data set on
            the Hub.
        split: which split; by default the first there is of test, validation and train.
        config: configuration of a data set on the Hub.

    Raises:
        ValueError: if there is no such data, or no such split in it.
    """
    from datasets import load_dataset

    path = Path(name)
    if path.is_dir():
        arguments, options = ("imagefolder",), {"data_dir": name, "drop_labels": False}
    elif path.is_file():
        suffix = path.suffix[1:].lower()
        if suffix not in READERS:
            raise ValueError(f"--data: expected a file of one of {', '.join(READERS)}, got {name!r}.")
        arguments, options = (READERS[suffix],), {"data_files": name}
        options |= {"sep": "\t"} if suffix == "tsv" else {}
    else:
        arguments, options = (name, config), {}
    try:
        splits = load_dataset(*arguments, **options)
    except Exception as error:  # Every reader has its own way to fail on a file.
        raise ValueError(f"--data: {name!r} cannot be loaded: {error.__cause__ or error}") from error
    chosen = split or next((known for known in SPLITS if known in splits), next(iter(splits)))
    if chosen not in splits:
        raise ValueError(f"--split: {name!r} has no split {chosen!r}; it has {', '.join(splits)}.")
    return splits[chosen]


def class_numbers(dataset: Any, column: str, config: PreTrainedConfig) -> list[int]:
    """The model's number of each sample's class.

    Names are looked up in the model's own, so that data which numbers its classes in another order is measured
    rightly; a number may be the name of a class, too. Other numbers are taken as they are.

    Raises:
        ValueError: for a column that is missing, and names that the model does not know.
    """
    if column not in dataset.column_names:
        raise ValueError(
            f"--label_column: the data has no column {column!r}; its columns are {', '.join(dataset.column_names)}."
        )
    labels, names = dataset[column][:], getattr(dataset.features[column], "names", None)
    if any(label is None or (names is not None and not 0 <= label < len(names)) for label in labels):
        raise ValueError(
            f"--label_column: {column!r} has samples without a label, as test splits often do: nothing can be "
            "measured on them. Take another split, or remove them."
        )
    if names is not None and not all(name.startswith("LABEL_") for name in config.label2id):
        labels = [names[label] for label in labels]
    if all(str(label) in config.label2id for label in labels):
        return [config.label2id[str(label)] for label in labels]
    if all(isinstance(label, int) for label in labels):
        return labels
    unknown = sorted({str(label) for label in labels if str(label) not in config.label2id})
    raise ValueError(
        f"--label_column: {column!r} has classes that the model does not know, {', '.join(unknown[:5])}; it knows "
        f"{', '.join(config.label2id)}. Evaluate it on data of its own classes."
    )


def labelled_batches(
    dataset: Any, labels: Sequence[int], columns: Sequence[str], processor: Any, batch_size: int = 32
) -> DataLoader[Any]:
    """Batches of a classifier's inputs with `labels`.

    Args:
        dataset: of [`~datasets.Dataset`].
        labels: the class of each sample.
        columns: the column of images; or that of texts, and that of the second texts where there are pairs.
        processor: image processor or tokenizer of the model.
        batch_size: samples per batch.

    Raises:
        ValueError: for a column that is missing.
    """
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(f"The data has no column {column!r}; its columns are {', '.join(dataset.column_names)}.")
    is_text = hasattr(processor, "pad_token")
    encode: Callable[[Any], Mapping[str, Any]] = _encode_texts(processor) if is_text else _encode_images(processor)

    def collate(rows: list[tuple[Mapping[str, Any], int]]) -> dict[str, Any]:
        inputs = encode(*([row[column] for row, _ in rows] for column in columns))
        return {**inputs, "labels": torch.tensor([label for _, label in rows])}

    return DataLoader(_Labelled(dataset, labels), batch_size=batch_size, collate_fn=collate)


class _Labelled(Dataset):
    def __init__(self, rows: Any, labels: Sequence[int]) -> None:
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Mapping[str, Any], int]:
        return self.rows[index], self.labels[index]


def _encode_images(processor: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
    def encode(images: list[Any]) -> Mapping[str, Any]:
        return {"pixel_values": processor([i.convert("RGB") for i in images], return_tensors="pt")["pixel_values"]}

    return encode


def _encode_texts(tokenizer: Any) -> Callable[..., Mapping[str, Any]]:
    def encode(texts: list[str], pairs: list[str] | None = None) -> Mapping[str, Any]:
        for text in (*texts, *(pairs or ())):
            if not isinstance(text, str):
                raise ValueError(f"--text_column: expected a text for every sample, got {text!r}.")
        return dict(tokenizer(texts, pairs, truncation=True, padding=True, return_tensors="pt"))

    return encode
