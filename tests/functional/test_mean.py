"""The mean of visible values: exact for every mask, cheap for the masks that occur, and in float32."""

import pytest
import torch

from hf_attentiondrop.functional import mean, visible_mean

from ..cases import CASES, CASES_BY_NAME, AttentionCase


def plain_mean(value: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The mean over each row's visible keys, one row at a time; zero where there is none."""
    value = value.repeat_interleave(visible.shape[1] // value.shape[1], dim=1)
    means = torch.zeros(*visible.shape[:3], value.shape[-1], dtype=value.dtype)
    for b, h, q in torch.cartesian_prod(*(torch.arange(n) for n in visible.shape[:3])).tolist():
        if visible[b, h, q].any():
            means[b, h, q] = value[b, h, visible[b, h, q]].mean(dim=0)
    return means


def middle_padding() -> torch.Tensor:
    """Rows of causal visibility around a key in the middle that nobody sees: two runs, and still one interval."""
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    visible[:, 4] = False
    return visible[None, None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_plain_mean_forward_and_backward(case: AttentionCase) -> None:
    value = case.tensors()[2].requires_grad_()
    found, count = visible_mean(value, case.mask(), is_causal=case.is_causal, query_length=case.queries)
    found = found.repeat_interleave(case.heads // found.shape[1], dim=1).expand(-1, -1, case.queries, -1)
    wanted = plain_mean(value, case.visible)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert (count == case.visible.sum(dim=-1, keepdim=True)).all()
    direction = torch.randn_like(wanted)
    gradients = [torch.autograd.grad(result, value, direction)[0] for result in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mask", "is_interval"),
    [
        *((CASES_BY_NAME[name].mask, True) for name in ("causal_padding_left", "causal_packed", "two_sided_window")),
        (CASES_BY_NAME["cached_padding_left"].mask, True),
        (CASES_BY_NAME["blind"].mask, True),
        (middle_padding, True),
        (CASES_BY_NAME["arbitrary"].mask, False),
    ],
)
def test_only_arbitrary_masks_cost_a_product(mask: object, is_interval: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    products, original = [], mean._mean_of_anything
    monkeypatch.setattr(mean, "_mean_of_anything", lambda *args: products.append(1) or original(*args))
    visible, value = mask(), torch.randn(3, 2, 9, 4, dtype=torch.float64)
    found, _ = visible_mean(value, visible, is_causal=True, query_length=visible.shape[-2])
    wanted = plain_mean(value, visible.expand(3, 2, -1, -1))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert len(products) == (not is_interval)


@pytest.mark.parametrize(("length", "window"), [(16384, None), (4096, 64)])
def test_half_precision_holds_over_many_tokens(length: int, window: int | None) -> None:
    value = (torch.randn(1, 1, length, 8) + 1.0).to(torch.bfloat16)
    sums = torch.nn.functional.pad(value.double().cumsum(dim=-2), (0, 0, 1, 0))
    end = torch.arange(1, length + 1)
    first = torch.zeros_like(end) if window is None else (end - window).clamp_min(0)
    wanted = (sums[:, :, end] - sums[:, :, first]) / (end - first).view(1, 1, -1, 1)
    if window is None:
        found, _ = visible_mean(value, None, is_causal=True, query_length=length)
    else:
        key = torch.arange(length)
        mask = (key >= first[:, None]) & (key < end[:, None])
        found, _ = visible_mean(value, mask[None, None], is_causal=True, query_length=length)
    assert found.dtype == torch.float32
    assert (found.double() - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["causal_padding_left", "arbitrary"])
def test_compiled_in_one_graph_it_is_the_same(name: str) -> None:
    case = CASES_BY_NAME[name]
    value, mask = case.tensors()[2].requires_grad_(), case.mask()

    def total(value: torch.Tensor) -> torch.Tensor:
        return visible_mean(value, mask, is_causal=False, query_length=case.queries)[0].square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(function(value), value)[0] for function in (total, compiled)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
