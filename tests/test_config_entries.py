"""Config entries that are given in code, saved in a checkpoint, assigned to a built model, or from a newer release."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

from hf_attentiondrop import AffineScaledConfig, AttentionDropConfig, DropHead, DropKey, HardMasking, configure, report
from hf_attentiondrop.version import __version__

from .models import build, inputs
from .test_registration import TINY, TINY_CLIP


NO_EFFECT = "`attention_drop` was given for Bert.*'sdpa'.*would train unperturbed.*\"attentiondrop\""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stock checkpoint, without an entry."""
    build("bert", attn_implementation="sdpa").save_pretrained(tmp_path)
    return tmp_path


def edit_entry(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    contents = json.loads(path.read_text())
    contents["attention_drop"] |= changes
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize("drop", [AttentionDropConfig(p=0.3), {"p": 0.3}, AttentionDropConfig().to_dict()], ids=type)
@pytest.mark.parametrize("options", [{}, {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}])
def test_what_is_given_to_from_pretrained_must_act(folder: Path, drop: Any, options: dict[str, str]) -> None:
    message = NO_EFFECT.replace("sdpa", options.get("attn_implementation", "sdpa"))
    for model_class in (BertModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=message):
            model_class.from_pretrained(folder, attention_drop=drop, **options)


def test_what_is_given_to_a_config_must_act(folder: Path) -> None:
    for config in (
        BertConfig(**TINY, attention_drop={"p": 0.3}),
        AutoConfig.from_pretrained(folder, attention_drop=AttentionDropConfig()),
        copy.deepcopy(BertConfig(**TINY, attention_drop=AttentionDropConfig())),
    ):
        for build_model in (BertModel, BertModel._from_config, AutoModel.from_config):
            with pytest.raises(ValueError, match=NO_EFFECT):
                build_model(config)
    assigned = BertConfig(**TINY)
    assigned.attention_drop = {"p": 0.3}
    with pytest.raises(ValueError, match=NO_EFFECT):
        BertModel(assigned)
    assert len(report(BertModel._from_config(assigned, attn_implementation="attentiondrop")).active) == 2


def test_what_is_given_to_a_composite_must_act_on_a_part() -> None:
    config = CLIPConfig(**TINY_CLIP, attention_drop={"p": 0.3})
    with pytest.raises(ValueError, match="`attention_drop` was given for CLIPModel"):
        CLIPModel._from_config(copy.deepcopy(config))
    model = CLIPModel._from_config(config, attn_implementation={"text_config": "attentiondrop"})
    assert len(report(model).active) == 2


@pytest.mark.parametrize("entry", [None, {"p": 0.3}], ids=["as saved", "by hand"])
def test_a_checkpoint_with_an_entry_loads_as_stock_would(tmp_path: Path, entry: dict | None) -> None:
    trained = build("bert", attention_drop={"p": 0.3, "layers": [0]})
    trained.save_pretrained(tmp_path)
    if entry is not None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_drop": entry}))
    config = AutoConfig.from_pretrained(tmp_path)
    for model in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager"),
        type(trained).from_pretrained(tmp_path),
        type(trained).from_pretrained(tmp_path, config=config),
        AutoModelForSequenceClassification.from_config(config),
        type(trained)(copy.deepcopy(config)),
        type(trained)(pickle.loads(pickle.dumps(config))),
        type(trained)(type(config).from_dict(config.to_dict())),
        type(trained)(type(config)(**config.to_dict())),
        type(trained)(type(config).from_json_file(tmp_path / "config.json")),
    ):
        assert model.config.attention_drop.p == 0.3
        assert not report(model).active
    parts = EncoderDecoderConfig.from_encoder_decoder_configs(config, config)
    assert not report(EncoderDecoderModel(config=parts)).active


def test_the_config_of_a_perturbed_model_builds_a_stock_one() -> None:
    model = build("bert", attention_drop={"p": 0.3})
    assert type(model.config.__dict__["attention_drop"]) is dict
    model.set_attn_implementation("sdpa")
    assert not report(type(model)(model.config)).active


def test_a_learned_method_that_is_given_must_be_run(folder: Path) -> None:
    for build_model in (
        lambda reweighting: BertModel.from_pretrained(folder, attention_reweighting=reweighting),
        lambda reweighting: AutoModel.from_pretrained(folder, attention_reweighting=reweighting),
        lambda reweighting: BertModel(BertConfig(**TINY, attention_reweighting=reweighting)),
        lambda reweighting: build("bert", attention_reweighting=reweighting),
    ):
        with pytest.raises(ValueError, match="AffineScaledConfig.*attn_implementation='affine_scaled'"):
            build_model(AffineScaledConfig())


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (AttentionDropConfig(layers=[99]), "names layer 99, and BertForSequenceClassification has no such layer"),
        ({"attentions": ["cross"]}, "no attention of BertForSequenceClassification matches"),
    ],
)
@pytest.mark.parametrize("implementation", ["attentiondrop", "affine_scaled"])
@pytest.mark.parametrize("clone", [lambda model: model, copy.deepcopy], ids=["model", "copy"])
def test_an_impossible_assignment_raises(drop: Any, message: str, implementation: str, clone: Any) -> None:
    model, batch = clone(build("bert", attn_implementation=implementation)), inputs("bert")
    model.train()(**batch)
    model.config.attention_drop = {"p": 0.3}
    with pytest.raises(ValueError, match=message):
        model.config.attention_drop = drop
    assert model.config.attention_drop == AttentionDropConfig(p=0.3)
    assert {row.applied for row in report(model).rows} == {"hard p=0.3 k=5 fill=mask"}
    model.config.attention_drop = {"layers": [1]}
    model(**batch)
    assert [row.layer for row in report(model).active] == [1]


