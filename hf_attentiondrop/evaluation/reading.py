"""Files of data, and data sets on the Hub, as `datasets` reads them, and the reason where it cannot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


READERS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
# Of a table only empty cells are missing: "nan" and "None" are words.
WORDS_ONLY = {"keep_default_na": False, "na_values": [""]}


def reader_of(path: str) -> tuple[str, dict[str, Any]] | None:
    """The builder of `datasets` that reads a table, and its options; `None` for a file of another kind.

    >>> reader_of("reviews.TSV")
    ('csv', {'keep_default_na': False, 'na_values': [''], 'sep': '\\t'})
    """
    suffix = Path(path).suffix[1:].lower()
    if suffix not in READERS:
        return None
    options = {**WORDS_ONLY, "sep": "\t" if suffix == "tsv" else ","} if READERS[suffix] == "csv" else {}
    return READERS[suffix], options


def load_splits(flag: str, name: str, *arguments: str | None, **options: Any) -> Any:
    """Loads data by [`~datasets.load_dataset`].

    Args:
        flag: what the user named the data by, for messages.
        name: the name that was given: a path, or a data set on the Hub.
        arguments, options: of `load_dataset`.

    Returns:
        [`~datasets.DatasetDict`]: every split.

    Raises:
        ValueError: if there is no such data, it is not in UTF-8, or it cannot be read.
    """
    from datasets import load_dataset, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # What it logs as an error, it raises as well.
    files = options.get("data_files", ())
    try:
        if arguments[:1] in (("json",), ("text",)):
            for path in files.values() if isinstance(files, Mapping) else (files,):
                _check_encoding(Path(path))
        return load_dataset(*arguments, **options)
    except Exception as error:  # Every reader has its own way to fail on a file.
        missing = "there is no such file or folder here, and as a data set on the Hub "
        missing = "" if files or Path(name).exists() else missing
        raise ValueError(f"{flag}: {missing}{name!r} cannot be loaded: {_reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


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
