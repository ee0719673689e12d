"""Composite models: every part runs the requested implementation, and checkpoints reload unchanged."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CLIPVisionConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Gemma3Config,
    Gemma3TextConfig,
    LlavaConfig,
    LlavaModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SpeechEncoderDecoderModel,
    T5Config,
    T5ForConditionalGeneration,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import hf_attentiondrop
from hf_attentiondrop import AffineScaledConfig, AttentionDropConfig
from hf_attentiondrop.methods.learned import LearnedWeights

from .models import build
from .test_registration import TINY


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {**TINY, **NO_DROPOUT, "vocab_size": 64}
IMAGE = {**TINY, **NO_DROPOUT, "image_size": 8, "patch_size": 4}
SPEECH = {
    **TINY,
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0),
    **dict.fromkeys(("layerdrop", "mask_time_prob", "final_dropout"), 0.0),
    **{"conv_dim": (16,), "conv_stride": (8,), "conv_kernel": (8,), "num_feat_extract_layers": 1},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True},
}
IDS = torch.arange(3, 19).view(2, 8)
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WAVES = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))


def text_encoder(**kwargs: Any) -> PreTrainedModel:
    return BertModel(BertConfig(**TEXT, **kwargs))


def image_encoder(**kwargs: Any) -> PreTrainedModel:
    return ViTModel(ViTConfig(**IMAGE, **kwargs))


def speech_encoder(**kwargs: Any) -> PreTrainedModel:
    return Wav2Vec2Model(Wav2Vec2Config(**SPEECH, **kwargs))


def decoder(**kwargs: Any) -> PreTrainedModel:
    return BertLMHeadModel(BertConfig(**TEXT, is_decoder=True, add_cross_attention=True, **kwargs))


class Composite(NamedTuple):
    """A composite model: its class, the classes and names (config, module) of its two parts, and inputs."""

    model_class: type[PreTrainedModel]
    make_first: Callable[..., PreTrainedModel]
    make_second: Callable[..., PreTrainedModel]
    keys: tuple[str, str]
    names: tuple[str, str]
    inputs: dict[str, torch.Tensor]

    def build(self, first: str = "sdpa", second: str = "sdpa", **entries: Any) -> PreTrainedModel:
        """Builds it from two models that were built separately, each with its implementation."""
        torch.manual_seed(0)
        parts = [
            make(attn_implementation=name, **(entries if name != "sdpa" else {}))
            for make, name in ((self.make_first, first), (self.make_second, second))
        ]
        return self.model_class(None, *parts).eval()


CODER, PAIR = ("encoder", "decoder"), ("vision_config", "text_config")
COMPOSITES = {
    "text": Composite(
        EncoderDecoderModel, text_encoder, decoder, CODER, CODER, {"input_ids": IDS, "decoder_input_ids": IDS}
    ),
    "image": Composite(
        VisionEncoderDecoderModel,
        image_encoder,
        decoder,
        CODER,
        CODER,
        {"pixel_values": PIXELS, "decoder_input_ids": IDS},
    ),
    "speech": Composite(
        SpeechEncoderDecoderModel,
        speech_encoder,
        decoder,
        CODER,
        CODER,
        {"input_values": WAVES, "decoder_input_ids": IDS},
    ),
    "pair": Composite(
        VisionTextDualEncoderModel,
        image_encoder,
        text_encoder,
        PAIR,
        ("vision_model", "text_model"),
        {"pixel_values": PIXELS, "input_ids": IDS},
    ),
}
each_composite = pytest.mark.parametrize("composite", COMPOSITES.values(), ids=COMPOSITES.keys())


def running(model: PreTrainedModel) -> dict[str, set[str]]:
    """Returns the implementations of the attention modules of each part, by module name."""
    found: dict[str, set[str]] = {}
    for row in hf_attentiondrop.report(model).rows:
        found.setdefault(row.name.split(".")[0], set()).add(row.implementation)
    return found


def configs(model: PreTrainedModel) -> dict[str, PreTrainedConfig]:
    """Returns the configs of a model's modules, by module name."""
    held = {name: getattr(module, "config", None) for name, module in model.named_modules()}
    return {name: config for name, config in held.items() if isinstance(config, PreTrainedConfig)}


def output(model: PreTrainedModel, composite: Composite, *, training: bool = False) -> torch.Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        outputs = model.train(training)(**composite.inputs)
    return outputs["logits"] if "logits" in outputs else outputs["logits_per_text"]


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(23)
    for name, tensor in model.state_dict().items():
        if "reweighting" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def reweighted(model: PreTrainedModel) -> set[str]:
    modules = {
        name.split(".")[0]: module for name, module in model.named_modules() if isinstance(module, LearnedWeights)
    }
    return set(modules)


