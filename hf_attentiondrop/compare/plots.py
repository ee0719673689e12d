"""The figures of a report: paired differences of a metric, and accuracy against calibration error.

Letters are larger than in other plots, so that they stay legible at the width of a phone.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..evaluation.style import BLUE, GRAY, LINES, VERMILION, new_figure, plural
from .comparison import Comparison, Estimate
from .results import Direction


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAGNIFICATION = 1.4
LONGEST_NAME = 20
# Color and marker of a verdict; the colors of "perhaps" are those of a decided one, with a hollow marker.
BETTER, WORSE, OPEN = (BLUE, "o"), (VERMILION, "s"), (GRAY, "D")
VERDICTS = {
    "better": ("better", BETTER, True),
    "perhaps better": ("better before correction", BETTER, False),
    "worse": ("worse", WORSE, True),
    "perhaps worse": ("worse before correction", WORSE, False),
    "unclear": ("cannot be told", OPEN, True),
    "unknown": ("no interval", OPEN, False),
}


def forest_plot(comparisons: Mapping[str, Comparison], metric: str, direction: Direction, reference: str) -> "Figure":
    """The paired difference of each method from the reference with its 95 % interval, and the differences per seed.

    Args:
        comparisons (`dict`): method, without the reference, to its [`Comparison`]. Methods without a seed in common
            with the reference have an empty row.
        metric (`str`): its name.
        direction (`str`): `"higher"` or `"lower"`; the better side is shaded.
        reference (`str`): its name.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if no method has a difference.
    """
    shown = [comparison for comparison in comparisons.values() if comparison.difference is not None]
    if not shown:
        raise ValueError(f"Expected a method with a seed in common with {reference!r}, got none: nothing to plot.")
    figure = new_figure(2.0 + 0.48 * len(comparisons), MAGNIFICATION)
    axes = figure.subplots()
    labelled = set()
    for row, comparison in enumerate(comparisons.values()):
        if comparison.difference is None:
            axes.text(0, row, " not measured", va="center", fontsize="small", color=GRAY)
            continue
        label, (color, marker), is_filled = VERDICTS[comparison.verdict]
        axes.plot(
            list(comparison.differences.values()), [row + 0.25] * len(comparison.differences), "|",
            color=GRAY, alpha=0.7, markersize=5,
        )  # fmt: skip
        axes.errorbar(
            comparison.difference.mean, row, xerr=comparison.difference.half_width,
            color=color, marker=marker, markerfacecolor=color if is_filled else "none", markersize=6, capsize=3,
            linestyle="none", label=None if label in labelled else label,
        )  # fmt: skip
        labelled.add(label)
    axes.axvline(0, color=GRAY, linewidth=1)
    largest = 1.05 * max(abs(bound) for bound in axes.get_xlim())
    axes.set_xlim(-largest, largest)
    sign = 1 if direction == "higher" else -1
    axes.axvspan(0, sign * largest, color=BLUE, alpha=0.07, linewidth=0)
    axes.annotate(
        "better →" if sign > 0 else "← better", (0.5 + 0.25 * sign, 1), (0, 3),
        xycoords="axes fraction", textcoords="offset points", color=BLUE, ha="center", fontsize="small",
    )  # fmt: skip
    axes.set_yticks(range(len(comparisons)), [plain(method) for method in comparisons])
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    counts = sorted({len(comparison.differences) for comparison in shown})
    seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else plural(counts[0], "seed")
    axes.set_xlabel(f"difference from {plain(reference)}\n(ticks: each of {seeds})")
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _legend_of_two_columns(figure, axes)
    has_intervals = any(comparison.p is not None for comparison in shown)
    figure.suptitle(plain(metric, 32) + (", with 95 % intervals" if has_intervals else ""), fontsize="medium")
    return figure


def trade_off_plot(
    accuracy: Mapping[str, Estimate | None],
    error: Mapping[str, Estimate | None],
    names: tuple[str, str],
    reference: str,
) -> "Figure":
    """Accuracy against calibration error, each with its 95 % interval over seeds.

    Args:
        accuracy, error (`dict`): method to [`Estimate`]. Methods without both are left out.
        names (`tuple` of `str`): of the two metrics.
        reference (`str`): the method whose means are marked by lines.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if no method has both.
    """
    shown = {method: (error[method], accuracy[method]) for method in accuracy if error.get(method)}
    points = {method: (x, y) for method, (x, y) in shown.items() if x is not None and y is not None}
    if not points:
        raise ValueError("Expected a method with both metrics, got none: there is nothing to plot.")
    figure = new_figure(4.0 + 0.25 * (len(points) // 2), MAGNIFICATION)
    axes = figure.subplots()
    for rank, (method, (x, y)) in enumerate(points.items()):
        # 25 different pairs of color and marker.
        color, marker = LINES[rank % len(LINES)][0], LINES[(rank + rank // len(LINES)) % len(LINES)][1]
        axes.errorbar(
            x.mean, y.mean, xerr=x.half_width, yerr=y.half_width,
            color=color, marker=marker, markersize=6, capsize=3, linestyle="none", label=plain(method),
        )  # fmt: skip
    has_intervals = any(estimate.half_width is not None for pair in points.values() for estimate in pair)
    title = "Means with 95 % intervals" if has_intervals else "Means over seeds"
    if reference in points:
        title += f" (dotted: {plain(reference)})"
        x, y = points[reference]
        axes.axvline(x.mean, color=GRAY, linewidth=1, linestyle=":", zorder=1)
        axes.axhline(y.mean, color=GRAY, linewidth=1, linestyle=":", zorder=1)
    axes.annotate(
        "↖ better", (0, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", color=BLUE, fontsize="small"
    )
    axes.set(xlabel=plain(names[1], 40), ylabel=plain(names[0], 30))
    axes.margins(0.08)
    axes.locator_params(nbins=5)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    _legend_of_two_columns(figure, axes)
    figure.suptitle(title, fontsize="medium")
    return figure


def plain(name: str, longest: int = LONGEST_NAME) -> str:
    r"""A name on one line, without the middle if it is long; matplotlib does not read `$` as the start of a formula.

    >>> plain("a\n$b$"), plain("abcdefghij", 5)
    ('a \\$b\\$', 'ab…ij')
    """
    name = " ".join(name.split())
    if len(name) > longest:
        name = f"{name[: longest // 2]}…{name[len(name) - (longest - 1) // 2 :]}"
    return name.replace("$", r"\$")


def _legend_of_two_columns(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
