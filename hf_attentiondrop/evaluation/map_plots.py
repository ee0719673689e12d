"""Plots of attention maps, between tokens and over images, with three panels on 1,200 pixels.

Each function returns a new `matplotlib.figure.Figure`, see `style.py`. Save it with `figure.savefig("name.png")`.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .maps import AttentionMaps
from .style import new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

TITLES = ("in evaluation", "one draw in training", "difference")
WIDTH, WIDTH_OF_ONE, MAGNIFICATION = 12.0, 6.0, 1.4
# Orange is weight, or more of it, and purple is less: colors that are safe for color-blind readers.
WEIGHTS, DIFFERENCE = "Oranges", "PuOr_r"
# With more tokens, only every second, third, ... is named.
MAX_NAMED = 32
LONGEST_NAME = 12
# In points, and the usual width of its letters in inches.
LARGEST_LETTER, WIDTH_OF_LETTER = 7.5, 0.065
# Of an image: the pixels of its longer side, and the brightness of black, so that colors stay visible on it.
PIXELS, DARKEST = 320, 0.6

Drawn = tuple["Figure", "list[Axes]"]


def plot_attention_maps(
    maps: AttentionMaps,
    tokens: Sequence[str] | None = None,
    image: Any = None,
    *,
    query_tokens: Sequence[str] | None = None,
    head: int | None = None,
) -> "Figure":
    """Attention weights in evaluation, under one draw of the perturbations, and what the draw changes, side by side.

    Without perturbations there is only the first panel.

    Args:
        maps ([`AttentionMaps`]): see [`~evaluation.maps.attention_maps`].
        tokens (`Sequence[str]`, *optional*): of the keys, those of the whole sample with its padding; by default
            their positions are shown.
        image (`array`, *optional*):
            The image that the keys are the patches of, `(height, width)`, `(channels, height, width)` or
            `(height, width, channels)`, of any range. The attention of the class token to the patches is shown over
            it, or the mean over all queries for a model without class tokens.
        query_tokens (`Sequence[str]`, *optional*): of the queries in cross-attention; by default `tokens`, or
            positions in cross-attention.
        head (`int`, *optional*): the head to show; by default the mean over heads.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: for a head that does not exist, for fewer tokens than positions, and for an image with keys that
            are not its patches, or together with tokens.
    """
    heads = len(maps.weights)
    if head is not None and not -heads <= head < heads:
        raise ValueError(f"`head` must be the number of one of {heads} heads, or None for their mean, got {head}.")
    if image is not None and (tokens is not None or query_tokens is not None):
        raise ValueError("Expected tokens or an image, got both: a map is shown between tokens or over an image.")
    kept = [part for part in (maps.weights, maps.perturbed, maps.difference) if part is not None]
    panels = [part.mean(dim=0) if head is None else part[head] for part in kept]
    what = f"mean of {heads} heads" if head is None else f"head {head % heads} of {heads}"
    if image is None:
        if query_tokens is None and maps.kind != "cross":
            query_tokens = tokens
        figure, drawn = _between_tokens(panels, _names(maps.queries, query_tokens), _names(maps.keys, tokens))
    else:
        source = _patch_source(maps)
        figure, drawn = _over_image([_on_grid(maps, panel) for panel in panels], _in_gray(image))
        what += f", from {source}"
    separator = ", " if len(panels) > 1 else ",\n"
    figure.suptitle(f"Attention weights in layer {maps.layer} ({maps.kind}){separator}{what}", fontsize="medium")
    for ax, name in zip(drawn, TITLES, strict=False):
        ax.set_title(name, fontsize="medium")
    if maps.applied:
        figure.supxlabel(textwrap.shorten(f"perturbation: {maps.applied}", 120, placeholder=" …"), fontsize="small")
    return figure


def _between_tokens(panels: Sequence[Tensor], queries: Sequence[str], keys: Sequence[str]) -> Drawn:
    """One cell for each query and key, queries down and keys across."""
    rows, columns = panels[0].shape
    beside, below = (WIDTH_OF_LETTER * max(map(len, names)) for names in (queries, keys))
    figure, axes, (height, width) = _subplots(len(panels), rows / columns, beside, below + 0.3)
    lowest = min(0.0, *(float(panel.min()) for panel in panels[:2]))
    _fill(figure, axes, panels, lowest, partial(_matrix, aspect="auto", interpolation="nearest"))
    for ax in axes:
        ax.set_xticks(*_named(keys), rotation=90, fontsize=_size(width, columns), parse_math=False)
        ax.set_xlabel("key", fontsize="small")
        ax.tick_params(length=2, pad=2, left=ax is axes[0])
    axes[0].set_yticks(*_named(queries), fontsize=_size(height, rows), parse_math=False)
    axes[0].set_ylabel("query", fontsize="small")
    return figure, axes


def _over_image(panels: Sequence[Tensor], picture: np.ndarray) -> Drawn:
    """The attention to each patch, upsampled, in colors that the image shades."""
    figure, axes, _ = _subplots(len(panels), picture.shape[0] / picture.shape[1])
    lowest = min(float(panel.min()) for panel in panels[:2])
    _fill(figure, axes, panels, lowest, partial(_shaded, picture=torch.from_numpy(picture)))
    for ax in axes:
        ax.set(xticks=(), yticks=())
    return figure, axes


def _matrix(ax: "Axes", panel: Tensor, colors: "ScalarMappable", **options: Any) -> None:
    lowest, highest = colors.get_clim()
    ax.imshow(panel.numpy(), cmap=colors.cmap, vmin=lowest, vmax=highest, **options)


def _shaded(ax: "Axes", panel: Tensor, colors: "ScalarMappable", *, picture: Tensor) -> None:
    size = [length * math.ceil(PIXELS / max(picture.shape)) for length in picture.shape]
    values, shade = (
        F.interpolate(part[None, None], size, mode=how)[0, 0]
        for part, how in ((panel, "bicubic"), (picture, "nearest"))
    )
    shade = DARKEST + (1 - DARKEST) * shade.unsqueeze(-1).numpy()
    ax.imshow(colors.to_rgba(values.clamp(panel.min(), panel.max()).numpy())[..., :3] * shade)


def _subplots(
    count: int, ratio: float, beside: float = 0.0, below: float = 0.0
) -> tuple["Figure", list["Axes"], tuple[float, float]]:
    """Panels of height `ratio` times their width, with room for letters, and their approximate size in inches."""
    total = WIDTH if count > 1 else WIDTH_OF_ONE
    width = (total / MAGNIFICATION - 0.25 - beside - 0.55 * min(count, 2)) / count
    height = width * min(max(ratio, 0.4), 2.0)
    figure = new_figure((height + below + 0.85) * MAGNIFICATION, MAGNIFICATION, total)
    axes = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    return figure, list(axes), (height, width)


def _fill(
    figure: "Figure", axes: Sequence["Axes"], panels: Sequence[Tensor], lowest: float, draw: Callable[..., None]
) -> None:
    """Draws the panels; both maps of weights share their range of colors, and the difference has 0 in the middle."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    highest = max(float(panel.max()) for panel in panels[:2])
    largest = float(panels[-1].abs().max()) or 1.0
    weights = ScalarMappable(Normalize(lowest, highest if highest > lowest else lowest + 1.0), WEIGHTS)
    difference = ScalarMappable(Normalize(-largest, largest), DIFFERENCE)
    for index, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
        colors = difference if index == 2 else weights
        draw(ax, panel, colors)
        if index > 0 or len(panels) == 1:
            bar = figure.colorbar(colors, ax=ax, fraction=0.05, pad=0.02, aspect=30).ax
            bar.tick_params(labelsize="small", length=2)


