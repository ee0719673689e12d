"""Values that differ between layers and heads: parsing, the value of every layer, and attention per head."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from hf_attentiondrop import (
    AttentionDropConfig,
    DropHead,
    DropKey,
    HardMasking,
    configure,
    report,
    scale_attention_drop,
)
from hf_attentiondrop.attention.modules import Place
from hf_attentiondrop.functional import dropkey_attention
from hf_attentiondrop.functional.drophead import sample_head_scale
from hf_attentiondrop.integration.functions import attention_drop_forward
from hf_attentiondrop.methods.method import Perturbation

from ..attention import make_module, position_bias, with_gradients
from ..cases import CASES, CASES_BY_NAME, AttentionCase
from ..models import build, inputs
from . import one_example_each


PLACE = Place("encoder_self", "layers", 0, 1, num_heads=4)


def values_by_layer(model: torch.nn.Module) -> list[Any]:
    return [
        module.attention_drop_state.values for module in model.modules() if hasattr(module, "attention_drop_state")
    ]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.3, [0.3, 0.3, 0.3]),
        ([0.1, 0.0, 0.3], [0.1, None, 0.3]),
        (torch.tensor([0.5, 0.25, 1.0]), [0.5, 0.25, 1.0]),
        ({"from": 0.5, "to": 0.0}, [0.5, 0.25, None]),
        ({"from": 0, "to": 1}, [None, 0.5, 1.0]),
        ({"heads": [0.0, 0.1, 0.2, 0.3]}, [(0.0, 0.1, 0.2, 0.3)] * 3),
        ({"heads": {"from": 0.75, "to": 0.0}}, [(0.75, 0.5, 0.25, 0.0)] * 3),
        (
            [0.1, {"heads": [0.0, 0.0, 0.0, 0.0]}, {"heads": {"from": 0, "to": 0.75}}],
            [0.1, None, (0, 0.25, 0.5, 0.75)],
        ),
    ],
    ids=str,
)
def test_every_layer_and_head_gets_its_value(p: Any, expected: list[Any], tmp_path: Path) -> None:
    model = build("bert", num_hidden_layers=3, attention_drop={"p": p})
    wanted = [[] if value is None else [value] for value in expected]
    assert values_by_layer(model) == wanted
    shown = [row.applied for row in report(model).rows]
    assert [bool(text) for text in shown] == [value is not None for value in expected]
    for text, value in zip(shown, expected, strict=True):
        assert value is None or isinstance(value, tuple) or f"p={float(value)} " in text
    # config.json keeps the profile as it was written, and reads it back.
    model.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["attention_drop"]["p"]
    assert written == (p.tolist() if isinstance(p, torch.Tensor) else p)
    assert AutoConfig.from_pretrained(tmp_path).attention_drop == model.config.attention_drop
    scale_attention_drop(model, 0.5)
    halved = [[(torch.tensor(value[0]) / 2).tolist()] if value else [] for value in wanted]
    assert [[list(v) if isinstance(v, tuple) else v for v in values] for values in values_by_layer(model)] == [
        [pytest.approx(value) for value in values] for values in halved
    ]


def test_a_line_spans_each_stack() -> None:
    model = build("marian", encoder_layers=2, decoder_layers=3, attention_drop={"p": {"from": 0.4, "to": 0.2}})
    found = {(row.kind, row.layer): row.applied.split()[1] for row in report(model).rows if row.applied}
    assert found == {
        ("encoder_self", 0): "p=0.4",
        ("encoder_self", 1): "p=0.2",
        ("decoder_self", 0): "p=0.4",
        ("decoder_self", 1): "p=0.3",
        ("decoder_self", 2): "p=0.2",
    }


PER_HEAD = [drop for name, drop in one_example_each().items() if name != "drophead"]


@pytest.mark.parametrize("drop", PER_HEAD, ids=lambda drop: drop.variant)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_head_is_perturbed_as_with_its_value_alone(case: AttentionCase, drop: Perturbation) -> None:
    check_heads(case, drop)


@pytest.mark.parametrize(
    "drop", [HardMasking(p=0.5, k=2), DropKey(p=0.5, axis="column")], ids=lambda drop: drop.variant
)
@pytest.mark.parametrize("name", ["none", "causal_without_mask", "packed", "grouped_queries_causal", "cached"])
def test_each_head_in_blocks_is_perturbed_as_with_its_value_alone(
    name: str, drop: Perturbation, small_blocks: None
) -> None:
    check_heads(CASES_BY_NAME[name], drop)


def check_heads(case: AttentionCase, drop: Perturbation, device: str = "cpu") -> None:
    """The random numbers do not depend on the values, so that each head equals that of a run with its value."""
    values = torch.linspace(0.0, 1.0, case.heads).tolist()
    attentions = ("cross",) if case.is_cross else ("encoder_self",)
    per_head = run(case, replace(drop, attentions=attentions, **{drop.scheduled: {"heads": values}}), device)
    for head, value in enumerate(values):
        alone = run(case, replace(drop, attentions=attentions, **{drop.scheduled: value}), device)
        for of_all, of_one in zip(per_head, alone, strict=True):
            torch.testing.assert_close(of_all[:, :, head], of_one[:, :, head], rtol=0, atol=1e-10)


def test_keys_in_blocks_are_dropped_with_the_probability_of_their_head() -> None:
    torch.manual_seed(0)
    p, states = torch.tensor([0.0, 0.2, 0.9, 1.0]).view(-1, 1, 1), torch.zeros(4, 4, 64, 64)
    query, key = states, states[:, :2]
    dropped = dropkey_attention(query, key, torch.eye(64).expand(4, 2, -1, -1), p=p) == 0
    expected = torch.tensor([0.0, 0.2, 0.9, 63 / 64], dtype=torch.float64)
    torch.testing.assert_close(dropped.double().mean(dim=(0, 1, 3)), expected, rtol=0, atol=0.01)


def run(case: AttentionCase, drop: Perturbation, device: str) -> list[torch.Tensor]:
    """Returns the output and the gradient of the queries, `(B, Q, H, D)`."""
    module, mask, bias = make_module(case, drop), case.mask(), position_bias(case)
    mask = None if mask is None else mask.to(device)
    extras = {} if bias is None else {"position_bias": bias.to(device)}
    # Also a value of 0, with which the method would not act and draw no numbers.
    module.attention_drop_state.active = ((drop, torch.tensor(drop.value_at(PLACE), dtype=torch.float64)),)

    def library(*tensors: torch.Tensor) -> torch.Tensor:
        tensors = [tensor.to(device) for tensor in tensors]
        return attention_drop_forward(module, *tensors, mask, scaling=0.3, **extras)[0].cpu()

    output, of_query, *_ = with_gradients(library, *case.tensors())
    return [output, of_query.transpose(1, 2)]


def test_heads_are_dropped_each_with_its_probability() -> None:
    torch.manual_seed(0)
    p = torch.tensor([0.0, 0.2, 0.5, 0.9])
    dropped = (sample_head_scale(20_000, 4, p=p) == 0).double().mean(dim=0)
    torch.testing.assert_close(dropped, p.double(), rtol=0, atol=0.01)
    alone = sample_head_scale(20_000, 4, p=torch.tensor([0.999, 1.0, 1.0, 1.0])) > 0
    torch.testing.assert_close(
        alone.double().mean(dim=0), torch.full((4,), 0.25), rtol=0, atol=0.01, check_dtype=False
    )


def test_a_model_with_values_per_head_trains() -> None:
    drops = [DropHead(p={"heads": {"from": 0.5, "to": 0.0}}), HardMasking(p=[0.2, {"heads": [0.0, 0.1, 0.2, 0.3]}])]
    model, batch = build("llama", attention_drop=drops).train(), inputs("llama")
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite() and "'heads': [0.0, 0.1, 0.2, 0.3]" in str(report(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p": [0.1, 1.5]}, r"`p` must be a probability in \[0, 1\], or a list with one per layer.*got \(0.1, 1.5\)"),
        ({"p": {"from": 0.2}}, r"`p` must be a probability.*got \{'from': 0.2\}"),
        ({"p": {"from": 0.2, "to": -0.1}}, "`p` must be a probability"),
        ({"p": {"heads": []}}, "`p` must be a probability"),
        ({"p": {"heads": [[0.1], [0.2]]}}, "`p` must be a probability"),
        ({"p": []}, "`p` must be a probability"),
        ({"variant": "blur", "sigma_max": {"from": 1.0, "to": float("inf")}}, "`sigma_max` must be a finite number"),
        ({"p": [0.1, 0.1], "layers": [0]}, "`layers` selects.*would have no effect"),
        ({"p": [0.1]}, "one value per layer, got 1 values, and the stack .* has 2 layers"),
        ({"p": [0.1, 0.1, 0.1]}, "one value per layer, got 3 values, and the stack .* has 2 layers"),
        ({"p": {"heads": [0.1, 0.2]}}, "one value per head, got 2 values, and layer 0 of .* has 4 heads"),
    ],
)
def test_a_profile_that_fits_nothing_raises(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("bert", attention_drop=settings)
    model = build("bert", attention_drop={"p": 0.3})
    with pytest.raises(ValueError, match=message):
        configure(model, settings)
    assert model.config.attention_drop == AttentionDropConfig(p=0.3) and values_by_layer(model) == [[0.3], [0.3]]
