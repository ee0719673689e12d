"""Hard masking through FlexAttention: when it is used, and under torch.compile."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_attentiondrop.functional import hard_attention
from hf_attentiondrop.integration.functions import attention_drop_forward
from hf_attentiondrop.methods import hard, long_sequences

from .attention import make_module
from .cases import CASES_BY_NAME
from .methods.test_hard import EXAMPLES


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def flex_on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_sequences, "FEW_SCORES", math.inf)
    monkeypatch.setattr(long_sequences, "FLEX_ATTENTION_BEYOND", {DEVICE: 8 * 8})


@pytest.mark.parametrize(
    ("name", "options", "is_taken"),
    [
        ("none", {}, True),
        ("causal_padding_left", {}, True),
        ("none", {"length": 8}, False),
        ("none", {"size": 8}, False),
        ("none", {"size": 160}, False),
        ("none", {"dtype": torch.float64}, False),
        ("none", {"dropout": 0.1}, False),
        ("none", {"position_bias": torch.zeros(1, 4, 9, 9)}, False),
        ("float_padding", {}, False),
        ("none", {"k": 0.5}, True),
        ("none", {"k": 70}, True),
        ("none", {"length": 100, "k": 70}, False),
        ("none", {"length": 100, "k": 0.7}, False),
    ],
)
def test_flex_attention_is_used_where_supported(
    name: str, options: dict[str, Any], is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(hard, "flex_hard_attention", lambda *a, **k: calls.append(a) or hard_attention(*a, **k))
    length, size = options.pop("length", 9), options.pop("size", 16)
    case = replace(CASES_BY_NAME[name], queries=length, keys=length)
    tensors = case.tensors(options.pop("dtype", torch.float32), head_dim=size)
    mask = case.mask() if case.mask() is None or case.mask().dtype == torch.bool else case.mask().float()
    drop = replace(EXAMPLES["hard_mask"], k=options.pop("k", 3))
    attention_drop_forward(make_module(case, drop), *tensors, mask, **options)
    assert len(calls) == is_taken


def test_flex_attention_is_not_used_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_sequences, "HAS_TRITON", False)
    monkeypatch.setattr(hard, "flex_hard_attention", None)
    case = CASES_BY_NAME["none"]
    attention_drop_forward(make_module(case, EXAMPLES["hard_mask"]), *case.tensors(torch.float32, 16), None)


def test_it_compiles_into_one_graph(flex_attention: None) -> None:
    case = replace(CASES_BY_NAME["grouped_queries_padding"], batch_size=1)
    module = make_module(case, EXAMPLES["hard_mask"])
    mask = case.mask()[:1].to(DEVICE)
    tensors = [tensor[:1].to(DEVICE).requires_grad_() for tensor in case.tensors(torch.float32, 16)]

    def attend(*states: torch.Tensor) -> torch.Tensor:
        return attention_drop_forward(module, *states, mask)[0]

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        output = function(*tensors)
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
