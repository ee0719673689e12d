"""Runs as trials of an Optuna study, which any number of workers on any number of machines take in turn.

A trial in the state WAITING is a run that a worker can take; its user attribute `"name"` says which. A worker stores
the outcome in the attribute `"record"`. A trial that failed without a record is an attempt whose worker died or was
interrupted, so [`Queue.fill`] adds its run again. Two workers may add the same run at the same time; then the trial
with the lower number counts, and the worker that takes the other one drops it. The database hands out a trial once.
"""

import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, OptunaError, TrialPruned, UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from .results import Direction, Run
from .sampling import OPTUNA_DIRECTION, suggest
from .search import Space


# Seconds. A worker reports that often that it is alive, and is taken for dead after that much silence.
HEARTBEAT_INTERVAL = 10
GRACE_PERIOD = 60
# Seconds to try again for: workers that create the tables of a new database at the same time disturb each other.
OPENING_TIME = 5
# Seconds to wait for the lock of an SQLite file.
LOCK_TIMEOUT = 60


class _Failed(Exception):
    """Marks the trial of a failed run."""


def open_storage(url: str) -> RDBStorage:
    """Opens a database, and creates its tables if it is empty.

    Args:
        url (`str`): as in SQLAlchemy, such as `"sqlite:///study.db"`.

    Raises:
        ValueError: if that fails; the message has no password.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Heartbeats are experimental in name since Optuna 2.8.
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    is_sqlite = url.startswith("sqlite:")
    options: dict[str, Any] = {"connect_args": {"timeout": LOCK_TIMEOUT}} if is_sqlite else {"pool_pre_ping": True}
    end = time.monotonic() + OPENING_TIME
    while True:
        try:
            storage = RDBStorage(url, options, heartbeat_interval=HEARTBEAT_INTERVAL, grace_period=GRACE_PERIOD)
            break
        except ImportError as error:
            raise ValueError(
                f"the driver of this database is not installed: {error.__cause__ or error}. For PostgreSQL, `pip "
                "install 'psycopg[binary]'` and name the database postgresql+psycopg://USER@HOST/DATABASE."
            ) from error
        except (SQLAlchemyError, OptunaError) as error:
            if time.monotonic() > end or isinstance(error, ArgumentError):
                raise ValueError(f"expected the URL of a database that answers: {error}") from error
            time.sleep(0.25)
    if is_sqlite:
        _lock_before_reading(storage.engine)
    return storage


class Queue:
    """The runs of one Optuna study.

    Args:
        storage ([`~optuna.storages.RDBStorage`]): from [`open_storage`].
        name (`str`): of the Optuna study, which is created if there is none.
        metric (`str`): the value of a trial.
        direction (`str`): `"higher"` or `"lower"`, whichever value is better.
        space (`Mapping`, *optional*): of the parameters of a trial.
    """

    def __init__(
        self,
        storage: RDBStorage,
        name: str,
        metric: str,
        direction: Direction,
        space: Mapping[str, Space] | None = None,
    ) -> None:
        self.storage, self.metric, self.space = storage, metric, space or {}
        self.study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction=OPTUNA_DIRECTION[direction],
            # It samples nothing: the parameters of a trial are given when it is added.
            sampler=RandomSampler(seed=0),
            load_if_exists=True,
        )

    def records(self) -> dict[str, Run]:
        """The runs that have ended, by name."""
        trials = self.study.get_trials(deepcopy=False)
        return {t.user_attrs["name"]: Run(**t.user_attrs["record"]) for t in trials if "record" in t.user_attrs}

    def fill(self, runs: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds runs to the queue, except those that wait in it, are running or have ended.

        Args:
            runs (`Mapping`): name of each run to the parameters that the search chose for it.
        """
        present = {trial.user_attrs.get("name") for trial in self._trials() if _counts(trial)}
        for name, parameters in runs.items():
            if name not in present:
                self.study.enqueue_trial(dict(parameters), user_attrs={"name": name})

    def release_dead(self) -> None:
        """Marks the trials of workers that died, so that [`Queue.fill`] adds their runs again."""
        fail_stale_trials(self.study)
        for trial in self._trials():
            # A worker that died right after it took the trial, before its first heartbeat.
            start = trial.datetime_start
            is_new = trial.state == TrialState.RUNNING and "worker" not in trial.user_attrs
            if is_new and start is not None and datetime.now() - start > timedelta(seconds=GRACE_PERIOD):
                with suppress(UpdateFinishedTrialError):
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def has_waiting(self) -> bool:
        """Whether there is a run to take."""
        return any(trial.state == TrialState.WAITING for trial in self._trials())

    def take(self, run: Callable[[str], Run]) -> Run | None:
        """Takes a run from the queue, runs it, and stores its record.

        Args:
            run (`Callable`): runs the run of that name.

        Returns:
            [`Run`]: the record. `None` if there was nothing to run, or if the run was lost to another worker, because
            this one was taken for dead.

        Raises:
            Exception: from `run`. The run can be taken again then.
        """
        done: list[Run] = []
        is_lost = False

        def objective(trial: Trial) -> float:
            nonlocal is_lost
            name = trial.user_attrs.get("name")
            # Without a name, another worker was faster, and this trial is a new one.
            if name is None or self._is_duplicate(trial.number, name):
                raise TrialPruned
            try:
                self.storage.record_heartbeat(trial._trial_id)
                trial.set_user_attr("worker", f"{platform.node()}:{os.getpid()}")
                suggest(trial, self.space)
                record = run(name)
                trial.set_user_attr("record", asdict(record))
            except UpdateFinishedTrialError:
                is_lost = True
                raise
            done.append(record)
            if record.state == "failed":
                raise _Failed
            return record.metrics[self.metric]

        try:
            self.study.optimize(objective, n_trials=1, catch=(_Failed,))
        except (UpdateFinishedTrialError, ValueError):
            if not is_lost:
                raise
        return done[0] if done else None

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _is_duplicate(self, number: int, name: str) -> bool:
        earlier = (trial for trial in self._trials() if trial.number < number)
        return any(_counts(trial) and trial.user_attrs.get("name") == name for trial in earlier)


def _counts(trial: FrozenTrial) -> bool:
    return "record" in trial.user_attrs or trial.state in (TrialState.WAITING, TrialState.RUNNING)


def _lock_before_reading(engine: sqlalchemy.Engine) -> None:
    """Makes transactions on an SQLite file exclusive from their first statement.

    By default they lock it at their first write. Then two workers can both read that a run waits, and both take it.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def leave_transactions_to_sqlalchemy(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def lock(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()
