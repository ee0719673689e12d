"""Hard Attention Masking as a random function: which scores it masks, how often, and which never."""

import math

import pytest
import torch

from hf_attentiondrop.functional import mask_top_scores, sample_masked_scores

from ..cases import CASES, AttentionCase
from .dtypes import drawn_in_default_dtypes


def within_four_standard_errors(is_masked: torch.Tensor, p: float) -> bool:
    return abs(is_masked.double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / is_masked.numel())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("fill", ["mask", "zero"])
def test_mask_rate_is_p_where_more_than_k_keys_are_visible(p: float, fill: str) -> None:
    scores = torch.randn(8, 4, 200, 12)
    is_masked = sample_masked_scores(scores, None, p=p, k=5, fill=fill)
    top = scores.topk(5).indices
    assert within_four_standard_errors(is_masked.gather(-1, top), p)
    assert is_masked.sum() == is_masked.gather(-1, top).sum(), "a score outside of the k highest was masked"


@pytest.mark.parametrize("fill", ["mask", "zero"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_only_visible_keys_are_masked_and_one_is_kept(case: AttentionCase, fill: str) -> None:
    scores, visible = torch.randn(case.visible.shape), case.visible
    for _ in range(20):
        is_masked = sample_masked_scores(scores, visible, p=0.8, k=3, fill=fill)
        assert not (is_masked & ~visible).any()
        if fill == "mask":
            assert ((visible & ~is_masked).any(dim=-1) == visible.any(dim=-1)).all()


def test_a_row_that_would_lose_everything_keeps_one_key() -> None:
    visible = torch.tensor([[True, True, False, False], [True, True, True, False], [False] * 4])[None, None]
    is_masked = sample_masked_scores(torch.randn(1, 1, 3, 4), visible, p=1.0, k=3)
    assert is_masked.sum(dim=-1).tolist() == [[[1, 2, 0]]]
    is_masked = sample_masked_scores(torch.randn(1, 1, 3, 4), visible, p=1.0, k=2)
    assert is_masked.sum(dim=-1).tolist() == [[[1, 2, 0]]]


@pytest.mark.parametrize("num_visible", [2, 4, None])
def test_the_kept_key_of_a_row_is_uniform(num_visible: int | None) -> None:
    visible = None if num_visible is None else (torch.arange(5) < num_visible).view(1, 1, 1, 5)
    is_masked = sample_masked_scores(torch.randn(8, 4, 500, 5), visible, p=1.0, k=5)
    length = num_visible or 5
    kept = (~is_masked[..., :length]).double()
    assert (kept.sum(dim=-1) == 1).all()
    assert all(within_four_standard_errors(kept[..., key], 1 / length) for key in range(length))


@pytest.mark.parametrize("num_keys", [1, 2, 4, 5, 6, 9])
def test_the_masked_fraction_grows_with_p(num_keys: int) -> None:
    """And equals `p` among the candidates of a row with more than `k` keys, also if only the last keys are masked."""
    scores = torch.randn(8, 4, 500, 9)
    visible = (torch.arange(9) < num_keys).view(1, 1, 1, 9)
    candidates = min(num_keys, 5)
    shares = []
    for p in (0.0, 0.1, 0.3, 0.5, 0.8, 0.9, 0.99, 1.0):
        num_masked = sample_masked_scores(scores, visible, p=p, k=5).sum(dim=-1).double()
        shares.append(num_masked.mean().item() / candidates)
        most = candidates if num_keys > 5 else num_keys - 1
        wanted = p if num_keys > 5 else p - p**num_keys / num_keys
        error = (p * (1 - p) / num_masked.numel() / candidates) ** 0.5
        assert abs(shares[-1] - wanted) <= 4 * error + 1e-9 and num_masked.max() <= most
    assert shares == sorted(shares) and (num_keys == 1) == (shares[-1] == 0)


@pytest.mark.parametrize(
    ("k", "candidates"), [(0.1, [1, 1, 1, 2, 3]), (1 / 3, [1, 1, 4, 4, 10]), (0.999, [1, 2, 10, 11, 30])]
)
def test_a_share_counts_the_visible_keys_of_each_row_and_rounds_up(k: float, candidates: list[int]) -> None:
    lengths = torch.tensor([1, 2, 10, 11, 30])
    visible = (torch.arange(30) < lengths[:, None])[None, None]
    is_masked = sample_masked_scores(torch.randn(1, 1, 5, 30), visible, p=1.0, k=k, fill="zero")
    assert is_masked.sum(dim=-1).flatten().tolist() == candidates
    is_masked = sample_masked_scores(torch.randn(1, 1, 5, 30), visible, p=1.0, k=k)
    kept = (lengths - is_masked.sum(dim=-1).flatten()).tolist()
    assert kept == [max(1, length - count) for length, count in zip(lengths.tolist(), candidates, strict=True)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("fill", ["mask", "zero"])
def test_mask_rate_of_a_share_is_p(p: float, fill: str) -> None:
    scores = torch.randn(8, 4, 200, 12)
    visible = (torch.arange(12) < 9).view(1, 1, 1, 12)
    is_masked = sample_masked_scores(scores, visible, p=p, k=0.5, fill=fill)
    top = scores.masked_fill(~visible, -torch.inf).topk(5).indices
    assert within_four_standard_errors(is_masked.gather(-1, top), p)
    assert is_masked.sum() == is_masked.gather(-1, top).sum(), "a score outside of the highest half was masked"


def test_the_zero_fill_masks_whole_rows_too() -> None:
    visible = torch.tensor([True, True, False, False]).view(1, 1, 1, 4)
    assert sample_masked_scores(torch.randn(1, 1, 1, 4), visible, p=1.0, k=3, fill="zero").sum() == 2


def test_samples_heads_queries_and_calls_are_independent() -> None:
    scores = torch.randn(1, 1, 1, 8).expand(64, 32, 16, 8)
    first, second = (sample_masked_scores(scores, None, p=0.5, k=1).any(dim=-1).double() for _ in range(2))
    pairs = {
        "samples": (first[:-1], first[1:]),
        "heads": (first[:, :-1], first[:, 1:]),
        "queries": (first[..., :-1], first[..., 1:]),
        "calls": (first, second),
    }
    for name, (a, b) in pairs.items():
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(a.numel()), name


def test_the_same_seed_masks_the_same_scores() -> None:
    scores = torch.randn(2, 2, 5, 7)
    torch.manual_seed(4)
    first = sample_masked_scores(scores, None, p=0.5, k=3)
    torch.manual_seed(4)
    assert torch.equal(first, sample_masked_scores(scores, None, p=0.5, k=3))


def test_the_default_dtype_changes_nothing() -> None:
    scores = torch.randn(2, 4, 64, 64)
    first, second = drawn_in_default_dtypes(lambda: sample_masked_scores(scores, None, p=0.01, k=3))
    assert torch.equal(first, second)


@pytest.mark.parametrize("fill", ["mask", "zero"])
def test_no_gradient_flows_into_a_masked_score(fill: str) -> None:
    scores = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].expand(2, 2, 6, 6)
    perturbed = mask_top_scores(scores, visible, p=0.5, k=2, fill=fill)
    touched = (perturbed != scores).detach()
    (perturbed.softmax(dim=-1) * torch.randn(2, 2, 6, 6)).sum().backward()
    assert touched.sum() > (~visible).sum() and (scores.grad[touched] == 0).all()
    assert (perturbed[~visible] == -torch.inf).all()


def test_the_zero_fill_raises_the_weight_of_a_negative_score() -> None:
    scores = torch.tensor([[[[-1.0, -2.0, -3.0]]]])
    weight = mask_top_scores(scores, p=1.0, k=1, fill="zero").softmax(dim=-1)[..., 0]
    assert weight > scores.softmax(dim=-1)[..., 0]


def test_an_unknown_fill_is_rejected() -> None:
    with pytest.raises(ValueError, match="`fill` must be one of"):
        mask_top_scores(torch.randn(1, 1, 2, 2), fill="mean")
