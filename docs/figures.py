"""Draws docs/images: attention maps of one sentence under each method, computed by the functions of this package.

Run it in the root of the repository (it takes matplotlib and Pillow):

    python docs/figures.py

Queries and keys of a word are the counts of its pairs of letters, beside sines and cosines of its position. So words
attend to themselves, to words that are spelled alike, and to their neighbors.
"""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from hf_attentiondrop.functional import (
    affine_bias,
    affine_scale,
    blur_keys,
    gate_output,
    prepend_sink,
    rescale_weights,
    sample_key_mask,
    sample_masked_scores,
    visible_neighbors,
)
from hf_attentiondrop.functional.dropconnect import drop_weights
from hf_attentiondrop.functional.drophead import sample_head_scale


FOLDER = Path(__file__).parent / "images"
WORDS = "she sells sea shells by the sea shore".split()
SPELLING, POSITION = 2.2, 1.2  # Weights of the two parts of a score.
COLORS = LinearSegmentedColormap.from_list("attention", ["#eef1fb", "#aab8ec", "#5c6bc0", "#2b3a9b", "#141b5c"])
SIGNED = LinearSegmentedColormap.from_list("signed", ["#b2481f", "#f3f1ee", "#2b3a9b"])
TEXT, DROPPED = "#7d8590", "#e8590c"  # Readable on white and on black.
SEED = 8
HIGHEST = 0.5  # The weight of the darkest color, the same in all maps.


def embeddings(spelling: float = SPELLING, position: float = POSITION) -> Tensor:
    """Returns a vector per word, `(1, 1, K, D)`, whose products are the scores."""
    pairs = [{word[i : i + 2] for i in range(len(word) - 1)} for word in WORDS]
    alphabet = sorted(set().union(*pairs))
    letters = torch.tensor([[float(pair in of_word) for pair in alphabet] for of_word in pairs])
    angles = torch.arange(len(WORDS))[:, None] * torch.tensor([0.5, 1.0, 2.0])
    places = torch.cat([angles.sin(), angles.cos()], dim=-1)
    parts = [math.sqrt(spelling) * letters, math.sqrt(position) * places]
    scales = [part.norm(dim=-1, keepdim=True) for part in (letters, places)]
    return torch.cat([part / scale for part, scale in zip(parts, scales, strict=True)], dim=-1)[None, None]


STATES = embeddings()
SCORES = STATES @ STATES.mT
Map = tuple[Tensor, Tensor | None]  # Weights (Q, K), and which of them are dropped.


def softmax(scores: Tensor = SCORES) -> Map:
    return scores.softmax(dim=-1)[0, 0], None


def masked(is_masked: Tensor) -> Map:
    weights, _ = softmax(SCORES.masked_fill(is_masked, -torch.inf))
    return weights, is_masked.expand_as(SCORES)[0, 0]


def hard() -> Map:
    return masked(sample_masked_scores(SCORES, None, p=0.5, k=3))


def blur() -> Map:
    length = len(WORDS)
    options = {"is_causal": False, "is_cross": False, "query_length": length, "key_length": length}
    neighbors = visible_neighbors(None, width=5, device=SCORES.device, **options)
    return softmax(STATES @ blur_keys(STATES, torch.tensor([1.0]), neighbors).mT)


def dropkey(axis: str = "score") -> Map:
    return masked(~sample_key_mask(SCORES.shape, p=0.25, axis=axis))


def affine() -> Map:
    weights = SCORES.softmax(dim=-1)
    # As if learned: the scale falls from the first word to the last.
    alpha = affine_scale(torch.linspace(5.0, -5.0, len(WORDS))).view(1, -1, 1)
    beta = affine_bias(alpha, torch.ones(1), torch.full((1, 1, 1), float(len(WORDS))))
    return rescale_weights(weights, None, alpha, beta)[0, 0], None


def sink() -> Map:
    query, key, _ = prepend_sink(STATES, STATES, STATES, torch.tensor([3.0]), scaling=1.0)
    return softmax(query @ key.mT)


def gate() -> Map:
    # With one value per word, an output is a row of weights.
    weights, _ = softmax()
    logits = 2.0 * torch.randn(1, *weights.shape)
    return gate_output(weights[None, :, None], logits)[0, :, 0], None


def draw(
    axes: Axes, panel: Map, title: str, note: str = "", rows: bool = True, columns: Sequence[str] | None = WORDS
) -> None:
    weights, dropped = panel
    axes.imshow(weights, cmap=COLORS, vmin=0.0, vmax=HIGHEST)
    finish(axes, weights, dropped, title, note)
    axes.set_yticks(range(len(WORDS)), WORDS if rows else [""] * len(WORDS))
    names = columns or [""] * weights.shape[1]
    axes.set_xticks(range(weights.shape[1]), names, rotation=45, ha="right", rotation_mode="anchor")


