"""The report of a study: report.md, report.html and plots in its folder."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .comparison import Comparison, compare_costs, compare_methods, metric_values
from .facts import Table, environment, extent, failed_runs, settings_table
from .plots import forest_plot, trade_off_plot
from .rendering import log_tail, render, svg, text_table
from .results import RESULTS_FILE, Question, Run
from .sentences import MISSING, format_estimate, format_p, format_ratio, sentence


if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS_FOLDER = "plots"
READING = (
    "Differences are from {reference}, paired by seed. ± is half the width of a 95 % t-interval over seeds, and p is "
    "of the paired t-test. The adjusted p bounds, by Holm's procedure, the chance that any method is called better or "
    "worse by luck, separately for each metric. “Cannot be told” does not mean equal: the interval says how large the "
    "difference can still be. Fewer than three seeds have no interval: from two values it would be 13 standard errors "
    "wide on each side."
)
COST_TEXT = "Relative to {reference}: the median over pairs of test runs with the same seed on the same hardware."


@dataclass
class Plot:
    """A plot: for report.md its file, for report.html its SVG element."""

    title: str
    file: str
    svg: str


@dataclass
class Section:
    """One metric of the report: its table, notes on it, and its plot."""

    metric: str
    direction: str
    table: Table
    notes: list[str] = field(default_factory=list)
    plot: Plot | None = None


def write_report(question: Question, runs: Sequence[Run], folder: str | Path) -> str:
    """Writes report.md and report.html, with the plots of the former in `plots`.

    Args:
        question ([`Question`]): what the study asks.
        runs (`list` of [`Run`]): of the study, see [`~results.read_runs`]. Only complete test runs are compared.
        folder (`str` or `Path`): that of the study.

    Returns:
        `str`: the comparison as a plain table.

    Raises:
        ImportError: if SciPy or matplotlib is missing.
        ValueError: if a method has two complete test runs with one seed.
    """
    folder = Path(folder)
    compared = {
        metric: compare_methods(metric_values(runs, question, metric), question.reference, direction)
        for metric, direction in question.metrics.items()
    }
    (folder / PLOTS_FOLDER).mkdir(parents=True, exist_ok=True)
    sections = [_section(question, metric, compared[metric], folder) for metric in question.metrics]
    cost = _cost_table(question, runs)
    values = {
        "question": question,
        "reading": READING.format(reference=question.reference),
        "cost_text": COST_TEXT.format(reference=question.reference),
        "sentences": [
            (method, sentence({metric: compared[metric][method] for metric in compared}, question.reference))
            for method in question.others
        ],
        "sections": sections,
        "trade_off": _trade_off(question, compared, folder),
        "cost": cost,
        "settings": settings_table(question, runs),
        "failures": [(run, log_tail(run.log)) for run in failed_runs(runs)],
        "facts": [*extent(question, runs), *environment(question, runs)],
        "results_file": RESULTS_FILE,
        "example": _example(compared, question.reference),
    }
    for name in ("report.md", "report.html"):
        (folder / name).write_text(render(name, **values), encoding="utf-8")
    rows = [(section.metric, *row) for section in sections for row in section.table[1:]]
    tables = [[("Metric", *sections[0].table[0]), *rows], cost]
    return "\n\n".join(text_table(table) for table in tables if table)


def _section(question: Question, metric: str, compared: Mapping[str, Comparison], folder: Path) -> Section:
    header = ("Method", "Mean", f"Difference from {question.reference}", "p", "Adjusted p", "Seeds better")
    rows, notes = [], []
    for method, comparison in compared.items():
        count = len(comparison.differences)
        rows.append(
            (
                method,
                format_estimate(comparison.estimate),
                "reference" if method == question.reference else format_estimate(comparison.difference, signed=True),
                format_p(comparison.p),
                format_p(comparison.adjusted_p),
                f"{comparison.num_better} of {count}" if count else MISSING,
            )
        )
        notes += [f"{method}: {comparison.note}."] if comparison.note else []
    direction = question.metrics[metric]
    section = Section(metric, direction, [header, *rows], notes)
    others = {method: compared[method] for method in question.others}
    if any(comparison.difference for comparison in others.values()):
        number = list(question.metrics).index(metric) + 1
        section.plot = _plot(
            forest_plot(others, metric, direction, question.reference),
            f"{metric}: differences from {question.reference} with 95 % intervals",
            f"{number}_{re.sub(r'[^A-Za-z0-9]+', '_', metric)}",
            folder,
        )
    return section


def _trade_off(question: Question, compared: Mapping[str, Mapping[str, Comparison]], folder: Path) -> Plot | None:
    """Accuracy against calibration error, if the study has metrics of both."""

    def find(direction: str, pattern: str) -> str | None:
        found = (name for name, better in question.metrics.items() if better == direction)
        return next((name for name in found if re.search(pattern, name)), None)

    accuracy, error = find("higher", r"accuracy$"), find("lower", r"calibration_error|\bece$|_ece$")
    if accuracy is None or error is None:
        return None
    names = (accuracy, error)
    ys, xs = ({method: item.estimate for method, item in compared[name].items()} for name in names)
    if not any(ys[method] and xs[method] for method in question.methods):
        return None
    return _plot(
        trade_off_plot(ys, xs, names, question.reference),
        f"{accuracy} against {error}",
        "trade_off",
        folder,
    )


def _plot(figure: "Figure", title: str, name: str, folder: Path) -> Plot:
    file = f"{PLOTS_FOLDER}/{name}.png"
    with warnings.catch_warnings():
        # The picture shows boxes instead of letters that the font lacks; the page has fonts of the browser.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(folder / file)
        return Plot(title, file, svg(figure))


def _cost_table(question: Question, runs: Sequence[Run]) -> Table:
    costs = compare_costs(runs, question)
    if all(cost.seconds is None and cost.peak_memory_mb is None for cost in costs.values()):
        return []
    rows = [
        (method, format_ratio(cost.seconds), format_ratio(cost.peak_memory_mb), str(cost.count))
        for method, cost in costs.items()
    ]
    return [("Method", "Time", "Peak memory", "Pairs of runs"), *rows]


def _example(compared: Mapping[str, Mapping[str, Comparison]], reference: str) -> str:
    """Code that repeats the first test of the report, or nothing without any test."""
    tested = [(metric, method) for metric, of in compared.items() for method in of if of[method].p is not None]
    if not tested:
        return ""
    metric, method = tested[0]
    return f"""\
import json
from scipy.stats import ttest_rel

runs = [json.loads(line) for line in open({RESULTS_FILE!r}, encoding="utf-8")]
tests = [run for run in runs if run["phase"] == "test" and run["state"] == "complete"]
metric = {metric!r}
values = {{(run["method"], run["seed"]): run["metrics"][metric] for run in tests if metric in run["metrics"]}}
method, reference = {method!r}, {reference!r}
seeds = sorted(seed for name, seed in values if name == method and (reference, seed) in values)
result = ttest_rel([values[method, seed] for seed in seeds], [values[reference, seed] for seed in seeds])
print(result.pvalue, result.confidence_interval(0.95))"""
