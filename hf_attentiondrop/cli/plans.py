"""What `compare` prints about runs: all of a study with their commands and the time they take, or how one ended."""

import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..compare.results import Run
    from ..compare.script import Script
    from ..compare.study import PlannedRun, Study


def describe_plan(study: "Study", script: "Script", folder: Path, runs: "Sequence[Run]", jobs: int) -> str:
    """All runs of a study with their commands, and how long those that are left will take.

    Args:
        study ([`Study`]): to describe.
        script ([`Script`]): that it runs.
        folder (`Path`): of the study.
        runs (`Sequence`): those that have ended.
        jobs (`int`): number of runs at the same time.
    """
    from ..compare.runs import command_line
    from ..compare.study import name_of

    ended = {name_of(run): run for run in runs}
    left, lines = [], []
    for planned in _plan(study):
        run = ended.get(planned.name)
        if run is None:
            left.append(planned)
        command = shlex.join(command_line(planned, study, script, folder))
        lines.append(f"{planned.name} ({run.state if run else 'to run'}): {command}")
    heading = f"{study.title}: {len(lines)} runs, {len(left)} of them to run, in {folder}"
    return "\n".join([heading, *lines, _estimate(left, runs, jobs)])


def describe_run(run: "Run", metrics: Iterable[str]) -> str:
    """The outcome of a run in one line.

    Args:
        run ([`Run`]): that has ended.
        metrics (`Iterable[str]`): to name, of a test run.
    """
    name = f"{run.method}, {f'trial {run.trial}' if run.phase == 'tune' else f'seed {run.seed}'}"
    if run.state == "failed":
        lines = (run.log or "").splitlines()
        return f"{name}: failed. {' '.join([*lines[:1], *lines[1:][-1:]])}"
    shown = [f"{metric} {run.metrics[metric]:.4g}" for metric in (metrics if run.phase == "test" else run.metrics)]
    return f"{name}: {', '.join(shown)} ({duration(run.seconds or 0)})"


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(7.2), duration(200), duration(7500)
    ('7 s', '3 min', '2 h 5 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _plan(study: "Study") -> "Iterable[PlannedRun]":
    """All runs; an argument that a search will choose is its space, in angle brackets."""
    search = study.search
    spaces = {
        method: {name: f"<{space}>" for name, space in (search.space(method) if search else {}).items()}
        for method in study.methods
    }
    for trial in range(search.trials if search else 0):
        for method in study.methods:
            yield study.tuning_run(method, trial, spaces[method])
    yield from study.test_runs({method: (0, space) for method, space in spaces.items()})


def _estimate(left: "Sequence[PlannedRun]", runs: "Sequence[Run]", jobs: int) -> str:
    measured: dict[str, list[float]] = {}
    for run in runs:
        if run.state == "complete" and run.seconds is not None:
            measured.setdefault(run.method, []).append(run.seconds)
    if not left:
        return "Nothing is left to run."
    if not measured:
        return "Estimated time: unknown before the first run has ended."
    medians = {method: statistics.median(seconds) for method, seconds in measured.items()}
    other = statistics.median(medians.values())
    seconds = sum(medians.get(run.method, other) for run in left) / jobs
    at_once = f", {jobs} runs at the same time" if jobs > 1 else ""
    return (
        f"Estimated time: {duration(seconds)} for {len(left)} runs{at_once}, from the times of those that have ended."
    )
