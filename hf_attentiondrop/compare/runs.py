"""One run of a study: its command line, its folder, and the record of what came of it."""

import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..validation import is_number, suggestion
from .parsing import flatten
from .process import Ended, Processes
from .results import Run
from .script import Script
from .study import PlannedRun, Study


METRICS_FILE = "metrics.json"
# Of the log of a failed run.
LOG_LINES = 20
LOG_CHARACTERS = 500
# How argparse, and so every recipe, ends when it does not accept its arguments.
REFUSAL = re.compile(r"\S+: error: .*")
TERMINAL_CODES = r"\x1b\[[\d;?]*[A-Za-z]"
# One process, whatever `accelerate config` has set up, since several runs can share a machine. Without --quiet, the
# traceback of the launcher would hide that of the script.
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--quiet"),
)


class MissingMetric(ValueError):
    """Raised for a metric of the study that a run did not write, although it ended without an error."""


def command_line(planned: PlannedRun, study: Study, script: Script, folder: Path) -> list[str]:
    """The command of a run.

    Args:
        planned ([`PlannedRun`]): the run.
        study ([`Study`]): with the launcher.
        script ([`Script`]): that runs.
        folder (`Path`): of the study.
    """
    arguments = {**planned.arguments, "seed": planned.seed, "output_dir": str(run_folder(planned, folder))}
    launcher = ACCELERATE if study.launcher == "accelerate" else ()
    return [sys.executable, *launcher, *script.command_line(arguments)]


def run_folder(planned: PlannedRun, folder: Path) -> Path:
    """The output folder of a run, in the folder of its study."""
    return folder.absolute() / "runs" / planned.name


def execute(
    planned: PlannedRun,
    study: Study,
    script: Script,
    folder: Path,
    processes: Processes,
    variables: Mapping[str, str],
    is_first: Callable[[], bool],
) -> Run:
    """Runs the script and returns the record.

    What an earlier attempt left in the folder is deleted. Everything that the script prints is in a log next to it.

    Args:
        planned ([`PlannedRun`]): what to run.
        study ([`Study`]): that the run belongs to.
        script ([`Script`]): to run.
        folder (`Path`): of the study.
        processes ([`Processes`]): that the run belongs to.
        variables (`Mapping[str, str]`): for the environment of the run, such as `CUDA_VISIBLE_DEVICES`.
        is_first (`Callable`): whether no run of its phase has been completed.

    Raises:
        Interrupted: if `processes` were stopped.
        MissingMetric: if the first run lacks a metric: probably all will, because its name in the study is wrong.
        ValueError: if the script does not accept the arguments of the first run: probably it will accept no others.
    """
    output = run_folder(planned, folder)
    log = output.with_name(f"{output.name}.log")
    if output.exists():
        shutil.rmtree(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    ended = processes.run(command_line(planned, study, script, folder), log, {**os.environ, **variables})
    wanted = list(study.metrics) if planned.phase == "test" else [study.objective[0]]
    try:
        metrics, versions = read_metrics(output / METRICS_FILE, ended, wanted)
        failure = None
    except ValueError as error:
        if isinstance(error, MissingMetric) and is_first():
            key = "metrics" if planned.phase == "test" else "search.metric"
            raise MissingMetric(
                f"{planned.name}: {error} All other runs would probably fail, too. Correct `{key}` of the study, or "
                "the script, and start it again: it repeats this run and keeps those that have ended."
            ) from error
        lines = printed_lines(log)
        last = lines[-1] if lines else ""
        is_begun = planned.phase == "test" and study.search is not None
        if ended.code > 0 and REFUSAL.fullmatch(last) and not is_begun and is_first():
            raise ValueError(
                f"{planned.name}: the script does not accept its arguments: {last} All other runs would probably "
                f"fail, too. Nothing was measured: correct the arguments, delete {folder} or name another folder, and "
                "start again."
            ) from error
        metrics, versions, failure = {}, {}, "\n".join([str(error), *map(_shortened, lines[-LOG_LINES:])])
    if planned.phase == "tune":
        # Measurements on the test data are for the test runs alone.
        metrics = {name: value for name, value in metrics.items() if name in wanted}
    return Run(
        planned.method,
        planned.seed,
        planned.phase,
        planned.trial,
        "complete" if failure is None else "failed",
        arguments=planned.arguments,
        metrics=metrics,
        seconds=ended.seconds or None,
        peak_memory_mb=ended.peak_memory_mb or None,
        versions=versions,
        commit=commit_of(script.path.parent),
        hardware=hardware(variables.get("CUDA_VISIBLE_DEVICES")),
        log=failure,
    )


def read_metrics(path: Path, ended: Ended, wanted: list[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Reads the metrics that a run wrote, and the versions of packages if it wrote them.

    Args:
        path (`Path`): of metrics.json.
        ended ([`Ended`]): how the run ended.
        wanted (`list[str]`): metrics that must be there.

    Raises:
        MissingMetric: if the script ended without an error, but did not write a wanted metric.
        ValueError: if the run failed, in any other way; the message says why.
    """
    if ended.code != 0:
        killed = f"was killed by signal {-ended.code}" + (" (out of memory?)" if ended.code == -9 else "")
        raise ValueError(f"The script {killed if ended.code < 0 else f'ended with exit code {ended.code}'}.")
    if not path.is_file():
        raise ValueError(f"The script ended without an error, but wrote no {path.name} into its --output_dir.")
    try:
        values = flatten(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"The script wrote a {path.name} that is no JSON object: {error}") from error
    numbers = {name: value for name, value in values.items() if is_number(value)}
    if missing := [name for name in wanted if name not in numbers]:
        raise MissingMetric(
            f"The script wrote no number {' and no '.join(map(repr, missing))} into {path.name}."
            f"{''.join(suggestion(name, numbers) for name in missing)} It has {', '.join(numbers) or 'none'}."
        )
    if not_finite := [f"{name} = {numbers[name]}" for name in wanted if not math.isfinite(numbers[name])]:
        raise ValueError(
            f"The script wrote {' and '.join(not_finite)} into {path.name}. A metric that is not finite has no mean, "
            "so the run counts as failed: the training may have diverged, or the metric is undefined."
        )
    versions = {name: str(value) for name, value in values.items() if name.startswith("versions/")}
    return (
        {name: value for name, value in numbers.items() if math.isfinite(value)},
        {name.removeprefix("versions/"): value for name, value in versions.items()},
    )


def printed_lines(log: Path) -> list[str]:
    """The lines that a program printed, without empty ones; a progress bar counts as its last state."""
    text = re.sub(TERMINAL_CODES, "", log.read_text(encoding="utf-8", errors="replace"))
    lines = (line.rstrip().rpartition("\r")[-1] for line in text.split("\n"))
    return [line for line in lines if line.strip()]


def _shortened(line: str) -> str:
    half = LOG_CHARACTERS // 2
    return line if len(line) <= LOG_CHARACTERS else f"{line[:half]} … {line[-half:]}"


@cache
def commit_of(folder: Path) -> str | None:
    """The git commit of a folder, with `-dirty` if files differ from it; `None` outside of a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return _output_of(command)


@cache
def hardware(gpu: str | None) -> str:
    """The name of a GPU, or of the CPU and its number of cores.

    Args:
        gpu (`str`, *optional*): its entry in `CUDA_VISIBLE_DEVICES`; none on a machine without GPUs.
    """
    if gpu is not None:
        command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=name", "--format=csv,noheader"]
        return _output_of(command) or f"GPU {gpu}"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _output_of(command: list[str]) -> str | None:
    try:
        result: Any = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
