"""Plots of calibration, robustness, attention entropy and training, 600 pixels wide.

Each function returns a new `matplotlib.figure.Figure`, see `style.py`. Save it with `figure.savefig("name.png")`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from .calibration import ReliabilityBins
from .style import BLUE, GRAY, LINES, ORANGE, VERMILION, legend_below, new_figure, plural


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The minimum width of a bar: the bin of confidence 1 has no width.
MIN_BAR = 0.015
# The normal quantile of a 95 % interval.
QUANTILE = 1.959964
# With more heads, the numbers in the cells of a heat map would overlap.
MAX_NUMBERED_HEADS = 12


def reliability_diagram(bins: ReliabilityBins, title: str = "Reliability") -> "Figure":
    """Accuracy against confidence, above a histogram of the confidences.

    Args:
        bins ([`ReliabilityBins`]): see [`~evaluation.calibration.reliability`].
        title (`str`, defaults to `"Reliability"`): of the plot.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if all bins are empty.
    """
    count = np.asarray(bins.count)
    if count.sum() == 0:
        raise ValueError("Expected bins with items, got none: there is nothing to plot.")
    lower, width = np.asarray(bins.lower), np.maximum(np.asarray(bins.upper - bins.lower), MIN_BAR)
    confidence, accuracy = np.asarray(bins.confidence), np.asarray(bins.accuracy)
    figure = new_figure(6.0)
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    bar = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}
    above.bar(lower, accuracy, width, color=BLUE, label="accuracy", **bar)
    above.bar(
        lower, accuracy - confidence, width, confidence, align="edge", label="gap to confidence",
        facecolor="none", edgecolor=VERMILION, hatch="////", linewidth=0.8,
    )  # fmt: skip
    above.plot((0, 1), (0, 1), "--", color=GRAY, label="perfect calibration")
    above.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1 + 1.5 * MIN_BAR))
    of_items = f"n = {plural(int(count.sum()), 'item')} in {plural(len(count), 'bin')}"
    figure.suptitle(f"{title}: ECE {bins.expected_error:.3f}, {of_items}")
    legend_below(figure, above)
    below.bar(lower, count / count.sum(), width, color=GRAY, **bar)
    below.set(xlabel="confidence (probability of the predicted class)", ylabel="share of items")
    for axes in (above, below):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def wilson_interval(share: ArrayLike, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % Wilson interval of a proportion; unlike the normal approximation, valid near 0 and 1 and for few items.

    Args:
        share (`array` of any shape): the observed proportion, in [0, 1].
        count (`int`): number of independent items, at least 1.

    Returns:
        `tuple`: lower and upper bounds, of the shape of `share`.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".

    Example:

    >>> low, high = wilson_interval(1.0, 10)
    >>> round(float(low), 3), float(high)
    (0.722, 1.0)
    """
    share, weight = np.asarray(share, dtype=float), QUANTILE**2 / count
    center = (share + weight / 2) / (1 + weight)
    half = np.sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    return np.clip(center - half, 0, share), np.clip(center + half, share, 1)


def robust_accuracy_curve(
    accuracies: Mapping[str, Mapping[float, float]],
    num_samples: int,
    in_pixels: bool = True,
    title: str = "Robust accuracy",
) -> "Figure":
    """Accuracy under attack as a function of ε, with 95 % Wilson intervals.

    Args:
        accuracies (`dict`): name of the attack to a dict from ε to accuracy in [0, 1]; ε = 0 is the clean accuracy.
        num_samples (`int`): number of samples behind each accuracy.
        in_pixels (`bool`, defaults to `True`): whether ε is in units of pixels in [0, 1], shown in units of 1/255.
        title (`str`, defaults to `"Robust accuracy"`): of the plot.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: for no attack, no ε or no sample, and for numbers out of range.
    """
    if not accuracies or not all(accuracies.values()) or num_samples < 1:
        raise ValueError(
            f"Expected at least one attack, one ε for each, and one sample, got {dict(accuracies)} over {num_samples} "
            "samples: there is nothing to plot."
        )
    if len(accuracies) > len(LINES):
        raise ValueError(
            f"Expected at most {len(LINES)} attacks, got {len(accuracies)}: there are no more distinct colors."
        )
    for name, curve in accuracies.items():
        for epsilon, accuracy in curve.items():
            if not (0 <= accuracy <= 1 and 0 <= epsilon < math.inf):
                raise ValueError(f"Expected ε ≥ 0 and accuracies in [0, 1], got {accuracy} at ε = {epsilon} ({name}).")
    figure = new_figure(4.0)
    axes = figure.subplots()
    unit = 255 if in_pixels else 1
    for rank, ((name, curve), (color, marker)) in enumerate(zip(accuracies.items(), LINES, strict=False)):
        epsilons = sorted(curve)
        values = np.array([curve[epsilon] for epsilon in epsilons])
        # Thinner lines on top, so that coinciding curves stay visible.
        thickness = len(accuracies) - rank
        low, high = wilson_interval(values, num_samples)
        axes.errorbar(
            unit * np.array(epsilons), values, (values - low, high - values),
            color=color, marker=marker, capsize=3 + 2 * (thickness - 1), label=name,
            linewidth=1.5 * thickness, markersize=3 + 3 * thickness, elinewidth=1.5,
        )  # fmt: skip
    axes.set(
        xlabel="perturbation ε (1/255 of the pixel range)" if in_pixels else "perturbation ε (embedding units)",
        ylabel=f"accuracy (n = {plural(num_samples, 'sample')})",
        ylim=(-0.02, 1.02),
    )
    largest = unit * max(max(curve) for curve in accuracies.values()) or 1.0
    axes.set_xlim(-0.03 * largest, 1.03 * largest)
    # ε is small for embeddings: scientific notation.
    axes.ticklabel_format(axis="x", scilimits=(-2, 4))
    axes.grid(alpha=0.3)
    figure.suptitle(f"{title}, with 95 % intervals")
    legend_below(figure, axes)
    return figure


