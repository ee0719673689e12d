"""`compare`: runs a study of several methods over several seeds, and reports which one helps."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import uuid4

from .flags import INVALID_INPUT, CommandError, naming_flag, positive
from .plans import describe_plan, describe_run


if TYPE_CHECKING:
    from ..compare.results import Run
    from ..compare.script import Script
    from ..compare.study import Study

# Modules that `compare` imports beyond the requirements of the package, and the packages that provide them.
COMPARE_NEEDS = {"matplotlib": "matplotlib", "optuna": "optuna", "scipy": "scipy", "yaml": "pyyaml"}
STUDY_FILE = "study.yaml"
DATABASE = "study.db"
INTERRUPTED = 130
FAILED = 1


def declare_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `compare` to the parser."""
    parser = commands.add_parser(
        "compare",
        help="find out which method helps: methods x seeds of one script, with error bars",
        description="Runs a script with several methods and seeds and reports which method helps, by how much and how "
        "certain that is: report.md, report.html and results.jsonl. The same command continues a study, and runs "
        "a part of it on each machine with the same --storage.",
    )
    parser.add_argument("study", metavar="STUDY.yaml", nargs="?", help="the study; see docs/compare.md")
    parser.add_argument("--preset", help="a study that comes with the package, in place of a file: regularizers")
    parser.add_argument("--output_dir", help="folder of the study (default: runs/ and the name of its file)")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at the same time on this machine (default: 1)")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="a database that several machines share, such as postgresql+psycopg://USER@HOST/DATABASE; by default a "
        "file in the folder of the study",
    )
    parser.add_argument("--seeds", type=positive, help="number of seeds, in place of the one in the study")
    parser.add_argument("--script", help="path of the script, in place of the one in the study")
    parser.add_argument("--dry_run", action="store_true", help="only list the runs, their commands and estimated time")
    parser.add_argument("--report_only", action="store_true", help="only write the report again, from results.jsonl")
    parser.set_defaults(run=compare)


def compare(arguments: argparse.Namespace) -> str:
    """Runs a study to its end and returns the report.

    Raises:
        CommandError: for invalid input and missing packages, with code 130 after Ctrl-C, and with code 1 if all test
            runs failed.
    """
    if missing := [package for module, package in COMPARE_NEEDS.items() if find_spec(module) is None]:
        raise CommandError(f"compare needs {', '.join(missing)}: `pip install {' '.join(missing)}`.")
    if os.name != "posix":
        raise CommandError("compare runs on Linux and macOS only, where it can stop all processes of a run.")
    try:
        return _compare(arguments)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error


def _compare(arguments: argparse.Namespace) -> str:
    from ..compare.report import write_report
    from ..compare.results import RESULTS_FILE, Question, read_runs
    from ..compare.script import Script, find_script

    study, file = _read_study(arguments)
    folder = Path(arguments.output_dir or Path("runs") / file.stem)
    with naming_flag("--output_dir"):
        _check_folder(folder, study)
    if arguments.report_only and arguments.dry_run:
        raise ValueError(
            "expected --report_only or --dry_run, got both: one writes, the other must not. Leave one out."
        )
    if arguments.report_only:
        runs = read_runs(folder / RESULTS_FILE)
    else:
        with naming_flag("script"):
            script = Script.load(find_script(study.script, file.parent))
        script.check(study)
        if arguments.dry_run:
            return describe_plan(study, script, folder, read_runs(folder / RESULTS_FILE), arguments.jobs)
        runs = _run(study, script, folder, arguments)
    if not any(run.phase == "test" and run.state == "complete" for run in runs):
        raise CommandError(*_nothing_to_report(runs, folder))
    question = Question(
        study.title,
        study.metrics,
        study.reference,
        list(study.methods),
        _command(arguments),
        study.search.trials if study.search else 0,
    )
    return f"{study.title}\n\n{write_report(question, runs, folder)}\n\nThe report is in {folder / 'report.html'}."


