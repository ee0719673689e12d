"""Learned weights behave like a model's own: construction, saving and loading, copies, casts, training."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    Trainer,
    TrainingArguments,
    VideoMAEConfig,
    VideoMAEModel,
)
from transformers.distributed import DistributedConfig

import hf_attentiondrop
from hf_attentiondrop import AffineScaledConfig, AttentionSinkConfig, GatedAttentionConfig
from hf_attentiondrop.methods.affine_scaled import AffineScaling
from hf_attentiondrop.methods.learned import LearnedWeights

from .models import build, enable_checkpointing, inputs, require_one_graph
from .test_registration import TINY, TINY_CLIP


FAMILIES = ["bert", "vit", "marian", "llama"]
CONFIGS = {
    "affine_scaled": AffineScaledConfig(),
    "affine_and_gate": AffineScaledConfig(gate=True),
    "gated_attention": GatedAttentionConfig(),
    "attention_sink": AttentionSinkConfig(),
}


def build_reweighted(family: str, name: str = "affine_scaled", **kwargs: Any) -> PreTrainedModel:
    config = CONFIGS[name]
    return build(family, dropout=False, attn_implementation=config.method, attention_reweighting=config, **kwargs)


def learned(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns learned weights and averages by name."""
    return {name: tensor for name, tensor in model.state_dict().items() if "reweighting" in name}


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Sets weights and averages to random values, as after training."""
    generator = torch.Generator().manual_seed(23)
    for tensor in learned(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("name", ["affine_scaled", "affine_and_gate", "gated_attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_zero_is_the_base_model_bit_for_bit_and_alive(family: str, name: str) -> None:
    base, model = build(family, dropout=False, attn_implementation="sdpa"), build_reweighted(family, name)
    for padding in (None,) if family == "vit" else (None, "left", "right"):
        batch = inputs(family, padding=padding)
        assert torch.equal(logits(base, batch), logits(model, batch))
        loss, other = base.train()(**batch).loss, model.train()(**batch).loss
        assert torch.equal(loss, other)
    loss.backward()
    other.backward()
    ours = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, parameter in base.named_parameters():
        torch.testing.assert_close(ours[key], parameter.grad, rtol=0, atol=1e-6)
    gradients = [gradient for key, gradient in ours.items() if "reweighting" in key]
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sink_starts_close_to_the_base_model(family: str) -> None:
    base, model = build(family, dropout=False, attn_implementation="sdpa"), build_reweighted(family, "attention_sink")
    batch = inputs(family, padding=None if family == "vit" else "left")
    difference = (logits(base, batch) - logits(model, batch)).abs().max()
    assert 0 < difference < 0.02
    model.train()(**batch).loss.backward()
    assert all(p.grad.abs().max() > 0 for key, p in model.named_parameters() if "reweighting" in key)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_without_an_argument_nothing_is_lost(family: str, name: str, tmp_path: Path) -> None:
    model, batch = randomise(build_reweighted(family, name)), inputs(family)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.config.attention_reweighting == CONFIGS[name]
    assert again.config._attn_implementation == CONFIGS[name].method
    assert torch.equal(logits(model, batch), logits(again, batch))
    assert not torch.equal(logits(model, batch), logits(build(family, attn_implementation="sdpa"), batch))


def test_a_vanilla_checkpoint_gets_initialized_weights(tmp_path: Path) -> None:
    base, batch = build("llama", attn_implementation="sdpa"), inputs("llama")
    base.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="affine_scaled")
    assert torch.equal(logits(base, batch), logits(model, batch))
    config = AffineScaledConfig(init="paper", layers=[-1])
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="affine_scaled", attention_reweighting=config
    )
    weights = learned(model)
    assert set(weights) == {f"model.layers.1.self_attn.reweighting.{key}" for key in ("weight", "average")}
    assert 0.015 < weights["model.layers.1.self_attn.reweighting.weight"].std() < 0.025
    assert (weights["model.layers.1.self_attn.reweighting.average"] == 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda config: AutoModelForCausalLM.from_config(config, attn_implementation="affine_scaled"),
        lambda config: type(build("llama"))(copy.deepcopy(config)).set_attn_implementation("affine_scaled"),
    ],
    ids=["from_config", "switch"],
)
def test_present_however_a_model_is_made(make: Any, tmp_path: Path) -> None:
    config = build("llama", attn_implementation="sdpa").config
    made = make(config)
    model = made if made is not None else build("llama", attn_implementation="sdpa")
    if made is None:
        model.set_attn_implementation("affine_scaled")
    assert len(learned(model)) == 4
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["attn_implementation"] == "hf_attentiondrop.affine_scaled"
    assert saved["attention_reweighting"] == AffineScaledConfig().to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_switching_a_loaded_model_attaches_weights_and_switching_back_raises(family: str) -> None:
    model, batch = build(family, dropout=False, attn_implementation="sdpa"), inputs(family)
    before = logits(model, batch)
    model.set_attn_implementation("affine_scaled")
    assert torch.equal(logits(model, batch), before) and learned(model)
    after = logits(randomise(model), batch)
    model.set_attn_implementation("affine_scaled")
    for other in ("sdpa", "eager", "attentiondrop", "attention_sink"):
        with pytest.raises(ValueError, match="has learned attention weights.*silently wrong"):
            model.set_attn_implementation(other)
    assert torch.equal(logits(model, batch), after)


def test_loading_with_another_implementation_raises(tmp_path: Path) -> None:
    build_reweighted("bert").save_pretrained(tmp_path)
    for other in ("sdpa", "eager", "attentiondrop"):
        with pytest.raises(ValueError, match="would ignore.*silently wrong"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation=other)
    with pytest.raises(ValueError, match="Name the same method in both"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="attention_sink")


def test_without_the_plugin_loading_fails_and_names_it(tmp_path: Path) -> None:
    model = build_reweighted("bert")
    model.save_pretrained(tmp_path)
    code = (
        "import sys, transformers\n"
        f"transformers.{type(model).__name__}.from_pretrained(sys.argv[1])\n"
        "print('loaded')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1 and "loaded" not in result.stdout
    assert 'ValueError: Specified `attn_implementation="hf_attentiondrop.affine_scaled"`' in result.stderr


@pytest.mark.parametrize("composite", [False, True])
def test_a_checkpoint_may_name_the_implementation_alone(composite: bool, tmp_path: Path) -> None:
    if composite:
        model = CLIPModel._from_config(CLIPConfig(**TINY_CLIP), attn_implementation={"text_config": "affine_scaled"})
    else:
        model = build_reweighted("bert")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("hf_attentiondrop.", ""))
    assert '"affine_scaled"' in (tmp_path / "config.json").read_text()
    assert learned(AutoModel.from_pretrained(tmp_path)).keys() and learned(model)


def test_a_method_of_a_newer_release_raises(tmp_path: Path) -> None:
    build_reweighted("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["attn_implementation"] = "hf_attentiondrop.something_new"
    del config["attention_reweighting"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hf_attentiondrop.something_new.*newer release of hf_attentiondrop"):
        AutoModel.from_pretrained(tmp_path)


def test_the_configuration_is_fixed_once_attached() -> None:
    model = build_reweighted("bert")
    for change in (None, AffineScaledConfig(momentum=0.5), AttentionSinkConfig()):
        with pytest.raises(ValueError, match="cannot change to"):
            model.config.attention_reweighting = change
    model.config.attention_reweighting = AffineScaledConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "affine_scaled", "activation": "relu"}, "`activation` must be one of"),
        ({"method": "affine_scaled", "init": "zeros"}, "`init` must be one of"),
        ({"method": "affine_scaled", "momentum": 1.5}, r"`momentum` must be a number in \[0, 1\], got 1.5"),
        ({"method": "affine_scaled", "bias_length": 5}, "`bias_length` must be one of"),
        ({"method": "affine_scaled", "gate": 1}, "`gate` must be True or False"),
        ({"method": "affine_scaled", "layers": []}, "`layers` must be None or a non-empty list"),
        ({"method": "affine_scaled", "moment": 0.9}, "Unknown key 'moment'.*Did you mean 'momentum'"),
        ({"method": "affine_scaled", "layers": [2]}, "names layer 2, and BertForSequenceClassification has no such"),
        ({"method": "attention_sink", "init": float("-inf")}, "`init` must be a finite number"),
        ({"method": "gated_attention", "init": 0}, "`init` must be one of"),
        ({"method": "attention_sink"}, "Name the same method in both"),
        ({"init": "paper"}, "must name its `method`"),
    ],
)
def test_a_bad_configuration_stops_the_build(values: dict[str, Any], message: str) -> None:
    method = values.get("method", "affine_scaled") if len(values) > 1 else "affine_scaled"
    with pytest.raises(ValueError, match=message):
        build("bert", attn_implementation=method, attention_reweighting=values)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (SiglipVisionModel, SiglipVisionConfig(**TINY, image_size=8, patch_size=4)),
        (VideoMAEModel, VideoMAEConfig(**TINY, image_size=8, patch_size=4, num_frames=2)),
    ],
)
def test_a_model_that_drops_keyword_arguments_raises(model_class: type[PreTrainedModel], config: Any) -> None:
    with pytest.raises(ValueError, match="does not pass its keyword arguments on"):
        model_class._from_config(config, attn_implementation="affine_scaled")
    model = model_class._from_config(config, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="does not pass its keyword arguments on"):
        model.set_attn_implementation("affine_scaled")
    assert model.config._attn_implementation == "sdpa" and model.config.attention_reweighting is None
    assert not learned(model)


def test_tensor_parallelism_raises() -> None:
    config = build("llama", attn_implementation="sdpa").config
    config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(ValueError, match="do not support tensor parallelism"):
        AutoModelForCausalLM.from_config(config, attn_implementation="affine_scaled")


def test_one_part_of_a_composite(tmp_path: Path) -> None:
    model = CLIPModel._from_config(CLIPConfig(**TINY_CLIP), attn_implementation={"text_config": "affine_scaled"})
    names = list(learned(model))
    assert len(names) == 4 and all(name.startswith("text_model.") for name in names)
    randomise(model).save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.config.vision_config._attn_implementation == "sdpa"
    assert all(torch.equal(tensor, learned(again)[name]) for name, tensor in learned(model).items())
    with pytest.raises(ValueError, match="would ignore"):
        AutoModel.from_pretrained(tmp_path, attn_implementation={"text_config": "sdpa"})


def test_a_whole_composite_takes_one_entry(tmp_path: Path) -> None:
    config = CLIPConfig(**TINY_CLIP, attention_reweighting=GatedAttentionConfig(layers=[0]))
    model = CLIPModel._from_config(config, attn_implementation="gated_attention")
    assert len(learned(model)) == 2
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["attn_implementation"] == "hf_attentiondrop.gated_attention"
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and again.config.text_config.attention_reweighting.layers == (0,)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_is_complete_and_on_its_own(name: str, clone: Any) -> None:
    model, batch = randomise(build_reweighted("llama", name)), inputs("llama")
    other = clone(model)
    assert torch.equal(logits(model, batch), logits(other, batch))
    before = copy.deepcopy(learned(model))
    other.train()(**batch).loss.backward()
    assert all(torch.equal(tensor, before[key]) for key, tensor in learned(model).items())


def test_resized_embeddings_leave_attention_alone(tmp_path: Path) -> None:
    model = randomise(build_reweighted("llama"))
    before = copy.deepcopy(learned(model))
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in learned(again).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_stays_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = randomise(build_reweighted("llama"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    built = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=dtype)
    moved = copy.deepcopy(model).to(dtype)
    halved = copy.deepcopy(model).half() if dtype == torch.float16 else copy.deepcopy(model).bfloat16()
    back = copy.deepcopy(halved).float()
    for other in (loaded, built, moved, halved, back):
        for key, tensor in learned(other).items():
            wanted = dtype if key.endswith("weight") and other is not back else torch.float32
            assert tensor.dtype == wanted
            if "average" in key and other is not built:
                assert torch.equal(tensor, learned(model)[key])
    before = learned(moved)["model.layers.0.self_attn.reweighting.average"].clone()
    moved.train()(**inputs("llama")).loss.backward()
    assert not torch.equal(learned(moved)["model.layers.0.self_attn.reweighting.average"], before)
    moved.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert all(torch.equal(tensor, learned(moved)[key]) for key, tensor in learned(again).items())
    empty = build_reweighted("llama").to("meta").to_empty(device="cpu")
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in learned(empty).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["affine_and_gate", "attention_sink"])
def test_autocast_trains(name: str, dtype: torch.dtype) -> None:
    model, batch = randomise(build_reweighted("llama", name)).train(), inputs("llama", padding="left")
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**batch).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", CONFIGS)
def test_learned_weights_can_be_float32_on_a_model_in_half_precision(name: str) -> None:
    model = randomise(build_reweighted("llama", name)).bfloat16().train()
    for module in model.modules():
        if isinstance(module, LearnedWeights):
            module.float()
    model(**inputs("llama")).loss.backward()
    assert all(p.grad.dtype == torch.float32 for key, p in model.named_parameters() if "reweighting" in key)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family: str, name: str, use_reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = randomise(build_reweighted(family, name)).train()
        if checkpointing:
            enable_checkpointing(model, use_reentrant)
        loss = model(**inputs(family)).loss
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters() if p.grad is not None], learned(model)))
    (loss, gradients, weights), (other_loss, other_gradients, other_weights) = results
    assert torch.equal(loss, other_loss) and len(gradients) == len(other_gradients)
    for gradient, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-7)
    assert all(torch.equal(tensor, other_weights[key]) for key, tensor in weights.items())


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "affine_scaled"),
        pytest.param("bert", "affine_and_gate", marks=pytest.mark.slow),
        pytest.param("marian", "attention_sink", marks=pytest.mark.slow),
    ],
)
def test_training_compiles_in_one_graph(family: str, name: str) -> None:
    require_one_graph(family)
    batch = inputs(family, padding=None if family == "vit" else "left")
    layers = ["encoder_layers", "decoder_layers"] if family == "marian" else ["num_hidden_layers"]
    model = randomise(build_reweighted(family, name, **dict.fromkeys(layers, 1))).train()
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        loss, other_loss = model(**batch).loss, compiled(**batch).loss
        loss.backward()
        other_loss.backward()
        torch.testing.assert_close(loss, other_loss, rtol=0, atol=1e-5)
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(other.get_parameter(key).grad, parameter.grad, rtol=0, atol=1e-4)
    for key, tensor in learned(model).items():
        torch.testing.assert_close(learned(other)[key], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compile_and_gradient_checkpointing_together_update_once() -> None:
    model, batch = randomise(build_reweighted("llama", num_hidden_layers=1)).train(), inputs("llama")
    other = copy.deepcopy(model)
    enable_checkpointing(other, use_reentrant=False)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager")
    model(**batch).loss.backward()
    compiled(**batch).loss.backward()
    for key, tensor in learned(model).items():
        torch.testing.assert_close(learned(other)[key], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("family", ["llama", "marian"])
def test_cached_decoding_equals_the_full_forward(family: str, num_beams: int, name: str) -> None:
    batch = inputs(family, padding="left", length=8)
    del batch["labels"]
    model = randomise(build_reweighted(family, name))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    options |= {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    generated = model.generate(**batch, **options)
    if num_beams == 1:
        if family == "llama":
            added = generated.sequences.shape[1] - batch["input_ids"].shape[1]
            mask = torch.cat([batch["attention_mask"], torch.ones(4, added, dtype=torch.long)], dim=1)
            positions = (mask.cumsum(dim=-1) - 1).clamp_min(0)
            full = model(input_ids=generated.sequences, attention_mask=mask, position_ids=positions).logits[:, -7:-1]
        else:
            full = model(**batch, decoder_input_ids=generated.sequences).logits[:, :-1]
        cached = torch.stack(generated.logits, dim=1)
        seen = cached.isfinite()
        torch.testing.assert_close(cached[seen], full[seen], rtol=0, atol=1e-5)
    uncached = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(generated.sequences, uncached.sequences)
    if num_beams > 1:
        torch.testing.assert_close(generated.sequences_scores, uncached.sequences_scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(generated.scores, uncached.scores, rtol=0, atol=1e-5)


def test_an_average_that_was_cast_raises() -> None:
    """FSDP's MixedPrecision(buffer_dtype=torch.bfloat16) also casts the average, unlike `.to()`."""
    model, batch = build_reweighted("bert"), inputs("bert")
    reweighting = next(module for module in model.modules() if hasattr(module, "average"))
    reweighting.average = reweighting.average.bfloat16()
    with pytest.raises(RuntimeError, match="must stay float32, but it was cast to torch.bfloat16"):
        model(**batch)


