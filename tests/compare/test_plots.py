"""The plots show the comparison, whatever the methods are called, and fit into their frames."""

import io

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from hf_attentiondrop.compare.comparison import Comparison, Estimate, compare_methods, metric_values
from hf_attentiondrop.compare.plots import forest_plot, trade_off_plot
from hf_attentiondrop.compare.rendering import svg

from . import WEIRD, question, study


METRIC = "test_expected_calibration_error"


def forest(seeds: int, direction: str = "higher", methods: tuple[str, ...] = (), metric: str = METRIC) -> Figure:
    names = ("dropout", *methods) or tuple(question().methods)
    asked = question(methods=list(names) if methods else question().methods)
    values = metric_values(study(seeds, tuple(asked.methods)), asked, "test_accuracy")
    compared = compare_methods(values, "dropout", direction)
    return forest_plot({name: compared[name] for name in asked.others}, metric, direction, "dropout")


def trade_off(count: int, half_width: float | None = 0.01) -> Figure:
    estimates = {f"method {i} of a $long$ name": Estimate(0.9 + 0.01 * i, half_width, 5) for i in range(count)}
    errors = {name: Estimate(1 - one.mean, half_width, 5) for name, one in estimates.items()}
    return trade_off_plot(estimates, errors, ("test_accuracy", METRIC), next(iter(estimates)))


PLOTS = {
    "forest": lambda: forest(5),
    "lower": lambda: forest(5, "lower"),
    "two_seeds": lambda: forest(2),
    "one_seed": lambda: forest(1),
    "one_method": lambda: forest(5, methods=("blur",)),
    "long_names": lambda: forest(5, methods=("x" * 300, "$" * 30), metric="metric_name_" * 20),
    "equal": lambda: forest_plot(
        {"blur": Comparison(None, {0: 0.0, 1: 0.0, 2: 0.0}, Estimate(0.0, 0.0, 3), verdict="unclear")},
        METRIC,
        "higher",
        "dropout",
    ),  # fmt: skip
    "trade_off": lambda: trade_off(4),
    "many": lambda: trade_off(12),
    "no_intervals": lambda: trade_off(3, None),
}


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_600_pixels_wide_and_everything_lies_in_it(name: str) -> None:
    figure = PLOTS[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    assert width == 600 and 200 <= height <= 900
    axes = figure.axes[0]
    low, high = sorted(axes.get_ylim())
    rows = [text for text in axes.get_yticklabels() if low <= text.get_position()[1] <= high]
    texts = [figure._suptitle, axes.xaxis.label, axes.yaxis.label, *axes.texts, *rows]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    for box in boxes:
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    assert axes.get_window_extent().width > 200


def test_a_forest_plot_shows_intervals_seeds_and_the_better_side() -> None:
    values = metric_values(study(5), question(), "test_accuracy")
    compared = compare_methods(values, "dropout", "higher")
    others = {name: compared[name] for name in question().others}
    axes = forest_plot(others, "test_accuracy", "higher", "dropout").axes[0]
    bars = [bar for bar in axes.containers if bar.has_xerr]
    assert [bar.lines[0].get_xdata()[0] for bar in bars] == [one.difference.mean for one in others.values()]
    for bar, one in zip(bars, others.values(), strict=True):
        (segment,) = bar.lines[2][0].get_segments()
        mean, half_width = one.difference.mean, one.difference.half_width
        assert segment[:, 0].tolist() == pytest.approx([mean - half_width, mean + half_width])
    seeds = [line for line in axes.get_lines() if line.get_marker() == "|" and len(line.get_xdata()) == 5]
    assert [list(line.get_xdata()) for line in seeds] == [list(one.differences.values()) for one in others.values()]
    low, high = axes.get_xlim()
    assert low == -high
    for direction, arrow, side in (("higher", "better →", (0, high)), ("lower", "← better", (low, 0))):
        axes = forest_plot(others, "test_accuracy", direction, "dropout").axes[0]
        assert axes.texts[0].get_text() == arrow
        (shade,) = axes.patches
        assert sorted((shade.get_x(), shade.get_x() + shade.get_width())) == pytest.approx(sorted(side))


def test_an_unmeasured_method_keeps_its_row() -> None:
    one = Comparison(None, {0: 0.1}, Estimate(0.1, None, 1))
    axes = forest_plot({"none": Comparison(None), "one": one}, "loss", "lower", "dropout").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "one"]
    assert "not measured" in axes.texts[0].get_text()
    with pytest.raises(ValueError, match="a seed in common with 'dropout', got none"):
        forest_plot({"none": Comparison(None)}, "loss", "lower", "dropout")


def test_the_trade_off_has_intervals_in_both_directions_and_leaves_out_what_is_not_measured() -> None:
    accuracy = {
        "dropout": Estimate(0.9, 0.02, 5),
        "blur": Estimate(0.8, None, 2),
        "none": None,
        "half": Estimate(1, 0, 3),
    }
    error = {"dropout": Estimate(0.1, 0.01, 5), "blur": Estimate(0.2, None, 2), "none": None, "half": None}
    figure = trade_off_plot(accuracy, error, ("accuracy", "ece"), "dropout")
    first, second = figure.axes[0].containers
    assert (first.lines[0].get_xdata()[0], first.lines[0].get_ydata()[0]) == (0.1, 0.9)
    assert first.has_xerr and first.has_yerr and not second.has_xerr
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dropout", "blur"]
    assert figure.get_suptitle().endswith("(dotted: dropout)")
    with pytest.raises(ValueError, match="both metrics, got none"):
        trade_off_plot({"none": None}, {"none": None}, ("accuracy", "ece"), "dropout")


@pytest.mark.filterwarnings("ignore:Glyph")
def test_the_svg_has_escaped_text_follows_the_color_scheme_and_is_deterministic() -> None:
    text = svg(forest(5))
    assert text == svg(forest(5))
    assert text.startswith("<svg") and text.rstrip().endswith("</svg>") and "<script" not in text
    assert "&lt;scrip" in text and "日本" in text  # Text stays text.
    assert "currentColor" in text or "stroke: var(--gray)" in text
    assert "#0072b2" not in text and "#666666" not in text and "#000000" not in text and "#ffffff" not in text.lower()
    assert "Date" not in text and WEIRD not in text
    picture = io.BytesIO()
    forest(5).savefig(picture)
    assert Image.open(picture).convert("RGB").getpixel((0, 0)) == (255, 255, 255)
