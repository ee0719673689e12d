"""Attention maps equal the float64 definitions, take part in the outputs as they should, and change nothing."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_attentiondrop import DropKey, HardMasking, configure, report
from hf_attentiondrop.evaluation.maps import AttentionMaps, attention_maps
from hf_attentiondrop.integration.implementations import FUNCTIONS
from hf_attentiondrop.methods.learned import LearnedMethod
from tests import reference
from tests.cases import AttentionCase
from tests.methods import Definition, examples, one_example_each, reference_of
from tests.models import build, inputs


# Family, kind of attention, and the side that is padded.
CALLS = [
    ("bert", "encoder_self", "right"),
    ("llama", "decoder_self", "left"),
    ("llama", "decoder_self", None),
    ("marian", "encoder_self", "right"),
    ("marian", "decoder_self", "right"),
    ("marian", "cross", "right"),
    ("vit", "encoder_self", None),
]
SAMPLE = 3  # With padding of three tokens.


class Recorder:
    """Passes calls of an attention function on and keeps them."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, []

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = self.function(module, *args, **kwargs)
        if kwargs.get("output_attentions"):
            self.calls.append((args, kwargs, result))
        return result


def batch_of(family: str, padding: str | None) -> dict[str, Tensor]:
    batch = inputs(family, padding=padding)
    if family == "marian":
        batch["decoder_input_ids"] = batch["labels"]
        batch["decoder_attention_mask"] = (torch.arange(8) < torch.tensor([8, 8, 8, 6])[:, None]).long()
    return batch


def definition_of(args: tuple[Any, ...], kwargs: dict[str, Any], is_causal: bool, kind: str) -> Definition:
    """The recorded call for the references, in float64."""
    query, key, value, mask = args
    case = AttentionCase(
        "recorded",
        lambda: mask,
        queries=query.shape[2],
        keys=key.shape[2],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        is_causal=is_causal,
        is_cross=kind == "cross",
        batch_size=len(query),
    )
    scores = reference.final_scores(query, key, scaling=kwargs["scaling"])
    return Definition(case, scores, 0.0, case.visible, value)


def cut(maps: AttentionMaps, weights: Tensor) -> Tensor:
    return weights[SAMPLE][:, maps.queries][:, :, maps.keys].float()