def test_returned_weights_are_affine() -> None:
    model, batch = randomise(build_reweighted("llama")), inputs("llama", padding="left")
    weights = model(**batch, output_attentions=True).attentions
    for layer, tensor in enumerate(weights):
        average = model.get_buffer(f"model.layers.{layer}.self_attn.reweighting.average")
        total = tensor.sum(dim=-1).transpose(1, 2)[batch["attention_mask"].bool()]
        torch.testing.assert_close(total, average.expand_as(total), rtol=0, atol=1e-5)


def test_attention_drop_acts_on_top_where_it_is_set() -> None:
    plain, dropped = (
        randomise(build_reweighted("bert", **kwargs)).train() for kwargs in ({}, {"attention_drop": {"p": 0.9}})
    )
    batch = inputs("bert")
    assert [row.calls for row in hf_attentiondrop.report(plain).rows] == [0, 0]
    outputs = [model(**batch).logits for model in (plain, dropped)]
    assert not torch.equal(*outputs)
    assert torch.equal(logits(copy.deepcopy(dropped), batch), logits(dropped, batch))
    assert [row.calls for row in hf_attentiondrop.report(plain).rows] == [0, 0]
    assert [row.calls for row in hf_attentiondrop.report(dropped).rows] == [1, 1]
    hf_attentiondrop.configure(plain, {"variant": "blur"})
    assert [row.applied for row in hf_attentiondrop.report(plain).rows] == ["blur sigma_max=1.0 width=5"] * 2


