"""Pairs of texts for translation, from a table with one column per language or from two txt files."""

from collections.abc import Callable
from dataclasses import dataclass, field

from datasets import Dataset, DatasetDict, concatenate_datasets

from .arguments import check_path
from .data import check_columns, check_separate, hold_out, load_local
from .text import FileArguments, check_text, load_text_data


# Name of the column with both languages in translation data sets on the Hub and in Transformers' examples.
NESTED_COLUMN = "translation"


@dataclass
class TranslationDataArguments(FileArguments):
    """A table with one column per language, or two txt files in which line n is the same text."""

    train_target_file: str | None = field(
        default=None, metadata={"help": "For a --train_file in txt: another one, with its lines translated."}
    )
    validation_target_file: str | None = field(
        default=None, metadata={"help": "For a --validation_file in txt: another one, with its lines translated."}
    )
    test_target_file: str | None = field(
        default=None, metadata={"help": "For a --test_file in txt: another one, with its lines translated."}
    )
    source_column: str = field(default="source", metadata={"help": "Column to translate from, such as en."})
    target_column: str = field(default="target", metadata={"help": "Column to translate to, such as de."})


def load_pairs(arguments: TranslationDataArguments, built_in: Callable[[str, str], Dataset]) -> DatasetDict:
    """Loads the pairs, and checks that both columns contain text.

    Args:
        arguments ([`TranslationDataArguments`]): of the recipe.
        built_in (`Callable`): returns the data for a run without arguments, given the names of its two columns.

    Returns:
        [`~datasets.DatasetDict`]: `train`, `validation`, and `test` if there are such data. No source that was held
        out is in the training data.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if the arguments contradict each other, or the data has no pairs of texts.
    """
    source, target = arguments.source_column, arguments.target_column
    if arguments.train_target_file or arguments.validation_target_file or arguments.test_target_file:
        data = _load_lines(arguments)
    else:
        data = _unnest(load_text_data(arguments, lambda: built_in(source, target)))
    columns = {"--source_column": source, "--target_column": target}
    check_columns(data, columns)
    for flag, column in columns.items():
        check_text(data, flag, column)
    if "validation" not in data or arguments.test_fraction:
        data = DatasetDict({**data, "train": drop_repeated(data["train"], source)})
    return hold_out(data, arguments)


def drop_repeated(dataset: Dataset, column: str) -> Dataset:
    """Keeps the first row of each text, so that none is in two splits."""
    first: dict[str, int] = {}
    for row, text in enumerate(dataset[column]):
        first.setdefault(text, row)
    return dataset.select(first.values())


def _load_lines(arguments: TranslationDataArguments) -> DatasetDict:
    if arguments.dataset_name:
        raise ValueError("--dataset_name and --train_target_file both name data to train on: give one of them.")
    files = {"train": (arguments.train_file, arguments.train_target_file)}
    if arguments.validation_file or arguments.validation_target_file:
        files["validation"] = (arguments.validation_file, arguments.validation_target_file)
    if arguments.test_file or arguments.test_target_file:
        files["test"] = (arguments.test_file, arguments.test_target_file)
        check_separate("--test_file", arguments.test_file, arguments.train_file, arguments.validation_file)
    data = DatasetDict({split: _pair_lines(split, *pair, arguments) for split, pair in files.items()})
    check_separate("--validation_file", arguments.validation_file, arguments.train_file)
    return data


def _pair_lines(
    split: str, source_file: str | None, target_file: str | None, arguments: TranslationDataArguments
) -> Dataset:
    files = {f"--{split}_file": source_file, f"--{split}_target_file": target_file}
    for flag, file in files.items():
        if file is None:
            raise ValueError(f"{' and '.join(files)} hold the two languages line by line: {flag} is missing.")
        check_path(flag, file, is_local=True)
    source, target = (load_local("text", {flag: file})["train"] for flag, file in files.items())
    if len(source) != len(target):
        raise ValueError(
            f"--{split}_target_file: line n must be the translation of line n, but {source_file} has {len(source)} "
            f"lines and {target_file} has {len(target)}."
        )
    columns = (
        source.rename_column("text", arguments.source_column),
        target.rename_column("text", arguments.target_column),
    )
    return concatenate_datasets(list(columns), axis=1)


def _unnest(data: DatasetDict) -> DatasetDict:
    """Splits a column of `{"en": ..., "de": ...}` into one column per language."""
    if NESTED_COLUMN not in data["train"].column_names:
        return data
    data = data.flatten()
    prefix = f"{NESTED_COLUMN}."
    nested = [name for name in data["train"].column_names if name.startswith(prefix)]
    return data.rename_columns({name: name.removeprefix(prefix) for name in nested})
