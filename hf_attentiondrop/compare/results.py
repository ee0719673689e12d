"""The question of a study, and its runs in a file with one JSON object per line."""

import json
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from ..validation import Config, is_integer, is_number, plain, suggestion


RESULTS_FILE = "results.jsonl"
Direction = Literal["higher", "lower"]


@dataclass(frozen=True, repr=False)
class Question(Config):
    """What a study asks.

    Args:
        title (`str`): of the report.
        metrics (`dict`): name of each metric to `"higher"` or `"lower"`, whichever is better. Corrections for
            multiple tests are made within each metric, not across metrics.
        reference (`str`): the method that the others are compared with.
        methods (`list` of `str`): all methods, including the reference, in the order of the report.
        command (`str`): the command line that made the study.
        tuning_trials (`int`, defaults to 0): settings tried per method before the test.

    Raises:
        ValueError: for a field that is empty or does not fit the others.

    Example:

    >>> question = Question("Digits", {"accuracy": "higher"}, "dropout", ["dropout", "blur"], "compare digits.yaml")
    >>> question.others
    ['blur']
    """

    title: str
    metrics: dict[str, Direction]
    reference: str
    methods: list[str]
    command: str
    tuning_trials: int = 0

    def __post_init__(self) -> None:
        self._check(
            "metrics",
            lambda metrics: (
                isinstance(metrics, dict)
                and len(metrics) > 0
                and all(isinstance(name, str) and value in ("higher", "lower") for name, value in metrics.items())
            ),
            "a dict from at least one metric to 'higher' or 'lower'",
            "Without a direction there is no better and no worse.",
        )
        self._check(
            "methods",
            lambda methods: len(methods) > 1 and len(set(methods)) == len(methods),
            "at least two different methods",
            "A comparison needs a reference and something else.",
        )
        self._check(
            "reference",
            lambda reference: reference in self.methods,
            f"one of the methods {', '.join(map(repr, self.methods))}",
            "The other methods are compared with it.",
        )
        self._check(
            "tuning_trials",
            lambda trials: is_integer(trials) and trials >= 0,
            "a number of settings, at least 0",
            "The report says how many each method was given.",
        )

    @property
    def others(self) -> list[str]:
        """The methods except the reference."""
        return [method for method in self.methods if method != self.reference]


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Args:
        method (`str`): its name in the study.
        seed (`int`): of the run. Runs of different methods with one seed are paired.
        phase (`str`): `"tune"` while settings are chosen, `"test"` for the runs that count.
        trial (`int`): number of the settings that were tried, from 0.
        state (`str`): `"complete"` or `"failed"`.
        arguments (`dict`): of the script.
        metrics (`dict`): name to finite number.
        seconds (`float`, *optional*): wall-clock time of the script.
        peak_memory_mb (`float`, *optional*): the largest memory use, in MB.
        versions (`dict`): package to version.
        commit (`str`, *optional*): of the source code.
        hardware (`str`, *optional*): the machine and its accelerator, in words.
        log (`str`, *optional*): why the run failed, and the last lines that the script printed.

    Raises:
        ValueError: for a phase or state that does not exist, for a metric, time or memory that is not a finite number,
            and for fields of another type.

    Example:

    >>> run = Run("blur", seed=0, phase="test", trial=0, state="complete", metrics={"accuracy": 0.9})
    >>> Run(**json.loads(run.to_json())) == run
    True
    """

    method: str
    seed: int
    phase: Literal["tune", "test"]
    trial: int
    state: Literal["complete", "failed"]
    arguments: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    peak_memory_mb: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    hardware: str | None = None
    log: str | None = None

    def __post_init__(self) -> None:
        who = f"Run of {self.method!r} with seed {self.seed}"
        for name, kind in (("method", str), ("seed", int), ("trial", int), ("arguments", dict), ("metrics", dict)):
            if not isinstance(value := getattr(self, name), kind) or isinstance(value, bool):
                raise ValueError(
                    f"{who}: `{name}` must be of type {kind.__name__}, got {value!r}. Correct the record."
                )
        object.__setattr__(self, "metrics", {name: plain(value) for name, value in self.metrics.items()})
        for name, known in (("phase", ("tune", "test")), ("state", ("complete", "failed"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{who}: `{name}` must be one of {known}, got {getattr(self, name)!r}.")
        for name, value in self.metrics.items():
            if not (is_number(value) and math.isfinite(value)):
                raise ValueError(
                    f"{who}: the metric {name!r} must be a finite number, got {value!r}. It would spoil every mean of "
                    "its method. A run that diverged is failed: pass state='failed' without this metric."
                )
        for name in ("seconds", "peak_memory_mb"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{who}: `{name}` must be a finite number above 0 or None, got {value!r}.")

    @property
    def key(self) -> tuple[bool, str, int, int]:
        """What identifies a run; also the order of runs: tuning first, then by method, trial and seed."""
        return self.phase == "test", self.method, self.trial, self.seed

    def to_json(self) -> str:
        """Returns the run as one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)


def read_runs(path: str | Path) -> list[Run]:
    """Reads the runs of a study, in an order that does not depend on when each ended.

    A line that a killed writer left incomplete is skipped with a warning.

    Args:
        path (`str` or `Path`): the results file. A missing file has no runs.

    Returns:
        `list` of [`Run`], sorted by [`Run.key`].

    Raises:
        ValueError: for a complete line that is not a run; the message names it.
    """
    path, runs = Path(path), []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:  # Includes UnicodeDecodeError: a line can end within a character.
            warnings.warn(f"{path}, line {number} is incomplete and was skipped: its writer was killed.", stacklevel=2)
            continue
        try:
            runs.append(_parse(values))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return sorted(runs, key=lambda run: run.key)


def append_run(path: str | Path, run: Run) -> None:
    """Appends a run to a results file, which need not exist, in one write, so that several processes can append.

    Raises:
        OSError: if the line was not written completely, such as on a full disk.
    """
    with open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        # Ends the line of a killed writer.
        start = "" if file.read(1) in (b"", b"\n") else "\n"
        line = f"{start}{run.to_json()}\n".encode()
        if file.write(line) != len(line):
            raise OSError(f"{path}: the disk took only a part of a line. Free some space and continue the study.")


def write_runs(path: str | Path, runs: Iterable[Run]) -> None:
    """Replaces a results file as a whole, so that a killed writer leaves the old or the new one."""
    path = Path(path)
    # Machines that share the folder may have processes of the same number.
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    lines = [run.to_json() + "\n" for run in sorted(runs, key=lambda run: run.key)]
    partial.write_text("".join(lines), encoding="utf-8", newline="\n")
    partial.replace(path)


def _parse(values: Any) -> Run:
    names = [item.name for item in fields(Run)]
    required = {item.name for item in fields(Run) if item.default is MISSING and item.default_factory is MISSING}
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object with the fields of a run, got {values!r}.")
    for name in values:
        if name not in names:
            hint = suggestion(name, names)
            raise ValueError(f"unknown field {name!r}.{hint} The fields of a run are {', '.join(names)}.")
    if missing := sorted(required - values.keys()):
        raise ValueError(f"expected the fields {', '.join(sorted(required))}, got none named {', '.join(missing)}.")
    return Run(**values)
