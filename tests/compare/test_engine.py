"""The command `compare` from a study to its report: who runs what, and what is left after a kill."""

import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_attentiondrop.cli import main
from hf_attentiondrop.compare.results import RESULTS_FILE, Run, read_runs

from .studies import SEARCH, TINY, lines, outcomes, wait_for, write_study


def run_study(study: Path, folder: Path, *flags: Any) -> list[dict[str, Any]]:
    assert main(["compare", str(study), "--output_dir", str(folder), *map(str, flags)]) == 0
    return outcomes(folder)


def test_a_study_ends_in_a_report(tmp_path: Path, starts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path, metrics={"test_score": "higher", "calibration/error": "lower"})
    run_study(study, tmp_path / "out")
    written = capsys.readouterr()
    assert "test_score" in written.out and "report.html" in written.out
    assert "low, seed 1: test_score 0.96, calibration/error 0.1 (" in written.err
    runs = {(run.method, run.seed): run for run in read_runs(tmp_path / "out" / RESULTS_FILE)}
    assert lines(starts) == [f"test/{method}-{seed}" for seed in (0, 1) for method in ("none", "low", "high")]
    run = runs["high", 1]
    assert (run.phase, run.trial, run.state, run.arguments) == ("test", 0, "complete", {"x": 0.2})
    assert run.metrics == pytest.approx({"eval_score": 0.99, "test_score": 0.99, "calibration/error": 0.1})
    assert run.versions == {"tiny": "1.0"} and "cores" in str(run.hardware) and len(str(run.commit)) >= 40
    assert run.seconds is not None and 0 < run.seconds < 60
    # Python alone, without the memory of this process, which has imported torch.
    assert run.peak_memory_mb is not None and 5 < run.peak_memory_mb < 100
    report = (tmp_path / "out" / "report.md").read_text()

    # The same command has nothing left to run; the report can be written from the results alone.
    (tmp_path / "out" / "report.md").unlink()
    run_study(study, tmp_path / "out")
    assert len(lines(starts)) == 6
    (tmp_path / "out" / "study.db").unlink()
    run_study(study, tmp_path / "out", "--report_only")
    assert (tmp_path / "out" / "report.md").read_text() == report


def test_the_report_names_the_command_with_another_script(tmp_path: Path, starts: Path) -> None:
    other = Path(shutil.copy(TINY, tmp_path / "other.py"))
    run_study(write_study(tmp_path, seeds=1), tmp_path / "out", "--script", str(other))
    report = (tmp_path / "out" / "report.md").read_text()
    [command] = re.findall("hf-attentiondrop (compare .*--report_only)", report)
    assert f"--script {other}" in command
    assert main(shlex.split(command)) == 0
    assert (tmp_path / "out" / "report.md").read_text() == report


def test_a_failed_run_is_kept_and_stops_no_other(tmp_path: Path, starts: Path, capfd: Any) -> None:
    modes = {mode: {"mode": mode} for mode in ("fail", "kill", "silent", "diverge", "empty")}
    study = write_study(tmp_path, methods={"none": {}, **modes}, seeds=1)
    run_study(study, tmp_path / "out")
    runs = {run.method: run for run in read_runs(tmp_path / "out" / RESULTS_FILE)}
    assert runs.pop("none").state == "complete"
    expected = {
        "fail": "ended with exit code 1.\nTraceback (most recent call last):\n",
        "kill": "was killed by signal 9 (out of memory?).",
        "silent": "ended without an error, but wrote no metrics.json into its --output_dir.",
        "diverge": "wrote test_score = nan into metrics.json. A metric that is not finite has no mean, so the run "
        "counts as failed: the training may have diverged, or the metric is undefined.",
        "empty": "wrote no number 'test_score' into metrics.json. It has none.",
    }
    assert runs.keys() == expected.keys()
    for mode, text in expected.items():
        assert runs[mode].state == "failed" and not runs[mode].metrics
        assert str(runs[mode].log).startswith(f"The script {text}"), runs[mode].log
    assert str(runs["fail"].log).endswith("RuntimeError: out of ideas")
    assert "test_score = nan into metrics.json" in (tmp_path / "out" / "report.md").read_text()
    assert (
        "fail, seed 0: failed. The script ended with exit code 1. RuntimeError: out of ideas" in capfd.readouterr().err
    )
    # Not even by the same command.
    run_study(study, tmp_path / "out")
    assert len(lines(starts)) == 6


