"""Sums over visible keys: exact for every mask, cheap for the common masks, and in float32."""

import pytest
import torch
from torch import Tensor

from hf_attentiondrop.functional import PrefixSums, rescale_output
from hf_attentiondrop.functional import prefix_sums as sums

from ..cases import CASES, CASES_BY_NAME, AttentionCase


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so small that the short sequences of these tests need several, the last one incomplete."""
    monkeypatch.setattr(sums, "CHUNK", 4)


def sums_of(mask: Tensor | None, queries: int, keys: int, is_causal: bool = True) -> PrefixSums:
    return PrefixSums.from_mask(
        mask, is_causal=is_causal, query_length=queries, key_length=keys, device=torch.device("cpu")
    )


def plain_sums(value: Tensor, visible: Tensor) -> Tensor:
    """The sum over each row's visible keys, `(B, Q, H, D)`."""
    value = value.repeat_interleave(visible.shape[1] // value.shape[1], dim=1)
    return torch.einsum("bhqk,bhkd->bqhd", visible.to(value.dtype), value)


def middle_padding() -> Tensor:
    """A causal mask with a masked key in the middle: each row is still one interval of the keys that are seen."""
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    visible[:, 4] = False
    return visible[None, None]


def fully_masked_row() -> Tensor:
    """A mask with a fully masked row in the middle: each key is still seen by one interval of queries."""
    return middle_padding().mT.flip(-1, -2)


def prefix() -> Tensor:
    """The first four tokens see each other, later tokens all earlier ones."""
    position = torch.arange(9)
    return ((position <= position[:, None]) | (position < 4))[None, None]


@pytest.mark.parametrize("as_in_models", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_plain_sum_and_its_gradient(case: AttentionCase, as_in_models: bool) -> None:
    value = case.tensors()[2]
    value = value.transpose(1, 2).contiguous().transpose(1, 2) if as_in_models else value
    found_sums = sums_of(case.mask(), case.queries, case.keys, case.is_causal)
    count = case.visible.sum(dim=-1).transpose(1, 2).float()
    assert (found_sums.lengths == count.masked_fill(count == 0, torch.inf)).all()
    sees = case.visible.any(dim=-1).transpose(1, 2).unsqueeze(-1)
    found = found_sums.total(value)
    total = found.repeat_interleave(case.heads // found.shape[2], dim=2).expand(-1, case.queries, -1, -1)
    value = value.clone().requires_grad_()
    wanted = plain_sums(value, case.visible)
    torch.testing.assert_close(total * sees, wanted, rtol=0, atol=1e-12)
    direction = torch.randn_like(wanted) * sees
    (gradient,) = torch.autograd.grad(wanted, value, direction)
    direction = direction.unflatten(2, (found.shape[2], -1)).sum(dim=3)
    direction = direction.sum(dim=1, keepdim=True) if found.shape[1] == 1 else direction
    torch.testing.assert_close(found_sums.adjoint(direction, value), gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        *((CASES_BY_NAME[name].mask, "_SharedRow") for name in ("padding_right", "padding_left", "float_padding")),
        (CASES_BY_NAME["cached_one_query"].mask, "_SharedRow"),
        *((CASES_BY_NAME[name].mask, "_Intervals") for name in ("causal", "causal_padding_left", "causal_packed")),
        *((CASES_BY_NAME[name].mask, "_Intervals") for name in ("packed", "sliding_window", "two_sided_window")),
        *((CASES_BY_NAME[name].mask, "_Intervals") for name in ("cached_padding_left", "fully_masked_causal")),
        *((mask, "_Intervals") for mask in (middle_padding, fully_masked_row, prefix)),
        (CASES_BY_NAME["arbitrary"].mask, "_MatrixProduct"),
        (
            lambda: torch.tensor([[1, 1, 1], [0, 1, 0], [1, 1, 1]]).bool()[None, None],
            "_MatrixProduct",
        ),
    ],
)
def test_only_arbitrary_masks_cost_a_product(mask: object, rule: str) -> None:
    visible = mask()
    queries, keys = visible.shape[-2:]
    found = sums_of(visible, queries, keys)
    assert type(found.linear_map).__name__ == rule
    value = torch.randn(3, 2, keys, 4, dtype=torch.float64)
    visible = visible if visible.dtype == torch.bool else visible == 0
    wanted = plain_sums(value, visible.expand(3, 2, -1, -1))
    sees = visible.any(dim=-1).transpose(1, 2).unsqueeze(-1)
    torch.testing.assert_close(found.total(value) * sees, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "gathers"), [("causal", 0), ("causal_padding_left", 0), ("causal_packed", 2)])
def test_intervals_from_the_start_need_no_differences(
    name: str, gathers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, original = [], sums._rows
    monkeypatch.setattr(sums, "_rows", lambda *args: calls.append(1) or original(*args))
    case = CASES_BY_NAME[name]
    found, value = sums_of(case.mask(), 9, 9), case.tensors()[2]
    found.adjoint(found.total(value), value)
    assert len(calls) == gathers


@pytest.mark.parametrize(("length", "window"), [(16384, None), (4096, 64)])
def test_half_precision_holds_over_many_tokens(length: int, window: int | None) -> None:
    value = (torch.randn(1, 1, length, 8) + 1.0).to(torch.bfloat16)
    running = torch.nn.functional.pad(value.double().cumsum(dim=-2), (0, 0, 1, 0))
    end = torch.arange(1, length + 1)
    first = torch.zeros_like(end) if window is None else (end - window).clamp_min(0)
    wanted = (running[:, :, end] - running[:, :, first]) / (end - first).view(1, 1, -1, 1)
    mask = None
    if window is not None:
        key = torch.arange(length)
        mask = ((key >= first[:, None]) & (key < end[:, None]))[None, None]
    found = sums_of(mask, length, length).total(value).transpose(1, 2)
    assert found.dtype == torch.float32
    assert (found.double() / (end - first).view(1, 1, -1, 1) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_in_half_precision_neither_overflows_nor_drifts(dtype: torch.dtype) -> None:
    mask = torch.rand(1, 1, 64, 64) < 0.5
    value = (1e3 * (1 + torch.rand(1, 2, 64, 8))).to(dtype)
    found, wanted = sums_of(mask, 64, 64), plain_sums(value.double(), mask.expand(-1, 2, -1, -1))
    torch.testing.assert_close(found.total(value).double(), wanted, rtol=2**-8, atol=0)


def factors(case: AttentionCase, sums: PrefixSums) -> tuple[Tensor, Tensor]:
    """`α` and `β`, random, as [`rescale_output`] takes them."""
    alpha, beta = torch.rand(2, case.batch_size, case.queries, case.heads, dtype=torch.float64)
    beta = beta.masked_fill(sums.lengths.isinf(), 0.0)
    return alpha.requires_grad_(), beta.requires_grad_()


@pytest.mark.parametrize("name", ["none", "causal_without_mask", "causal_padding_left", "masks_per_head_grouped"])
def test_gradients_of_the_rescaled_output_are_the_slopes(name: str) -> None:
    case = CASES_BY_NAME[name]
    found = sums_of(case.mask(), case.queries, case.keys, case.is_causal)
    query, _, value = case.tensors(head_dim=2)
    output = query.transpose(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *tensors: rescale_output(*tensors, found),
        (output, value.requires_grad_(), *factors(case, found)),
        fast_mode=True,
    )


@pytest.mark.parametrize(
    "name", ["none", "causal_without_mask", "cached_one_query", "causal_padding_left", "arbitrary"]
)
def test_compiled_into_one_graph_it_is_the_same(name: str) -> None:
    case = CASES_BY_NAME[name]
    query, _, value = case.tensors()
    mask = case.mask()
    leaves = [query.transpose(1, 2).requires_grad_(), value.requires_grad_()]
    leaves += factors(case, sums_of(mask, case.queries, case.keys, case.is_causal))

    def total(*tensors: Tensor) -> Tensor:
        found = sums_of(mask, case.queries, case.keys, case.is_causal)
        return rescale_output(*tensors, found).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(function(*leaves), leaves) for function in (total, compiled)]
    for plain, from_graph in zip(*results, strict=True):
        torch.testing.assert_close(plain, from_graph, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [64, 65, 1000])
def test_prefix_sums_at_the_length_of_a_chunk_and_beyond(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    value = torch.randn(2, 3, length, 4, dtype=torch.float64)
    found = sums_of(None, length, length)
    torch.testing.assert_close(found.total(value), value.cumsum(dim=-2).transpose(1, 2), rtol=0, atol=1e-12)
    wanted = value.flip(-2).cumsum(dim=-2).flip(-2)
    torch.testing.assert_close(found.adjoint(value.transpose(1, 2), value), wanted, rtol=0, atol=1e-12)


def test_without_gradients_it_is_the_same() -> None:
    case = CASES_BY_NAME["causal_packed"]
    query, _, value = case.tensors()
    found = sums_of(case.mask(), case.queries, case.keys)
    alpha, beta = factors(case, found)
    arguments = (query.transpose(1, 2), value, alpha, beta, found)
    with torch.no_grad():
        plain = rescale_output(*arguments)
    assert torch.equal(rescale_output(*arguments), plain) and not plain.requires_grad


def test_autocast_does_not_change_the_precision() -> None:
    case = CASES_BY_NAME["causal_without_mask"]
    query, _, value = case.tensors(torch.float32)
    leaves = [query.transpose(1, 2).requires_grad_(), value.requires_grad_()]
    found = sums_of(None, 9, 9)
    leaves += [factor.detach().float().requires_grad_() for factor in factors(case, found)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = rescale_output(*leaves, found)
            with torch.no_grad():
                plain = rescale_output(*leaves, found)
            results.append([plain, output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
