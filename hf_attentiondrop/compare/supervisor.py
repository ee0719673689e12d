"""A program that runs another one, measures it, and kills it when its own parent dies, even by SIGKILL.

    python supervisor.py LOG PROGRAM ARGUMENT...

It needs a process group of its own and a pipe from its parent as standard input, and prints a line of JSON at the end.
It imports nothing large: on Linux, the peak memory of a process includes that of its parent when it started.
"""

import json
import os
import signal
import subprocess
import sys
import time
from threading import Thread


# The unit of ru_maxrss in bytes.
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def die_with_parent() -> None:
    """Kills this process group at the end of standard input: nobody else has the other end of the pipe."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def main(log: str, *command: str) -> None:
    """Runs a program.

    Args:
        log (`str`): file for everything that it prints.
        command (`str`): the program and its arguments.
    """
    Thread(target=die_with_parent, daemon=True).start()
    with open(log, "wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    code = os.waitstatus_to_exitcode(status)
    print(json.dumps({"code": code, "seconds": seconds, "peak_memory_mb": usage.ru_maxrss * MAXRSS_UNIT / 1e6}))


if __name__ == "__main__":
    main(*sys.argv[1:])
