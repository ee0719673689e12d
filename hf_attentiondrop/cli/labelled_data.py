"""Labelled data, from files or the Hub, as batches of a classifier's inputs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..evaluation.images import encoded_images, read_image
from ..evaluation.pretrained import Processor
from ..evaluation.reading import READERS, load_splits, reader_of
from .checkpoint import channels_of, pads_alike


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
        if (reader := reader_of(name)) is None:
            raise ValueError(f"--data: expected a file of one of {', '.join(READERS)}, got {name!r}.")
        arguments, options = reader[:1], {"data_files": name, **reader[1]}
    else:
        arguments, options = (name, config), {}
    splits = load_splits("--data", name, *arguments, **options)
    chosen = split or next((known for known in SPLITS if known in splits), next(iter(splits)))
    if chosen not in splits:
        raise ValueError(f"--split: {name!r} has no split {chosen!r}; it has {', '.join(splits)}.")
    return splits[chosen]


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
        encode, read = _encode_images(processor), partial(read_image, channels=channels_of(config))
        for flag, column in columns.items():
            dataset = encoded_images(dataset, flag, column)

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
        values = [read_value(self.read, row[column], flag, column, number) for flag, column in self.columns.items()]
        return values, self.labels[number]


def read_value(read: Callable[[Any], Any], value: Any, flag: str, column: str, number: int, rows: str = "row") -> Any:
    """What a sample holds in a column.

    Args:
        read: makes the value of what is stored.
        value: what is stored.
        flag: names the column.
        column: its name.
        number: of the sample, counted from 0.
        rows: what a message calls it.

    Raises:
        ValueError: naming the sample, and its file where there is one, if it cannot be read.
    """
    try:
        return read(value)
    except Exception as error:  # Every kind of image file has its own way to be broken.
        path = value.get("path") if isinstance(value, Mapping) else None
        place = f"{rows} {number} of {column!r}, counted from 0" + (f", {path}" if path else "")
        raise ValueError(
            f"{flag}: {place}: {str(error).rstrip('.')}. What cannot be read can be neither learned nor measured: "
            "mend it, or remove it."
        ) from error


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {value!r}")
    return value


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
