"""DropKey by FlexAttention: the random bits, and the definition under these bits.

Without a GPU, FlexAttention runs as the tensor functions that define it.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from hf_attentiondrop.functional import flex_dropkey_attention
from hf_attentiondrop.functional.dropkey.flex import sample_dropped_bits

from .. import reference
from ..cases import CASES, CASES_BY_NAME, AttentionCase


NAMES = [
    "none",
    "causal_without_mask",
    "cross_padding",
    "masks_per_head_grouped",
    "fully_masked_causal",
    "static_prefill",
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


pytestmark = pytest.mark.usefixtures("flex_attention")


def mask_of(case: AttentionCase) -> Tensor | None:
    return None if case.mask() is None else case.mask().to(DEVICE)


def sample_kept(case: AttentionCase, p: float) -> Tensor:
    """Which keys are visible and kept, `(B, H, Q, K)`."""
    shape = case.visible.shape
    words = sample_dropped_bits(shape, mask_of(case), p=p, is_causal=case.is_causal, device=DEVICE)
    assert words.shape == (*shape[:-1], math.ceil(shape[-1] / 32)) and words.dtype == torch.int32
    keys = torch.arange(shape[-1], device=DEVICE)
    return case.visible & ((words[..., keys // 32] >> (keys % 32)) & 1 == 0).cpu()


def within_four_standard_errors(values: Tensor, p: float) -> bool:
    return abs(values.double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / values.numel())


@pytest.mark.parametrize("case", [case for case in CASES if case.bias is None], ids=lambda case: case.name)
def test_no_row_loses_every_key(case: AttentionCase) -> None:
    sees_key = case.visible.any(dim=-1)
    assert torch.equal(sample_kept(case, 0.0), case.visible)
    assert torch.equal(sample_kept(case, 0.9).any(dim=-1), sees_key)
    assert torch.equal(sample_kept(case, 1.0).sum(dim=-1), sees_key.long())


def scattered() -> Tensor:
    return torch.rand(1, 1, 3, 70, generator=torch.Generator().manual_seed(0)) < 0.2


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("none", queries=3, keys=70),
        AttentionCase("causal", queries=70, keys=70, is_causal=True),
        AttentionCase("scattered", scattered, queries=3, keys=70),
    ],
    ids=lambda case: case.name,
)
def test_the_kept_key_of_a_row_is_uniform(case: AttentionCase) -> None:
    kept = sample_kept(replace(case, batch_size=500), 1.0).double().flatten(0, 1)
    visible = case.visible[0, 0]
    rate = visible / visible.sum(dim=-1, keepdim=True)
    error = (kept.mean(dim=0) - rate).abs()
    assert (error <= 5.5 * (rate * (1 - rate) / len(kept)).sqrt()).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_rate_is_p_and_bits_are_independent(p: float) -> None:
    case = AttentionCase("long", queries=64, keys=96, batch_size=8)
    kept = sample_kept(case, p).double()
    assert within_four_standard_errors(kept, 1 - p)
    for dim in range(4):
        a, b = kept.narrow(dim, 0, kept.shape[dim] - 1), kept.narrow(dim, 1, kept.shape[dim] - 1)
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(a.numel()), dim


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_definition_forward_and_backward(name: str) -> None:
    case = CASES_BY_NAME[name]
    tensors = [tensor.float().double().requires_grad_() for tensor in case.tensors(head_dim=16)]
    torch.manual_seed(2)
    kept = sample_kept(case, 0.5)
    torch.manual_seed(2)
    states = [tensor.to(DEVICE, torch.float32) for tensor in tensors]
    options = {"p": torch.tensor(0.5), "is_causal": case.is_causal, "scaling": 0.3}
    found = flex_dropkey_attention(*states, mask_of(case), **options).double().cpu()
    query, key, value = tensors
    expected = reference.attend(reference.final_scores(query, key, scaling=0.3), value, kept)[0]
    direction = torch.randn_like(expected)
    results = [[output, *torch.autograd.grad(output, tensors, direction)] for output in (found, expected)]
    torch.testing.assert_close(*results, rtol=0, atol=2e-5)


def test_a_changing_rate_does_not_recompile() -> None:
    torch._dynamo.reset()
    counters.clear()
    states = [tensor.to(DEVICE) for tensor in CASES_BY_NAME["none"].tensors(torch.float32, head_dim=16)]
    for p in (0.0, 0.3, 1.0):
        flex_dropkey_attention(*states, p=torch.tensor(p))
    assert counters["stats"]["unique_graphs"] == 2  # the bits and the attention


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_draw(use_reentrant: bool) -> None:
    def layer(*tensors: Tensor) -> Tensor:
        return flex_dropkey_attention(*tensors, p=0.5)

    gradients = []
    for run in (layer, lambda *tensors: checkpoint(layer, *tensors, use_reentrant=use_reentrant)):
        states = CASES_BY_NAME["grouped_queries"].tensors(torch.float32, head_dim=16)
        tensors = [tensor.to(DEVICE).requires_grad_() for tensor in states]
        torch.manual_seed(0)
        run(*tensors).square().sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    torch.testing.assert_close(*gradients)


def test_it_compiles_into_one_graph() -> None:
    states = [tensor.to(DEVICE) for tensor in CASES_BY_NAME["none"].tensors(torch.float32, head_dim=16)]
    visible = torch.rand(1, 1, 9, 9, device=DEVICE) < 0.5
    run = torch.compile(flex_dropkey_attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (flex_dropkey_attention, run):
        torch.manual_seed(0)
        results.append(function(*states, visible, p=torch.tensor(0.5)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
