"""Names that may stand for something here or for something on the Hub, and a Hub that may be out of reach."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_session


# What files are called, and repositories of the Hub are not.
FILE_SUFFIXES = (
    *(".arrow", ".bin", ".csv", ".gz", ".jpeg", ".jpg", ".json", ".jsonl", ".parquet", ".png", ".pt", ".pth"),
    *(".safetensors", ".tar", ".tsv", ".txt", ".xls", ".xlsx", ".yaml", ".yml", ".zip"),
)
# Seconds until the Hub counts as out of reach.
PATIENCE = 5.0


def check_path(flag: str, name: str, expected: str) -> None:
    """Refuses a name that can only be a path, and leads nowhere: the Hub need not be asked for it.

    Args:
        flag: what the user gave the name by.
        name: a path, or an id on the Hub.
        expected: what the user was asked for, in words.

    Raises:
        ValueError: for a path, or a name with the suffix of a file, where there is nothing.
    """
    path = Path(name)
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    if not path.exists() and (looks_like_path or path.suffix.lower() in FILE_SUFFIXES):
        raise ValueError(f"{flag}: expected {expected}; there is nothing at {name!r}.")


@contextmanager
def offline_if_cut_off(name: str) -> Iterator[None]:
    """Runs as under `HF_HUB_OFFLINE=1`, on what was downloaded before, where the Hub does not answer a short request.

    The libraries would try six times, for half a minute, and for each of the files that they look for.

    Args:
        name: a path, for which the Hub is not asked, or an id on the Hub.
    """
    if constants.HF_HUB_OFFLINE or Path(name).exists() or _answers(constants.ENDPOINT):
        yield
        return
    try:
        _set_offline(True)
        yield
    finally:
        _set_offline(False)


def _answers(endpoint: str) -> bool:
    try:
        # A proxy answers for a Hub that it cannot reach.
        return get_session().head(endpoint, timeout=PATIENCE).status_code < 500
    except Exception:  # Of httpx or httpx2, as the release of huggingface_hub has it.
        return False


def _set_offline(is_offline: bool) -> None:
    constants.HF_HUB_OFFLINE = is_offline
    if "datasets.config" in sys.modules:  # It has a copy of the setting.
        sys.modules["datasets.config"].HF_HUB_OFFLINE = is_offline
