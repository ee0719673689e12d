"""Running a study to its end, together with all other workers on the same storage.

First the tuning runs, in rounds, then the test runs with the best arguments of each method. All workers do the same:
add the runs that can run by now to their queues, take one, and start over until all have ended.
"""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from .process import Interrupted, Processes
from .queue import Queue, open_storage
from .results import RESULTS_FILE, Run, write_runs
from .runs import execute
from .sampling import round_of, sample
from .script import Script
from .study import PlannedRun, Study, changeable


# The attribute of the Optuna study with the study itself.
STUDY_KEY = "study"
# Seconds between looks at the storage while other workers have all runs that can run.
POLL_INTERVAL = 1


class Engine:
    """Runs a study.

    Args:
        study ([`Study`]): to run.
        script ([`Script`]): of the study.
        folder (`Path`): for the runs and their results.
        storage (`str`): URL of a database.
        jobs (`int`, defaults to 1): number of runs at the same time.
        gpus (`Sequence[str]`, *optional*): entries of `CUDA_VISIBLE_DEVICES`, of which each run has one.
        report (`Callable`, *optional*): called after each run of this machine, with its record and all records.

    Raises:
        ValueError: if the database cannot be opened, or has another study of the same title. One that differs in its
            metrics alone is the same, until runs that were measured by them have been completed.
    """

    def __init__(
        self,
        study: Study,
        script: Script,
        folder: Path,
        storage: str,
        jobs: int = 1,
        gpus: Sequence[str] = (),
        report: Callable[[Run, list[Run]], Any] = lambda run, runs: None,
    ) -> None:
        self.study, self.script, self.folder, self.report = study, script, folder, report
        self._variables = [environment(slot, jobs, gpus) for slot in range(jobs)]
        self._processes = Processes()
        # Held by the thread that chooses a run, or writes the results.
        self._lock = Lock()
        database = open_storage(storage)
        metric, direction = next(iter(study.metrics.items()))
        self._tests = Queue(database, study.title, metric, direction)
        self._tuning: dict[str, Queue] = {}
        # Before the queues for the tuning of another study are created, and again when its tuning runs are known.
        self._check_title()
        if study.search is not None:
            metric, direction = study.objective
            for method in study.methods:
                name, space = f"{study.title} (tuning of {method})", study.search.space(method)
                self._tuning[method] = Queue(database, name, metric, direction, space)
        self._check_title()
        self._tests.study.set_user_attr(STUDY_KEY, study.to_dict())

    def run(self) -> list[Run]:
        """Runs until all runs of the study have ended, here or elsewhere, and returns their records.

        If it is interrupted, it kills the runs of this machine, which can then be taken again.
        """
        with ThreadPoolExecutor(len(self._variables)) as threads:
            workers = [threads.submit(self._work, variables) for variables in self._variables]
            try:
                wait(workers, return_when=FIRST_EXCEPTION)
            finally:
                self._processes.stop()
        errors = [error for worker in workers if (error := worker.exception()) is not None]
        # The error of one worker interrupts the others.
        for error in sorted(errors, key=lambda error: isinstance(error, Interrupted)):
            raise error
        return self.write_results()

    def records(self) -> list[Run]:
        """The runs that have ended."""
        return [run for queue in (*self._tuning.values(), self._tests) for run in queue.records().values()]

    def write_results(self) -> list[Run]:
        """Writes the records of all machines into results.jsonl, and returns them."""
        with self._lock:
            runs = self.records()
            write_runs(self.folder / RESULTS_FILE, runs)
        return runs

    def _work(self, variables: Mapping[str, str]) -> None:
        while not self._processes.is_stopped:
            with self._lock:
                queue, has_ended = self._choose()
            if queue is not None:
                run = queue.take(partial(self._execute, variables))
                if run is not None:
                    self.report(run, self.write_results())
            elif has_ended:
                return
            else:
                time.sleep(POLL_INTERVAL)

    def _execute(self, variables: Mapping[str, str], name: str) -> Run:
        # Not those that were planned when the queue was chosen: other workers may have begun the next round since.
        (run,) = (planned[name] for _, planned in self._phases() if name in planned)
        if run.phase == "test" and self._tuning and run.method not in self._best():
            log = "All tuning runs of this method failed, so it has no arguments to test."
            return Run(run.method, run.seed, run.phase, run.trial, "failed", run.arguments, log=log)

        def is_first() -> bool:
            return all((other.phase, other.state) != (run.phase, "complete") for other in self.records())

        record = execute(run, self.study, self.script, self.folder, self._processes, variables, is_first)
        if self._differences():
            raise ValueError(
                "another worker has begun with a corrected version of this study. Start that one here, too."
            )
        return record

    def _check_title(self) -> None:
        if differences := self._differences(changeable(self.records())):
            raise ValueError(
                f"the database already has a study {self.study.title!r}: {differences}. Change the title of this one."
            )

    def _differences(self, changeable: Collection[str] = ()) -> str:
        """What differs from the study in the database, see [`Study.differences`]."""
        stored = self._tests.study.user_attrs.get(STUDY_KEY, self.study.to_dict())
        return self.study.differences(stored, changeable)

    def _choose(self) -> tuple[Queue | None, bool]:
        """A queue with a run to take, if there is one, and whether all runs have ended."""
        for queue, planned in self._phases():
            queue.release_dead()
            queue.fill({name: {key: run.arguments[key] for key in queue.space} for name, run in planned.items()})
            if queue.has_waiting():
                return queue, False
            if queue is self._tests and planned.keys() <= queue.records().keys():
                return None, True
        return None, False

    def _phases(self) -> Iterator[tuple[Queue, dict[str, PlannedRun]]]:
        """Yields queues with the runs that can run by now: for each method those of the first round of tuning that has
        not ended, or after all tuning the test runs."""
        is_tuned = True
        for method, queue in self._tuning.items():
            runs = list(queue.records().values())
            if missing := set(self._trials) - {run.trial for run in runs}:
                is_tuned = False
                yield queue, self._round(method, round_of(min(missing)), runs)
        if is_tuned:
            yield self._tests, {run.name: run for run in self.study.test_runs(self._best())}

    @property
    def _trials(self) -> range:
        return range(self.study.search.trials if self.study.search else 0)

    def _round(self, method: str, trials: range, runs: list[Run]) -> dict[str, PlannedRun]:
        """The tuning runs of a method in one round."""
        queue, (metric, direction) = self._tuning[method], self.study.objective
        earlier = [run for run in runs if run.trial < trials.start and run.state == "complete"]
        planned = {}
        for trial in trials:
            if trial in self._trials:
                chosen = sample(trial, len(self._trials), queue.space, metric, direction, earlier)
                run = self.study.tuning_run(method, trial, chosen)
                planned[run.name] = run
        return planned

    def _best(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """The best trial of each method that has one and its arguments, after all tuning."""
        best = {}
        for method, queue in self._tuning.items():
            metric, direction = self.study.objective
            runs = [run for run in queue.records().values() if run.state == "complete"]
            if runs:
                sign = 1 if direction == "higher" else -1
                run = max(runs, key=lambda run: (sign * run.metrics[metric], -run.trial))
                best[method] = run.trial, {name: run.arguments[name] for name in queue.space}
        return best


def visible_gpus() -> list[str]:
    """The entries of `CUDA_VISIBLE_DEVICES` that this process may use; all GPUs if it is not set."""
    import torch

    count = torch.cuda.device_count()
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")[:count]


def environment(slot: int, jobs: int, gpus: Sequence[str]) -> dict[str, str]:
    """Environment variables of the runs of a worker: one of the GPUs, or a share of the CPU's cores.

    Args:
        slot (`int`): number of the worker on this machine.
        jobs (`int`): number of workers on this machine.
        gpus (`Sequence[str]`): that they share.

    Example:

    >>> environment(2, jobs=3, gpus=["4", "5"])
    {'CUDA_VISIBLE_DEVICES': '4'}
    """
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