def attention_entropy_map(
    entropy: ArrayLike,
    stack: str = "",
    uniform_entropy: float | None = None,
    num_queries: int | None = None,
) -> "Figure":
    """A heat map of the attention entropy of each head in one stack of layers.

    Args:
        entropy (`array` of shape `(layers, heads)`): in nats, NaN for a head that a layer does not have.
        stack (`str`, *optional*): name of the stack, such as `"encoder_self"`.
        uniform_entropy (`float`, *optional*):
            Entropy of uniform attention to `K` keys, `log K`. Marked on the color bar, which ends there unless a value
            is larger.
        num_queries (`int`, *optional*): number of queries in the mean entropies.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: for other shapes, and for entropies that are negative, infinite, or all NaN.
    """
    values = np.asarray(entropy, dtype=float)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"Expected entropies of shape (layers, heads), got {values.shape}: pass one stack at a time.")
    there = values[~np.isnan(values)]
    if there.size == 0 or not np.isfinite(there).all() or (there < 0).any():
        raise ValueError(
            "Expected finite entropies in nats, at least 0, got others: the attention weights did not sum to 1, or a "
            "query had no visible key."
        )
    layers, heads = values.shape
    figure = new_figure(min(8.0, 1.8 + 0.3 * max(layers, 2)))
    axes = figure.subplots()
    top = max(uniform_entropy or 0.0, there.max()) or 1.0
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=top, aspect="auto")
    bar = figure.colorbar(image, ax=axes, label="entropy (nats)").ax
    if uniform_entropy is not None:
        bar.axhline(uniform_entropy, color=VERMILION, linewidth=3)
        bar.set_title(f"uniform\n{uniform_entropy:.2f}", color=VERMILION, fontsize=8)
    axes.set(xlabel="head", ylabel="layer")
    about = f" of {stack}" if stack else ""
    if num_queries is not None:
        about += f" (n = {num_queries:,} {'query' if num_queries == 1 else 'queries'})"
    figure.suptitle(f"Attention entropy{about}")
    axes.set_xticks(range(0, heads, 1 + heads // 20))
    axes.set_yticks(range(0, layers, 1 + layers // 25))
    if heads <= MAX_NUMBERED_HEADS:
        for (layer, head), value in np.ndenumerate(values):
            color, text = "black" if value > 0.55 * top else "white", "" if np.isnan(value) else f"{value:.2f}"
            axes.text(head, layer, text, ha="center", va="center", color=color, fontsize=8)
    return figure


def _series(log_history: Iterable[Mapping[str, float]], name: str) -> tuple[Sequence[float], Sequence[float]]:
    entries = (entry for entry in log_history if name in entry and "step" in entry)
    points = {entry["step"]: entry[name] for entry in entries if math.isfinite(entry[name])}
    return list(points), list(points.values())


def training_curves(log_history: Sequence[Mapping[str, float]], title: str = "Training") -> "Figure":
    """The losses of a training run, and below them the consistency term if it was logged.

    Args:
        log_history (`list` of `dict`):
            `trainer.state.log_history`: `loss` is the minimized sum, `task_loss` and `consistency_loss` are its terms,
            the latter before weighting, and `eval_loss` is the loss on held-out data. Values that are not finite are
            left out.
        title (`str`, defaults to `"Training"`): of the plot.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if no finite loss was logged.
    """
    losses = {
        # Drawn first and wider: it stays visible if the consistency term is negligible.
        "loss": ("training loss", GRAY, ".", 5.0),
        "task_loss": ("task loss", BLUE, "o", 1.5),
        "eval_loss": ("evaluation loss", ORANGE, "D", 1.5),
    }
    series = {name: _series(log_history, name) for name in (*losses, "consistency_loss")}
    if not any(series[name][0] for name in losses):
        raise ValueError(
            f"Expected a log with finite values of at least one of {tuple(losses)}, got none: nothing was logged "
            "before the end, or the run diverged. Lower `logging_steps`, and pass `trainer.state.log_history`."
        )
    has_term = bool(series["consistency_loss"][0])
    figure = new_figure(5.0 if has_term else 3.6)
    grid = figure.subplots(1 + has_term, sharex=True, squeeze=False, height_ratios=(2, 1)[: 1 + has_term])
    panels: list[Axes] = list(grid[:, 0])
    for name, (label, color, marker, width) in losses.items():
        if series[name][0]:
            panels[0].plot(
                *series[name], color=color, marker=marker, markersize=2.5 + width, label=label, linewidth=width
            )
    panels[0].set_ylabel("loss (nats)")
    figure.suptitle(title)
    legend_below(figure, panels[0])
    if has_term:
        panels[1].plot(*series["consistency_loss"], color=VERMILION, marker="s", markersize=4)
        panels[1].set(ylabel="consistency loss\n(nats)")
    logged = max(len(steps) for steps, _ in series.values())
    panels[-1].set_xlabel(f"optimizer step (n = {plural(logged, 'logged point')})")
    for axes in panels:
        axes.grid(alpha=0.3)
        bottom, top = min(0.0, axes.dataLim.ymin), max(0.0, axes.dataLim.ymax)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom, top + 0.08 * ((top - bottom) or 1.0))
    return figure
