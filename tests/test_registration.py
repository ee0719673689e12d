"""Registration and switching: a model either runs AttentionDrop or raises an error with the reason."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DebertaConfig,
    MPNetConfig,
    MPNetModel,
    ResNetConfig,
    ResNetModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

import hf_attentiondrop
from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.attention.modules import uses_attention_interface
from hf_attentiondrop.integration.registration import register

from .models import build, inputs


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TINY_CLIP = {
    "text_config": {**TINY, "vocab_size": 64, "projection_dim": 16},
    "vision_config": {**TINY, "image_size": 8, "patch_size": 4, "projection_dim": 16},
    "projection_dim": 16,
}


def perturbed(model: torch.nn.Module) -> list[str]:
    return [row.name for row in hf_attentiondrop.report(model).active]


def training_output(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(5)
    return model.train()(**batch).logits


@pytest.mark.parametrize("as_dict", [True, False])
def test_from_pretrained_takes_the_configuration(tmp_path: Path, as_dict: bool) -> None:
    build("bert", attn_implementation="sdpa").save_pretrained(tmp_path)
    drop = AttentionDropConfig(p=0.7, layers=[1])
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="attentiondrop", attention_drop=drop.to_dict() if as_dict else drop
    )
    assert model.config.attention_drop == drop
    assert perturbed(model) == ["bert.encoder.layer.1.attention.self"]


def test_without_a_configuration_the_documented_defaults_apply(tmp_path: Path) -> None:
    build("bert", attn_implementation="sdpa").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="attentiondrop")
    assert model.config.attention_drop is None
    assert [row.applied for row in hf_attentiondrop.report(model).rows] == ["hard p=0.1 k=5 fill=mask"] * 2


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"p": 2}, ValueError, r"`p` must be a probability in \[0, 1\], got 2"),
        ({"rate": 0.1}, ValueError, "Unknown key 'rate'"),
        ({"layers": [2]}, ValueError, "names layer 2, and BertForSequenceClassification has no such layer"),
        ({"layers": [-3]}, ValueError, "names layer -3"),
        ({"attentions": ["cross"]}, ValueError, "no attention of BertForSequenceClassification matches"),
    ],
)
def test_a_bad_configuration_stops_the_build_and_the_change(
    values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build("bert", attention_drop=values)
    model = build("bert", attention_drop={"p": 0.3})
    with pytest.raises(error, match=message):
        hf_attentiondrop.configure(model, values)
    assert model.config.attention_drop.p == 0.3, "a failed change must leave the model unchanged"


def test_configure_acts_from_the_next_pass_on() -> None:
    model, batch = build("bert", dropout=False), inputs("bert")
    clean = model.eval()(**batch).logits
    hard = training_output(model, batch)
    hf_attentiondrop.configure(model, {"variant": "blur", "sigma_max": 3.0})
    blurred = training_output(model, batch)
    hf_attentiondrop.configure(model, AttentionDropConfig(p=0.0))
    off = training_output(model, batch)
    assert not torch.equal(hard, clean) and not torch.equal(blurred, hard) and torch.equal(off, clean)


def test_an_assignment_to_the_config_acts_too() -> None:
    model, batch = build("bert", dropout=False, attention_drop={"p": 0.0}), inputs("bert")
    clean = training_output(model, batch)
    model.config.attention_drop = AttentionDropConfig(p=0.9)
    assert not torch.equal(training_output(model, batch), clean)


def test_configure_raises_for_a_model_that_would_ignore_it() -> None:
    with pytest.raises(
        ValueError, match=r'uses attn_implementation=.sdpa.*set_attn_implementation\("attentiondrop"\)'
    ):
        hf_attentiondrop.configure(build("bert", attn_implementation="sdpa"), {"p": 0.1})
    with pytest.raises(TypeError, match="Expected a Transformers model"):
        hf_attentiondrop.configure(torch.nn.Linear(2, 2), {"p": 0.1})


@pytest.mark.parametrize("family", ["bert", "vit", "marian", "llama"])
@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_switching_to_and_from(family: str, other: str) -> None:
    model, batch = build(family, dropout=False, attn_implementation=other), inputs(family)
    stock = training_output(model, batch)
    model.set_attn_implementation("attentiondrop")
    assert len(perturbed(model)) > 0
    assert not torch.equal(training_output(model, batch), stock)
    model.set_attn_implementation(other)
    assert perturbed(model) == []
    assert torch.equal(training_output(model, batch), stock)


@pytest.mark.parametrize(
    "build_model",
    [
        lambda: MPNetModel(MPNetConfig(**TINY, attn_implementation="attentiondrop")),
        lambda: AutoModel.from_config(MPNetConfig(**TINY), attn_implementation="attentiondrop"),
        lambda: MPNetModel(MPNetConfig(**TINY)).set_attn_implementation("attentiondrop"),
    ],
    ids=["constructor", "from_config", "switch"],
)
def test_a_model_that_ignores_the_interface_raises(build_model: Any) -> None:
    with pytest.raises(ValueError, match="MPNetModel does not dispatch its attention.*BERT, RoBERTa"):
        build_model()


def test_an_unsupported_pretrained_model_leaves_nothing_behind(tmp_path: Path) -> None:
    MPNetModel(MPNetConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MPNetModel does not dispatch"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="attentiondrop")
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation == "eager"


def test_a_model_without_attention_raises_alone_but_not_as_a_part() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="ResNetModel has no attention"):
        ResNetModel._from_config(config, attn_implementation="attentiondrop")
    from transformers import DetrConfig, DetrModel

    config.out_features = ["stage4"]
    detr = DetrModel._from_config(
        DetrConfig(
            backbone_config=config,
            use_timm_backbone=False,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        ),
        attn_implementation="attentiondrop",
    )
    assert sorted({row.kind for row in hf_attentiondrop.report(detr).rows}) == [
        "cross",
        "decoder_self",
        "encoder_self",
    ]


def test_a_composite_with_a_part_that_cannot_names_it_and_takes_the_dict_form() -> None:
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**TINY, image_size=8, patch_size=4),
        BertConfig(**TINY, vocab_size=64, is_decoder=True, add_cross_attention=True),
    )
    model = VisionEncoderDecoderModel._from_config(config, attn_implementation={"decoder": "attentiondrop"})
    implementations = {row.name.split(".")[0]: row.implementation for row in hf_attentiondrop.report(model).rows}
    assert implementations == {"encoder": "sdpa", "decoder": "attentiondrop"}
    with pytest.raises(ValueError, match="DebertaModel does not dispatch.*name only the parts"):
        unsupported = copy.deepcopy(config)
        unsupported.encoder = DebertaConfig(**TINY, vocab_size=64)
        VisionEncoderDecoderModel._from_config(unsupported, attn_implementation="attentiondrop")


def test_the_dict_form_reaches_one_sub_model() -> None:
    model = CLIPModel._from_config(CLIPConfig(**TINY_CLIP), attn_implementation={"text_config": "attentiondrop"})
    assert all(name.startswith("text_model.") for name in perturbed(model)) and len(perturbed(model)) == 2
    hf_attentiondrop.configure(model, {"p": 0.5, "layers": [-1]})
    assert len(perturbed(model)) == 1
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "attentiondrop"})
    assert perturbed(model) == ["vision_model.encoder.layers.1.self_attn"]


@pytest.mark.parametrize(
    "requested",
    [
        {"txt_config": "attentiondrop"},
        {"text_config": "attentiondrop", "vison_config": "sdpa"},
        {"text_config": {"txt": "affine_scaled"}},
    ],
)
def test_a_dict_that_names_no_part_raises(requested: dict[str, Any], tmp_path: Path) -> None:
    message = "names '(txt_config|vison_config|txt)', but CLIP(Text)?Config has no such part"
    with pytest.raises(ValueError, match=message):
        CLIPModel._from_config(CLIPConfig(**TINY_CLIP), attn_implementation=requested)
    model = CLIPModel(CLIPConfig(**TINY_CLIP))
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation(requested)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path, attn_implementation=requested)


def test_a_dict_for_a_model_without_parts_raises() -> None:
    with pytest.raises(
        ValueError, match="'text_config', but BertConfig has no such part.*It has no parts; the key ''"
    ):
        build("bert", attn_implementation={"text_config": "attentiondrop"})
    with pytest.raises(ValueError, match=r"""Did you mean 'text_config'.*'vision_config'"""):
        CLIPConfig(**TINY_CLIP, attn_implementation={"txt_config": "attentiondrop"})
    model = build("bert", attn_implementation={"": "attentiondrop"})
    assert len(perturbed(model)) == 2
    assert build("bert", attn_implementation={"text_config": "eager"}).config._attn_implementation == "sdpa"


def test_a_misspelled_name_raises_with_a_suggestion(tmp_path: Path) -> None:
    message = 'attention_drop.*is not supported.*hf_attentiondrop adds "attentiondrop", "affine_scaled"'
    message += ".*Did you mean 'attentiondrop'"
    build("bert", attn_implementation="sdpa").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path, attn_implementation="attention_drop")
    with pytest.raises(ValueError, match=message):
        build("bert", attn_implementation="sdpa").set_attn_implementation("attention_drop")
    with pytest.raises(ValueError, match="nothing_like_it.*is not supported.*hf_attentiondrop adds") as caught:
        build("bert", attn_implementation="nothing_like_it")
    assert "Did you mean" not in str(caught.value)


def test_a_module_that_only_mentions_the_interface_is_no_attention() -> None:
    class Mentions(torch.nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            """Not ALL_ATTENTION_FUNCTIONS."""
            return states  # A comment that mentions `ALL_ATTENTION_FUNCTIONS`.

    assert not uses_attention_interface(Mentions)


def test_sub_configs_can_differ() -> None:
    model = CLIPModel._from_config(
        CLIPConfig(**TINY_CLIP, attention_drop={"p": 0.2}), attn_implementation="attentiondrop"
    )
    model.config.vision_config.attention_drop = {"variant": "blur"}
    applied = {row.name.split(".")[0]: row.applied for row in hf_attentiondrop.report(model).rows}
    assert applied == {"text_model": "hard p=0.2 k=5 fill=mask", "vision_model": "blur sigma_max=1.0 width=5"}


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_perturbed_and_counted_on_its_own(clone: Any) -> None:
    model, batch = build("bert", dropout=False), inputs("bert")
    other = clone(model)
    assert torch.equal(training_output(model, batch), training_output(other, batch))
    training_output(other, batch)
    assert [[row.calls for row in hf_attentiondrop.report(m).rows] for m in (model, other)] == [[1, 1], [2, 2]]


def test_registering_twice_is_harmless_and_a_clash_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    post_init = BertModel.post_init
    register()
    assert BertModel.post_init is post_init
    monkeypatch.setitem(AttentionInterface._global_mapping, "attentiondrop", lambda: None)
    with pytest.raises(RuntimeError, match="already has 'attentiondrop'"):
        register()


def test_an_older_dependency_raises_on_import() -> None:
    code = (
        "import importlib.metadata as metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '4.57.0' if name == 'transformers' else real(name)\n"
        "import hf_attentiondrop\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "ImportError: hf_attentiondrop needs transformers >= " in result.stderr and "found 4.57.0" in result.stderr