def test_a_study_without_any_complete_run_ends_with_its_reason(tmp_path: Path, capsys: Any) -> None:
    study = write_study(tmp_path, arguments={"mode": "fail"}, seeds=1)
    assert main(["compare", str(study), "--output_dir", str(tmp_path / "out")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "no test run was completed" in last and "RuntimeError: out of ideas" in last


def test_a_search_is_fair_and_does_not_depend_on_the_number_of_workers(tmp_path: Path, starts: Path) -> None:
    search = {**SEARCH, "spaces": {"high": SEARCH["spaces"]["high"]}, "arguments": {"fast": True}}
    study = write_study(tmp_path, methods={"none": {}, "high": {"x": 0.2}}, search=search, seeds=1)
    runs = run_study(study, tmp_path / "one")
    tuning = [Run(**run, seconds=None, peak_memory_mb=None) for run in runs if run["phase"] == "tune"]
    tried = {method: [run for run in tuning if run.method == method] for method in ("none", "high")}
    assert {method: len(runs) for method, runs in tried.items()} == {"none": 5, "high": 5}
    assert [run.seed for run in tried["none"]] == [1000, 1001, 1002, 1003, 1004]
    assert {run.seed for run in tried["high"]} == {1000}
    assert all(0.001 <= run.arguments["x"] <= 1 and run.arguments["size"] in (1, 2) for run in tried["high"])
    assert len({run.arguments["x"] for run in tried["high"]}) == 5
    # What the tuning runs measured on the test data is not looked at.
    assert all(run.metrics.keys() == {"eval_score"} and run.arguments["fast"] for run in tuning)
    for run in runs:
        if run["phase"] == "test" and run["method"] != "none":
            best = max(tried[run["method"]], key=lambda run: run.metrics["eval_score"])
            assert run["trial"] == best.trial
            assert run["arguments"] == {name: best.arguments[name] for name in run["arguments"]}
            assert "fast" not in run["arguments"] and run["seed"] == 0
    order = lines(starts)
    assert [name for name in order if name.startswith("test/")] == order[-2:]

    assert run_study(study, tmp_path / "three", "--jobs", 3) == runs


def test_a_method_whose_tuning_failed_is_not_tested(tmp_path: Path, starts: Path) -> None:
    study = write_study(tmp_path, methods={"none": {}, "low": {"mode": "fail"}}, seeds=1, search=_search(trials=1))
    failed = run_study(study, tmp_path / "out")[-2:]
    assert sorted(lines(starts)) == ["test/none-0", "tune/low-0", "tune/none-0"]
    (low,) = [run for run in failed if run["method"] == "low"]
    assert low["log"] == "All tuning runs of this method failed, so it has no arguments to test."


def _search(**changes: Any) -> dict[str, Any]:
    return {**SEARCH, "spaces": {"low": SEARCH["spaces"]["low"]}, **changes}


@pytest.mark.usefixtures("short_grace")
@pytest.mark.parametrize("victim", ["worker", "command"])
def test_a_killed_study_continues_as_if_undisturbed(victim: str, tmp_path: Path, starts: Path, start: Any) -> None:
    """A worker: another one goes on meanwhile. The command: nobody does, until it is started again."""
    gate = tmp_path / "gate"
    methods = {"none": {"gate": str(gate)}, "low": {"x": 0.1}}
    study = write_study(tmp_path, methods=methods, search=_search(trials=1), seeds=1)
    flags = ("compare", study, "--output_dir", tmp_path / "out")
    killed = start(*flags)
    wait_for(lambda: lines(starts) == ["tune/none-0"])
    other = start(*flags) if victim == "worker" else None
    wait_for(lambda: other is None or "tune/low-0" in lines(starts))
    killed.kill()
    killed.join()
    # What the command had started died with it.
    time.sleep(0.2)
    gate.touch()
    time.sleep(0.5)
    assert not (tmp_path / "out" / "runs" / "tune" / "none-0" / "metrics.json").exists()
    if other is None:
        runs = run_study(study, tmp_path / "out")
    else:
        other.join()
        assert other.exitcode == 0
        runs = outcomes(tmp_path / "out")
    assert sorted(lines(starts)) == ["test/low-0", "test/none-0", "tune/low-0", "tune/none-0", "tune/none-0"]
    assert runs == run_study(study, tmp_path / "undisturbed", "--jobs", 2)


def test_workers_share_the_runs(tmp_path: Path, starts: Path, start: Any) -> None:
    study = write_study(tmp_path, seeds=6)
    workers = [start("compare", study, "--output_dir", tmp_path / "out", "--jobs", 2) for _ in range(2)]
    run_study(study, tmp_path / "out")
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(lines(starts)) == len(set(lines(starts))) == 18
    assert len(outcomes(tmp_path / "out")) == 18


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_stops_its_runs(number: int, tmp_path: Path, starts: Path, start: Any) -> None:
    study = write_study(tmp_path, arguments={"gate": str(tmp_path / "gate")}, seeds=1)
    command = start("compare", study, "--output_dir", tmp_path / "out", "--jobs", 2)
    wait_for(lambda: len(lines(starts)) == 2)
    os.kill(command.pid, number)
    command.join(20)
    assert command.exitcode == 130
    with sqlite3.connect(tmp_path / "out" / "study.db") as database:
        states = [state for (state,) in database.execute("SELECT state FROM trials ORDER BY number")]
    # They can be taken at once, without waiting for a heartbeat to be missed.
    assert "RUNNING" not in states and states.count("FAIL") >= 2
    assert not list((tmp_path / "out").glob("runs/*/*/metrics.json"))


@pytest.mark.usefixtures("short_grace")
def test_a_worker_that_was_taken_for_dead_loses_its_run(tmp_path: Path, starts: Path, start: Any) -> None:
    """A laptop that slept: the run has been taken by another worker, whose record counts."""
    gate = tmp_path / "gate"
    study = write_study(tmp_path, arguments={"gate": str(gate)}, methods={"none": {}, "low": {}}, seeds=1)
    sleeper = start("compare", study, "--output_dir", tmp_path / "out")
    wait_for(lambda: len(lines(starts)) == 1)
    wait_for(lambda: _is_stopped(sleeper, tmp_path / "out" / "study.db"))
    gate.touch()
    run_study(study, tmp_path / "out")
    os.kill(sleeper.pid, signal.SIGCONT)
    sleeper.join(20)
    assert sleeper.exitcode == 0
    assert sorted(lines(starts)) == ["test/low-0", "test/none-0", "test/none-0"]
    assert len(outcomes(tmp_path / "out")) == 2


def _is_stopped(process: Any, database: Path) -> bool:
    """Stops a process, but not while it locks the database: then all others would wait for it."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with closing(sqlite3.connect(database, timeout=0)) as connection:
            connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        os.kill(process.pid, signal.SIGCONT)
        return False
    return True


def test_the_runs_of_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path, search=_search(trials=1), seeds=1)
    flags = ["compare", str(study), "--output_dir", str(tmp_path / "out")]
    assert main([*flags, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "Tiny: 6 runs, 6 of them to run" in printed and "Estimated time: unknown" in printed
    assert "tune/low-0 (to run): " in printed and "--x '<0.0 to 1.0>' --seed 1000 --output_dir" in printed
    run_study(study, tmp_path / "out")
    capsys.readouterr()
    results = tmp_path / "out" / RESULTS_FILE
    left = [json.loads(line) for line in results.read_text().splitlines() if '"test"' not in line]
    results.write_text("".join(json.dumps({**run, "seconds": 600}) + "\n" for run in left))
    assert main([*flags, "--dry_run", "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "tune/low-0 (complete): " in printed and "test/low-0 (to run): " in printed
    assert "Estimated time: 15 min for 3 runs, 2 runs at the same time" in printed


@pytest.mark.slow
def test_accelerate_starts_the_runs(tmp_path: Path) -> None:
    study = write_study(tmp_path, launcher=None, methods={"none": {}, "fail": {"mode": "fail"}}, seeds=1)
    failed, complete = run_study(study, tmp_path / "out")
    assert complete["metrics"]["test_score"] == pytest.approx(-0.09)
    # The end of the script's traceback, not of the launcher's.
    assert failed["log"].startswith("The script ended with exit code 1.\n")
    assert failed["log"].endswith("RuntimeError: out of ideas")


def test_the_preset_is_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--preset", "regularizers"]) == 2
    assert "found no script 'recipes/image_classification.py'" in capsys.readouterr().err
    flags = ["--preset", "regularizers", "--script", str(write_recipe(tmp_path)), "--dry_run", "--seeds", "3"]
    assert main(["compare", *flags]) == 0
    assert ": 12 runs, 12 of them to run, in runs/regularizers" in capsys.readouterr().out


def write_recipe(folder: Path) -> Path:
    """A script with the flags of the preset, whose help takes no time."""
    from hf_attentiondrop.compare.study import preset_path

    preset = yaml.safe_load(preset_path("regularizers").read_text())
    names = {name for arguments in (preset["arguments"], *preset["methods"].values()) for name in arguments}
    path = folder / "image_classification.py"
    flags = "".join(f"parser.add_argument('--{name}')\n" for name in sorted({*names, "seed", "output_dir"}))
    path.write_text(f"import argparse\nparser = argparse.ArgumentParser()\n{flags}parser.parse_args()\n")
    return path
