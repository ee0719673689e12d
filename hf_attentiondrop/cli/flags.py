"""Errors that name the flag behind them. Library functions name no flag: they have other callers."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager


INVALID_INPUT = 2


class CommandError(Exception):
    """Ends a command with one line on stderr.

    Args:
        message (`str`): what was expected, what came, and what to do.
        code (`int`, defaults to 2): the exit code; 2 means that the input cannot be used.
    """

    def __init__(self, message: str, code: int = INVALID_INPUT) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def naming_flag(flag: str) -> Iterator[None]:
    """Prefixes the message of a `ValueError` with the flag that caused it.

    Args:
        flag (`str`): such as `"--data"`, or the name of a positional argument.

    Raises:
        ValueError: from the body, with the flag in front.

    Example:

    >>> with naming_flag("--data"):
    ...     raise ValueError("'reviews.csv' has no rows.")
    Traceback (most recent call last):
    ValueError: --data: 'reviews.csv' has no rows.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error


def one_line(error: Exception) -> str:
    """The message of an error, with line breaks and runs of spaces collapsed."""
    return " ".join(str(error).split())


def positive(text: str) -> int:
    """The type of a flag that takes an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}.")
    return int(text)
