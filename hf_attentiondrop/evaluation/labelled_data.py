"""Labelled data, from files or the Hub, as batches of a classifier's inputs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .checkpoint import Processor, channels_of, pads_alike


READERS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
# Of a table only empty cells are missing: "nan" and "None" are words.
WORDS_ONLY = {"keep_default_na": False, "na_values": [""]}
# What is evaluated on where no split is named, the first of them that there is.
SPLITS = ("test", "validation", "train")


def load_labelled(name: str, split: str | None = None, config: str | None = None) -> Any:
    """Loads one split of a data set.

    Args:
        name: a folder with one folder of images per class; a csv, tsv, json, jsonl or parquet file; or a data set on
            the Hub.
        split: which split; by default the first there is of test, validation and train.
        config: configuration of a data set on the Hub.

    In csv and tsv files only an empty cell is a missing value; words such as `None` are texts.

    Raises:
        ValueError: if there is no such data, no such split in it, no row, or a `config` of local data.
    """
    from datasets import load_dataset

    if not name:
        raise ValueError("--data: expected a folder, a file, or a data set on the Hub, got nothing. Name one.")
    path = Path(name)
    if config is not None and path.exists():
        raise ValueError(
            f"--config: only a data set on the Hub has configurations, and {name!r} lies here: {config!r} would be "
            "ignored. Leave it out."
        )
    if path.is_dir():
        arguments, options = ("imagefolder",), {"data_dir": name, "drop_labels": False}
    elif path.is_file():
        suffix = path.suffix[1:].lower()
        if suffix not in READERS:
            raise ValueError(f"--data: expected a file of one of {', '.join(READERS)}, got {name!r}.")
        arguments, options = (READERS[suffix],), {"data_files": name}
        if READERS[suffix] == "csv":
            options |= {**WORDS_ONLY, "sep": "\t" if suffix == "tsv" else ","}
    else:
        arguments, options = (name, config), {}
    try:
        if arguments == ("json",):
            _check_encoding(path)
        splits = load_dataset(*arguments, **options)
    except Exception as error:  # Every reader has its own way to fail on a file.
        missing = "" if path.exists() else "there is no such file or folder here, and as a data set on the Hub "
        raise ValueError(f"--data: {missing}{name!r} cannot be loaded: {_reason(error)}") from error
    chosen = split or next((known for known in SPLITS if known in splits), next(iter(splits)))
    if chosen not in splits:
        raise ValueError(f"--split: {name!r} has no split {chosen!r}; it has {', '.join(splits)}.")
    return splits[chosen]


def _check_encoding(path: Path) -> None:
    """Decodes a file, as its reader does only when a text is looked at."""
    with path.open(encoding="utf-8") as lines:
        for _ in lines:
            pass


def _reason(error: Exception) -> str:
    """Why data could not be loaded, and what to do where that is known."""
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        return f"it is not in UTF-8: {cause}. Save it as UTF-8."
    if type(cause).__name__ in ("StopIteration", "EmptyDataError") or "corresponds to no data" in str(cause):
        return "it has no rows. Name data with a sample in every row."
    return str(cause) or type(cause).__name__


def check_column(flag: str, column: str, dataset: Any) -> None:
    """Refuses a column, named by a flag, that the data does not have."""
    if column not in dataset.column_names:
        raise ValueError(
            f"{flag}: the data has no column {column!r}; its columns are {', '.join(dataset.column_names)}. Name one."
        )


def labelled_batches(
    dataset: Any,
    labels: Sequence[int],
    columns: Mapping[str, str],
    config: PreTrainedConfig,
    processor: Processor,
    batch_size: int = 32,
    order: Sequence[int] | None = None,
) -> DataLoader[Any]:
    """Batches of a classifier's inputs with `labels`.

    Texts come one by one where the model and its tokenizer do not agree on what padding is: a model that classifies
    by the last token would take padding for it.

    Args:
        dataset: of [`~datasets.Dataset`].
        labels: the class of each sample.
        columns: the column of images; or that of texts, and that of the second texts where there are pairs; each by
            the flag that names it.
        config: of the model.
        processor: its image processor or tokenizer.
        batch_size: samples per batch.
        order: numbers of the samples to take, in this order; by default all as they come.

    Raises:
        ValueError: for a column that is missing, or holds something else; and in going through the batches, for a
            sample that cannot be read.
    """
    for flag, column in columns.items():
        check_column(flag, column, dataset)
    # A row is read whole, and what the model does not take may be large, or broken.
    dataset = dataset.select_columns(list(dict.fromkeys(columns.values())))
    if isinstance(processor, PreTrainedTokenizerBase):
        encode, read = _encode_texts(processor, config), _read_text
        batch_size = batch_size if pads_alike(config, processor) else 1
    else:
        encode, read = _encode_images(processor), _image_reader(channels_of(config))
        dataset = _undecoded(dataset, columns)

    def collate(samples: list[tuple[list[Any], int]]) -> dict[str, Any]:
        inputs = encode(*map(list, zip(*(values for values, _ in samples), strict=True)))
        return {**inputs, "labels": torch.tensor([label for _, label in samples])}

    samples = _Samples(dataset, labels, columns, read, range(len(labels)) if order is None else order)
    return DataLoader(samples, batch_size=batch_size, collate_fn=collate)


class _Samples(Dataset):
    """The inputs of each sample, column by column, and its class."""

    def __init__(
        self,
        rows: Any,
        labels: Sequence[int],
        columns: Mapping[str, str],
        read: Callable[[Any], Any],
        order: Sequence[int],
    ) -> None:
        self.rows, self.labels, self.columns, self.read, self.order = rows, labels, columns, read, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[list[Any], int]:
        number = self.order[index]
        row = self.rows[number]
        return [self._value(number, flag, row[column]) for flag, column in self.columns.items()], self.labels[number]

    def _value(self, number: int, flag: str, value: Any) -> Any:
        try:
            return self.read(value)
        except Exception as error:  # Every kind of image file has its own way to be broken.
            path = value.get("path") if isinstance(value, Mapping) else None
            row = f"row {number} of {self.columns[flag]!r}, counted from 0" + (f", {path}" if path else "")
            raise ValueError(
                f"{flag}: {row}: {str(error).rstrip('.')}. What cannot be read cannot be measured: mend it, or remove "
                "it."
            ) from error


def _undecoded(dataset: Any, columns: Mapping[str, str]) -> Any:
    """The data with images that are still to be read, so that the file of one that cannot be read is known."""
    from datasets import Image

    for flag, column in columns.items():
        if not isinstance(dataset.features[column], Image):
            raise ValueError(
                f"{flag}: expected images in {column!r}, the column holds {dataset.features[column]}. Name another "
                f"one, or make it one of images and save that: dataset.cast_column({column!r}, datasets.Image())."
            )
        dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {value!r}")
    return value


def _image_reader(channels: int) -> Callable[[Any], Any]:
    from datasets import Image

    from .images import convert_image

    def read(value: Any) -> Any:
        if value is None:
            raise ValueError("expected an image, got None")
        return convert_image(Image().decode_example(value), channels)

    return read


def _encode_images(processor: Any) -> Callable[[list[Any]], Mapping[str, Tensor]]:
    def encode(images: list[Any]) -> Mapping[str, Tensor]:
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

    return encode


def _encode_texts(tokenizer: Any, config: PreTrainedConfig) -> Callable[..., Mapping[str, Tensor]]:
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)

    def encode(texts: list[str], pairs: list[str] | None = None) -> Mapping[str, Tensor]:
        inputs = dict(tokenizer(texts, pairs, truncation=True, padding=len(texts) > 1, return_tensors="pt"))
        if inputs["input_ids"].numel() == 0:
            raise ValueError(f"--text_column: expected texts of at least one token, got {texts}. Remove empty ones.")
        highest = inputs["input_ids"].max().item()
        if vocab_size is not None and highest >= vocab_size:
            raise ValueError(
                f"MODEL: expected a tokenizer whose tokens are numbered below {vocab_size}, for which the model has "
                f"embeddings, got token {highest}: they do not belong together. Save the model with the tokenizer "
                "that it was trained with."
            )
        return inputs

    return encode
