"""Runs at the same time share the GPUs of the machine, or the cores of its CPU."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_attentiondrop.compare.engine import Engine, visible_gpus
from hf_attentiondrop.compare.results import Run
from hf_attentiondrop.compare.script import Script
from hf_attentiondrop.compare.study import read_study

from .studies import TINY, lines, wait_for, write_study


def run_at_once(folder: Path, starts: Path, jobs: int, gpus: Sequence[str]) -> list[Run]:
    """The runs of a study of as many runs as run at the same time."""
    gate = folder / "gate"
    study = read_study(write_study(folder, arguments={"gate": str(gate), "mode": "environment"}, seeds=1))
    engine = Engine(study, Script.load(TINY), folder, f"sqlite:///{folder / 'study.db'}", jobs, gpus)
    with ThreadPoolExecutor(1) as thread:
        runs = thread.submit(engine.run)
        try:
            wait_for(lambda: len(lines(starts)) == study.size or runs.done())
        finally:
            gate.touch()
        return runs.result()


def seen(runs: Sequence[Run], variable: str) -> list[float]:
    return sorted(run.metrics[f"environment/{variable}"] for run in runs)


def test_gpus_are_dealt_out_to_the_runs(tmp_path: Path, starts: Path) -> None:
    runs = run_at_once(tmp_path, starts, jobs=3, gpus=["5", "2"])
    assert seen(runs, "CUDA_VISIBLE_DEVICES") == [2, 5, 5]
    # The cost of a method is compared on the same hardware.
    for run in runs:
        gpu = f"GPU {run.metrics['environment/CUDA_VISIBLE_DEVICES']:.0f}"
        assert run.hardware == gpu or visible_gpus()


def test_runs_without_gpus_share_the_cores(tmp_path: Path, starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    runs = run_at_once(tmp_path, starts, jobs=3, gpus=[])
    assert seen(runs, "OMP_NUM_THREADS") == [max(1, (os.cpu_count() or 1) // 3)] * 3
    assert all("environment/CUDA_VISIBLE_DEVICES" not in run.metrics for run in runs)