@each_composite
def test_a_composite_of_two_models_switches_as_a_whole(composite: Composite) -> None:
    model = composite.build()
    stock, stock_training = output(model, composite), output(model, composite, training=True)
    both = dict.fromkeys(composite.names, {"attentiondrop"})
    model.set_attn_implementation("attentiondrop")
    assert running(model) == both
    assert torch.equal(output(model, composite), stock)
    assert not torch.equal(output(model, composite, training=True), stock_training)
    calls = {row.name.split(".")[0]: row.calls for row in hf_attentiondrop.report(model).rows if row.applied}
    assert calls == dict.fromkeys(composite.names, 1)
    model.set_attn_implementation("sdpa")
    assert running(model) == dict.fromkeys(composite.names, {"sdpa"})
    assert torch.equal(output(model, composite, training=True), stock_training)


@each_composite
def test_a_dict_switches_one_part_and_leaves_the_other(composite: Composite) -> None:
    model = composite.build()
    for on, off in (composite.names, composite.names[::-1]):
        key = composite.keys[composite.names.index(on)]
        model.set_attn_implementation({key: "attentiondrop"})
        assert running(model) == {on: {"attentiondrop"}, off: {"sdpa"}}
        model.set_attn_implementation({key: "sdpa"})
        assert running(model) == {on: {"sdpa"}, off: {"sdpa"}}


@each_composite
@pytest.mark.parametrize(
    "implementations", [("attentiondrop", "sdpa"), ("sdpa", "attentiondrop"), ("attentiondrop", "attentiondrop")]
)
def test_parts_that_run_it_keep_it_in_the_composite(composite: Composite, implementations: tuple[str, str]) -> None:
    model = composite.build(*implementations, attention_drop={"p": 0.7})
    assert running(model) == {
        name: {implementation} for name, implementation in zip(composite.names, implementations, strict=True)
    }
    applied = {row.applied for row in hf_attentiondrop.report(model).rows if row.implementation == "attentiondrop"}
    assert applied - {""} == {"hard p=0.7 k=5 fill=mask"}
    hf_attentiondrop.configure(model, {"p": 0.2})
    applied = {row.applied for row in hf_attentiondrop.report(model).rows if row.implementation == "attentiondrop"}
    assert applied - {""} == {"hard p=0.2 k=5 fill=mask"}
    model.set_attn_implementation("sdpa")
    assert running(model) == dict.fromkeys(composite.names, {"sdpa"})


@pytest.mark.parametrize(
    "implementations", [("attentiondrop", None), (None, "attentiondrop"), ("attentiondrop", "attentiondrop")]
)
def test_from_two_checkpoints_with_an_argument_for_each(
    implementations: tuple[str | None, ...], tmp_path: Path
) -> None:
    text_encoder().save_pretrained(tmp_path / "encoder")
    decoder().save_pretrained(tmp_path / "decoder")
    asked = dict(zip(CODER, implementations, strict=True))
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(
        tmp_path / "encoder",
        tmp_path / "decoder",
        **{f"{part}_attn_implementation": name for part, name in asked.items() if name is not None},
    )
    assert running(model) == {part: {name or "sdpa"} for part, name in asked.items()}


@each_composite
@pytest.mark.parametrize("how", ["both built", "first built", "second built", "both switched", "first switched"])
def test_a_saved_composite_with_learned_weights_reloads_to_the_same(
    composite: Composite, how: str, tmp_path: Path
) -> None:
    learned = {"first": {0}, "second": {1}, "both": {0, 1}}[how.split()[0]]
    if how.endswith("built"):
        implementations = ["affine_scaled" if index in learned else "sdpa" for index in (0, 1)]
        model = composite.build(*implementations, attention_reweighting=AffineScaledConfig(gate=True))
    else:
        model = composite.build()
        both = how.startswith("both")
        model.set_attn_implementation("affine_scaled" if both else {composite.keys[0]: "affine_scaled"})
    expected = {composite.names[index] for index in learned}
    assert reweighted(model) == expected
    assert {name for name, kinds in running(model).items() if kinds == {"affine_scaled"}} == expected
    randomise(model).save_pretrained(tmp_path)
    again, info = composite.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert reweighted(again) == expected and running(again) == running(model)
    assert torch.equal(output(again, composite), output(model, composite))
    with pytest.raises(ValueError, match="has learned attention weights"):
        again.set_attn_implementation("sdpa")
    assert running(again) == running(model)


