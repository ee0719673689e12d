"""Labelled data from files or the Hub, as batches of inputs for a classifier."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..evaluation.images import encoded_images, read_image
from ..evaluation.pretrained import Processor, channels_of
from ..evaluation.reading import READERS, check_column, load_splits, read_value, reader_of
from .flags import naming_flag


# The first of these that exists is the default split.
SPLITS = ("test", "validation", "train")


def load_labelled(name: str, split: str | None = None, config: str | None = None) -> Any:
    """Loads one split of a data set.

    Args:
        name (`str`): a folder with one folder of images per class; a csv, tsv, json, jsonl or parquet file; or a data
            set on the Hub.
        split (`str`, *optional*): defaults to the first of test, validation and train that exists.
        config (`str`, *optional*): configuration of a data set on the Hub.

    In csv and tsv files only empty cells are missing values; words such as `None` are texts.

    Raises:
        ValueError: if the data or the split does not exist or is empty, and for a `config` with local data.
    """
    if not name:
        raise ValueError("--data: expected a folder, a file, or a data set on the Hub, got nothing. Name one.")
    path = Path(name)
    if config is not None and path.exists():
        raise ValueError(
            f"--config: only data sets on the Hub have configurations, and {name!r} is local: {config!r} would be "
            "ignored. Leave it out."
        )
    arguments: tuple[str | None, ...]
    options: dict[str, Any]
    if path.is_dir():
        arguments, options = ("imagefolder",), {"data_dir": name, "drop_labels": False}
    elif path.is_file():
        if (reader := reader_of(name)) is None:
            raise ValueError(f"--data: expected a file of one of {', '.join(READERS)}, got {name!r}.")
        arguments, options = reader[:1], {"data_files": name, **reader[1]}
    else:
        arguments, options = (name, config), {}
    with naming_flag("--data"):
        splits = load_splits(name, *arguments, **options)
    chosen = split or next((known for known in SPLITS if known in splits), next(iter(splits)))
    if chosen not in splits:
        raise ValueError(f"--split: {name!r} has no split {chosen!r}; it has {', '.join(splits)}.")
    return splits[chosen]


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

    The batch size is 1 for texts if the model and its tokenizer disagree on the padding token: a model that classifies
    by the last token would classify by a padding token.

    Args:
        dataset ([`~datasets.Dataset`]): the samples.
        labels (`Sequence[int]`): the class of each sample.
        columns (`Mapping[str, str]`): flag to column: of images, or of texts and optionally of the second texts.
        config ([`~transformers.PreTrainedConfig`]): of the model.
        processor: its image processor or tokenizer.
        batch_size (`int`, defaults to 32): samples per batch.
        order (`Sequence[int]`, *optional*): indices of the samples to take, in this order; all of them by default.

    Raises:
        ValueError: for a column that is missing or holds values of another kind; and during iteration, for a sample
            that cannot be read.
    """
    for flag, column in columns.items():
        with naming_flag(flag):
            check_column(dataset, column)
    # Rows are read whole, and other columns may be large or broken.
    dataset = dataset.select_columns(list(dict.fromkeys(columns.values())))
    if isinstance(processor, PreTrainedTokenizerBase):
        encode, read = _encode_texts(processor, config), _read_text
        batch_size = batch_size if _pads_alike(config, processor) else 1
    else:
        encode, read = _encode_images(processor), partial(read_image, channels=channels_of(config))
        for flag, column in columns.items():
            with naming_flag(flag):
                dataset = encoded_images(dataset, column)

    def collate(samples: list[tuple[list[Any], int]]) -> dict[str, Any]:
        inputs = encode(*map(list, zip(*(values for values, _ in samples), strict=True)))
        return {**inputs, "labels": torch.tensor([label for _, label in samples])}

    samples = _Samples(dataset, labels, columns, read, range(len(labels)) if order is None else order)
    return DataLoader(samples, batch_size=batch_size, collate_fn=collate)


class _Samples(Dataset):
    """The values of each sample, one per column, and its class."""

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
        values = []
        for flag, column in self.columns.items():
            with naming_flag(flag):
                values.append(read_value(self.read, row[column], column, number))
        return values, self.labels[number]


def _pads_alike(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether model and tokenizer agree on the padding token."""
    padding = config.get_text_config().pad_token_id
    return padding is not None and padding == tokenizer.pad_token_id


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
        options = {"truncation": True, "padding": len(texts) > 1, "return_tensors": "pt"}
        inputs = dict(tokenizer(texts, pairs, **options, return_attention_mask=True))
        lengths = inputs["attention_mask"].sum(dim=-1)
        inputs = {name: value for name, value in inputs.items() if name in tokenizer.model_input_names}
        if empty := [text for text, length in zip(texts, lengths, strict=True) if length == 0]:
            raise ValueError(
                f"--text_column: expected texts of at least one token, got {empty[0]!r}. Remove such rows."
            )
        highest = inputs["input_ids"].max().item()
        if vocab_size is not None and highest >= vocab_size:
            raise ValueError(
                f"MODEL: expected a tokenizer with token ids below {vocab_size}, for which the model has embeddings, "
                f"got token id {highest}: they do not belong together. Save the model with the tokenizer that it was "
                "trained with."
            )
        return inputs

    return encode
