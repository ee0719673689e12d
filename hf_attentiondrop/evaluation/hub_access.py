"""Names of local paths or of repositories on the Hub, and a Hub that may be unreachable."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_session


# Suffixes of files that repositories on the Hub do not have.
FILE_SUFFIXES = (
    *(".arrow", ".bin", ".csv", ".gz", ".jpeg", ".jpg", ".json", ".jsonl", ".parquet", ".png", ".pt", ".pth"),
    *(".safetensors", ".tar", ".tsv", ".txt", ".xls", ".xlsx", ".yaml", ".yml", ".zip"),
)
# Seconds until the Hub counts as unreachable.
PATIENCE = 5.0


def check_path(name: str, expected: str) -> None:
    """Checks that a name which can only be a path exists, so that the Hub is not asked for it.

    Args:
        name (`str`): a path, or an id on the Hub.
        expected (`str`): what the name should stand for, in words.

    Raises:
        ValueError: for a path, or a name with the suffix of a file, that does not exist.
    """
    path = Path(name)
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    if not path.exists() and (looks_like_path or path.suffix.lower() in FILE_SUFFIXES):
        raise ValueError(f"expected {expected}; there is nothing at {name!r}.")


@contextmanager
def offline_if_cut_off(name: str) -> Iterator[None]:
    """Acts like `HF_HUB_OFFLINE=1`, which uses cached downloads, if the Hub does not answer a short request.

    Otherwise the libraries would retry six times, for half a minute, for each file.

    Args:
        name (`str`): an id on the Hub, or a path, for which no request is made.
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
        # A proxy answers with an error of its own if it cannot reach the Hub.
        return get_session().head(endpoint, timeout=PATIENCE).status_code < 500
    except Exception:  # From httpx or httpx2, depending on the release of huggingface_hub.
        return False


def _set_offline(is_offline: bool) -> None:
    constants.HF_HUB_OFFLINE = is_offline
    if "datasets" in sys.modules:  # It has a copy of the setting.
        import datasets

        datasets.config.HF_HUB_OFFLINE = is_offline