def test_a_part_switched_on_its_own_belongs_to_the_whole_again() -> None:
    composite = COMPOSITES["text"]
    model = composite.build()
    model.encoder.set_attn_implementation("attentiondrop")
    assert running(model) == {"encoder": {"attentiondrop"}, "decoder": {"sdpa"}}
    hf_attentiondrop.configure(model, {"p": 0.4, "layers": [-1]})
    assert [row.applied for row in hf_attentiondrop.report(model).rows if row.applied] == ["hard p=0.4 k=5 fill=mask"]
    model.set_attn_implementation("sdpa")
    assert running(model) == {"encoder": {"sdpa"}, "decoder": {"sdpa"}}


def test_a_model_whose_stacks_hold_copies_of_its_config_switches_as_a_whole() -> None:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64}
    config = T5Config(**sizes, decoder_start_token_id=0)
    torch.manual_seed(0)
    model, batch = T5ForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS}
    for name in ("attentiondrop", "sdpa", "attentiondrop", "sdpa"):
        model.set_attn_implementation(name)
        assert {row.implementation for row in hf_attentiondrop.report(model).rows} == {name}
        assert {config._attn_implementation for config in configs(model).values()} == {name}
        model.train()(**batch).loss.backward()
    calls = [row.calls for row in hf_attentiondrop.report(model).rows if row.kind != "cross"]
    assert calls == [2] * len(calls) and len(calls) == 4


def test_a_failed_switch_leaves_the_model_unchanged() -> None:
    composite = COMPOSITES["pair"]
    model = composite.build()
    model.config.text_config.attention_drop = AttentionDropConfig(layers=[7])
    before = {name: dict(config.__dict__) for name, config in configs(model).items()}
    with pytest.raises(ValueError, match="no such layer"):
        model.set_attn_implementation("attentiondrop")
    assert {name: dict(config.__dict__) for name, config in configs(model).items()} == before
    assert running(model) == dict.fromkeys(composite.names, {"sdpa"})


def test_learned_weights_that_do_not_match_the_composite_config_raise() -> None:
    encoder = text_encoder(attn_implementation="affine_scaled", attention_reweighting=AffineScaledConfig(momentum=0.5))
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**TEXT), BertConfig(**TEXT))
    with pytest.raises(ValueError, match="momentum=0.5.*would load as a different model"):
        EncoderDecoderModel(config, encoder, decoder())


def applied(model: nn.Module) -> set[str]:
    return {row.applied for row in hf_attentiondrop.report(model).rows}


def of_strength(p: float) -> set[str]:
    return {AttentionDropConfig(p=p).summary}


def stacked_twice() -> nn.Module:
    """Builds a model with copies of two layers, as in depth up-scaling."""
    model = build("llama", dropout=False)
    model.model.layers.extend(copy.deepcopy(layer) for layer in list(model.model.layers))
    return model


def trained_copies() -> nn.Module:
    """Builds a model whose attention modules PEFT copies and trains."""
    config = LoraConfig(r=2, target_modules=["lm_head"], modules_to_save=["self_attn"])
    return get_peft_model(build("llama", dropout=False), config)


@pytest.mark.parametrize(("make", "number"), [(stacked_twice, 4), (trained_copies, 4)])
def test_copies_of_attention_modules_follow_the_model(make: Callable[[], nn.Module], number: int) -> None:
    model = make()
    config = model.get_base_model().config if hasattr(model, "get_base_model") else model.config
    assert len(hf_attentiondrop.report(model).rows) == number and applied(model) == of_strength(0.1)
    config.attention_drop = {"p": 0.4}
    assert applied(model) == of_strength(0.4)
    hf_attentiondrop.configure(model, {"p": 0.6})
    assert applied(model) == of_strength(0.6)
    unpickled = pickle.loads(pickle.dumps(model))
    for other in (copy.deepcopy(model), unpickled):
        hf_attentiondrop.configure(other, {"p": 0.9})
        assert applied(other) == of_strength(0.9) and applied(model) == of_strength(0.6)
    hf_attentiondrop.set_base_attention(model, "flex_attention")
    assert {row.implementation for row in hf_attentiondrop.report(model).rows} == {"attentiondrop on flex_attention"}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("sdpa")
    assert {config._attn_implementation for config in configs(base).values()} == {"sdpa"}


def test_copies_of_cross_attention_are_cross_attention() -> None:
    model = build("marian", attn_implementation="sdpa")
    config = LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["encoder_attn"])
    peft_model = get_peft_model(model, config)
    model.set_attn_implementation("attentiondrop")
    kinds = {row.kind for row in hf_attentiondrop.report(peft_model).rows if "encoder_attn" in row.name}
    assert kinds == {"cross"}