def _named(names: Sequence[str]) -> tuple[Sequence[int], Sequence[str]]:
    """Positions and names of the ticks."""
    step = math.ceil(len(names) / MAX_NAMED)
    return range(0, len(names), step), names[::step]


def _size(length: float, count: int) -> float:
    """The size of letters, in points, at which the names along `length` inches do not overlap."""
    return min(LARGEST_LETTER, 0.95 * 72 * length / min(count, MAX_NAMED))


def _names(positions: Tensor, tokens: Sequence[str] | None) -> list[str]:
    """The tokens at these positions, shortened, or the positions."""
    if tokens is None:
        return [str(position) for position in positions.tolist()]
    if len(tokens) <= int(positions.max()):
        raise ValueError(
            f"Expected a token for each position up to {int(positions.max())}, got {len(tokens)}: pass those of the "
            "whole sample with its padding, tokenizer.convert_ids_to_tokens(input_ids[sample])."
        )
    names = [str(tokens[position]) for position in positions.tolist()]
    return [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]


def _num_patches(maps: AttentionMaps) -> int:
    if maps.grid is None:
        raise ValueError(
            f"Expected maps whose keys are the patches of an image, those of {maps.module} are not: leave `image` out."
        )
    return maps.grid[0] * maps.grid[1]


def _patch_source(maps: AttentionMaps) -> str:
    return "the class token" if _num_patches(maps) < len(maps.keys) else "all patches"


def _on_grid(maps: AttentionMaps, panel: Tensor) -> Tensor:
    """The attention to each patch, `(rows, columns)`: of the class token, or the mean over queries."""
    num_patches = _num_patches(maps)
    row = panel[0] if num_patches < panel.shape[-1] else panel.mean(dim=0)
    return row[-num_patches:].unflatten(0, maps.grid)


def _in_gray(image: Any) -> np.ndarray:
    """An image as `(height, width)` in [0, 1]."""
    values = np.asarray(image, dtype=np.float32)
    if values.ndim == 3:
        values = values.mean(axis=0 if len(values) in (1, 3) else -1)
    if values.ndim != 2:
        raise ValueError(f"Expected an image (height, width) with or without channels, got shape {values.shape}.")
    return (values - values.min()) / (np.ptp(values) or 1.0)
