"""The sweep: every architecture either passes all tests below, or raises an error when it is built.

All other dropout is 0 here, so any randomness or difference in training comes from AttentionDrop.
"""

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.testing import assert_close
from transformers import PreTrainedModel

from docs.generate_support_table import support_document
from hf_attentiondrop import AffineScaledConfig, configure, report
from hf_attentiondrop.methods.method import Perturbation

from .architectures import ABSENT, ARCHITECTURES, SUPPORTED, UNSUPPORTED, Inputs, build, model_class, tiny_inputs
from .methods import idle_examples, one_example_each


EVERYWHERE = {"attentions": ("encoder_self", "decoder_self", "cross")}
PERTURBATIONS = one_example_each()
# The only ones that can let a token feel another one.
BETWEEN_TOKENS = [perturbation for perturbation in PERTURBATIONS.values() if not perturbation.scales_output]
IDLE = [replace(idle, **EVERYWHERE) for idle in idle_examples()]

# Eager attention and SDPA of stock Transformers differ by up to 3e-6 here.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}

# Their scores are softcapped, so blurring keys would not blur scores.
SOFTCAPPED = ["gemma2", "t5gemma", "vaultgemma"]
# Models whose modules call attention more than once per forward: shared layers, differential attention, recurrence,
# one call per image.
REPEATED = {
    "albert": {2},
    "diffllama": {2},
    "hrm_text": {2, 6},
    "qwen2_vl": {1, 3},
    "qwen2_5_vl": {1, 3},
    "qwen3_vl": {1, 3},
}
# Arguments by which model files pass the key sequence of cross-attention.
OTHER_STATES = ("key_value_states", "encoder_hidden_states", "cross_attention_states", "context")

# They silently accept any implementation name.
SILENT = """
    mpnet longformer big_bird led bloom mpt blip convbert rembert luke nystromformer roformer xglm
    deberta deberta-v2 swinv2 wavlm xlnet reformer prophetnet
"""

# Their attention modules do not pass keyword arguments on, so hidden states do not reach the attention function.
NOT_REWEIGHTED = "aimv2 gemma3 idefics2 idefics3 paligemma siglip siglip2 videomae".split()
# Their vision towers attend within segments of a sequence: the first forward pass raises an error.
STOPPED_REWEIGHTING = "qwen2_vl qwen2_5_vl qwen3_vl".split()
REWEIGHTED = [name for name in SUPPORTED if name not in NOT_REWEIGHTED + STOPPED_REWEIGHTING]
# Some of their weights get no gradient: queries that are zero at first, and towers whose last layer is not used.
PARTLY_AT_REST = "blip-2 conditional_detr detr llava maskformer mllama".split()


def _case(name: str, *values: Any) -> Any:
    version = transformers.__version__
    marks = [pytest.mark.skip(reason=f"absent: Transformers {version} has no {name}")] if name in ABSENT else []
    return pytest.param(name, *values, marks=marks, id="-".join([name, *(value.variant for value in values)]))


def _cases(names: list[str]) -> Any:
    return pytest.mark.parametrize("name", [_case(name) for name in names])


def _variants(names: list[str], perturbations: Iterable[Perturbation] = tuple(PERTURBATIONS.values())) -> Any:
    cases = [
        _case(name, drop)
        for name in names
        for drop in perturbations
        if drop.variant != "blur" or name not in SOFTCAPPED
    ]
    return pytest.mark.parametrize(("name", "drop"), cases)


