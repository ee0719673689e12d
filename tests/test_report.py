"""The report lists every attention module once, with its kind, layer and number of perturbed calls."""

import pytest
import torch
from torch import nn
from transformers import SwinConfig, SwinModel, T5Config, T5ForConditionalGeneration

from hf_attentiondrop import AttentionDropConfig, configure, report
from hf_attentiondrop.attention.dropout import attention_dropout
from hf_attentiondrop.integration import functions

from .models import build, enable_checkpointing, inputs


EVERYWHERE = {"attentions": ["encoder_self", "decoder_self", "cross"]}


def test_marian_has_three_kinds_told_apart() -> None:
    rows = {row.name: (row.kind, row.layer) for row in report(build("marian")).rows}
    assert rows == {
        "model.encoder.layers.0.self_attn": ("encoder_self", 0),
        "model.encoder.layers.1.self_attn": ("encoder_self", 1),
        "model.decoder.layers.0.self_attn": ("decoder_self", 0),
        "model.decoder.layers.0.encoder_attn": ("cross", 0),
        "model.decoder.layers.1.self_attn": ("decoder_self", 1),
        "model.decoder.layers.1.encoder_attn": ("cross", 1),
    }


@pytest.mark.parametrize(
    ("drop", "active"),
    [
        ({}, ["encoder.layers.0.self", "encoder.layers.1.self", "decoder.layers.0.self", "decoder.layers.1.self"]),
        ({"layers": [-1]}, ["encoder.layers.1.self", "decoder.layers.1.self"]),
        ({"layers": [0], "attentions": ["cross"]}, ["decoder.layers.0.encoder"]),
        ({"attentions": ["decoder_self"]}, ["decoder.layers.0.self", "decoder.layers.1.self"]),
        ({"p": 0.0}, []),
        ({"variant": "blur", "width": 1}, []),
    ],
)
def test_layers_and_attentions_select(drop: dict, active: list[str]) -> None:
    model = build("marian", attention_drop=drop)
    names = [row.name.removeprefix("model.").removesuffix("_attn") for row in report(model).active]
    assert names == active
    model.train()(**inputs("marian"))
    assert [row.calls > 0 for row in report(model).rows] == [bool(row.applied) for row in report(model).rows]


def test_stages_are_counted_through() -> None:
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4)
    config.attention_drop = {"layers": [-1]}
    model = SwinModel._from_config(config, attn_implementation="attentiondrop")
    assert [row.layer for row in report(model).rows] == [0, 1, 2]
    assert [row.layer for row in report(model).active] == [2]


def test_sublayers_are_not_layers() -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=64, decoder_start_token_id=0)
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="attentiondrop")
    rows = {row.name.removesuffix("Attention"): (row.kind, row.layer) for row in report(model).rows}
    assert rows == {
        "encoder.block.0.layer.0.Self": ("encoder_self", 0),
        "encoder.block.1.layer.0.Self": ("encoder_self", 1),
        "decoder.block.0.layer.0.Self": ("decoder_self", 0),
        "decoder.block.0.layer.1.EncDec": ("cross", 0),
        "decoder.block.1.layer.0.Self": ("decoder_self", 1),
        "decoder.block.1.layer.1.EncDec": ("cross", 1),
    }


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert", "attention_probs_dropout_prob"),
        ("vit", "attention_probs_dropout_prob"),
        ("marian", "attention_dropout"),
        ("llama", "attention_dropout"),
    ],
)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_attention_dropout_is_seen_and_costs_a_score_matrix(
    family: str, name: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, attend = {}, functions._attend
    monkeypatch.setattr(
        functions, "_attend", lambda call, *others: seen.update({call.module: call}) or attend(call, *others)
    )
    model = build(family, attention_drop=EVERYWHERE | {"layers": [0]}, **{name: rate})
    model.train()(**inputs(family))
    assert seen and all(attention_dropout(module) == call.dropout == rate for module, call in seen.items())
    first = report(model)
    assert all(row.needs_score_matrix == bool(rate and row.applied) for row in first.rows)
    assert ("full score matrix" in str(first)) == bool(rate)
    configure(model, AttentionDropConfig(variant="blur", **EVERYWHERE))
    assert "full score matrix" not in str(report(model))


def test_evaluation_is_not_counted() -> None:
    model = build("bert")
    model(**inputs("bert"))
    assert [row.calls for row in report(model).rows] == [0, 0]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "vit", "marian", "llama"])
@pytest.mark.parametrize("variant", ["hard", "blur"])
def test_gradient_checkpointing_changes_nothing_and_counts_once(
    family: str, variant: str, use_reentrant: bool
) -> None:
    results = []
    for checkpointing in (False, True):
        strength = {"p": 0.5} if variant == "hard" else {"sigma_max": 2.0}
        model = build(family, attention_drop=AttentionDropConfig(variant=variant, **strength, **EVERYWHERE))
        model.train()
        if checkpointing:
            enable_checkpointing(model, use_reentrant)
        torch.manual_seed(1)
        loss = model(**inputs(family)).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((loss, gradients, [row.calls for row in report(model).rows]))
    (loss, gradients, calls), (other_loss, other_gradients, other_calls) = results
    assert torch.equal(loss, other_loss)
    assert len(gradients) == len(other_gradients)
    # Reentrant checkpointing sums the gradients of two decoder layers in another order, with stock attention too.
    tolerance = 1e-9 if use_reentrant and family == "marian" else 0.0
    for gradient, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=tolerance)
    assert calls == other_calls == [1] * len(calls)


def test_a_wrapped_model_is_found_and_other_objects_raise() -> None:
    assert report(nn.ModuleDict({"inner": build("bert")})).model == "BertForSequenceClassification"
    with pytest.raises(TypeError, match="Expected a Transformers model"):
        report(nn.Linear(2, 2))


def test_a_stack_with_a_copied_config_follows_its_model() -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=64, decoder_start_token_id=0)
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model.set_attn_implementation("attentiondrop")
    configure(model, {"variant": "blur"})
    assert {row.applied for row in report(model).active} == {"blur sigma_max=1.0 width=5"}
    model.config.attention_drop = {"p": 0.3, "attentions": ["cross"]}
    assert [(row.kind, row.applied) for row in report(model).active] == [("cross", "hard p=0.3 k=5 fill=mask")] * 2
