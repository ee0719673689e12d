"""The parser of `hf-attentiondrop` and its exit codes.

Each command has a module that declares its flags and sets `run`: a function from the parsed arguments to the text to
print. `run` raises [`~flags.CommandError`] if the command fails.
"""

import argparse
import sys
from collections.abc import Sequence

from ..version import __version__
from .check import declare_check
from .compare import declare_compare
from .evaluate import declare_evaluate
from .flags import CommandError, one_line


COMMANDS = (declare_check, declare_compare, declare_evaluate)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and prints its output.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments, those of the process by default.

    Returns:
        `int`: the exit code: 0 on success, 1 if `check` finds a model that is not supported or all test runs of
        `compare` failed, 2 for invalid input, 130 if `compare` was interrupted.

    Raises:
        SystemExit: from argparse, with code 2 for arguments that do not parse and 0 after `--help` and `--version`.
    """
    parser = argparse.ArgumentParser(prog="hf-attentiondrop", description="AttentionDrop for Transformers models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for declare in COMMANDS:
        declare(commands)
    arguments = parser.parse_args(argv)
    try:
        print(arguments.run(arguments))
    except CommandError as error:
        print(f"{parser.prog}: error: {one_line(error)}", file=sys.stderr)
        return error.code
    return 0
