"""DropKey block by block: the definition for every mask, derivatives, checkpointing, compilation and rates."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from hf_attentiondrop.functional import AXES, dropkey_attention, sample_key_mask

from .. import reference
from ..cases import CASES, CASES_BY_NAME, AttentionCase


NAMES = [
    "none",
    "causal_without_mask",
    "padding_left",
    "masks_per_head_grouped",
    "fully_masked",
    "cross_random",
    "cached",
]
ADDITIVE = ["float_with_bias", "fully_masked_float", "fully_masked_float_minus_infinity", "bias_grouped"]


pytestmark = pytest.mark.usefixtures("small_blocks")


def weights(
    case: AttentionCase,
    p: float | Tensor,
    dropout: float = 0.0,
    axis: str = "score",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The attention weights of queries that are zero, `(B, H, Q, K)`."""
    query, key, _ = case.tensors(dtype)
    value = torch.eye(case.keys, dtype=dtype).expand(case.batch_size, case.kv_heads, -1, -1)
    options = {"is_causal": case.is_causal, "p": p, "axis": axis, "dropout": dropout}
    return dropkey_attention(torch.zeros_like(query), key, value, case.mask(), **options).transpose(1, 2)


def test_p_may_change_before_the_backward_pass() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in CASES_BY_NAME["none"].tensors())
    p = torch.tensor(0.5, dtype=torch.float64)
    gradients = []
    for later in (0.5, 0.1):
        torch.manual_seed(0)
        output = dropkey_attention(query, key, value, p=p.fill_(0.5))
        p.fill_(later)
        gradients.append(torch.autograd.grad(output.sum(), query)[0])
    assert torch.equal(*gradients)


