"""Fixtures of the tests that run studies."""

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_attentiondrop.compare import queue

from .studies import run_command


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which each run of the tiny script writes its name when it starts."""
    monkeypatch.setenv("TINY_STARTS", str(tmp_path / "starts"))
    return tmp_path / "starts"


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead workers are found after seconds."""
    monkeypatch.setattr(queue, "HEARTBEAT_INTERVAL", 1)
    monkeypatch.setattr(queue, "GRACE_PERIOD", 4)


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Returns a function that starts a command in a copy of this process, which need not import torch anew."""
    processes = []

    def start(*argv: Any) -> Any:
        process = multiprocessing.get_context("fork").Process(target=run_command, args=(list(map(str, argv)),))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()