def test_a_copied_part_is_governed_by_its_own_config() -> None:
    model = build("bert", attention_drop={"p": 0.3})
    part = copy.deepcopy(model.bert)
    part.config.attention_drop = {"p": 0.7}
    assert applied(part) == of_strength(0.7) and applied(model) == of_strength(0.3)


class Pair(nn.Module):
    """Two models in a custom module."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


def test_all_models_in_a_module_are_configured() -> None:
    pair = Pair(build("bert"), build("llama"))
    hf_attentiondrop.configure(pair, {"p": 0.8})
    assert applied(pair) == of_strength(0.8)
    assert [row.name for row in hf_attentiondrop.report(pair).rows] == [
        *(f"first.bert.encoder.layer.{layer}.attention.self" for layer in (0, 1)),
        *(f"second.model.layers.{layer}.self_attn" for layer in (0, 1)),
    ]
    assert str(hf_attentiondrop.report(pair)).startswith("Pair: 4 of 4 attention modules")
    hf_attentiondrop.set_base_attention(pair, "flex_attention")
    assert {row.implementation for row in hf_attentiondrop.report(pair).rows} == {"attentiondrop on flex_attention"}


def test_a_model_in_a_module_that_runs_something_else_is_left_alone() -> None:
    pair = Pair(build("bert", attn_implementation="sdpa"), build("llama"))
    hf_attentiondrop.configure(pair, {"p": 0.8})
    assert pair.first.config.attention_drop is None and pair.second.config.attention_drop.p == 0.8
    pair.second.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="BertForSequenceClassification uses .*LlamaForCausalLM uses .*no effect"):
        hf_attentiondrop.configure(pair, {"p": 0.8})


def test_a_configuration_that_fails_for_one_model_changes_none() -> None:
    pair = Pair(build("llama", attention_drop={"p": 0.3}), build("bert", attention_drop={"p": 0.3}))
    with pytest.raises(ValueError, match="no attention of LlamaForCausalLM matches"):
        hf_attentiondrop.configure(pair, {"p": 0.8, "attentions": ["encoder_self"]})
    with pytest.raises(ValueError, match="no attention of BertForSequenceClassification matches"):
        hf_attentiondrop.configure(pair, {"p": 0.8, "attentions": ["decoder_self"]})
    assert applied(pair) == of_strength(0.3)


def nested(**kwargs: Any) -> PreTrainedModel:
    """Builds a composite with a part that is a composite itself."""
    image = {**TINY, "image_size": 8, "patch_size": 4}
    text = Gemma3TextConfig(**TINY, vocab_size=64, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    inner = Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(**image), hidden_size=32)
    config = LlavaConfig(text_config=inner, vision_config=CLIPVisionConfig(**image))
    return LlavaModel._from_config(config, **kwargs)


def perturbed_parts(model: PreTrainedModel) -> set[str]:
    names = ("vision_tower", "language_model.vision_tower", "language_model.language_model")
    rows = hf_attentiondrop.report(model).rows
    return {name for name in names for row in rows if row.applied and row.name.startswith(f"{name}.")}


def test_a_part_of_a_part_is_switched() -> None:
    inner = "language_model.language_model"
    assert perturbed_parts(nested(attn_implementation={"text_config": {"text_config": "attentiondrop"}})) == {inner}
    model = nested()
    model.set_attn_implementation("attentiondrop")
    assert perturbed_parts(model) == {"vision_tower", "language_model.vision_tower", inner}
    model.set_attn_implementation("sdpa")
    assert {config._attn_implementation for config in configs(model).values()} == {"sdpa"}
    requested = {"text_config": {"text_config": "attentiondrop"}}
    if Version(transformers.__version__) >= Version("5.20"):
        model.set_attn_implementation(requested)
        assert perturbed_parts(model) == {inner}
    else:  # Transformers accepts nested dicts only while building a model.
        with pytest.raises(ValueError, match="not supported"):
            model.set_attn_implementation(requested)
        assert perturbed_parts(model) == set()


def test_a_name_that_no_part_of_a_pair_runs_raises(tmp_path: Path) -> None:
    for name in ("encoder", "decoder"):
        BertModel(BertConfig(**TINY, is_decoder=name == "decoder")).save_pretrained(tmp_path / name)
    folders = (tmp_path / "encoder", tmp_path / "decoder")
    with pytest.raises(ValueError, match=r"parts \(encoder, decoder\) run 'sdpa'.*set_attn_implementation"):
        EncoderDecoderModel.from_encoder_decoder_pretrained(*folders, attn_implementation="attentiondrop")
