"""Running a command inside the test process."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_attentiondrop.cli import main


def config_folder(path: Path, contents: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return path


def failure(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str]:
    """The exit code of a command that fails, and its one line."""
    code = main(list(map(str, argv)))
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.count("\n") == 1 and written.err.startswith("hf-attentiondrop: error: ")
    return code, written.err


def printed(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The output of a command that succeeds."""
    assert main(list(map(str, argv))) == 0
    written = capsys.readouterr()
    assert written.err == ""
    return written.out
