"""The queue of runs in the moments that a kill or a race can hit."""

from pathlib import Path

import pytest
from optuna.trial import TrialState

from hf_attentiondrop.compare import queue
from hf_attentiondrop.compare.queue import Queue, open_storage
from hf_attentiondrop.compare.results import Run


@pytest.fixture
def runs(tmp_path: Path) -> Queue:
    return Queue(open_storage(f"sqlite:///{tmp_path / 'study.db'}"), "runs", "score", "higher")


def record(name: str) -> Run:
    return Run(name, 0, "test", 0, "complete", metrics={"score": 1.0})


def refuse(name: str) -> Run:
    raise AssertionError(name)


def test_a_run_that_two_workers_added_runs_once(runs: Queue) -> None:
    for _ in range(2):
        runs.study.enqueue_trial({}, user_attrs={"name": "a"})
    assert runs.take(record) == record("a")
    assert runs.has_waiting()
    assert runs.take(refuse) is None
    assert runs.records() == {"a": record("a")}
    runs.fill({"a": {}})
    assert not runs.has_waiting()


def test_a_trial_that_is_not_from_the_queue_runs_nothing(runs: Queue) -> None:
    """Another worker was faster after this one had seen that a run waits: Optuna adds a trial then."""
    assert runs.take(refuse) is None
    assert runs.records() == {}


def test_an_attempt_that_raised_is_taken_again(runs: Queue) -> None:
    runs.fill({"a": {}})
    with pytest.raises(AssertionError, match="a"):
        runs.take(refuse)
    assert not runs.has_waiting()
    runs.fill({"a": {}})
    assert runs.take(record) == record("a")


def test_a_worker_that_died_before_its_first_heartbeat_blocks_nobody(
    runs: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.fill({"a": {}})
    (trial,) = runs.study.get_trials()
    runs.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    runs.release_dead()
    runs.fill({"a": {}})
    assert not runs.has_waiting()
    monkeypatch.setattr(queue, "GRACE_PERIOD", 0)
    runs.release_dead()
    runs.fill({"a": {}})
    assert runs.take(record) == record("a")


def test_a_failed_run_has_ended(runs: Queue) -> None:
    failed = Run("a", 0, "test", 0, "failed", log="no")
    runs.fill({"a": {}})
    assert runs.take(lambda name: failed) == failed
    runs.fill({"a": {}})
    assert not runs.has_waiting()
    assert runs.records() == {"a": failed}
