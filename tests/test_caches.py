"""Models in training mode with a cache: queries map to the right keys, and static caches give the same results."""

import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hf_attentiondrop import AffineScaledConfig, AttentionDropConfig
from hf_attentiondrop.functional import query_offset

from .models import VOCAB_SIZE, build


METHODS: dict[str, dict[str, Any]] = {
    "hard": {"attention_drop": AttentionDropConfig(p=0.5, k=3)},
    "blur": {"attention_drop": AttentionDropConfig(variant="blur", sigma_max=3.0)},
    "affine": {"attn_implementation": "affine_scaled", "attention_reweighting": AffineScaledConfig(init="paper")},
}
PADDED = {"left": [0, 3, 2], "right": [0, 3, 2], "right_in_all": [2, 4, 5], "none": [0, 0, 0]}


def attention_mask(padding: str, length: int) -> torch.Tensor:
    keep = torch.arange(length) < length - torch.tensor(PADDED[padding])[:, None]
    return (keep.flip(-1) if padding == "left" else keep).long()


def run(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, chunks: list[int], static: bool) -> list[Any]:
    """Returns the logits of each chunk and the averages after it."""
    cache = StaticCache(config=model.config, max_cache_len=19) if static else DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    results, end = [], 0
    torch.manual_seed(0)
    for chunk in ids.split(chunks, dim=1):
        end += chunk.shape[1]
        with torch.no_grad():
            logits = model(chunk, attention_mask=mask[:, :end], **{name: cache}).logits
        averages = [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("average")]
        results.append((logits * mask[:, end - chunk.shape[1] : end, None], averages))
    return results


@pytest.mark.parametrize("chunks", [[11], [5, 6], [8, 3], [10, 1]], ids=str)
@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("method", METHODS)
def test_a_static_cache_trains_as_a_dynamic_one(method: str, padding: str, chunks: list[int]) -> None:
    ids = torch.randint(3, VOCAB_SIZE, (3, 11))
    mask = attention_mask(padding, 11)
    on_static, on_dynamic = (
        run(build("llama", **METHODS[method]).train(), ids, mask, chunks, s) for s in (True, False)
    )
    torch.testing.assert_close(on_static, on_dynamic, rtol=0, atol=1e-5)
    if method == "affine":
        assert all(average.abs().max() > 0 for _, averages in on_static for average in averages)


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("offset", [0, 2, 7])
@pytest.mark.parametrize("window", [None, 3])
def test_the_mask_determines_the_query_positions(offset: int, padding: str, window: int | None) -> None:
    queries, keys = 6, 13
    position = torch.arange(keys)
    distance = position[offset : offset + queries, None] - position
    visible = (distance >= 0) & (distance < (window or keys))
    padded = torch.zeros(3, keys, dtype=torch.bool)
    padded[:, : offset + queries] = attention_mask(padding, offset + queries) > 0
    mask = visible & padded[:, None, None]
    assert query_offset(mask, query_length=queries, key_length=keys) == offset
    additive = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    assert query_offset(additive, query_length=queries, key_length=keys) == offset


def test_queries_that_all_see_the_same_keys_are_the_last() -> None:
    mask = attention_mask("right_in_all", 13)[:, None, None] > 0  # prefix tuning of an encoder
    assert query_offset(mask, query_length=9, key_length=13) == 4
    assert query_offset(mask, query_length=13, key_length=13) == 0
