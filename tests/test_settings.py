"""Changing a loaded model: a new configuration replaces the old one and warns; a schedule does not change it."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from hf_attentiondrop import AttentionDropConfig, configure, report, scale_attention_drop

from .models import build, inputs
from .test_registration import TINY_CLIP, training_output


def current_values(model: nn.Module) -> set[Any]:
    return {value for row in report(model).rows for value in row.current}


def test_configure_replaces_and_says_what_it_resets(caplog: pytest.LogCaptureFixture) -> None:
    model = build("bert")
    configure(model, {"p": 0.3, "k": 2, "layers": [0]})
    assert not caplog.records, "nothing was reset"
    configure(model, {"layers": [1]})
    assert model.config.attention_drop == AttentionDropConfig(layers=[1])
    assert [record.getMessage() for record in caplog.records] == [
        "configure: the new configuration replaces the old one, and settings go back to their defaults: "
        "p from 0.3 to 0.1, k from 2 to 5. To keep a value, pass it, or change a copy of "
        "model.config.attention_drop."
    ]


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({"layers": [0]}, {"layers": [1]}, []),
        ({"layers": [0]}, AttentionDropConfig(p=0.2), ["layers from [0] to None"]),
        ({"variant": "blur", "width": 3}, {"p": 0.2}, ["variant from 'blur' to 'hard'"]),
        ({"p": 0.3}, {"variant": "blur"}, []),
        ({"p": 0.3, "attentions": ["encoder_self"]}, {"p": 0.1}, ["attentions from ['encoder_self']"]),
    ],
)
def test_the_warning_names_what_was_left_out(
    before: Any, after: Any, named: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = build("bert", attention_drop=before)
    configure(model, after)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(named)
    assert all(name in message for name, message in zip(named, messages, strict=True))


def test_a_copy_keeps_what_it_does_not_change(caplog: pytest.LogCaptureFixture) -> None:
    model = build("bert", attention_drop={"p": 0.3, "layers": [0]})
    configure(model, replace(model.config.attention_drop, layers=(0, 1)))
    assert model.config.attention_drop == AttentionDropConfig(p=0.3, layers=[0, 1])
    assert not caplog.records


def test_configure_reaches_the_sub_configs() -> None:
    # The sub-configs must not keep the entries of the old configuration.
    config = CLIPConfig(**TINY_CLIP, attention_drop={"p": 0.2})
    model = CLIPModel._from_config(config, attn_implementation="attentiondrop")
    configure(model, {"p": 0.4})
    assert {row.applied for row in report(model).rows} == {"hard p=0.4 k=5 fill=mask"}


@pytest.mark.parametrize("variant", ["hard", "blur"])
def test_a_scaled_value_acts_and_is_not_saved(variant: str, tmp_path: Path) -> None:
    name = "p" if variant == "hard" else "sigma_max"
    drop = AttentionDropConfig(variant=variant, **{name: 0.9})
    model, batch = build("bert", dropout=False, attention_drop=drop), inputs("bert")
    keys, clean, configured = model.state_dict().keys(), model(**batch).logits, training_output(model, batch)
    scale_attention_drop(model, 0.5)
    weaker = build("bert", dropout=False, attention_drop=replace(drop, **{name: 0.45}))
    assert torch.equal(training_output(model, batch), training_output(weaker, batch))
    assert model.config.attention_drop == drop and model.state_dict().keys() == keys
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention_drop"] == drop.to_dict()
    scale_attention_drop(model, 0.0)
    assert torch.allclose(training_output(model, batch), clean, atol=1e-6)
    assert torch.equal(model.eval()(**batch).logits, clean)
    scale_attention_drop(model, None)
    assert torch.equal(training_output(model, batch), configured)


def test_the_report_shows_the_configured_and_the_current_value() -> None:
    model = build("bert", attention_drop={"p": 0.3, "layers": [0]})
    scale_attention_drop(model, 0.5)
    rows = report(model).rows
    assert [(row.applied, row.current) for row in rows] == [("hard p=0.3 k=5 fill=mask", (0.15,)), ("", ())]
    assert "hard p=0.3 k=5 fill=mask (now 0.15)" in str(report(model))
    scale_attention_drop(model, None)
    assert "now" not in str(report(model))


def test_a_schedule_survives_a_copy_and_a_switch_and_ends_with_a_new_configuration() -> None:
    model = build("bert", attention_drop={"p": 0.3})
    scale_attention_drop(nn.ModuleDict({"inner": model}), 0.5)
    copied = copy.deepcopy(model)
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation("attentiondrop")
    for scheduled in (model, copied):
        assert current_values(scheduled) == {0.15}
    with pytest.raises(ValueError, match="no such layer"):
        configure(model, {"layers": [99]})
    assert current_values(model) == {0.15}, "a failed change must leave the model unchanged"
    configure(model, {"variant": "blur"})
    copied.config.attention_drop = {"variant": "blur"}
    for changed in (model, copied):
        assert current_values(changed) == set()
        assert {value for module in attentions(changed) for value in module.attention_drop_state.values} == {1.0}


def attentions(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(row.name) for row in report(model).rows]


@pytest.mark.parametrize(
    ("drop", "factor", "message"),
    [
        ({}, 1.5, r"`factor` must be a number in \[0, 1\] or None, got 1.5"),
        ({}, float("nan"), "`factor` must be a number"),
        ({}, "0.1", "`factor` must be a number"),
        ({"p": 0.0}, 0.5, "or perturbs nothing.*with a value above 0"),
        ({"variant": "blur", "width": 1}, 1.0, "or perturbs nothing.*width above 1"),
    ],
)
def test_a_factor_that_cannot_act_raises(drop: dict, factor: Any, message: str) -> None:
    model = build("bert", attention_drop=drop)
    with pytest.raises(ValueError, match=message):
        scale_attention_drop(model, factor)
    assert current_values(model) == set()


def test_a_schedule_of_a_model_that_would_ignore_it_raises() -> None:
    with pytest.raises(ValueError, match="so a schedule would have no effect"):
        scale_attention_drop(build("bert", attn_implementation="sdpa"), 0.5)
    learned = build("bert", attn_implementation="affine_scaled")
    with pytest.raises(ValueError, match="is not configured for BertForSequenceClassification"):
        scale_attention_drop(learned, 0.5)
    configure(learned, {"p": 0.2})
    scale_attention_drop(learned, 0.5)
    assert current_values(learned) == {0.1}


def test_a_schedule_survives_an_assignment_that_raises() -> None:
    model = build("bert", attention_drop={"p": 0.3})
    scale_attention_drop(model, 0.5)
    with pytest.raises(ValueError, match="names layer 99"):
        model.config.attention_drop = {"layers": [99]}
    assert current_values(model) == {0.15}


def test_an_object_of_another_variant_resets_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = build("bert", attention_drop={"p": 0.3})
    configure(model, AttentionDropConfig(variant="blur"))
    assert not caplog.records


def test_settings_of_another_variant_do_not_count_as_reset(caplog: pytest.LogCaptureFixture) -> None:
    model = build("bert", attention_drop={"p": 0.3, "layers": [1]})
    configure(model, {"variant": "drophead"})
    (message,) = [record.getMessage() for record in caplog.records]
    assert "layers from [1] to None" in message and "p from" not in message
