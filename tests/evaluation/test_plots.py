"""Plots show their data, including extremes, touch no global state, and refuse invalid input."""

import io
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from sklearn.datasets import load_digits

from hf_attentiondrop import AttentionDropTrainer, AttentionDropTrainingArguments
from hf_attentiondrop.evaluation.calibration import ReliabilityBins, reliability
from hf_attentiondrop.evaluation.plots import (
    attention_entropy_map,
    reliability_diagram,
    robust_accuracy_curve,
    training_curves,
    wilson_interval,
)
from tests.models import build


LOGITS = torch.linspace(-3, 3, 60).view(20, 3)
LABELS = torch.arange(20) % 3
LOG = [
    {"step": 1, "loss": 2.5, "task_loss": 2.0, "consistency_loss": 0.5},
    {"step": 2, "loss": 1.5, "task_loss": 1.2, "consistency_loss": 0.3},
    {"step": 2, "eval_loss": 1.7},
    {"step": 2, "train_loss": 2.0, "train_runtime": 3.0},
]
PLOTS: dict[str, Callable[[], Figure]] = {
    "reliability": lambda: reliability_diagram(reliability(LOGITS, LABELS)),
    "reliability_equal_mass": lambda: reliability_diagram(reliability(LOGITS, LABELS, binning="equal_mass")),
    "reliability_one_item": lambda: reliability_diagram(reliability(LOGITS[:1], LABELS[:1])),
    "reliability_all_correct": lambda: reliability_diagram(reliability(1000 * (torch.eye(3) - 1), torch.arange(3))),
    "robust": lambda: robust_accuracy_curve({"FGSM": {0: 0.9, 8 / 255: 0.4}, "PGD": {0: 0.9, 8 / 255: 0.1}}, 100),
    "robust_one_point": lambda: robust_accuracy_curve({"PGD": {8 / 255: 0.0}}, 1),
    "robust_embeddings": lambda: robust_accuracy_curve({"PGD": {0: 0.9, 0.0019853: 0.4}}, 200, in_pixels=False),
    "robust_clean_only": lambda: robust_accuracy_curve({"PGD": {0: 1.0}}, 5, in_pixels=False),
    "entropy": lambda: attention_entropy_map(np.linspace(0, 4, 24).reshape(6, 4), "encoder_self", math.log(64), 12),
    "entropy_one_head": lambda: attention_entropy_map([[0.0]]),
    "entropy_large": lambda: attention_entropy_map(torch.arange(24 * 16).view(24, 16) / 99, "decoder_self"),
    "training": lambda: training_curves(LOG),
    "training_plain": lambda: training_curves([{"step": 1, "loss": 0.0}]),
    "training_diverged": lambda: training_curves([*LOG, {"step": 3, "loss": math.nan, "task_loss": math.inf}]),
}


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def text_of(figure: Figure) -> str:
    axes = [text for ax in figure.axes for text in (ax.get_xlabel(), ax.get_ylabel(), ax.get_title())]
    return " | ".join([figure.get_suptitle(), *axes])


def numbers_along(axes: Axes) -> list[Text]:
    """The visible tick labels of the horizontal axis."""
    if not axes.xaxis.get_tick_params().get("labelbottom"):
        return []
    low, high = axes.get_xlim()
    ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    return [label for position, label in ticks if low <= position <= high]


def lettering(figure: Figure) -> list[Text]:
    """The title, the axis labels and the legend."""
    names = [label for ax in figure.axes for label in (ax.xaxis.label, ax.yaxis.label)]
    return [figure._suptitle, *names, *(text for legend in figure.legends for text in legend.get_texts())]


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_600_pixels_wide_legible_and_deterministic(name: str) -> None:
    figure = PLOTS[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent() for text in lettering(figure) if text.get_text()]
    width, height = canvas.get_width_height()
    assert width == 600 and 200 <= height <= 800
    for i, box in enumerate(boxes):
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1
        assert not any(box.overlaps(other) for other in boxes[:i])
    for ax in figure.axes:
        numbers = [label.get_window_extent() for label in numbers_along(ax)]
        assert all(right.x0 - left.x1 > 5 for left, right in pairwise(numbers))
    image = Image.open(io.BytesIO(png(PLOTS[name]())))
    assert np.array_equal(np.asarray(image), np.asarray(canvas.buffer_rgba()))


