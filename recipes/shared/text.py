"""Code shared by the recipes for text: local files, checks of text and tokens, and a tokenizer."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Value
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_attentiondrop.evaluation.reading import READERS, reader_of

from .arguments import check_path
from .data import DatasetArguments, check_separate, load_from_hub, load_local


FILE_ENDINGS = (*(f".{suffix}" for suffix in READERS), ".txt")
TEXT_BUILDER = ("text", {"sample_by": "paragraph"})

UNKNOWN, PADDING, START, SEPARATOR = "[UNK]", "[PAD]", "[CLS]", "[SEP]"


@dataclass
class FileArguments(DatasetArguments):
    """Local files, as an alternative to a data set on the Hub."""

    train_file: str | None = field(
        default=None, metadata={"help": "File to train on: csv, tsv, json, jsonl, parquet or txt."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "File to evaluate on; by default a share of --train_file is held out."}
    )
    test_file: str | None = field(
        default=None, metadata={"help": "File to test the trained model on, once; by default it is not tested."}
    )


def load_text_data(arguments: FileArguments, built_in: Callable[[], Dataset]) -> DatasetDict:
    """Loads the data set of `--dataset_name`, the files of `--train_file`, `--validation_file` and `--test_file`, or
    built-in data.

    Args:
        arguments ([`FileArguments`]): of the recipe.
        built_in (`Callable`): returns the data for a run without arguments, which needs no download.

    Returns:
        [`~datasets.DatasetDict`]: `train`, and `validation` and `test` if there are such data.

    Raises:
        ValueError: if the arguments contradict each other, or the data cannot be read.
        FileNotFoundError: if a file does not exist.
    """
    if arguments.dataset_name and arguments.train_file:
        raise ValueError("--dataset_name and --train_file both name the data to train on: give one of them.")
    for flag in ("validation_file", "test_file"):
        if getattr(arguments, flag) and not arguments.train_file:
            raise ValueError(f"--{flag} needs --train_file, which is missing.")
    if arguments.dataset_name:
        return load_from_hub(arguments)
    if arguments.train_file:
        return load_files(arguments.train_file, arguments.validation_file, arguments.test_file)
    return DatasetDict(train=built_in())


def load_files(train_file: str, validation_file: str | None, test_file: str | None) -> DatasetDict:
    """Reads one file per split, all of the same type. In a txt file, empty lines separate the texts."""
    files = {"--train_file": train_file, "--validation_file": validation_file, "--test_file": test_file}
    for flag, path in files.items():
        check_path(flag, path, is_local=True)
        if path is not None and Path(path).suffix.lower() not in FILE_ENDINGS:
            raise ValueError(f"{flag}: expected a file that ends in {', '.join(FILE_ENDINGS)}, got {path}.")
    suffix = Path(train_file).suffix
    for flag, path in files.items():
        if path and Path(path).suffix != suffix:
            raise ValueError(f"{flag}: expected a {suffix} file, as --train_file is, got {path}.")
    check_separate("--validation_file", validation_file, train_file)
    check_separate("--test_file", test_file, train_file, validation_file)
    builder, options = reader_of(train_file) or TEXT_BUILDER
    return load_local(builder, files, **options)


def check_text(data: DatasetDict, flag: str, column: str) -> None:
    """Checks that a column has a text in every row.

    Args:
        data ([`~datasets.DatasetDict`]): the splits, with the column.
        flag (`str`): flag that names the column.
        column (`str`): the column.

    Raises:
        ValueError: if the column has another type, or rows without text.
    """
    for split, dataset in data.items():
        feature = dataset.features[column]
        if not isinstance(feature, Value) or "string" not in feature.dtype:
            raise ValueError(f"{flag}: expected text in {column!r}, the {split} data holds {feature} there.")
        missing = sum(text is None for text in dataset[column])
        if missing:
            raise ValueError(f"{flag}: {missing} rows of the {split} data have no text in {column!r}; remove them.")


def check_tokens(data: DatasetDict, model: PreTrainedModel, columns: Sequence[str] = ("input_ids",)) -> None:
    """Checks that the model has an embedding for each token; the tokenizer may be that of another model.

    Raises:
        ValueError: if a token has no embedding.
    """
    size = model.get_input_embeddings().num_embeddings
    for dataset in data.values():
        for column in columns:
            highest = pc.max(pc.list_flatten(dataset.data.column(column))).as_py() or 0
            if highest >= size:
                raise ValueError(
                    f"--model_name_or_path: expected a tokenizer whose tokens are numbered below {size}, for which "
                    f"the model has embeddings, got token {highest}: they do not belong together. Pass a model with "
                    "the tokenizer that it was trained with."
                )


def texts_at_limit(data: DatasetDict, max_length: int, columns: Sequence[str] = ("input_ids",)) -> str | None:
    """Says how many rows of each split have a text of as many tokens as are kept, whose rest is cut off.

    >>> data = Dataset.from_dict({"input_ids": [[1], [1]], "labels": [[1, 2, 3], [1]]})
    >>> texts_at_limit(DatasetDict(train=data), 3, ("input_ids", "labels"))
    '--max_length 3: 1 of 2 rows in train have a text of that many tokens; longer texts are cut there.'
    """
    counts = {}
    for split, dataset in data.items():
        reached = [pc.greater_equal(pc.list_value_length(dataset.data.column(name)), max_length) for name in columns]
        counts[split] = int(np.logical_or.reduce([each.to_numpy() for each in reached]).sum())
    if not any(counts.values()):
        return None
    shown = ", ".join(f"{count} of {len(data[split])} rows in {split}" for split, count in counts.items())
    return f"--max_length {max_length}: {shown} have a text of that many tokens; longer texts are cut there."


def train_encoder_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer for an encoder like BERT, with `[CLS]` before each text and `[SEP]` after it.

    It is a lower-case byte-level BPE. BERT's WordPiece would give processes different vocabularies, because its
    training depends on the order of a hash table.

    Args:
        texts (`Iterable[str]`): training texts.
        vocab_size (`int`): number of tokens, at least 256 bytes plus the special tokens.
        max_length (`int`): maximum number of tokens of the model.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PADDING, UNKNOWN, START, SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {SEPARATOR}",
        pair=f"{START} $A {SEPARATOR} $B:1 {SEPARATOR}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (START, SEPARATOR)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PADDING,
        unk_token=UNKNOWN,
        cls_token=START,
        sep_token=SEPARATOR,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
