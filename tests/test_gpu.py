"""The attention function on a CUDA device, where it uses other kernels: compared with float64 on CPU, and autocast."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import MarianMTModel

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.functional import flex_hard_attention, hard_attention, num_visible_keys, sample_masked_ranks
from hf_attentiondrop.integration.functions import attention_drop_forward
from hf_attentiondrop.methods import long_sequences
from hf_attentiondrop.methods.method import Perturbation

from .attention import make_module, position_bias
from .cases import CASES, CASES_BY_NAME, AttentionCase
from .methods import examples, idle_examples
from .methods.test_profile import PER_HEAD, check_heads
from .models import build, enable_checkpointing, inputs


EXAMPLES = examples()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("idle", idle_examples(), ids=lambda idle: idle.summary)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_idle_perturbation_equals_the_cpu(case: AttentionCase, idle: Perturbation) -> None:
    """Uses settings without effect, because the random generators of CPU and CUDA differ."""
    results = []
    for device in ("cpu", "cuda"):
        module = make_module(case, idle)
        tensors = [t.to(device).requires_grad_() for t in case.tensors()]
        mask, bias = case.mask(), position_bias(case)
        extras = {} if bias is None else {"position_bias": bias.to(device)}
        mask = None if mask is None else mask.to(device)
        output = attention_drop_forward(module, *tensors, mask, scaling=0.3, **extras)[0]
        gradients = torch.autograd.grad(output.square().sum(), tensors)
        results.append([output, *gradients])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=0, atol=1e-10)


@pytest.mark.parametrize("drop", PER_HEAD, ids=lambda drop: drop.variant)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_head_is_perturbed_as_with_its_value_alone(case: AttentionCase, drop: Perturbation) -> None:
    check_heads(case, drop, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", EXAMPLES)
@pytest.mark.parametrize("family", ["bert", "vit", "marian", "llama"])
def test_models_train_in_half_precision(family: str, variant: str, dtype: torch.dtype) -> None:
    model = build(family, attention_drop=EXAMPLES[variant]).cuda().train()
    batch = {name: tensor.cuda() for name, tensor in inputs(family).items()}
    with torch.autocast("cuda", dtype=dtype):
        loss = model(**batch).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def causal_window(length: int) -> torch.Tensor:
    ones = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda").tril()
    return ones & ~ones.tril(-100)


def padding(length: int) -> torch.Tensor:
    lengths = torch.tensor([length, length // 3], device="cuda")
    return (torch.arange(length, device="cuda") < lengths[:, None])[:, None, None]


@pytest.mark.parametrize(
    ("mask", "fill", "size", "dtype"),
    [
        (None, "mask", 64, torch.bfloat16),
        (None, "zero", 128, torch.float32),
        (causal_window, "mask", 40, torch.float16),
        (causal_window, "zero", 64, torch.float32),
        (padding, "mask", 128, torch.bfloat16),
        (padding, "zero", 72, torch.bfloat16),
    ],
)
def test_hard_without_a_score_matrix_equals_the_cpu(
    mask: Callable[[int], torch.Tensor] | None, fill: str, size: int, dtype: torch.dtype
) -> None:
    for length in (300, 384):  # the second compiles for dynamic lengths and fills its blocks
        query = torch.randn(2, length, 4, size, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
        key, value = (
            torch.randn(2, length, 2, size, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
            for _ in range(2)
        )
        visible = None if mask is None else mask(length)
        lengths = {"query_length": length, "key_length": length, "device": query.device}
        num_visible = num_visible_keys(visible, is_causal=mask is None, **lengths)
        masked_ranks = sample_masked_ranks((2, 4, length, length), num_visible, p=0.5, k=5, fill=fill, device="cuda")
        results = []
        for attend, device in ((flex_hard_attention, "cuda"), (hard_attention, "cpu")):
            states = [
                tensor.to(device, dtype if device == "cuda" else torch.float64) for tensor in (query, key, value)
            ]
            shown = None if visible is None else visible.to(device)
            output = attend(*states, masked_ranks.to(device), shown, is_causal=mask is None, fill=fill)
            gradients = torch.autograd.grad(output.double().square().sum(), (query, key, value))
            results.append([output.double().cpu(), *(gradient.double().cpu() for gradient in gradients)])
        for cuda, cpu in zip(*results, strict=True):
            error = (cuda - cpu).abs().amax(dim=-1) / cpu.abs().max()
            # Where two scores almost tie, the other one may be masked.
            assert (error < (1e-5 if dtype == torch.float32 else 0.03)).double().mean() > 0.99
            assert cuda.isfinite().all()


@pytest.mark.parametrize(
    "name", ["none", "causal_without_mask", "grouped_queries_padding", "fully_masked", "cross_padding"]
)
@pytest.mark.parametrize("fill", ["mask", "zero"])
def test_both_paths_of_hard_mask_the_same_scores(name: str, fill: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One samples for a score matrix and one for indices, from the same generator."""
    case = CASES_BY_NAME[name]
    module = make_module(case, AttentionDropConfig(p=0.5, k=3, fill=fill))
    tensors = [tensor.cuda().requires_grad_() for tensor in case.tensors(torch.float32, 16)]
    mask = None if case.mask() is None else case.mask().cuda()
    results = []
    for beyond in ({}, {"cuda": 0}):
        monkeypatch.setattr(long_sequences, "FLEX_ATTENTION_BEYOND", beyond)
        torch.manual_seed(0)
        output = attention_drop_forward(module, *tensors, mask)[0]
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fill", ["mask", "zero"])
def test_hard_on_long_sequences_holds_no_score_matrix(fill: str) -> None:
    case = replace(CASES_BY_NAME["causal_without_mask"], batch_size=1, queries=8192, keys=8192, kv_heads=1)
    module = make_module(case, AttentionDropConfig(fill=fill))
    tensors = [tensor.cuda().requires_grad_() for tensor in case.tensors(torch.bfloat16, 64)]
    attention_drop_forward(module, *tensors, None)[0].sum().backward()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention_drop_forward(module, *tensors, None)[0].sum().backward()
    score_matrix = 4 * case.heads * case.queries * case.keys
    assert torch.cuda.max_memory_allocated() - before < score_matrix / 8


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_model_trains_without_score_matrices(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_sequences, "FLEX_ATTENTION_BEYOND", {"cuda": 0})
    config = build("marian", attention_drop={"p": 0.5}).config
    config.d_model = 64  # heads of size 16, the minimum of FlexAttention
    model = MarianMTModel._from_config(config, attn_implementation="attentiondrop").cuda().train()
    enable_checkpointing(model, use_reentrant=False)
    run = torch.compile(model) if is_compiled else model
    for length in (33, 47, 60):
        batch = {name: tensor.cuda() for name, tensor in inputs("marian", length=length, padding="right").items()}
        with torch.autocast("cuda", dtype=torch.bfloat16):
            run(**batch).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