def _run(model: PreTrainedModel, inputs: Inputs, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every float tensor that a model returns, with only the real tokens of those that follow the text."""
    torch.manual_seed(seed)
    with torch.no_grad():
        outputs = dict(_float_tensors("", model(**inputs)))
    mask = inputs.get("attention_mask")
    is_text = mask is not None
    return {
        key: value[mask.bool()] if is_text and value.shape[:2] == mask.shape else value
        for key, value in outputs.items()
    }


def _float_tensors(key: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _float_tensors(f"{key}.{name}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _float_tensors(f"{key}.{index}", item)


def _tokens(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """What a model says of each token, `(B, length, width)`."""
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def _differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(first[key], second[key]) for key in first)


def _trained_with(name: str, drop: Perturbation) -> PreTrainedModel:
    return build(name, "attentiondrop", attention_drop=drop).train()


def test_the_sweep_does_not_shrink() -> None:
    assert sum(architecture.supported for architecture in ARCHITECTURES.values()) >= 175
    assert len(ARCHITECTURES) >= 233
    assert set(SILENT.split()) <= set(UNSUPPORTED)


@pytest.mark.slow
def test_the_documented_table_is_up_to_date() -> None:
    document = (Path(__file__).parents[1] / "docs" / "supported_models.md").read_text(encoding="utf-8")
    version = Version(transformers.__version__)
    if f"with Transformers {version.major}.{version.minor}." not in document:
        pytest.skip("absent: the table is of another version of Transformers")
    assert document == support_document(), (
        "docs/supported_models.md is out of date: run `python -m docs.generate_support_table`"
    )


@_cases(UNSUPPORTED)
def test_unsupported_models_raise_when_built(name: str) -> None:
    with pytest.raises(ValueError, match=f"{model_class(name).__name__}.*attention"):
        build(name, "attentiondrop")


@_cases("bert layoutlm markuplm splinter".split())
def test_the_attention_of_a_text_encoder_is_called_so(name: str) -> None:
    """Though those of LayoutLM, MarkupLM and Splinter do not say that they are not causal."""
    assert {row.kind for row in report(build(name, "attentiondrop")).rows} == {"encoder_self"}


@_cases(SUPPORTED)
def test_evaluation_equals_stock_transformers(name: str) -> None:
    stock, model = build(name).eval(), build(name, "attentiondrop", attention_drop=PERTURBATIONS["hard"]).eval()
    inputs = tiny_inputs(name, model)
    outputs = _run(model, inputs)
    # Before Transformers 5.21 SDPA silently ignores the softcap.
    is_faithful = name not in SOFTCAPPED or Version(transformers.__version__) >= Version("5.21")
    if stock.config._attn_implementation == "sdpa" and is_faithful:
        assert not _differ(_run(stock, inputs), outputs)
    assert_close(outputs, _run(build(name, "eager").eval(), inputs), **TOLERANCE)
    assert all(row.calls == 0 for row in report(model).rows)


@_cases(SUPPORTED)
def test_training_without_effect_equals_eager_training(name: str) -> None:
    """Perturbed attention still applies every kind of bias, softcap, sink and mask."""
    model = _trained_with(name, PERTURBATIONS["hard"])
    inputs = tiny_inputs(name, model)
    expected = _run(build(name, "eager").train(), inputs)
    for drop in IDLE:
        if drop.variant == "blur" and name in SOFTCAPPED:
            with pytest.raises(ValueError, match="blur.*softcap"):
                configure(model, drop)
        else:
            configure(model, drop)
            assert_close(_run(model, inputs), expected, **TOLERANCE)


@_cases(SOFTCAPPED)
def test_blur_of_softcapped_scores_raises_when_built(name: str) -> None:
    with pytest.raises(ValueError, match="blur.*softcap"):
        _trained_with(name, PERTURBATIONS["blur"])


@_variants(SUPPORTED)
def test_training_perturbs_every_attention(name: str, drop: Perturbation) -> None:
    model = _trained_with(name, drop)
    inputs = tiny_inputs(name, model)
    outputs = _run(model, inputs)
    assert {row.calls for row in report(model).rows} == REPEATED.get(name, {1})
    assert all(torch.isfinite(value).all() for value in outputs.values())
    assert _differ(outputs, _run(build(name, "eager").train(), inputs))
    assert not _differ(outputs, _run(model, inputs))
    assert _differ(outputs, _run(model, inputs, seed=1))


@_variants([name for name in SUPPORTED if ARCHITECTURES[name].causal], BETWEEN_TOKENS)
def test_tokens_do_not_depend_on_later_tokens(name: str, drop: Perturbation) -> None:
    model = _trained_with(name, drop)
    inputs = tiny_inputs(name, model)
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    changed = inputs[key].clone()
    changed[:, -2:] = 95
    before, after = (_tokens(model, {**inputs, key: ids}) for ids in (inputs[key], changed))
    real = inputs["attention_mask"].bool() if key == "input_ids" else torch.ones_like(changed, dtype=torch.bool)
    assert_close(after[:, :-2][real[:, :-2]], before[:, :-2][real[:, :-2]], **TOLERANCE)
    assert not torch.equal(after[:, -2:], before[:, -2:])


@_variants([name for name in SUPPORTED if ARCHITECTURES[name].padded], BETWEEN_TOKENS)
def test_tokens_do_not_depend_on_padding(name: str, drop: Perturbation) -> None:
    model = _trained_with(name, drop)
    inputs = tiny_inputs(name, model)
    real = inputs["attention_mask"].bool()
    repadded = inputs["input_ids"].where(real, 7)
    before, after = (_tokens(model, {**inputs, "input_ids": ids}) for ids in (inputs["input_ids"], repadded))
    if "decoder_input_ids" not in inputs:
        before, after = before[real], after[real]
    assert_close(after, before, **TOLERANCE)


def _reweighted(name: str) -> PreTrainedModel:
    return build(name, "affine_scaled", attention_reweighting=AffineScaledConfig(gate=True))


@_cases(REWEIGHTED)
def test_reweighting_starts_as_the_base_and_learns(name: str) -> None:
    base, model = build(name, "attentiondrop").eval(), _reweighted(name).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    inputs = tiny_inputs(name, model)
    assert not _differ(_run(base, inputs), _run(model, inputs))
    outputs = _float_tensors("", model.train()(**inputs))
    sum(value.square().sum() for _, value in outputs if value.requires_grad).backward()
    learned = {key: weight.grad for key, weight in model.named_parameters() if "reweighting" in key}
    alive = {key for key, gradient in learned.items() if gradient is not None and gradient.any()}
    assert len({key.partition(".reweighting")[0] for key in learned}) == len(report(model).rows)
    assert alive and (alive == set(learned) or name in PARTLY_AT_REST)


@_cases(NOT_REWEIGHTED)
def test_models_that_drop_keyword_arguments_raise_when_built(name: str) -> None:
    with pytest.raises(ValueError, match="does not pass its keyword arguments on"):
        _reweighted(name)


@_cases(STOPPED_REWEIGHTING)
def test_models_that_attend_within_segments_raise_in_the_first_forward(name: str) -> None:
    model = _reweighted(name)
    with pytest.raises((ValueError, RuntimeError), match="learned weights"):
        model(**tiny_inputs(name, model))


@_cases(SUPPORTED)
def test_kinds_match_the_calls(name: str) -> None:
    """Cross-attention is attention with keys of another sequence, and generative models have a decoder."""
    model = _trained_with(name, PERTURBATIONS["hard"])
    given_other_states = {}

    def look(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        arguments |= arguments.get("kwargs", {})
        given_other_states[module] = any(arguments.get(key) is not None for key in OTHER_STATES)

    rows = report(model).rows
    for row in rows:
        model.get_submodule(row.name).register_forward_pre_hook(look, with_kwargs=True)
    _run(model, tiny_inputs(name, model))
    assert {row.name: row.kind == "cross" for row in rows} == {
        row.name: given_other_states[model.get_submodule(row.name)] for row in rows
    }
    # CLIP's text tower is an encoder, though a causal one; PaliGemma's prefix sees itself both ways.
    if ARCHITECTURES[name].causal and name not in ("clip_text_model", "paligemma"):
        assert "decoder_self" in {row.kind for row in rows}