def attend(
    name: str, p: float, dropout: float = 0.0, axis: str = "score"
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """DropKey under one draw, as a function of query, key and value alone, and these."""
    case = CASES_BY_NAME[name]
    tensors = tuple(tensor[..., :4].requires_grad_() for tensor in case.tensors())

    def function(*states: Tensor) -> Tensor:
        torch.manual_seed(0)
        return dropkey_attention(*states, case.mask(), p=p, axis=axis, is_causal=case.is_causal, dropout=dropout)

    return function, tensors


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_definition_forward_and_backward(case: AttentionCase, p: float, axis: str) -> None:
    torch.manual_seed(5)
    kept = weights(case, p, axis=axis) > 0
    if axis == "column":
        torch.manual_seed(5)
        mask = sample_key_mask(kept.shape, case.mask(), p=p, axis=axis, is_causal=case.is_causal)
        assert torch.equal(kept, mask.expand(kept.shape))
    assert not (kept & ~case.visible).any()
    assert torch.equal(kept.any(dim=-1), case.visible.any(dim=-1))
    if p in (0.0, 1.0):
        assert torch.equal(kept.sum(dim=-1), case.visible.sum(dim=-1).clamp_max(1 if p else case.keys))
    tensors = [tensor.requires_grad_() for tensor in case.tensors()]
    torch.manual_seed(5)
    found = dropkey_attention(*tensors, case.mask(), p=p, axis=axis, is_causal=case.is_causal, scaling=0.3)
    query, key, value = tensors
    scores = reference.final_scores(query, key, scaling=0.3, bias=case.bias)
    expected = reference.attend(scores, value, kept)[0]
    direction = torch.randn_like(found)
    results = [[output, *torch.autograd.grad(output, tensors, direction)] for output in (found, expected)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("axis", "dropout"), [("score", 0.0), ("score", 0.3), ("column", 0.3)])
@pytest.mark.parametrize("p", [0.4, 1.0])
@pytest.mark.parametrize("name", [*NAMES, *ADDITIVE])
def test_gradients_are_the_slopes(name: str, p: float, axis: str, dropout: float) -> None:
    assert gradcheck(*attend(name, p, dropout, axis), fast_mode=True)


@pytest.mark.parametrize(
    ("name", "axis", "dropout"),
    [
        ("causal_without_mask", "score", 0.0),
        ("masks_per_head_grouped", "column", 0.3),
        ("float_with_bias", "score", 0.3),
    ],
)
def test_the_operator_follows_the_rules_of_torch(name: str, axis: str, dropout: float) -> None:
    case, (_, tensors) = CASES_BY_NAME[name], attend(name, 0.4)
    columns = torch.rand(3, 4, 1, 9) if axis == "column" else None
    p, seed = torch.tensor(0.4, dtype=torch.float64), torch.tensor(5)
    operator = torch.ops.hf_attentiondrop.dropkey_attention.default
    torch.library.opcheck(operator, (*tensors, case.mask(), p, columns, seed, case.is_causal, 0.5, dropout))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_rate_is_p_in_rows_with_many_keys(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = AttentionCase("long", queries=300, keys=300, is_causal=True)
    dropped = weights(case, p, dtype=torch.float32)[:, :, 200:, :200] == 0
    assert abs(dropped.double().mean() - p) < 4 * math.sqrt(p * (1 - p) / dropped.numel())


@pytest.mark.parametrize("name", ["none", "sliding_window", "float_with_bias"])
def test_the_kept_key_of_a_row_is_uniform(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = replace(CASES_BY_NAME[name], batch_size=200)
    kept = (weights(case, 1.0) > 0).double()
    assert (kept.sum(dim=-1) == 1).all()
    visible = case.visible[0]
    rate = visible / visible.sum(dim=-1, keepdim=True)
    error = (kept.mean(dim=0) - rate).abs()
    assert (error <= 5 * (rate * (1 - rate) / 200).sqrt()).all()


def test_draws_are_independent_over_samples_heads_queries_and_keys() -> None:
    case = AttentionCase("square", queries=8, keys=8, batch_size=128)
    kept = (weights(case, 0.5) > 0).double()
    for dim in range(4):
        a, b = kept.narrow(dim, 0, kept.shape[dim] - 1), kept.narrow(dim, 1, kept.shape[dim] - 1)
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(a.numel()), dim


def test_the_dropped_fraction_grows_with_p() -> None:
    case = AttentionCase("two_keys", queries=40, keys=2, batch_size=40)
    fractions = [(weights(case, p) == 0).double().mean().item() for p in (0.0, 0.1, 0.3, 0.6, 0.9, 1.0)]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 0.5
    assert abs(fractions[3] - (0.6 - 0.6**2 / 2)) < 0.02


def test_dropout_acts_on_the_remaining_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its draw changes which keys are dropped, so this compares means over many samples."""
    monkeypatch.undo()
    case = replace(CASES_BY_NAME["float_with_bias"], batch_size=400)
    plain, dropped = (weights(case, 0.3, rate) for rate in (0.0, 0.5))
    error = (plain.var(dim=0) / 400 + dropped.var(dim=0) / 400).sqrt() + 1e-6
    assert ((plain.mean(dim=0) - dropped.mean(dim=0)).abs() < 5 * error).all()
    assert (dropped == 0).double().mean() > (plain == 0).double().mean() + 0.1


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("axis", "dropout"), [("score", 0.0), ("score", 0.3), ("column", 0.3)])
def test_checkpointing_repeats_the_draw(axis: str, dropout: float, use_reentrant: bool) -> None:
    def layer(*states: Tensor) -> Tensor:
        return dropkey_attention(*states, p=0.5, axis=axis, dropout=dropout)

    gradients = []
    for run in (layer, lambda *states: checkpoint(layer, *states, use_reentrant=use_reentrant)):
        tensors = [tensor.requires_grad_() for tensor in CASES_BY_NAME["none"].tensors()]
        torch.manual_seed(0)
        run(*tensors).square().sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("name", "axis"), [("none", "column"), ("float_with_bias", "score")])
def test_compiled_into_one_graph_it_draws_the_same_for_every_rate(name: str, axis: str) -> None:
    tensors, mask = attend(name, 0.5)[1], CASES_BY_NAME[name].mask()

    def total(p: Tensor, *states: Tensor) -> Tensor:
        return dropkey_attention(*states, mask, p=p, axis=axis, dropout=0.3).square().sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for p in (0.2, 0.7, 1.0):
        results = []
        for run in (total, compiled):
            torch.manual_seed(0)
            results.append(torch.autograd.grad(run(torch.tensor(p), *tensors), tensors))
        torch.testing.assert_close(*results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_autocast_does_not_change_the_precision() -> None:
    function, tensors = attend("causal_without_mask", 0.4)
    states = [tensor.detach().to(torch.bfloat16).requires_grad_() for tensor in tensors]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = function(*states)
            results.append([output, *torch.autograd.grad(output.float().square().sum(), states)])
    assert all(a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*NAMES, *ADDITIVE])
def test_half_precision_is_finite_and_fully_masked_rows_give_zeros(name: str, dtype: torch.dtype) -> None:
    case, mask = CASES_BY_NAME[name], CASES_BY_NAME[name].mask()
    if mask is not None and mask.dtype != torch.bool:
        mask = (mask.clamp_min(torch.finfo(dtype).min) if mask.min() > -torch.inf else mask).to(dtype)
    tensors = [tensor.requires_grad_() for tensor in case.tensors(dtype)]
    output = dropkey_attention(*tensors, mask, p=0.9, is_causal=case.is_causal)
    gradients = torch.autograd.grad(output.square().sum(), tensors)
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))
    assert (output.transpose(1, 2)[~case.visible.any(dim=-1)] == 0).all()


def test_a_mask_that_requires_a_gradient_is_rejected() -> None:
    mask = torch.zeros(1, 1, 9, 9, requires_grad=True)
    with pytest.raises(ValueError, match="constant mask.*sample_key_mask"):
        dropkey_attention(*CASES_BY_NAME["none"].tensors(), mask, p=0.1)