def test_the_report_shows_what_is_attached() -> None:
    config = GatedAttentionConfig(layers=[0])
    model = build("marian", attn_implementation="gated_attention", attention_reweighting=config)
    attached = [row.reweighting for row in hf_attentiondrop.report(model).rows]
    assert attached == ["init=identity", "", "init=identity", "init=identity", "", ""]
    text = str(hf_attentiondrop.report(build_reweighted("bert")))
    assert "reweighting" in text and "momentum=0.9" in text and "average=1.0000" in text
    assert "reweighting" not in str(hf_attentiondrop.report(build("bert")))


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[index] for name, tensor in inputs("bert", batch_size=8).items()}


def test_the_trainer_resumes_with_weights_and_average(tmp_path: Path) -> None:
    def train(folder: Path, checkpoint: Path | None = None) -> PreTrainedModel:
        model = build_reweighted("bert")
        arguments = TrainingArguments(
            str(folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=Samples())
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return model

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2")
    for key, tensor in learned(whole).items():
        torch.testing.assert_close(learned(resumed)[key], tensor, rtol=0, atol=1e-6)
    averages = [module.average for module in whole.modules() if isinstance(module, AffineScaling)]
    assert all(not torch.equal(average, torch.ones_like(average)) for average in averages)


def test_no_learned_module_is_a_linear_layer() -> None:
    model = build_reweighted("llama", "affine_and_gate")
    modules = [module for module in model.modules() if isinstance(module, LearnedWeights)]
    assert len(modules) == 4 and not any(isinstance(m, nn.Linear) for module in modules for m in module.modules())


def test_lora_trains_saves_and_reloads_the_learned_weights(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    build_reweighted("llama").save_pretrained(tmp_path / "base")

    def base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", modules_to_save=["reweighting"])
    model, batch = get_peft_model(base(), config), inputs("llama", padding="left")
    assert not any("reweighting" in name and "lora" in name for name, _ in model.named_parameters())
    assert any("reweighting" in name and p.requires_grad for name, p in model.named_parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    for _ in range(3):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: tensor for name, tensor in learned(model).items() if "modules_to_save" in name}
    assert len(weights) == 4
    assert all((tensor != (1.0 if "average" in name else 0.0)).any() for name, tensor in weights.items())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(logits(model, batch), logits(again, batch))
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), logits(model, batch), rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()) and torch.equal(logits(reloaded, batch), logits(merged, batch))


def test_the_config_alone_says_which_implementation(tmp_path: Path) -> None:
    build_reweighted("bert", "affine_and_gate").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config._attn_implementation == "affine_scaled" and config.attention_reweighting.gate