def test_an_impossible_assignment_after_a_switch_of_one_part_raises() -> None:
    config = CLIPConfig(**TINY_CLIP)
    config.vision_config.num_hidden_layers = 3
    model = CLIPModel._from_config(config, attn_implementation="attentiondrop")
    model.config.attention_drop = {"layers": [2]}
    assert len(report(model).active) == 1
    message = "names layer 2, and CLIPModel has no such layer"
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation({"vision_config": "sdpa"})
    assert len(report(model).active) == 1
    model.config.attention_drop = {"layers": [1]}
    model.set_attn_implementation({"vision_config": "sdpa"})
    with pytest.raises(ValueError, match=message):
        model.config.attention_drop = {"layers": [2]}
    assert [row.layer for row in report(model).active] == [1]


def test_what_is_given_to_a_part_that_runs_something_else_must_act() -> None:
    config = CLIPConfig(**TINY_CLIP)
    config.vision_config.attention_drop = {"p": 0.4}
    with pytest.raises(ValueError, match=r"given for CLIPModel \(CLIPVisionConfig\).*'sdpa'.*no effect"):
        CLIPModel._from_config(config, attn_implementation={"text_config": "attentiondrop"})
    config.attention_drop = {"p": 0.3}  # For all parts, including those that run it.
    assert report(CLIPModel._from_config(config, attn_implementation={"text_config": "attentiondrop"})).active


def test_an_impossible_assignment_to_a_model_that_grew_raises() -> None:
    model = build("llama", attn_implementation="attentiondrop")
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    configure(model, {"p": 0.3})
    with pytest.raises(ValueError, match="names layer 99"):
        model.config.attention_drop = {"layers": [99]}
    model.config.attention_drop = {"layers": [2]}
    assert [row.layer for row in report(model).active] == [2]


def test_configure_leaves_out_what_cannot_be_read() -> None:
    config = CLIPConfig(**TINY_CLIP)
    model = CLIPModel._from_config(config, attn_implementation={"text_config": "attentiondrop"})
    model.config.vision_config.__dict__["attention_drop"] = [1]
    configure(model, {"p": 0.2})
    assert model.config.text_config.attention_drop.p == 0.2


@pytest.mark.slow
def test_an_assignment_reaches_a_compiled_model() -> None:
    model, batch = build("llama", dropout=False, attention_drop={"p": 0.9}).train(), inputs("llama")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch)
    model.config.attention_drop = {"layers": [1]}
    compiled(**batch)
    assert [row.calls for row in report(model).rows] == [1, 2]


@pytest.mark.parametrize("changes", [{"annealing": "cosine"}, {"variant": "dropkey"}], ids=["key", "value"])
def test_an_entry_of_a_newer_release_is_kept_and_blocks_our_implementation_only(
    changes: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build("bert", attention_drop={"p": 0.3}).save_pretrained(tmp_path / "saved")
    edit_entry(tmp_path / "saved", **changes)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["attention_drop"]
    known = next(iter(changes.values() if "variant" in changes else changes))
    for _ in range(2):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_attentiondrop")]
    for part in (f"hf_attentiondrop {__version__}", str(tmp_path / "saved"), repr(known), "upgrade hf_attentiondrop"):
        assert part in warning
    model(**inputs("bert"))
    assert not report(model).active
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["attention_drop"] == saved
    message = f"hf_attentiondrop {__version__} cannot use the `attention_drop` entry of .*saved.*{known}.*upgrade"
    for use in (
        lambda: type(model).from_pretrained(tmp_path / "saved", attn_implementation="attentiondrop"),
        lambda: model.set_attn_implementation("attentiondrop"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    replaced = type(model).from_pretrained(
        tmp_path / "saved", attn_implementation="attentiondrop", attention_drop={"p": 0.2}
    )
    assert {row.applied for row in report(replaced).rows} == {"hard p=0.2 k=5 fill=mask"}


def test_an_unknown_learned_method_names_where_it_came_from(tmp_path: Path) -> None:
    build("bert", attn_implementation="affine_scaled").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    contents = json.loads(path.read_text())
    contents["attention_reweighting"]["temperature"] = 1.0
    path.write_text(json.dumps(contents))
    message = (
        f"{__version__} cannot use the `attention_reweighting` entry of .*{tmp_path.name}.*'temperature'.*upgrade"
    )
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_part_with_a_config_of_its_own_is_configured_alone() -> None:
    model = CLIPModel._from_config(CLIPConfig(**TINY_CLIP), attn_implementation="attentiondrop")
    configure(model.vision_model, DropKey(p=0.5))
    applied = {row.name.split("_")[0]: row.applied for row in report(model).rows}
    assert applied == {"text": "hard p=0.1 k=5 fill=mask", "vision": "dropkey p=0.5 axis=score"}
    # The other part still belongs to the model.
    model.config.attention_drop = DropHead(p=0.3)
    assert {row.applied for row in report(model).rows} == {"drophead p=0.3"}


def test_a_part_that_shares_its_config_is_not_configured_alone() -> None:
    model = build("marian", attention_drop=HardMasking(p=0.1))
    for part in (model.get_encoder(), model.get_decoder()):
        with pytest.raises(ValueError, match=f"{type(part).__name__}, a part of Marian.*attention modules outside"):
            configure(part, DropKey(p=0.5))
    assert {row.applied for row in report(model).rows} == {"hard p=0.1 k=5 fill=mask", ""}
    copied = copy.deepcopy(model.get_encoder())
    configure(copied, DropKey(p=0.5))
    assert {row.applied for row in report(copied).rows} == {"dropkey p=0.5 axis=score"}
    model.config.attention_drop = DropHead(p=0.3)
    assert {row.applied for row in report(model).rows} == {"drophead p=0.3", ""}
