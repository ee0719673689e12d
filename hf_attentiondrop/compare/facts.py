"""What a report says about the runs themselves: how many, with which settings, on which machine."""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from ..evaluation.style import plural
from .comparison import complete_tests
from .results import Question, Run
from .sentences import MISSING, enumerated


Table = list[tuple[str, ...]]
"""Rows of cells, the header first."""


def settings_table(question: Question, runs: Sequence[Run]) -> Table:
    """The arguments in which methods differ, of those that all test runs of a method share; empty without any."""
    shared = {}
    for method, tests in complete_tests(runs, question).items():
        arguments = [run.arguments for run in tests.values()] or [{}]
        shared[method] = {
            name: value
            for name, value in arguments[0].items()
            if all(name in others and others[name] == value for others in arguments)
        }
    ran = [arguments for arguments in shared.values() if arguments]
    rows = [
        (
            method,
            ", ".join(
                f"{name}={value}"
                for name, value in arguments.items()
                if any(name not in others or others[name] != value for others in ran)
            )
            or MISSING,
        )
        for method, arguments in shared.items()
    ]
    return [("Method", "Arguments"), *rows] if any(text != MISSING for _, text in rows) else []


def failed_runs(runs: Sequence[Run]) -> list[Run]:
    """The failed runs, without those that were completed later."""
    complete = {run.key for run in runs if run.state == "complete"}
    return [run for run in runs if run.state == "failed" and run.key not in complete]


def extent(question: Question, runs: Sequence[Run]) -> list[tuple[str, str]]:
    """How much was run: seeds, and settings tried."""
    seeds = {method: sorted(tests) for method, tests in complete_tests(runs, question).items()}
    tried = {
        method: len({run.trial for run in runs if (run.method, run.phase, run.state) == (method, "tune", "complete")})
        for method in question.methods
    }
    planned = question.tuning_trials
    facts = [
        ("Test seeds", _per_method({method: f"{len(of)} ({', '.join(map(str, of))})" for method, of in seeds.items()}))
    ]
    if planned or any(tried.values()):
        counts = {
            method: str(count) if count == planned else f"{count} of {planned}" for method, count in tried.items()
        }
        facts.append(("Settings tried per method", _per_method(counts)))
    else:
        facts.append(("Settings tried per method", "none, the study fixes them"))
    if unknown := Counter(run.method for run in runs if run.method not in question.methods):
        left_out = enumerated([f"{method} ({plural(count, 'run')})" for method, count in sorted(unknown.items())])
        facts.append(("Left out, not in the study", left_out))
    return facts


def environment(question: Question, runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Hardware, commit and versions of the test runs; several values if they were mixed."""
    tests = [run for of_method in complete_tests(runs, question).values() for run in of_method.values()]
    packages = sorted({name for run in tests for name in run.versions})
    found = {
        "Hardware": Counter(run.hardware or "unknown" for run in tests),
        "Commit": Counter(run.commit or "unknown" for run in tests),
        **{name: Counter(run.versions.get(name, "unknown") for run in tests) for name in packages},
    }
    facts = [(name, _counted(counts)) for name, counts in found.items() if counts]
    return [*facts, ("Statistics", f"SciPy {version('scipy')}")]


def _per_method(texts: Mapping[str, str]) -> str:
    """One text if all methods have the same."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{method}: {text}" for method, text in texts.items())


def _counted(counts: Counter[str]) -> str:
    """The only text, or all with their numbers of runs."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{text} ({plural(count, 'run')})" for text, count in counts.items())
