"""Locking of the output folder while a run writes into it, and one-line exits when the run is interrupted."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainingArguments

from .checkpoints import last_checkpoint
from .output import LOCK_FILE, check_output_dir
from .parser import RecipeParser


INTERRUPTED = 130
FAILED = 1
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Messages of safetensors (with the errno) and torch for failed writes, which are not raised as OSError.
FAILED_WRITES = re.compile(rf"(os error|code:) ({'|'.join(map(str, NO_ROOM))})\b|PytorchStreamWriter|unexpected pos")


@contextmanager
def owning_output_dir(parser: RecipeParser, arguments: TrainingArguments) -> Iterator[str | None]:
    """Locks the output folder, and exits with one line if the run is interrupted or the disk is full.

    The operating system releases the lock when the process ends, even if it is killed.

    Args:
        parser ([`RecipeParser`]): of the run.
        arguments ([`~transformers.TrainingArguments`]): of the run.

    Yields:
        `str`, *optional*: the checkpoint to resume from.

    Raises:
        SystemExit:
            With one line on stderr: code 2 if another run writes into the folder, 130 after Ctrl-C, 1 if a file cannot
            be written.
    """
    with parser.exiting_on_bad_input():
        lock = _lock(arguments)
    try:
        with parser.exiting_on_bad_input():
            # Another run may have finished in the folder since the first check.
            checkpoint = check_output_dir(arguments)
        yield checkpoint
    except KeyboardInterrupt:
        _end_progress_bar(arguments)
        parser.stop(INTERRUPTED, f"interrupted. {_way_to_continue(arguments.output_dir)}")
    except Exception as error:
        if (reason := _failed_write(error)) is None:
            raise
        _end_progress_bar(arguments)
        parser.stop(
            FAILED,
            f"error: a file in {arguments.output_dir} cannot be written: {reason}. Make room on that disk. "
            f"{_way_to_continue(arguments.output_dir)}",
        )
    finally:
        if lock is not None:
            # Before the release: afterwards another run may have locked the file. Windows cannot delete an open file.
            with suppress(OSError):
                Path(lock.lock_file).unlink()
            lock.release()


def _lock(arguments: TrainingArguments) -> FileLock | None:
    """Locks the output folder, in the process that writes the record of the run."""
    lock = None
    if arguments.process_index == 0:
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(
                f"--output_dir: another run is writing into {folder}, and the two would mix their files. Wait until "
                "it ends, or pass another folder."
            ) from None
    arguments.distributed_state.wait_for_everyone()
    return lock


def _way_to_continue(folder: str) -> str:
    if (checkpoint := last_checkpoint(folder)) is not None:
        return f"The same command with --resume_from_checkpoint continues from {checkpoint}."
    return "No checkpoint was saved yet: the same command with --overwrite_output_dir starts again."


def _end_progress_bar(arguments: TrainingArguments) -> None:
    # The bar does not end its line.
    if arguments.local_process_index == 0 and not arguments.disable_tqdm:
        print(file=sys.stderr)


def _failed_write(error: BaseException | None) -> str | None:
    """The reason of a failed write; `None` for any other error."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in NO_ROOM) or FAILED_WRITES.search(str(error)):
            return str(error).splitlines()[0].rstrip(".")
        error = error.__cause__ or error.__context__
    return None
