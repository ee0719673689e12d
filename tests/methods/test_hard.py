"""Hard Attention Masking: reference, and computation without a score matrix."""

import math
from dataclasses import replace

import pytest
import torch

from hf_attentiondrop import HardMasking
from hf_attentiondrop.integration.functions import attention_drop_forward
from hf_attentiondrop.methods import hard

from .. import reference as definitions
from ..attention import check_against_the_definition, check_half_precision, expected, make_module
from ..cases import CASES, CASES_BY_NAME, AttentionCase
from . import Definition


EXAMPLES = {
    "hard_mask": HardMasking(p=0.5, k=3),
    "hard_zero": HardMasking(p=0.5, k=3, fill="zero"),
    "hard_share": HardMasking(p=0.7, k=0.3),
}
IDLE = [HardMasking(p=1e-9), HardMasking(p=1e-9, fill="zero")]


def reference(hard: HardMasking, definition: Definition) -> Definition:
    scores, visible = definition.final_scores.detach(), definition.visible
    keys = scores.shape[-1]
    num_ranks = min(hard.k, keys) if hard.k >= 1 else math.ceil(hard.k * keys)
    uniform = torch.rand(*scores.shape[:-1], num_ranks)
    masked = definitions.masked_scores(scores, visible, uniform, p=hard.p, k=hard.k, fill=hard.fill)
    if hard.fill == "mask":
        return replace(definition, visible=visible & ~masked)
    return replace(definition, zeroed=masked)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_blocks_equal_the_definition(case: AttentionCase, name: str, small_blocks: None) -> None:
    check_against_the_definition(case, [EXAMPLES[name]], dropout=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["hard_mask", "hard_zero"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_blocks_in_half_precision(case: AttentionCase, name: str, dtype: torch.dtype, small_blocks: None) -> None:
    check_half_precision(case, EXAMPLES[name], dtype)


def test_long_sequences_run_in_blocks_where_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = hard.hard_attention
    monkeypatch.setattr(hard, "hard_attention", lambda *a, **k: calls.append(a[0].shape[-2]) or original(*a, **k))
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
        module = make_module(case, EXAMPLES["hard_mask"])
        attention_drop_forward(module, *case.tensors(torch.float32), **options)
    assert calls == [257, 258, 260, 261]


@pytest.mark.parametrize("name", ["hard_mask", "hard_zero"])
def test_dropout_in_blocks_is_that_of_the_module(name: str, small_blocks: None) -> None:
    """The random numbers differ from those of the reference, but the mean is the same."""
    case = CASES_BY_NAME["float_with_bias"]
    perturbation = replace(EXAMPLES[name], p=1.0, k=1)  # Only dropout is random then.
    module, tensors = make_module(case, perturbation), case.tensors()
    outputs = torch.stack(
        [attention_drop_forward(module, *tensors, case.mask(), dropout=0.5, scaling=0.3)[0] for _ in range(200)]
    )
    wanted, _ = expected(case, [perturbation], *tensors)
    assert outputs.std(dim=0).amax() > 0.1
    assert ((outputs.mean(dim=0) - wanted).abs() <= 5 * outputs.std(dim=0) / len(outputs) ** 0.5 + 1e-4).all()
