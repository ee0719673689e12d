"""Plots of attention maps show the maps with their tokens or image, legibly, and refuse what does not fit."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from transformers import BertConfig, BertModel, GPT2Tokenizer

from hf_attentiondrop.evaluation.map_plots import plot_attention_maps
from hf_attentiondrop.evaluation.maps import AttentionMaps, attention_maps
from hf_attentiondrop.evaluation.sample_maps import map_first_sample
from tests.models import build, inputs


TEXT = "an old tree, a red tree: 愛"


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    """Byte-level, so spaces are parts of tokens, and some tokens are parts of characters."""
    return GPT2Tokenizer().train_new_from_iterator([TEXT, "an old tree, a red tree"], 270, show_progress=False)


FIRST = 2  # Position of the first token after the padding.


def maps_of(queries: int = 5, keys: int | None = None, is_perturbed: bool = True, **fields: object) -> AttentionMaps:
    keys = keys or queries
    weights, perturbed = torch.rand(2, 4, queries, keys).softmax(-1)
    given = {"module": "layers.1", "kind": "encoder_self", "layer": 1, "applied": "hard p=0.1" * is_perturbed}
    positions = {"queries": torch.arange(queries) + FIRST, "keys": torch.arange(keys) + FIRST}
    given |= {**positions, **fields}
    return AttentionMaps(weights, perturbed if is_perturbed else None, **given)


TOKENS = [f"$token_{number}" for number in range(62)]
IMAGE = np.arange(48.0).reshape(6, 8)
PLOTS: dict[str, Callable[[], Figure]] = {
    "positions": lambda: plot_attention_maps(maps_of()),
    "one_token": lambda: plot_attention_maps(maps_of(1), TOKENS),
    "tokens": lambda: plot_attention_maps(maps_of(30), TOKENS),
    "many_tokens": lambda: plot_attention_maps(maps_of(60), TOKENS, head=-1),
    "cross": lambda: plot_attention_maps(maps_of(9, 30, kind="cross"), TOKENS, query_tokens=TOKENS),
    "one_panel": lambda: plot_attention_maps(maps_of(15, is_perturbed=False), TOKENS),
    "image": lambda: plot_attention_maps(maps_of(13, grid=(3, 4)), image=IMAGE),
    "image_one_panel": lambda: plot_attention_maps(maps_of(12, grid=(3, 4), is_perturbed=False), image=IMAGE),
}


def lettering(figure: Figure) -> list[Text]:
    names = [text for ax in figure.axes for text in (ax.xaxis.label, ax.yaxis.label, ax.title)]
    return [text for text in (figure._suptitle, figure._supxlabel, *names) if text is not None and text.get_text()]


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_legible(name: str) -> None:
    figure = PLOTS[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    assert width == (600 if name.endswith("one_panel") else 1200) and 250 <= height <= 800
    panels = [ax for ax in figure.axes if ax.get_images()]
    assert len(panels) == (1 if width == 600 else 3)
    ticks = [[label for label in ax.get_xticklabels() if label.get_text()] for ax in panels]
    ticks += [[label for label in panels[0].get_yticklabels() if label.get_text()]]
    for text in [*lettering(figure), *sum(ticks, [])]:
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, text
    boxes = [text.get_window_extent() for text in lettering(figure)]
    assert not any(box.overlaps(other) for index, box in enumerate(boxes) for other in boxes[:index])
    for labels in ticks:
        assert len(labels) <= 32 and all(label.get_fontsize() * 1.4 * 100 / 72 > 8 for label in labels)
        centers = [label.get_window_extent() for label in labels]
        steps = [max(abs(a.x0 + a.x1 - b.x0 - b.x1), abs(a.y0 + a.y1 - b.y0 - b.y1)) / 2 for a, b in pairwise(centers)]
        size = labels[0].get_fontsize() * 1.4 * 100 / 72 if labels else 0
        assert all(step >= 0.9 * size for step in steps)


def test_the_panels_show_the_maps() -> None:
    maps = maps_of(6)
    figure = plot_attention_maps(maps, TOKENS)
    panels = figure.axes[:3]
    shown = [panel.get_images()[0] for panel in panels]
    for image, part in zip(shown, (maps.weights, maps.perturbed, maps.difference), strict=True):
        assert np.allclose(image.get_array(), part.mean(dim=0))
    assert shown[0].get_clim() == shown[1].get_clim() and shown[0].get_clim()[0] == 0
    assert sum(shown[2].get_clim()) == 0  # White is no difference.
    assert [label.get_text() for label in panels[0].get_xticklabels()] == TOKENS[2:8]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == TOKENS[2:8]
    assert figure.get_suptitle() == "Attention weights in layer 1 (encoder_self), mean of 4 heads"
    assert figure.get_supxlabel() == "perturbation: hard p=0.1"
    (first, *_) = plot_attention_maps(maps, head=2).axes
    assert np.allclose(first.get_images()[0].get_array(), maps.weights[2])


def test_attention_over_an_image_comes_from_the_class_token() -> None:
    weights = torch.full((1, 5, 5), 0.2)
    weights[0, 0] = torch.tensor([0.9, 0.1, 0.0, 0.0, 0.0])  # The class token sees the first patch.
    maps = AttentionMaps(weights, None, "m", "encoder_self", 0, "", torch.arange(5), torch.arange(5), (2, 2))
    figure = plot_attention_maps(maps, image=np.zeros((3, 8, 8)))
    shown = np.asarray(figure.axes[0].get_images()[0].get_array())
    height, width, channels = shown.shape
    assert channels == 3 and "from the class token" in figure.get_suptitle()
    corners = shown[[0, 0, -1, -1], [0, -1, 0, -1]].sum(-1)
    assert corners.argmin() == 0 and np.allclose(corners[1:], corners[1], atol=0.02)  # More weight is darker.


def test_tokens_are_shown_as_text(tokenizer: GPT2Tokenizer) -> None:
    batch = tokenizer([TEXT], return_tensors="pt")
    assert "Ġ" in "".join(tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist()))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), **sizes)
    model = BertModel._from_config(config, attn_implementation="attentiondrop")
    _, tokens, _ = map_first_sample(model, [batch], tokenizer)
    assert len(tokens) == batch["input_ids"].shape[1] and all(tokens)
    assert "".join(tokens).startswith("anoldtree,aredtree:") and "\ufffd" not in "".join(tokens)


def test_the_first_sample_of_a_report(caplog: pytest.LogCaptureFixture, tokenizer: GPT2Tokenizer) -> None:
    batch = inputs("bert", padding="left")
    maps, tokens, image = map_first_sample(build("bert"), iter([batch]), tokenizer)
    raw = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert tokens == [token.lstrip("Ġ") or token for token in raw] and image is None
    assert torch.equal(maps.weights, attention_maps(build("bert"), {k: v[:1] for k, v in batch.items()}).weights)
    pixels = inputs("vit")
    maps, tokens, image = map_first_sample(build("vit"), [pixels], None)
    assert maps.grid == (4, 4) and tokens is None and torch.equal(image, pixels["pixel_values"][0])
    plot_attention_maps(maps, tokens, image)
    assert not caplog.records
    assert map_first_sample(build("bert", attn_implementation="sdpa"), [batch], None) is None and not caplog.records
    broken = build("bert")
    torch.nn.init.constant_(broken.bert.encoder.layer[1].attention.self.query.weight, torch.nan)
    assert map_first_sample(broken, [batch], None) is None and "not finite" in caplog.text


def test_the_example_in_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "plot_attention_maps" in code]
    exec(code, {})
    with Image.open(tmp_path / "maps.png") as image:
        assert image.width == 1200


BAD = {
    "head": (
        lambda: plot_attention_maps(maps_of(), head=4),
        "one of 4 heads, or None for their mean, got 4",
    ),
    "few_tokens": (lambda: plot_attention_maps(maps_of(), ["a"]), "Expected a token for each position up to 6, got 1"),
    "both": (lambda: plot_attention_maps(maps_of(), ["a"] * 5, IMAGE), "Expected tokens or an image, got both"),
    "no_patches": (lambda: plot_attention_maps(maps_of(), image=IMAGE), "are not: leave `image` out"),
    "no_image": (
        lambda: plot_attention_maps(maps_of(12, grid=(3, 4)), image=np.zeros(5)),
        r"Expected an image \(height, width\) with or without channels, got shape \(5,\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    draw, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        draw()
