"""Lists of perturbations: the first one wraps the others, in attention calls and in whole models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_attentiondrop import (
    AffineScaledConfig,
    BlurredSmoothing,
    DropHead,
    HardMasking,
    configure,
    report,
    scale_attention_drop,
)
from hf_attentiondrop.integration.functions import attention_drop_forward
from hf_attentiondrop.methods import hard, long_sequences

from ..attention import check_against_the_definition, make_module
from ..cases import CASES_BY_NAME, AttentionCase
from ..models import build, inputs


HARD, ZERO = HardMasking(p=0.5, k=3), HardMasking(p=0.5, k=3, fill="zero")
BLUR, DROPHEAD = BlurredSmoothing(sigma_max=2.0), DropHead(p=0.5)
LISTS = {
    "hard, blur": [HARD, BLUR],
    "blur, hard": [BLUR, HARD],
    "zero, blur": [ZERO, BLUR],
    "zero, hard": [ZERO, HARD],
    "hard, hard": [HARD, HARD],
    "hard, drophead": [HARD, DROPHEAD],
    "drophead, blur, zero": [DROPHEAD, BLUR, ZERO],
}


# Each way of masking once: the methods alone are tested with all cases.
NAMES = [
    *("none", "one_query", "causal_without_mask", "padding_left", "causal_packed", "sliding_window", "cross_padding"),
    *("masks_per_head_grouped", "float_minus_infinity", "float_minus_100_with_bias", "position_bias_causal"),
    *("fully_masked_float", "cached_padding_left", "static_prefill"),
]


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("case", [CASES_BY_NAME[name] for name in NAMES], ids=lambda case: case.name)
def test_a_list_equals_the_definition_forward_and_backward(case: AttentionCase, name: str) -> None:
    check_against_the_definition(case, LISTS[name], dropout=0.0)


@pytest.mark.parametrize(
    ("methods", "is_blockwise"), [([HARD, DROPHEAD], True), ([BLUR, HARD], True), ([HARD, BLUR], False)]
)
def test_hard_needs_no_score_matrix_if_nothing_runs_inside_of_it(
    methods: list, is_blockwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = hard.hard_attention
    monkeypatch.setattr(long_sequences, "FEW_SCORES", 0)
    monkeypatch.setattr(hard, "hard_attention", lambda *a, **k: calls.append(a) or original(*a, **k))
    case = CASES_BY_NAME["causal_padding_left"]
    attention_drop_forward(make_module(case, methods), *case.tensors(torch.float32), case.mask())
    assert bool(calls) is is_blockwise


def test_report_shows_which_methods_act_on_which_layer() -> None:
    model = build("bert", attention_drop=[{"p": 0.2, "layers": [0]}, DROPHEAD]).train()
    model(**inputs("bert"))
    first, second = report(model).rows
    assert first.applied == "hard p=0.2 k=5 fill=mask + drophead p=0.5"
    assert second.applied == "drophead p=0.5"
    assert first.calls == second.calls == 1, "a call counts once, however many methods perturb it"


def test_a_list_survives_in_config_json(tmp_path: Path) -> None:
    build("bert", attention_drop=[HARD, DROPHEAD]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention_drop"] == [HARD.to_dict(), DROPHEAD.to_dict()]
    assert AutoConfig.from_pretrained(tmp_path).attention_drop == (HARD, DROPHEAD)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not report(stock).active
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="attentiondrop")
    assert {row.applied for row in report(model).rows} == {f"{HARD.summary} + {DROPHEAD.summary}"}
    configure(model, BLUR)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention_drop"] == BLUR.to_dict()


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ([], ValueError, "at least one perturbation, got an empty list"),
        ([{"p": 0.1}, {"p": 2}], ValueError, r"Entry 1 of the list: .*`p` must be a probability in \[0, 1\], got 2"),
        ([{"p": 0.1}, 3], TypeError, "Entry 1 .* must be one of HardMasking, .* got 3"),
        (["drophead"], TypeError, 'Write {"variant": "drophead"}'),
        ([AffineScaledConfig()], TypeError, 'use attn_implementation="affine_scaled"'),
        ([{"variant": "drophead", "k": 3}], ValueError, "Unknown key 'k'.*setting of hard"),
        ([{"p": 0.1}, {"p": 0.2, "layers": [9]}], ValueError, "names layer 9"),
    ],
)
def test_one_invalid_method_raises_for_the_whole_list(methods: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build("bert", attention_drop=methods)
    model = build("bert", attention_drop={"p": 0.3})
    with pytest.raises(error, match=message):
        configure(model, methods)
    assert {row.applied for row in report(model).rows} == {"hard p=0.3 k=5 fill=mask"}


def test_a_schedule_scales_every_perturbation_of_a_list() -> None:
    entries = [{"p": 0.1, "layers": [0]}, {"p": 0.3, "layers": [1]}, replace(DROPHEAD, layers=(1,))]
    model = build("bert", attention_drop=entries)
    scale_attention_drop(model, 0.5)
    assert [row.current for row in report(model).rows] == [(0.05,), (0.15, 0.25)]
    assert "drophead p=0.5 (now 0.15, 0.25)" in str(report(model))
    assert model.config.attention_drop[1].p == 0.3
    scale_attention_drop(model, None)
    assert [row.current for row in report(model).rows] == [(), ()]


def test_a_list_compiles_in_one_graph_whatever_its_values() -> None:
    model = build("llama", dropout=False, attention_drop=[BLUR, HARD, DROPHEAD], num_hidden_layers=1).train()
    batch = inputs("llama")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for factor in (0.2, 0.9, 0.0):
        scale_attention_drop(model, factor)
        losses = []
        for run in (model, compiled):
            torch.manual_seed(0)
            losses.append(run(**batch).loss)
        torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
