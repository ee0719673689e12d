"""The results file survives killed and concurrent writers, and refuses what is not a run."""

import json
import math
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_attentiondrop.compare.results import Question, append_run, read_runs, write_runs

from . import LOG, WEIRD, question, run


def test_runs_are_read_as_they_were_written_in_one_order(tmp_path: Path) -> None:
    runs = [
        run(WEIRD, 1, log=LOG),
        run("blur", 0, state="failed", seconds=None),
        run("blur", 0, phase="tune", trial=3),
    ]
    runs += [run("blur", seed) for seed in (10, 2)]
    for one in runs:
        append_run(tmp_path / "appended.jsonl", one)
    write_runs(tmp_path / "written.jsonl", reversed(runs))
    found = read_runs(tmp_path / "appended.jsonl")
    assert found == read_runs(tmp_path / "written.jsonl") == [runs[i] for i in (2, 0, 1, 4, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["appended.jsonl", "written.jsonl"]
    assert read_runs(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize("kept", [1, 30, -1])
def test_the_torn_line_of_a_killed_writer_is_skipped_and_the_next_writer_continues(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "results.jsonl"
    append_run(path, run(seed=0))
    whole = path.read_bytes()
    path.write_bytes(whole + (run(seed=1).to_json()).encode()[:kept])
    with pytest.warns(UserWarning, match="line 2 is incomplete"):
        assert read_runs(path) == [run(seed=0)]
    append_run(path, run(seed=2))
    with pytest.warns(UserWarning, match="line 2 is incomplete"):
        assert read_runs(path) == [run(seed=0), run(seed=2)]


def test_a_line_without_its_line_break_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(run(seed=0).to_json(), encoding="utf-8")
    append_run(path, run(seed=1))
    assert read_runs(path) == [run(seed=0), run(seed=1)]


def append_many(path: Path, method: str) -> None:
    for seed in range(50):
        append_run(path, run(method, seed, log="x" * 5000))


def test_processes_append_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        list(pool.map(append_many, [path] * 2, ["blur", "hard"]))
    assert [(one.method, one.seed) for one in read_runs(path)] == [(m, s) for m in ("blur", "hard") for s in range(50)]


BAD_LINES = {
    "a list": ([], "JSON object with the fields of a run, got"),
    "unknown": ({**asdict(run()), "peak_memory": 1}, "unknown field 'peak_memory'. Did you mean 'peak_memory_mb'"),
    "missing": ({"method": "blur", "seed": 0, "phase": "test"}, "none named state, trial"),
    "phase": ({**asdict(run()), "phase": "train"}, "`phase` must be one of .* got 'train'"),
    "NaN": ({**asdict(run()), "metrics": {"loss": math.nan}}, "'dropout' with seed 0: the metric 'loss' .* got nan"),
    "text": ({**asdict(run()), "metrics": {"loss": "0.1"}}, "'loss' must be a finite number, got '0.1'"),
    "no metrics": (
        {**asdict(run()), "metrics": None},
        "'dropout' with seed 0: `metrics` must be of type dict, got None",
    ),
    "seed": ({**asdict(run()), "seed": "1"}, "`seed` must be of type int, got '1'"),
    "time": ({**asdict(run()), "seconds": 0}, "`seconds` must be a finite number above 0 or None, got 0"),
}


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), np.int64(1)])
def test_metrics_may_be_scalars_of_numpy_and_torch(value: Any) -> None:
    one = replace(run(), metrics={"loss": value})
    assert json.loads(one.to_json())["metrics"] == {"loss": float(value)}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_complete_line_that_is_not_a_run_is_refused(tmp_path: Path, bad: str) -> None:
    values, message = BAD_LINES[bad]
    path = tmp_path / "results.jsonl"
    path.write_text(f"{run().to_json()}\n{json.dumps(values)}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, line 2: .*{message}"):
        read_runs(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metrics": {}}, "at least one metric"),
        ({"metrics": {"loss": "down"}}, "'higher' or 'lower'"),
        ({"methods": ["dropout"]}, "at least two different methods"),
        ({"methods": ["dropout", "dropout"]}, "at least two different methods"),
        ({"reference": "dropuot"}, "`reference` must be one of the methods 'dropout', .* got 'dropuot'"),
        ({"tuning_trials": -1}, "at least 0, got -1"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        question(**changes)
    assert isinstance(question(), Question)
