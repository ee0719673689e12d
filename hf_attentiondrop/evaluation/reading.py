"""Data sets from files or the Hub, their columns and their values, with errors that say what cannot be read."""

from collections.abc import Callable, Mapping
from glob import escape
from pathlib import Path
from typing import Any


READERS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
# Only empty cells are missing values: "nan" and "None" are words.
WORDS_ONLY = {"keep_default_na": False, "na_values": [""]}


def reader_of(path: str) -> tuple[str, dict[str, Any]] | None:
    """The `datasets` builder that reads a table, and its options; `None` for a file of another kind.

    >>> reader_of("reviews.TSV")
    ('csv', {'keep_default_na': False, 'na_values': [''], 'sep': '\\t'})
    """
    suffix = Path(path).suffix[1:].lower()
    if suffix not in READERS:
        return None
    options = {**WORDS_ONLY, "sep": "\t" if suffix == "tsv" else ","} if READERS[suffix] == "csv" else {}
    return READERS[suffix], options


def load_splits(name: str, *arguments: str | None, **options: Any) -> Any:
    """Loads all splits of a data set with [`~datasets.load_dataset`].

    Args:
        name (`str`): a path, or a data set on the Hub, for the error message.
        arguments, options: passed to `load_dataset`.

    Returns:
        [`~datasets.DatasetDict`]: every split.

    Raises:
        ValueError: if the data does not exist, is not encoded in UTF-8, or cannot be read.
    """
    from datasets import load_dataset, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # It raises every error that it logs.
    files = options.get("data_files", ())
    try:
        if arguments[:1] in (("json",), ("text",)):
            for path in files.values() if isinstance(files, Mapping) else (files,):
                _check_encoding(Path(path))
        if files and arguments[:1] != ("imagefolder",):
            # The library takes paths for patterns.
            escaped = {split: escape(path) for split, path in files.items()} if isinstance(files, Mapping) else None
            options["data_files"] = escaped or escape(files)
        return load_dataset(*arguments, **options)
    except Exception as error:  # Every reader has its own errors.
        missing = "there is no such file or folder here, and as a data set on the Hub "
        missing = "" if files or Path(name).exists() else missing
        raise ValueError(f"{missing}{name!r} cannot be loaded: {_reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def check_column(dataset: Any, column: str, data: str = "the data") -> None:
    """Checks that a data set has a column.

    Args:
        dataset ([`~datasets.Dataset`]): to look in.
        column (`str`): its name.
        data (`str`, defaults to `"the data"`): how the message refers to the data set.

    Raises:
        ValueError: if it does not, with the columns that it has.
    """
    if column not in dataset.column_names:
        raise ValueError(
            f"{data} has no column {column!r}; its columns are {', '.join(dataset.column_names)}. Name one of them."
        )


def check_all_labelled(dataset: Any, column: str, data: str = "the data") -> None:
    """Checks that every sample has a label.

    Args:
        dataset ([`~datasets.Dataset`]): with the column.
        column (`str`): of labels.
        data (`str`, defaults to `"the data"`): how the message refers to the data set.

    Raises:
        ValueError: if a label is missing or empty, with the first such row.
    """
    names = getattr(dataset.features[column], "names", None)

    def is_missing(label: Any) -> bool:
        if isinstance(label, str):
            return not label.strip()
        return label is None or label != label or (names is not None and not 0 <= label < len(names))

    if any(map(is_missing, dataset.unique(column))):
        row = next(row for row, label in enumerate(dataset[column]) if is_missing(label))
        raise ValueError(
            f"{column!r} has samples without a label, as test splits often do, the first in row {row} of {data}, "
            "counted from 0: they can be neither learned nor measured. Choose another split, or remove them."
        )


def read_value(read: Callable[[Any], Any], value: Any, column: str, number: int, rows: str = "row") -> Any:
    """Reads the value of a sample in a column.

    Args:
        read (`Callable`): converts the stored value.
        value: as stored.
        column (`str`): its column.
        number (`int`): of the sample, counted from 0.
        rows (`str`, defaults to `"row"`): how the message refers to samples.

    Raises:
        ValueError: if it cannot be read, with the sample and its file, if it has one.

    Example:

    >>> read_value(int, "seven", "label", 3)
    Traceback (most recent call last):
    ValueError: row 3 of 'label', counted from 0: invalid literal for int() with base 10: 'seven'. ...
    """
    try:
        return read(value)
    except Exception as error:  # Every kind of image file has its own errors.
        path = value.get("path") if isinstance(value, Mapping) else None
        place = f"{rows} {number} of {column!r}, counted from 0" + (f", {path}" if path else "")
        raise ValueError(
            f"{place}: {str(error).rstrip('.')}. A value that cannot be read can be neither learned nor measured: "
            "repair it, or remove it."
        ) from error


def _check_encoding(path: Path) -> None:
    """Decodes a whole file: the reader would decode it only when a text is accessed."""
    with path.open(encoding="utf-8") as lines:
        for _ in lines:
            pass


def _reason(error: Exception) -> str:
    """Why data could not be loaded, with the remedy for known reasons."""
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        return f"it is not in UTF-8: {cause}. Save it as UTF-8."
    if type(cause).__name__ in ("StopIteration", "EmptyDataError") or "corresponds to no data" in str(cause):
        return "it has no rows. Name data with a sample in every row."
    return str(cause) or type(cause).__name__
