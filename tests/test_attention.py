"""The attention function matches the float64 references in output, gradients and weights, for every kind of mask."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.integration.functions import attention_drop_forward
from hf_attentiondrop.methods.method import Perturbation

from .attention import (
    assert_same,
    check_against_the_definition,
    check_half_precision,
    expected,
    make_module,
    position_bias,
    with_gradients,
)
from .cases import CASES, CASES_BY_NAME, AttentionCase
from .methods import examples


EXAMPLES = examples()
SOFTCAP = 2.0
SINKS = torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("variant", EXAMPLES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_definition_forward_and_backward(case: AttentionCase, variant: str, dropout: float) -> None:
    check_against_the_definition(case, [EXAMPLES[variant]], dropout)


@pytest.mark.parametrize(
    ("module_class", "extras", "variant"),
    [
        (Gemma2Attention, {"softcap": SOFTCAP}, "hard_mask"),
        (Gemma2Attention, {"softcap": SOFTCAP}, "hard_zero"),
        (type("OwnAttention", (Gemma2Attention,), {"__module__": __name__}), {"softcap": SOFTCAP}, "hard_mask"),
        (GptOssAttention, {"s_aux": SINKS}, "hard_mask"),
        (GptOssAttention, {"s_aux": SINKS}, "hard_zero"),
        (GptOssAttention, {"s_aux": SINKS}, "blur"),
    ],
)
@pytest.mark.parametrize("name", ["causal_without_mask", "padding_left", "grouped_queries_padding", "float_with_bias"])
def test_softcap_and_sinks_are_part_of_the_scores(
    name: str, module_class: type[nn.Module], extras: dict[str, Any], variant: str
) -> None:
    case, drop = CASES_BY_NAME[name], EXAMPLES[variant]
    module = make_module(case, drop, module_class)
    module.sinks = SINKS

    def library(*tensors: torch.Tensor) -> torch.Tensor:
        return attention_drop_forward(module, *tensors, case.mask(), scaling=0.3, **extras)[0]

    def definition(*tensors: torch.Tensor) -> torch.Tensor:
        return expected(case, [drop], *tensors, softcap=extras.get("softcap"), sinks=extras.get("s_aux"))[0]

    tensors = case.tensors()
    # The eager functions of Gemma and gpt-oss compute the softmax in float32.
    tolerance = 1e-10 if variant == "hard_zero" else 2e-6
    assert_same(with_gradients(library, *tensors), with_gradients(definition, *tensors), tolerance)


@pytest.mark.parametrize("variant", EXAMPLES)
@pytest.mark.parametrize(
    "name", ["none", "causal_without_mask", "padding_left", "fully_masked_float", "masks_per_head_grouped"]
)
def test_returned_weights_are_the_ones_used(name: str, variant: str) -> None:
    case, drop = CASES_BY_NAME[name], EXAMPLES[variant]
    module = make_module(case, drop, Gemma2Attention)
    query, key, value = case.tensors()
    torch.manual_seed(3)
    output, weights = attention_drop_forward(
        module, query, key, value, case.mask(), scaling=0.3, output_attentions=True
    )
    torch.manual_seed(3)
    wanted_output, wanted_weights = expected(case, [drop], query, key, value)
    torch.testing.assert_close(weights, wanted_weights, rtol=0, atol=2e-6)
    torch.testing.assert_close(output, wanted_output, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", EXAMPLES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_half_precision_is_finite_and_close(case: AttentionCase, variant: str, dtype: torch.dtype) -> None:
    check_half_precision(case, EXAMPLES[variant], dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_evaluation_is_sdpa_bit_for_bit(case: AttentionCase) -> None:
    module = make_module(case, EXAMPLES["hard_mask"]).eval()
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
def test_p_zero_samples_and_counts_nothing(drop: Perturbation) -> None:
    case = CASES_BY_NAME["causal_without_mask"]
    module, state = make_module(case, drop), torch.get_rng_state()
    training = attention_drop_forward(module.train(), *case.tensors(), None, scaling=0.3)[0]
    evaluation = attention_drop_forward(module.eval(), *case.tensors(), None, scaling=0.3)[0]
    assert torch.equal(training, evaluation) and torch.equal(state, torch.get_rng_state())
    assert module.attention_drop_state.calls == 0


@pytest.mark.parametrize("name", ["indices", "block_indices", "cu_seq_lens_q", "cache"])
@pytest.mark.parametrize("training", [True, False])
def test_an_unsupported_argument_raises_with_its_name(name: str, training: bool) -> None:
    case = CASES_BY_NAME["none"]
    module = make_module(case, EXAMPLES["hard_mask"]).train(training)
    with pytest.raises(ValueError, match=f"passes `{name}`"):
        attention_drop_forward(module, *case.tensors(), None, **{name: torch.arange(3)})


def test_packing_is_read_from_the_mask_and_raises_without_one() -> None:
    case = CASES_BY_NAME["packed"]
    module, lengths = make_module(case, EXAMPLES["hard_mask"]), {"cu_seq_lens_q": torch.tensor([0, 4, 6, 9])}
    results = []
    for extras in ({}, lengths):
        torch.manual_seed(0)
        results.append(attention_drop_forward(module, *case.tensors(), case.mask(), **extras)[0])
    assert torch.equal(*results)
    attention_drop_forward(module, *case.tensors(), None, cu_seq_lens_q=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="passes `cu_seq_lens_q`.*position_ids that restart"):
        attention_drop_forward(module, *case.tensors(), None, **lengths)


def test_a_module_outside_of_a_model_raises_in_training() -> None:
    case = CASES_BY_NAME["none"]
    module = make_module(case, EXAMPLES["hard_mask"])
    del module.attention_drop_state
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        attention_drop_forward(module, *case.tensors(), None)
