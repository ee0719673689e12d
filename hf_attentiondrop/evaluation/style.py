"""The style of all plots: size, colors and legend.

Plots are `matplotlib.figure.Figure` objects without pyplot, its global state or a backend. The colors, Okabe-Ito and
cividis, are safe for color-blind readers; lines also differ in their markers.
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, ORANGE, PURPLE, GRAY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#666666"
LINES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), (ORANGE, "D"), (PURPLE, "v"))
INCHES, DOTS_PER_INCH = 6.0, 100


def new_figure(height: float, magnification: float = 1.0, width: float = INCHES) -> "Figure":
    """A figure of 600 (100 `width`) by 100 `height` pixels, with letters and lines of `magnification` times the usual
    size.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install matplotlib`.") from error
    size = (width / magnification, height / magnification)
    return Figure(figsize=size, dpi=DOTS_PER_INCH * magnification, layout="constrained")


def legend_below(figure: "Figure", axes: "Axes") -> None:
    """Adds a legend below the plot, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def plural(count: int, noun: str) -> str:
    """Returns a count with its noun.

    >>> plural(1, "seed"), plural(1200, "item")
    ('1 seed', '1,200 items')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
