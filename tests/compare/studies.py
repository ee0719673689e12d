"""Studies of the tiny script."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hf_attentiondrop.cli import main
from hf_attentiondrop.compare.results import RESULTS_FILE, Run, read_runs


TINY = Path(__file__).with_name("tiny.py")
STUDY: dict[str, Any] = {
    "title": "Tiny",
    "script": str(TINY),
    "launcher": "python",
    "methods": {"none": {}, "low": {"x": 0.1}, "high": {"x": 0.2}},
    "reference": "none",
    "metrics": {"test_score": "higher"},
    "seeds": 2,
}
SEARCH: dict[str, Any] = {
    "trials": 5,
    "metric": {"eval_score": "higher"},
    "spaces": {"low": {"x": [0.0, 1.0]}, "high": {"x": [1e-3, 1, "log"], "size": {"choices": [1, 2]}}},
}


def write_study(folder: Path, **changes: Any) -> Path:
    """Writes a study with some keys replaced, or removed by `None`."""
    values = {name: value for name, value in {**STUDY, **changes}.items() if value is not None}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """The runs of a study without what differs between two equal ones."""
    return [outcome(run) for run in read_runs(folder / RESULTS_FILE)]


def outcome(run: Run) -> dict[str, Any]:
    measured = ("seconds", "peak_memory_mb")
    return {name: value for name, value in vars(run).items() if name not in measured}


def run_command(argv: list[str]) -> None:
    """Runs a command, prints nothing, and exits with its code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A test run in the background ignores it.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os._exit(main(argv))


def lines(starts: Path) -> list[str]:
    """The names of the runs that have started."""
    return starts.read_text().split() if starts.exists() else []


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
