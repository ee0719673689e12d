"""The attention function against the float64 definitions: output, gradients and weights, for every kind of mask."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.attention.modules import Place
from hf_attentiondrop.functional.hard import blocks
from hf_attentiondrop.integration.config_entries import perturbations_of
from hf_attentiondrop.integration.functions import attention_drop_forward
from hf_attentiondrop.methods import hard
from hf_attentiondrop.methods.method import Perturbation
from hf_attentiondrop.methods.state import ModuleState

from . import reference
from .cases import CASES, CASES_BY_NAME, AttentionCase


VARIANTS = {
    "hard_mask": AttentionDropConfig(variant="hard", p=0.5, k=3),
    "hard_zero": AttentionDropConfig(variant="hard", p=0.5, k=3, fill="zero"),
    "hard_share": AttentionDropConfig(variant="hard", p=0.7, k=0.3),
    "blur": AttentionDropConfig(variant="blur", sigma_max=2.0, width=5),
}
SOFTCAP = 2.0
SINKS = torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=torch.float64)


def make_module(case: AttentionCase, drop: Perturbation, module_class: type[nn.Module] = nn.Module) -> nn.Module:
    """An attention module with what the attention function reads from one."""
    module = module_class.__new__(module_class)
    nn.Module.__init__(module)
    module.is_causal = case.is_causal
    module.num_key_value_groups = case.heads // case.kv_heads
    kind = "cross" if case.is_cross else "encoder_self"
    module.config = PreTrainedConfig(attention_drop=replace(drop, attentions=[kind]))
    module.config._attn_implementation = "attentiondrop"
    module.attention_drop_state = ModuleState(module.config, Place(kind, "layers", 0, 1))
    module.attention_drop_state.configure(perturbations_of(module.config))
    return module


def position_bias(case: AttentionCase) -> torch.Tensor | None:
    if not case.position_bias:
        return None
    generator = torch.Generator().manual_seed(11)
    return torch.randn(1, case.heads, case.queries, case.keys, dtype=torch.float64, generator=generator)


def expected(
    case: AttentionCase,
    drop: Perturbation,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, consuming random numbers in the order in which the library draws them."""
    visible, biases = case.visible, [bias for bias in (position_bias(case), case.bias) if bias is not None]
    scores = reference.final_scores(query, key, scaling=0.3, softcap=softcap)
    if drop.variant == "blur":
        sigma = drop.sigma_max * torch.rand(case.batch_size, dtype=torch.float64)
        scores = reference.blurred_scores(scores, case.own_view, sigma, drop.width)
        if case.name == "static_prefill":  # SDPA leaves the empty tail of a static cache out before it draws dropout.
            scores, visible, value = (t[..., : case.queries] for t in (scores, visible, value.mT))
            value = value.mT
    for bias in biases:
        scores = scores + bias
    if drop.variant == "hard":
        num_ranks = min(drop.k, case.keys) if drop.k >= 1 else math.ceil(drop.k * case.keys)
        uniform = torch.rand(*scores.shape[:-1], num_ranks)
        hits = reference.hits(scores.detach(), visible, uniform, p=drop.p, k=drop.k, fill=drop.fill)
        scores, visible = reference.hit_scores(scores, visible, hits, drop.fill)
    return reference.attend(scores, value, visible, sinks=sinks, dropout=dropout)


