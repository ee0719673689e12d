"""Blurring keys: identity, weights, precision, and masked keys."""

import math

import pytest
import torch

from hf_attentiondrop.functional import blur_keys, gaussian_window, visible_neighbors

from ..cases import CASES, AttentionCase


def neighbors(case: AttentionCase, width: int = 5) -> torch.Tensor:
    return visible_neighbors(
        case.mask(),
        width=width,
        is_causal=case.is_causal,
        is_cross=case.is_cross,
        query_length=case.queries,
        key_length=case.keys,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("width", [1, 3, 5, 9, 21])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_neighbors_are_the_keys_that_the_token_sees(case: AttentionCase, width: int) -> None:
    found = neighbors(case, width).expand(case.batch_size, case.heads, case.keys, width)
    half, view = width // 2, case.own_view
    for j in range(case.keys):
        for t in range(-half, half + 1):
            wanted = view[..., j, j + t] if 0 <= j + t < case.keys else torch.zeros(case.batch_size, case.heads).bool()
            assert torch.equal(found[..., j, t + half], wanted), (j, t)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sigma_zero_is_the_identity(case: AttentionCase) -> None:
    key = case.tensors()[1]
    blurred = blur_keys(key, torch.zeros(case.batch_size), neighbors(case))
    assert torch.equal(blurred, key.repeat_interleave(blurred.shape[1] // key.shape[1], dim=1))


def test_weights_sum_to_one_and_fall_with_distance() -> None:
    everyone = torch.ones(1, 1, 4, 7, dtype=torch.bool)
    weights = gaussian_window(torch.tensor([0.3, 1.0, 3.0]), everyone)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 1, 4))
    assert (weights[..., 3:].diff(dim=-1) < 0).all() and torch.equal(weights, weights.flip(-1))
    ratio = weights[1, 0, 0, 4] / weights[1, 0, 0, 3]
    torch.testing.assert_close(ratio, torch.tensor(math.exp(-0.5)))


@pytest.mark.parametrize(("sigma", "side"), [(1e-4, 0.0), (100.0, 1 / 3)])
def test_a_key_that_its_own_token_does_not_see_counts_itself(sigma: float, side: float) -> None:
    without_centre = torch.tensor([True, False, True]).view(1, 1, 1, 3)
    weights = gaussian_window(torch.tensor([sigma]), without_centre)
    torch.testing.assert_close(weights.flatten(), torch.tensor([side, 1 - 2 * side, side]), atol=1e-4, rtol=0)


def test_masked_keys_never_enter_the_blend() -> None:
    visible = torch.tensor([True, True, True, False, False]).view(1, 1, 1, 5)
    around = visible_neighbors(
        visible, width=5, is_causal=False, is_cross=False, query_length=5, key_length=5, device=torch.device("cpu")
    )
    key = torch.randn(1, 1, 5, 4)
    changed = key.clone()
    changed[..., 3:, :] = 1e4
    sigma = torch.tensor([2.0])
    assert torch.equal(blur_keys(key, sigma, around)[..., :3, :], blur_keys(changed, sigma, around)[..., :3, :])


def test_half_precision_keys_are_accumulated_in_float32() -> None:
    case = CASES[0]
    key = case.tensors(torch.float32, head_dim=64)[1].bfloat16()
    sigma = torch.full((3,), 2.0)
    blurred = blur_keys(key, sigma, neighbors(case, 9))
    wanted = blur_keys(key.float(), sigma, neighbors(case, 9))
    assert blurred.dtype == torch.bfloat16 and torch.equal(blurred, wanted.bfloat16())