def test_the_reliability_diagram_shows_the_bins() -> None:
    bins = ReliabilityBins(
        *(torch.tensor(column) for column in ([0.4, 0.8], [0.6, 1.0], [1, 3], [0.5, 0.9], [1.0, 0.7]))
    )
    figure = reliability_diagram(bins, "Digits")
    above, below = figure.axes
    bars, gaps = above.containers
    assert [bar.get_height() for bar in bars] == pytest.approx([1.0, 0.7])
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [
        pytest.approx(pair) for pair in ((0.4, 0.2), (0.8, 0.2))
    ]
    assert [(gap.get_y(), gap.get_height()) for gap in gaps] == [
        pytest.approx(pair) for pair in ((0.5, 0.5), (0.9, -0.2))
    ]
    assert [bar.get_height() for bar in below.containers[0]] == [0.25, 0.75]
    assert "Digits: ECE 0.275, n = 4 items in 2 bins" in text_of(figure)


def test_the_interval_of_wilson_by_hand() -> None:
    # 8 of 10: (0.8 + 1.9207/10 ± 1.96 sqrt(0.016 + 0.9604/100)) / (1 + 3.8415/10)
    low, high = wilson_interval(0.8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    low, high = wilson_interval(np.array([0.0, 1.0]), 7)
    assert low[0] == 0 and high[1] == 1 and high[0] == pytest.approx(1 - low[1]) == pytest.approx(0.3543, abs=1e-4)


def test_the_robustness_curve_shows_each_attack_in_pixel_levels() -> None:
    figure = robust_accuracy_curve({"FGSM": {8 / 255: 0.4, 0: 0.9}, "PGD": {0: 0.9}}, 50)
    (line, _, _), (other, _, _) = figure.axes[0].containers
    assert line.get_xdata().tolist() == pytest.approx([0, 8]) and line.get_ydata().tolist() == [0.9, 0.4]
    assert other.get_ydata().tolist() == [0.9]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FGSM", "PGD"]
    assert line.get_linewidth() > other.get_linewidth()  # coinciding curves stay visible
    assert "n = 50 samples" in text_of(figure) and "1/255" in text_of(figure)
    assert "255" not in text_of(robust_accuracy_curve({"FGSM": {0.1: 0.4}}, 50, in_pixels=False))


def test_the_entropy_map_shows_layers_down_and_heads_across() -> None:
    values = np.arange(6.0).reshape(3, 2)
    figure = attention_entropy_map(values, "encoder_self", 7.0, 4)
    (image,) = figure.axes[0].get_images()
    assert np.array_equal(image.get_array(), values) and image.get_clim() == (0, 7)
    assert "encoder_self (n = 4 queries)" in text_of(figure) and "nats" in text_of(figure)


def test_the_entropy_map_marks_uniform_attention() -> None:
    figure = attention_entropy_map([[0.5, 1.0]], uniform_entropy=2.0)
    (mark,) = figure.axes[1].get_lines()
    assert list(mark.get_ydata()) == [2.0, 2.0] and "uniform\n2.00" in text_of(figure)
    assert figure.axes[0].get_images()[0].get_clim() == (0, 2)
    # Entropies of several layers may exceed the value of one.
    assert attention_entropy_map([[0.5, 3.0]], uniform_entropy=2.0).axes[0].get_images()[0].get_clim() == (0, 3)
    assert "uniform" not in text_of(attention_entropy_map([[0.5, 1.0]]))


def test_the_curves_of_a_real_run(tmp_path: Path) -> None:
    digits = load_digits()
    data = [
        {"pixel_values": torch.tensor(image, dtype=torch.float32)[None] / 16, "labels": int(label % 2)}
        for image, label in zip(digits.images[:32], digits.target[:32], strict=True)
    ]
    arguments = AttentionDropTrainingArguments(
        str(tmp_path),
        max_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=True,
        save_strategy="no",
        consistency_weight=0.5,
    )
    trainer = AttentionDropTrainer(build("vit"), arguments, train_dataset=data, eval_dataset=data[:8])
    trainer.train()
    losses, term = training_curves(trainer.state.log_history).axes
    lines = {line.get_label(): line for line in losses.get_lines()}
    history = trainer.state.log_history
    assert lines["task loss"].get_ydata().tolist() == [entry["task_loss"] for entry in history if "task_loss" in entry]
    assert lines["training loss"].get_xdata().tolist() == [1, 2, 3, 4]
    # Both stay visible if they coincide.
    assert lines["training loss"].get_linewidth() > 2 * lines["task loss"].get_linewidth()
    assert lines["evaluation loss"].get_xdata().tolist() == [2, 4]
    assert term.get_lines()[0].get_ydata().tolist() == [e["consistency_loss"] for e in history if "task_loss" in e]


def test_cells_of_missing_heads_stay_empty() -> None:
    axes = attention_entropy_map([[1.0, math.nan], [0.5, 2.0]], num_queries=1).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00", "", "0.50", "2.00"]
    assert "n = 1 query" in axes.figure.get_suptitle()


def test_values_that_are_not_finite_are_left_out() -> None:
    figure = PLOTS["training_diverged"]()
    assert [line.get_xdata().tolist() for line in figure.axes[0].get_lines()] == [[1, 2], [1, 2], [2]]


@pytest.mark.slow
def test_pyplot_is_not_used_and_matplotlib_is_imported_late() -> None:
    program = """
import sys
from hf_attentiondrop.evaluation.plots import attention_entropy_map
assert "matplotlib" not in sys.modules
attention_entropy_map([[1.0]]).savefig("map.png")
assert "matplotlib.pyplot" not in sys.modules
sys.modules["matplotlib.figure"] = None
try:
    attention_entropy_map([[1.0]])
except ImportError as error:
    assert "pip install matplotlib" in str(error), error
else:
    raise AssertionError
"""
    root = Path(__file__).parents[2]
    program = program.replace('"map.png"', "__import__('io').BytesIO()")
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


EMPTY = ReliabilityBins(*[torch.empty(0)] * 5)
BAD = {
    "no_bins": (lambda: reliability_diagram(EMPTY), "bins with items"),
    "no_attack": (lambda: robust_accuracy_curve({}, 5), "at least one attack"),
    "no_epsilon": (lambda: robust_accuracy_curve({"PGD": {}}, 5), "at least one attack"),
    "no_samples": (lambda: robust_accuracy_curve({"PGD": {0: 1.0}}, 0), "one sample"),
    "percent": (lambda: robust_accuracy_curve({"PGD": {0: 93.0}}, 5), r"accuracies in \[0, 1\], got 93.0"),
    "nan_accuracy": (lambda: robust_accuracy_curve({"PGD": {0: math.nan}}, 5), "got nan"),
    "negative_epsilon": (lambda: robust_accuracy_curve({"PGD": {-1: 0.5}}, 5), "ε ≥ 0"),
    "too_many": (lambda: robust_accuracy_curve({str(i): {0: 0.5} for i in range(6)}, 5), "at most 5"),
    "one_dimension": (lambda: attention_entropy_map([1.0, 2.0]), r"\(layers, heads\), got \(2,\)"),
    "no_layers": (lambda: attention_entropy_map(np.empty((0, 4))), r"\(layers, heads\)"),
    "nan_entropy": (lambda: attention_entropy_map([[math.nan]]), "entropies in nats"),
    "infinite_entropy": (lambda: attention_entropy_map([[math.inf, 1.0]]), "entropies in nats"),
    "negative_entropy": (lambda: attention_entropy_map([[-1.0]]), "entropies in nats"),
    "empty_log": (lambda: training_curves([]), "logging_steps"),
    "nothing_finite": (lambda: training_curves([{"step": 1, "loss": math.nan, "consistency_loss": 0.1}]), "finite"),
    "only_the_summary": (lambda: training_curves(LOG[-1:]), "logging_steps"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused(bad: str) -> None:
    draw, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        draw()