@pytest.mark.parametrize("name", one_example_each())
@pytest.mark.parametrize(("family", "kind", "padding"), CALLS)
def test_maps_equal_the_definition(
    family: str, kind: str, padding: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    perturbation = one_example_each()[name]
    spread = {"init_std" if family == "marian" else "initializer_range": 0.5}  # Otherwise attention is uniform.
    model = build(family, attention_drop=perturbation.to_dict(), **spread).double()
    recorder = Recorder(FUNCTIONS["attentiondrop"])
    monkeypatch.setitem(FUNCTIONS, "attentiondrop", recorder)
    batch = batch_of(family, padding)
    maps = attention_maps(model, batch, kind=kind, layer=1, sample=SAMPLE, seed=5)
    (args, kwargs, (output, _)), (_, _, (perturbed_output, _)) = recorder.calls
    module = model.get_submodule(maps.module)
    definition = definition_of(args, kwargs, kind == "decoder_self", kind)
    expected = cut(maps, definition.attend()[1])
    torch.testing.assert_close(maps.weights, expected, rtol=0, atol=1e-6)
    torch.manual_seed(5)
    drawn = reference_of(perturbation)(perturbation, definition).attend()[1]
    torch.testing.assert_close(maps.perturbed, cut(maps, drawn), rtol=0, atol=1e-6)
    assert maps.difference.abs().max() > 0.01
    assert torch.equal(maps.difference, maps.perturbed - maps.weights)

    assert maps.weights.sum(-1).numpy() == pytest.approx(1.0, abs=1e-6)
    if name == "hard":
        masked = maps.perturbed == 0
        kept = maps.weights.masked_fill(masked, 0.0)
        assert masked.any()
        torch.testing.assert_close(maps.perturbed, kept / kept.sum(-1, keepdim=True), rtol=0, atol=1e-6)
    value = args[2].repeat_interleave(len(maps.weights) // args[2].shape[1], dim=1)[SAMPLE][:, maps.keys]
    for weights, whole in ((maps.weights, output), (maps.perturbed, perturbed_output)):
        found = (weights.double() @ value).transpose(0, 1)
        torch.testing.assert_close(found, whole[SAMPLE][maps.queries], rtol=0, atol=1e-6)

    lengths = {"encoder_self": (7, 7), "decoder_self": (6, 6), "cross": (6, 7)}[kind]
    if family == "llama":
        lengths = (10, 10) if padding is None else (7, 7)
        assert maps.weights.triu(1).eq(0).all()
    lengths = (17, 17) if family == "vit" else lengths
    assert maps.weights.shape == (4, *lengths) and maps.weights.dtype == torch.float32
    assert maps.keys[0] == (3 if padding == "left" else 0)
    assert (maps.kind, maps.layer) == (kind, 1) and maps.module in {row.name for row in report(model).rows}
    assert module.attention_drop_state.place.kind == kind and maps.applied.startswith(name)
    assert maps.grid == ((4, 4) if family == "vit" else None)


@pytest.mark.parametrize("is_perturbed", [False, True], ids=["alone", "with_hard"])
@pytest.mark.parametrize("name", examples(LearnedMethod))
def test_maps_of_learned_methods(name: str, is_perturbed: bool) -> None:
    method = examples(LearnedMethod)[name]
    entry = {"attention_drop": {"p": 0.5}} if is_perturbed else {}
    model = build("llama", attn_implementation=method.method, attention_reweighting=method, **entry)
    for parameter in model.model.layers[1].self_attn.reweighting.parameters():
        nn.init.normal_(parameter)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = inputs("llama", padding="left")
    maps = attention_maps(model.train(), batch, sample=SAMPLE)
    weights = model.eval()(**batch, output_attentions=True).attentions[1]
    torch.testing.assert_close(maps.weights, cut(maps, weights))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (maps.perturbed is not None) == is_perturbed == (maps.difference is not None)
    if is_perturbed:
        assert maps.difference.abs().max() > 0.01


def snapshot(model: nn.Module) -> dict[str, Any]:
    states = [module.attention_drop_state for module in model.modules() if hasattr(module, "attention_drop_state")]
    return {
        "modes": [module.training for module in model.modules()],
        "calls": [int(state.calls) for state in states],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "config": model.config.to_dict() | {"attn": model.config._attn_implementation},
        "random": torch.get_rng_state().tolist(),
        "buffers": [buffer.tolist() for buffer in model.buffers()],
        "interface": [ALL_ATTENTION_FUNCTIONS[name] for name in FUNCTIONS],
    }


def test_nothing_changes_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert", attn_implementation="affine_scaled", attention_drop={"p": 0.5}).train()
    model.bert.encoder.layer[0].eval()
    before = snapshot(model)
    batch = inputs("bert", padding="right")
    first, second, other = (attention_maps(model, batch, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.perturbed, second.perturbed) and not torch.equal(first.perturbed, other.perturbed)
    assert snapshot(model) == before

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(HardMasking, "attend", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        attention_maps(model, batch)
    assert snapshot(model) == before


def test_the_default_layer_is_the_last_perturbed_one() -> None:
    model = build("marian")
    batch = batch_of("marian", None)
    assert attention_maps(model, batch).module == "model.decoder.layers.1.self_attn"
    configure(model, DropKey(p=0.5, layers=[0], attentions=["encoder_self", "cross"]))
    assert attention_maps(model, batch).module == "model.encoder.layers.0.self_attn"
    assert attention_maps(model, batch, kind="cross").module == "model.decoder.layers.0.encoder_attn"
    assert attention_maps(model, batch, "model.decoder.layers.1.self_attn").perturbed is None
    configure(model, DropKey(p=0.0))
    assert attention_maps(model, batch).module == "model.decoder.layers.1.self_attn"
    assert attention_maps(model, batch, layer=-2, kind="encoder_self").layer == 0


def test_compiled_and_half_precision_models() -> None:
    model, batch = build("llama"), inputs("llama")
    plain = attention_maps(model, batch)
    compiled = torch.compile(model, backend="eager")
    compiled(**batch)
    assert torch.equal(attention_maps(compiled, batch).perturbed, plain.perturbed)
    torch.testing.assert_close(attention_maps(model.bfloat16(), batch).weights, plain.weights, rtol=0.1, atol=0.02)


BAD = {
    "stock": ({"model": "sdpa"}, ValueError, 'model.set_attn_implementation("attentiondrop") first'),
    "batches": ({"batch": [{}]}, TypeError, "must be one batch, a mapping"),
    "kind": ({"kind": "self"}, ValueError, "`kind` must be one of"),
    "no_kind": ({"kind": "cross"}, ValueError, "selects no attention of BertForSequenceClassification"),
    "no_layer": ({"layer": 2}, ValueError, "layer=2, kind=None selects no attention"),
    "layer_type": ({"layer": 0.5}, ValueError, "`layer` must be the number of a layer"),
    "sample": ({"sample": 4}, ValueError, "which has 4, got 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    given, error, message = BAD[name]
    given = {"batch": inputs("bert"), **given}
    model = build("bert", attn_implementation=given.pop("model", "attentiondrop"))
    with pytest.raises(error, match=re.escape(message)):
        attention_maps(model, **given)


def test_windows_ambiguity_and_broken_weights() -> None:
    with pytest.raises(ValueError, match=r"selects model\.encoder.*Pass the kind"):
        attention_maps(build("marian"), batch_of("marian", None), layer=0)
    model = build("bert")
    nn.init.constant_(model.bert.encoder.layer[1].attention.self.query.weight, torch.nan)
    with pytest.raises(ValueError, match="weights that are not finite"):
        attention_maps(model, inputs("bert"))
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    swin = SwinForImageClassification._from_config(config, attn_implementation="attentiondrop")
    with pytest.raises(ValueError, match="Expected weights of 1 samples from .* within windows"):
        attention_maps(swin, {"pixel_values": torch.rand(1, 3, 32, 32)}, layer=0)