def _read_study(arguments: argparse.Namespace) -> "tuple[Study, Path]":
    """The study with the flags that replace parts of it, and its file."""
    from ..compare.study import preset_path, read_study

    if (arguments.study is None) == (arguments.preset is None):
        given = "both" if arguments.study else "neither"
        raise ValueError(f"expected the file of a study or --preset, got {given}. Name one of them.")
    with naming_flag("--preset" if arguments.preset else arguments.study):
        file = Path(arguments.study) if arguments.study else preset_path(arguments.preset)
        study = read_study(file)
    changes = {name: getattr(arguments, name) for name in ("seeds", "script")}
    return replace(study, **{name: value for name, value in changes.items() if value is not None}), file


def _check_folder(folder: Path, study: "Study") -> None:
    """Raises for a folder that belongs to something else, or to this study as it was before a change."""
    from ..compare.parsing import read_yaml
    from ..compare.results import RESULTS_FILE, read_runs
    from ..compare.study import changeable

    file = folder / STUDY_FILE
    if not folder.exists() or (folder.is_dir() and not file.exists() and not any(folder.iterdir())):
        return
    if not file.is_file():
        raise ValueError(
            f"expected the folder of this study, an empty folder or none, got {str(folder)!r}. Name another one."
        )
    if differences := study.differences(read_yaml(file), changeable(read_runs(folder / RESULTS_FILE))):
        raise ValueError(
            f"{str(folder)!r} holds another study: {differences}. Runs of both would be mixed. Undo the change, name "
            "another folder, or delete that one."
        )


def _run(study: "Study", script: "Script", folder: Path, arguments: argparse.Namespace) -> "list[Run]":
    """Runs the study, with a progress bar on stderr."""
    import yaml
    from optuna.exceptions import StorageInternalError
    from tqdm import tqdm

    from ..compare.engine import Engine, visible_gpus

    def write_study() -> None:
        # Outside of the folder, and as a whole: another worker may look for it at the same time.
        partial = folder.with_name(f"{folder.name}.{uuid4().hex}.partial")
        folder.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(study.to_dict(), sort_keys=False, allow_unicode=True)
        partial.write_text(f"# {_command(arguments)}\n{text}", encoding="utf-8")
        folder.mkdir(exist_ok=True)
        partial.replace(folder / STUDY_FILE)

    if arguments.storage is None:
        write_study()
    with tqdm(total=study.size, unit="run", dynamic_ncols=True) as progress:

        def report(run: "Run", runs: "list[Run]") -> None:
            progress.write(describe_run(run, list(study.metrics)), file=sys.stderr)
            progress.update(len(runs) - progress.n)

        with naming_flag("--storage" if arguments.storage else str(folder / DATABASE)):
            storage = arguments.storage or f"sqlite:///{folder.absolute() / DATABASE}"
            engine = Engine(study, script, folder, storage, arguments.jobs, visible_gpus(), report)
        write_study()
        progress.initial = progress.n = len(engine.records())
        progress.refresh()
        try:
            with _terminating():
                return engine.run()
        except KeyboardInterrupt:
            progress.close()
            raise CommandError(
                f"interrupted with {progress.n} of {study.size} runs ended. The same command continues the study.",
                INTERRUPTED,
            ) from None
        except StorageInternalError as error:
            progress.close()
            raise CommandError(
                f"the database failed: {error.__cause__ or error}. The same command continues the study.", FAILED
            ) from error


@contextmanager
def _terminating() -> Iterator[None]:
    """Makes SIGTERM, with which a cluster ends a job, interrupt like Ctrl-C."""

    def interrupt(signal: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(arguments: argparse.Namespace) -> str:
    """The command that repeats the study, without what concerns this machine, such as the password of a database."""
    given = [arguments.study] if arguments.study else ["--preset", arguments.preset]
    for name in ("seeds", "script", "output_dir"):
        value = getattr(arguments, name)
        given += [f"--{name}", str(value)] if value else []
    return shlex.join(["hf-attentiondrop", "compare", *given])


def _nothing_to_report(runs: "Sequence[Run]", folder: Path) -> tuple[str, int]:
    failed = [run for run in runs if run.state == "failed"]
    if not failed:
        return f"{str(folder)!r} has no complete test run, so there is nothing to report.", INVALID_INPUT
    return (
        f"no test run was completed, so there is nothing to report: {describe_run(failed[-1], []).rstrip('.')}. The "
        f"logs are in {str(folder / 'runs')!r}. Correct the cause, delete {str(folder)!r} and start again.",
        FAILED,
    )
