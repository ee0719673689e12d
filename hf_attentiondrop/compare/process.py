"""Running programs that end with this process, however it ends, and measuring their time and memory."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from . import supervisor


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Args:
        code (`int`): its exit code; -9 if signal 9 killed it.
        seconds (`float`): of wall-clock time.
        peak_memory_mb (`float`):
            The largest resident memory of one of its processes in 10⁶ bytes, without that of a GPU.
    """

    code: int
    seconds: float
    peak_memory_mb: float


class Interrupted(Exception):
    """Raised for programs that [`Processes.stop`] killed or kept from starting."""


class Processes:
    """Programs that threads run at the same time.

    A program and all that it started are killed by [`Processes.stop`], and if this process dies, even by SIGKILL: they
    would go on to write into a folder that another worker may have taken over.
    """

    def __init__(self) -> None:
        self.is_stopped = False
        self._lock = Lock()
        self._groups: set[int] = set()

    def run(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Ended:
        """Runs a program to its end.

        Args:
            command (`Sequence[str]`): the program and its arguments.
            log (`Path`): file for everything that it prints.
            environment (`Mapping[str, str]`): of the program.

        Raises:
            Interrupted: if [`Processes.stop`] was called.
        """
        with self._lock:
            if self.is_stopped:
                raise Interrupted
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, str(log), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
            self._groups.add(process.pid)
        with process:
            assert process.stdout is not None  # It is a pipe.
            ended = process.stdout.read()
            process.wait()
        with self._lock:
            self._groups.discard(process.pid)
            _kill(process.pid)  # What the program left running.
        if self.is_stopped:
            raise Interrupted
        # Without a line, the supervisor was killed itself.
        return Ended(**json.loads(ended)) if ended else Ended(process.returncode, 0, 0)

    def stop(self) -> None:
        """Kills all programs. Those that would start later raise [`Interrupted`]."""
        with self._lock:
            self.is_stopped = True
            for group in self._groups:
                _kill(group)


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
