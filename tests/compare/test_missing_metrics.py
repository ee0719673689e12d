"""A misspelled metric, or arguments that the script does not accept, cost one run: the study stops.

When the name of the metric is corrected, it continues.
"""

from pathlib import Path
from typing import Any

import pytest

from hf_attentiondrop.cli import main

from .studies import SEARCH, lines, outcomes, wait_for, write_study


METHODS: dict[str, Any] = {"none": {}, "low": {"x": 0.1}}
MISSPELLED = {"test_scor": "higher", "calibration/eror": "lower"}


@pytest.fixture
def command(tmp_path: Path) -> Any:
    def command(expected: int, *flags: str, **changes: Any) -> None:
        study = write_study(tmp_path, **{"methods": METHODS, "seeds": 2, **changes})
        assert main(["compare", str(study), "--output_dir", str(tmp_path / "out"), *flags]) == expected

    return command


def search(metric: str | dict[str, str]) -> dict[str, Any]:
    return {**SEARCH, "trials": 2, "metric": metric, "spaces": {"low": SEARCH["spaces"]["low"]}}


def test_the_first_run_without_a_metric_stops_the_study(
    command: Any, tmp_path: Path, starts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(2, metrics=MISSPELLED)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "hf-attentiondrop: error: test/none-0: The script wrote no number 'test_scor' and no 'calibration/eror' into "
        "metrics.json. Did you mean 'test_score'? Did you mean 'calibration/error'? It has eval_score, test_score, "
        "calibration/error. All other runs would probably fail, too. Correct `metrics` of the study, or the script, "
        "and start it again: it repeats this run and keeps those that have ended."
    )
    # Another direction, too.
    command(0, metrics={"calibration/error": "lower", "test_score": "higher"})
    assert sorted(lines(starts)) == ["test/low-0", "test/low-1", "test/none-0", "test/none-0", "test/none-1"]
    assert [run["state"] for run in outcomes(tmp_path / "out")] == ["complete"] * 4
    command(2, metrics={"test_score": "lower"})
    assert "metrics/test_score was 'higher' and is 'lower'" in capsys.readouterr().err


def test_the_metric_of_the_search_is_corrected_before_the_others(
    command: Any, tmp_path: Path, starts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(2, search=search({"eval_scor": "lower"}), metrics=MISSPELLED)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no number 'eval_scor' into" in error and "Correct `search.metric` of the study" in error
    metrics = {**MISSPELLED, "eval_score": "higher"}
    command(2, search=search("eval_score"), metrics=metrics)
    assert "Correct `metrics` of the study" in capsys.readouterr().err
    # The same metric of the search, although its direction has been that of a metric that is gone.
    command(0, search=search({"eval_score": "higher"}), metrics={"test_score": "higher"})
    capsys.readouterr()
    tuning = ["tune/none-0", "tune/none-0", "tune/none-1", "tune/low-0", "tune/low-1"]
    tests = ["test/none-0", "test/none-0", "test/none-1", "test/low-0", "test/low-1"]
    assert sorted(lines(starts)) == sorted([*tests, *tuning])
    assert len(outcomes(tmp_path / "out")) == 8


def test_the_metric_of_the_search_stays_after_the_first_tuning_run(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command(2, search=search("eval_score"), metrics={**MISSPELLED, "eval_score": "higher"})
    command(2, search=search("eval_score"), metrics={"test_score": "higher", "eval_score": "lower"})
    assert "search/metric/eval_score was 'higher' and is 'lower'" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["python", "accelerate"])
def test_arguments_that_the_script_does_not_accept_stop_the_study(
    command: Any, tmp_path: Path, starts: Path, capsys: pytest.CaptureFixture[str], launcher: str
) -> None:
    command(2, methods={"none": {"mode": "refuse"}, "low": {}}, launcher=launcher)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "test/none-0: the script does not accept its arguments: tiny.py: error: --mode: refused, as it is" in error
    assert "on this long list, All other runs would probably fail" in error
    assert lines(starts) == ["test/none-0"] and outcomes(tmp_path / "out") == []


def test_arguments_that_the_script_accepts_of_other_runs_fail_one_run(command: Any, tmp_path: Path) -> None:
    command(0, methods={"none": {}, "low": {"mode": "refuse"}})
    assert [run["state"] for run in outcomes(tmp_path / "out")] == ["failed", "failed", "complete", "complete"]


def test_a_metric_that_another_run_wrote_fails_only_the_runs_without_it(command: Any, tmp_path: Path) -> None:
    command(0, methods={"none": {}, "low": {"mode": "empty"}})
    assert [run["state"] for run in outcomes(tmp_path / "out")] == ["failed", "failed", "complete", "complete"]


def test_other_workers_end_their_runs_and_stop(command: Any, tmp_path: Path, starts: Path, start: Any) -> None:
    """One of them has the misspelled metric, and its run ends after the study was corrected."""
    gate = tmp_path / "gate"
    arguments = {"gate": str(gate)}
    study = write_study(tmp_path, methods=METHODS, arguments=arguments, seeds=2, metrics=MISSPELLED)
    worker = start("compare", study, "--output_dir", tmp_path / "out")
    wait_for(lambda: lines(starts) == ["test/none-0"])
    write_study(tmp_path, methods=METHODS, arguments=arguments, seeds=2)
    corrected = start("compare", study, "--output_dir", tmp_path / "out")
    wait_for(lambda: lines(starts) == ["test/none-0", "test/low-0"])
    gate.touch()
    for process, code in ((worker, 2), (corrected, 0)):
        process.join()
        assert process.exitcode == code
    assert sorted(lines(starts)) == ["test/low-0", "test/low-1", "test/none-0", "test/none-0", "test/none-1"]
    assert [run["state"] for run in outcomes(tmp_path / "out")] == ["complete"] * 4


def test_a_run_with_the_metrics_of_before_a_correction_is_not_recorded(
    command: Any, tmp_path: Path, starts: Path, start: Any
) -> None:
    gate = tmp_path / "gate"
    arguments = {"gate": str(gate)}
    study = write_study(tmp_path, methods=METHODS, arguments=arguments, seeds=1)
    worker = start("compare", study, "--output_dir", tmp_path / "out")
    wait_for(lambda: lines(starts) == ["test/none-0"])
    write_study(tmp_path, methods=METHODS, arguments=arguments, seeds=1, metrics={"calibration/error": "lower"})
    changed = start("compare", study, "--output_dir", tmp_path / "out")
    wait_for(lambda: len(lines(starts)) == 2)
    gate.touch()
    worker.join()
    changed.join()
    assert (worker.exitcode, changed.exitcode) == (2, 0)
    assert sorted(lines(starts)) == ["test/low-0", "test/none-0", "test/none-0"]
