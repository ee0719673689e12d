"""Errors of library functions reach the user with the flag that caused them; the library names no flags."""

import ast
import re
from pathlib import Path

import pytest

import hf_attentiondrop
from hf_attentiondrop.cli.flags import naming_flag


PACKAGE = Path(hf_attentiondrop.__file__).parent


def test_the_flag_is_put_before_the_message() -> None:
    with pytest.raises(ValueError, match="^--data: it has no rows") as error, naming_flag("--data"):
        raise ValueError("it has no rows")
    assert str(error.value.__cause__) == "it has no rows"


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(OSError, match="^disk full$"), naming_flag("--data"):
        raise OSError("disk full")


# An option of `hf upload`, in the command that retries an upload.
OPTIONS_OF_OTHER_PROGRAMS = {"--exclude"}
# They run a study's script and other programs, or name colors of a style sheet.
NOT_ABOUT_OUR_FLAGS = {PACKAGE / "compare" / name for name in ("rendering.py", "runs.py", "script.py")}


def flags_in(path: Path) -> set[str]:
    """The flags in the strings of a module."""
    constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    return {flag for text in constants if isinstance(text, str) for flag in re.findall(r"(?<![\w-])--[a-z]\w*", text)}


def test_only_the_command_line_names_flags() -> None:
    modules = [path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "cli")]
    modules = [path for path in modules if path not in NOT_ABOUT_OUR_FLAGS]
    found = {str(path): flags for path in modules if (flags := flags_in(path) - OPTIONS_OF_OTHER_PROGRAMS)}
    assert not found