def finish(axes: Axes, values: Tensor, dropped: Tensor | None, title: str, note: str) -> None:
    """Adds what all panels have: a grid, a title, and crosses on what is dropped."""
    if dropped is not None:
        ys, xs = dropped.nonzero(as_tuple=True)
        axes.scatter(xs, ys, marker="x", s=26, linewidths=1.8, color=DROPPED)
    axes.set_xticks([x - 0.5 for x in range(1, values.shape[1])], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, values.shape[0])], minor=True)
    axes.grid(which="minor", color="#ffffff", linewidth=1.0)
    axes.tick_params(which="both", length=0, colors=TEXT, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_title(title, color=TEXT, fontsize=11, fontweight="bold", pad=20 if note else 8)
    if note:
        axes.text(0.5, 1.02, note, transform=axes.transAxes, ha="center", va="bottom", color=TEXT, fontsize=8.5)


def draw_heads(axes: Axes, title: str, note: str, p: float) -> None:
    """Draws four heads, of which DropHead has dropped some and scaled the others."""
    heads = [embeddings(*weights) for weights in ((SPELLING, POSITION), (4.0, 0.0), (0.0, 4.0), (1.0, 1.0))]
    finish(axes, STATES[0, 0], None, title, note)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[], yticks=[])
    axes.grid(False, which="both")
    axes.patch.set_alpha(0.0)
    for head, (states, scale) in enumerate(zip(heads, sample_head_scale(1, 4, p=p)[0], strict=True)):
        inset = axes.inset_axes((0.52 * (head % 2), 0.52 * (1 - head // 2), 0.48, 0.48))
        weights = scale * softmax(states @ states.mT)[0]
        inset.imshow(weights, cmap=COLORS, vmin=0.0, vmax=HIGHEST)
        finish(inset, weights, None, "", "")
        inset.set(xticks=[], yticks=[])
        if scale == 0:
            inset.scatter(3.5, 3.5, marker="x", s=260, linewidths=3.5, color=DROPPED, zorder=3)


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.05)
    figure.patch.set_alpha(0.0)
    return figure


def save(figure: Figure, name: str) -> None:
    """Writes a PNG with a palette, a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=200, transparent=True, bbox_inches="tight", pad_inches=0.05)
    image = Image.open(buffer).quantize(128, method=Image.Quantize.FASTOCTREE)
    image.save(FOLDER / f"{name}.png", optimize=True)


def draw_weights(axes: Axes, weights: Tensor, dropped: Tensor | None, title: str, note: str) -> None:
    axes.imshow(weights, cmap=SIGNED, vmin=-2.5, vmax=2.5)
    finish(axes, weights, dropped, title, note)
    axes.set(xticks=[], yticks=[])


PANELS: dict[str, tuple[str, str, Callable[[], Map]]] = {
    "hard": ("Hard masking", "each of the 3 highest dropped, p = 0.5", hard),
    "blur": ("Blur", "scores averaged over neighbors, σ = 1", blur),
    "dropkey": ("DropKey", "each key dropped, p = 0.25", dropkey),
    "affine_scaled": ("Affine scaling", "α from 1.5 (first word) to 0.5 (last)", affine),
    "attention_sink": ("Attention sink", "a key without a word or a value", sink),
    "gated_attention": ("Gated attention", "each component times its gate", gate),
}
DROPHEAD = ("DropHead", "each of 4 heads dropped, p = 0.3", 0.3)


def draw_overview() -> Figure:
    figure = new_figure(8.0, 5.9)
    grid = figure.subplots(2, 3)
    draw(grid[0, 0], softmax(), "Softmax", "stock attention", columns=None)
    for axes, name in zip([*grid.flat[1:4], grid.flat[4]], ("hard", "blur", "dropkey", "affine_scaled"), strict=True):
        title, note, panel = PANELS[name]
        torch.manual_seed(SEED)
        lowest = axes in grid[1]
        draw(axes, panel(), title, note, rows=axes in grid[:, 0], columns=WORDS if lowest else None)
    torch.manual_seed(SEED)
    draw_heads(grid[1, 2], *DROPHEAD)
    return figure


def draw_method(name: str) -> Figure:
    """Draws stock attention and a method side by side."""
    figure = new_figure(6.4, 3.5)
    left, right = figure.subplots(1, 2)
    torch.manual_seed(SEED)
    if name == "consistency":
        draw(left, hard(), "First pass", "hard masking, p = 0.5")
        draw(right, hard(), "Second pass", "the same words, other masks", rows=False)
    elif name == "dropconnect":
        weights = torch.randn(8, 8)
        kept = drop_weights(weights, p=0.25)
        draw_weights(left, weights, None, "A linear layer", "its weights in evaluation")
        draw_weights(right, kept, kept == 0, "DropConnect", "each weight dropped, p = 0.25")
    elif name == "drophead":
        draw_heads(left, "Four heads", "stock attention", 0.0)
        torch.manual_seed(SEED)
        draw_heads(right, *DROPHEAD)
    else:
        title, note, panel = PANELS[name]
        draw(left, softmax(), "Softmax", "stock attention")
        columns = ["(sink)", *WORDS] if name == "attention_sink" else WORDS
        draw(right, panel(), title, note, rows=False, columns=columns)
    return figure


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    save(draw_overview(), "methods")
    for name in (*PANELS, "drophead", "consistency", "dropconnect"):
        save(draw_method(name), name)


if __name__ == "__main__":
    main()