def with_gradients(function: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    torch.manual_seed(3)
    output = function(*leaves)
    direction = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(13))
    output.backward(direction)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-10) -> None:
    for name, a, b in zip(("output", "query", "key", "value"), found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hard in blocks, of which even the short sequences here need several, in both directions."""
    monkeypatch.setattr(hard, "FEW_SCORES", 0)
    monkeypatch.setattr(blocks, "QUERIES_PER_BLOCK", 4)
    monkeypatch.setattr(blocks, "SCORES_PER_BLOCK", 2 * 4 * 9)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_definition_forward_and_backward(case: AttentionCase, variant: str, dropout: float) -> None:
    check_against_the_definition(case, VARIANTS[variant], dropout)


@pytest.mark.parametrize("variant", ["hard_mask", "hard_zero", "hard_share"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_blocks_equal_the_definition(case: AttentionCase, variant: str, small_blocks: None) -> None:
    check_against_the_definition(case, VARIANTS[variant], dropout=0.0)


def test_long_sequences_run_in_blocks_and_what_blocks_cannot_carry_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = hard.hard_attention
    monkeypatch.setattr(hard, "hard_attention", lambda *a, **k: calls.append(a[0].shape[-2]) or original(*a, **k))
    drop = VARIANTS["hard_mask"]
    for name, length, options in [
        ("none", 256, {}),
        ("none", 257, {}),
        ("none", 258, {"dropout": 0.1}),
        ("none", 259, {"position_bias": torch.zeros(1, 4, 259, 259)}),
        ("causal_without_mask", 260, {}),
        ("none", 261, {"attention_mask": torch.zeros(1, 1, 261, 261)}),
        ("none", 262, {"attention_mask": torch.zeros(1, 4, 262, 262, requires_grad=True)}),
    ]:
        case = replace(CASES_BY_NAME[name], queries=length, keys=length)
        options = {"attention_mask": None, **options}
        attention_drop_forward(make_module(case, drop), *case.tensors(torch.float32), **options)
    assert calls == [257, 258, 260, 261]


@pytest.mark.parametrize("fill", ["hard_mask", "hard_zero"])
def test_dropout_in_blocks_is_that_of_the_module(fill: str, small_blocks: None) -> None:
    """The draws are another's than the definition's, and their mean is the same."""
    case = CASES_BY_NAME["float_with_bias"]
    drop = replace(VARIANTS[fill], p=1.0, k=1)  # Then only dropout is left to chance.
    module, tensors = make_module(case, drop), case.tensors()
    draws = torch.stack(
        [attention_drop_forward(module, *tensors, case.mask(), dropout=0.5, scaling=0.3)[0] for _ in range(200)]
    )
    wanted, _ = expected(case, drop, *tensors)
    assert draws.std(dim=0).amax() > 0.1
    assert ((draws.mean(dim=0) - wanted).abs() <= 5 * draws.std(dim=0) / len(draws) ** 0.5 + 1e-4).all()


def check_against_the_definition(case: AttentionCase, drop: Perturbation, dropout: float) -> None:
    module = make_module(case, drop)

    def library(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        bias = position_bias(case)
        extras = {} if bias is None else {"position_bias": bias}
        return attention_drop_forward(module, query, key, value, case.mask(), dropout=dropout, scaling=0.3, **extras)[
            0
        ]

    def definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return expected(case, drop, query, key, value, dropout=dropout)[0]

    tensors = case.tensors()
    assert_same(with_gradients(library, *tensors), with_gradients(definition, *tensors))
    assert module.attention_drop_state.calls == 1


@pytest.mark.parametrize(
    ("module_class", "extras", "variant"),
    [
        (Gemma2Attention, {"softcap": SOFTCAP}, "hard_mask"),
        (Gemma2Attention, {"softcap": SOFTCAP}, "hard_zero"),
        (GptOssAttention, {"s_aux": SINKS}, "hard_mask"),
        (GptOssAttention, {"s_aux": SINKS}, "hard_zero"),
        (GptOssAttention, {"s_aux": SINKS}, "blur"),
    ],
)
@pytest.mark.parametrize("name", ["causal_without_mask", "padding_left", "grouped_queries_padding", "float_with_bias"])
def test_softcap_and_sinks_are_part_of_the_scores(
    name: str, module_class: type[nn.Module], extras: dict[str, Any], variant: str
) -> None:
    case, drop = CASES_BY_NAME[name], VARIANTS[variant]
    module = make_module(case, drop, module_class)
    module.sinks = SINKS

    def library(*tensors: torch.Tensor) -> torch.Tensor:
        return attention_drop_forward(module, *tensors, case.mask(), scaling=0.3, **extras)[0]

    def definition(*tensors: torch.Tensor) -> torch.Tensor:
        return expected(case, drop, *tensors, softcap=extras.get("softcap"), sinks=extras.get("s_aux"))[0]

    tensors = case.tensors()
    # Gemma's and gpt-oss's own eager functions take their softmax in float32.
    tolerance = 1e-10 if variant == "hard_zero" else 2e-6
    assert_same(with_gradients(library, *tensors), with_gradients(definition, *tensors), tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "name", ["none", "causal_without_mask", "padding_left", "blind_float", "masks_per_head_grouped"]
)
def test_returned_weights_are_the_ones_used(name: str, variant: str) -> None:
    case, drop = CASES_BY_NAME[name], VARIANTS[variant]
    module = make_module(case, drop, Gemma2Attention)
    query, key, value = case.tensors()
    torch.manual_seed(3)
    output, weights = attention_drop_forward(
        module, query, key, value, case.mask(), scaling=0.3, output_attentions=True
    )
    torch.manual_seed(3)
    wanted_output, wanted_weights = expected(case, drop, query, key, value)
    torch.testing.assert_close(weights, wanted_weights, rtol=0, atol=2e-6)
    torch.testing.assert_close(output, wanted_output, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_half_precision_is_finite_and_close(case: AttentionCase, variant: str, dtype: torch.dtype) -> None:
    check_half_precision(case, variant, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["hard_mask", "hard_zero"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_blocks_in_half_precision(case: AttentionCase, variant: str, dtype: torch.dtype, small_blocks: None) -> None:
    check_half_precision(case, variant, dtype)


def check_half_precision(case: AttentionCase, variant: str, dtype: torch.dtype) -> None:
    module = make_module(case, VARIANTS[variant])
    bias, mask = position_bias(case), case.mask()
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.clamp_min(torch.finfo(dtype).min) if mask.min() > -torch.inf else mask
        mask = mask.to(dtype)
    extras = {} if bias is None else {"position_bias": bias.to(dtype)}

    def library(*tensors: torch.Tensor) -> torch.Tensor:
        return attention_drop_forward(module, *tensors, mask, scaling=0.3, **extras)[0]

    results = with_gradients(library, *case.tensors(dtype))
    assert all(tensor.isfinite().all() for tensor in results)
    blind = ~case.visible.any(dim=-1).transpose(1, 2)
    assert (results[0][blind] == 0).all()
    assert (results[1].transpose(1, 2)[blind] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_evaluation_is_sdpa_bit_for_bit(case: AttentionCase) -> None:
    module = make_module(case, VARIANTS["hard_mask"]).eval()
    query, key, value = case.tensors(torch.float32)
    mask, bias = case.mask(), position_bias(case)
    mask = mask.float() if mask is not None and mask.dtype != torch.bool else mask
    extras = {} if bias is None else {"position_bias": bias.float()}
    state = torch.get_rng_state()
    output, weights = attention_drop_forward(module, query, key, value, mask, scaling=0.3, **extras)
    wanted, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3, **extras)
    assert torch.equal(output, wanted)
    assert weights is None and module.attention_drop_state.calls == 0
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "drop", [AttentionDropConfig(p=0.0), AttentionDropConfig(variant="blur", sigma_max=0.0)], ids=["p", "sigma"]
)
def test_nothing_is_drawn_or_counted_when_the_rate_is_zero(drop: Perturbation) -> None:
    case = CASES_BY_NAME["causal_without_mask"]
    module, state = make_module(case, drop), torch.get_rng_state()
    training = attention_drop_forward(module.train(), *case.tensors(), None, scaling=0.3)[0]
    evaluation = attention_drop_forward(module.eval(), *case.tensors(), None, scaling=0.3)[0]
    assert torch.equal(training, evaluation) and torch.equal(state, torch.get_rng_state())
    assert module.attention_drop_state.calls == 0


def test_blur_refuses_a_softcap() -> None:
    case = CASES_BY_NAME["none"]
    module = make_module(case, VARIANTS["blur"], Gemma2Attention)
    with pytest.raises(ValueError, match='caps its scores.*variant="hard"'):
        attention_drop_forward(module, *case.tensors(), None, softcap=SOFTCAP)


@pytest.mark.parametrize("name", ["indices", "block_indices", "cu_seq_lens_q", "cache"])
@pytest.mark.parametrize("training", [True, False])
def test_an_argument_that_would_be_ignored_is_refused_by_name(name: str, training: bool) -> None:
    case = CASES_BY_NAME["none"]
    module = make_module(case, VARIANTS["hard_mask"]).train(training)
    with pytest.raises(ValueError, match=f"passes `{name}`"):
        attention_drop_forward(module, *case.tensors(), None, **{name: torch.arange(3)})


def test_packing_is_taken_from_the_mask_and_refused_without_one() -> None:
    case = CASES_BY_NAME["packed"]
    module, lengths = make_module(case, VARIANTS["hard_mask"]), {"cu_seq_lens_q": torch.tensor([0, 4, 6, 9])}
    results = []
    for extras in ({}, lengths):
        torch.manual_seed(0)
        results.append(attention_drop_forward(module, *case.tensors(), case.mask(), **extras)[0])
    assert torch.equal(*results)
    attention_drop_forward(module, *case.tensors(), None, cu_seq_lens_q=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="passes `cu_seq_lens_q`.*position_ids that start anew"):
        attention_drop_forward(module, *case.tensors(), None, **lengths)


def test_a_module_outside_of_a_model_is_refused_in_training() -> None:
    case = CASES_BY_NAME["none"]
    module = make_module(case, VARIANTS["hard_mask"])
    del module.attention_drop_state
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        attention_drop_forward(module, *case.tensors(), None)
