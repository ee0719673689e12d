"""Scores: float32 under autocast and half precision, where ties would change the ranking."""

import pytest
import torch

from hf_attentiondrop.functional import attention_scores, visible_keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_float32_even_under_autocast(dtype: torch.dtype) -> None:
    query, key = torch.randn(1, 4, 16, 32).to(dtype), torch.randn(1, 2, 16, 32).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = attention_scores(query, key)
    wanted = query.double() @ key.double().repeat_interleave(2, dim=1).mT * 32**-0.5
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), wanted, rtol=0, atol=1e-5)


def test_a_bias_leaves_a_key_visible_and_what_lies_far_below_hides_it() -> None:
    values = [0.0, -30.0, 3.0, -100.0, -1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf]
    mask = torch.tensor(values).view(1, 1, 1, -1)
    visible = visible_keys(mask, is_causal=False, query_length=1, key_length=len(values), device=mask.device)
    assert visible.flatten().tolist() == [True] * 3 + [False] * 5
