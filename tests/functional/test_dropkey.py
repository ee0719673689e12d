"""DropKey as a random mask: equality with the definition, its rates, and what it must never mask."""

import math

import pytest
import torch
from torch import Tensor

from hf_attentiondrop.functional import AXES, sample_key_mask

from .. import reference
from ..cases import CASES, AttentionCase
from .dtypes import drawn_in_default_dtypes


def sample(case: AttentionCase, p: float | Tensor, axis: str) -> Tensor:
    return sample_key_mask(case.visible.shape, case.mask(), p=p, axis=axis, is_causal=case.is_causal)


def within_four_standard_errors(values: Tensor, p: float) -> bool:
    return abs(values.double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / values.numel())


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_definition_under_the_same_uniform_numbers(case: AttentionCase, axis: str, p: float) -> None:
    visible = case.visible
    rows = case.queries if axis == "score" else 1
    torch.manual_seed(3)
    uniform = torch.rand(case.batch_size, case.heads, rows, case.keys)
    for number in (p, torch.tensor(p), torch.tensor(p, dtype=torch.float64)):
        torch.manual_seed(3)
        kept = sample(case, number, axis)
        expected = visible & ~reference.dropped_keys(visible, uniform, p)
        assert torch.equal(kept.expand(visible.shape), expected)


def test_the_default_dtype_changes_nothing() -> None:
    assert torch.equal(*drawn_in_default_dtypes(lambda: sample_key_mask((2, 4, 64, 64), p=0.01, axis="score")))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_masked_key_stays_masked_and_no_row_loses_every_key(case: AttentionCase, axis: str) -> None:
    for _ in range(10):
        kept = sample(case, 0.9, axis).expand(case.visible.shape)
        assert not (kept & ~case.visible).any()
        assert torch.equal(kept.any(dim=-1), case.visible.any(dim=-1))


def test_columns_take_one_row_where_all_queries_see_the_same_keys() -> None:
    padding = torch.ones(3, 1, 1, 9, dtype=torch.bool)
    assert sample_key_mask((3, 4, 9, 9), p=0.5, axis="column").shape == (3, 4, 1, 9)
    assert sample_key_mask((3, 4, 9, 9), padding, p=0.5, axis="column").shape == (3, 4, 1, 9)
    assert sample_key_mask((3, 4, 9, 9), p=0.5, axis="column", is_causal=True).shape == (3, 4, 9, 9)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_rate_is_p_in_rows_with_many_keys(axis: str, p: float, is_causal: bool) -> None:
    kept = sample_key_mask((16, 8, 400, 400), p=p, axis=axis, is_causal=is_causal)
    assert within_four_standard_errors(~kept[:, :, -1], p)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("visible", [[True] * 5, [False, True, True, False, True]])
def test_the_kept_key_of_a_row_is_uniform(axis: str, visible: list[bool]) -> None:
    rows, columns = (500, 8) if axis == "score" else (1, 4000)
    mask = torch.tensor(visible).view(1, 1, 1, 5)
    kept = sample_key_mask((4, columns, rows, 5), mask, p=1.0, axis=axis)
    assert (kept.sum(dim=-1) == 1).all()
    keys = mask.flatten().nonzero().flatten().tolist()
    assert all(within_four_standard_errors(kept[..., key], 1 / len(keys)) for key in keys)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("num_keys", [1, 2, 5])
def test_the_dropped_fraction_grows_with_p(axis: str, num_keys: int) -> None:
    """A row of `n` keys drops `p - p^n / n` of them: it keeps one of those that it would all lose."""
    rows, columns = (500, 8) if axis == "score" else (1, 4000)
    fractions = []
    for p in (0.0, 0.1, 0.3, 0.5, 0.8, 0.99, 1.0):
        dropped = ~sample_key_mask((4, columns, rows, num_keys), p=p, axis=axis)
        fractions.append(dropped.double().mean().item())
        expected = p - p**num_keys / num_keys
        assert abs(fractions[-1] - expected) <= 4 * math.sqrt(p * (1 - p) / dropped.numel()) + 1e-9
    assert fractions == sorted(fractions)


@pytest.mark.parametrize("axis", AXES)
def test_draws_are_independent(axis: str) -> None:
    first, second = (sample_key_mask((64, 32, 8, 8), p=0.5, axis=axis).double() for _ in range(2))
    pairs = {
        "samples": (first[:-1], first[1:]),
        "heads": (first[:, :-1], first[:, 1:]),
        "keys": (first[..., :-1], first[..., 1:]),
        "calls": (first, second),
    }
    if axis == "score":
        pairs["queries"] = (first[..., :-1, :], first[..., 1:, :])
    for name, (a, b) in pairs.items():
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(a.numel()), name


def test_causal_queries_share_the_draw_of_a_column() -> None:
    kept = sample_key_mask((8, 4, 64, 64), p=0.3, axis="column", is_causal=True)
    last = kept[:, :, -1:]
    rows = (last & torch.ones(64, 64, dtype=torch.bool).tril()).any(dim=-1)  # rows that keep a column's own choice
    assert rows.double().mean() > 0.9
    assert torch.equal(kept[rows], (last & torch.ones(64, 64, dtype=torch.bool).tril())[rows])


def test_a_changing_rate_does_not_recompile() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sampled = torch.compile(lambda p: sample_key_mask((1, 2, 9, 9), p=p), backend="aot_eager", fullgraph=True)
    for p in (0.0, 0.25, 1.0):
        assert sampled(torch.tensor(p)).any(dim=-1).all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_an_unknown_axis_is_rejected() -> None:
    with pytest.raises(ValueError, match="`axis` must be one of.*'row'"):
        sample_key_mask((1, 1, 2, 2), p=0.1, axis="row")
