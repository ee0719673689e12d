"""The cache per mask: one computation per mask, dropped when the mask is freed or modified."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.functional import PrefixSums, visibility, visible_neighbors
from hf_attentiondrop.functional.visibility import once_per_mask

from ..models import build, enable_checkpointing, inputs


class Counter:
    """Counts the visible keys of a mask, and its own calls."""

    calls = 0

    def __call__(self, mask: Tensor, factor: int = 1) -> int:
        self.calls += 1
        return factor * int(mask.sum())


def test_it_is_computed_once_per_mask_and_arguments() -> None:
    find, mask = Counter(), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    find_once = once_per_mask(find)
    assert [find_once(mask) for _ in range(3)] == [9, 9, 9] and find.calls == 1
    assert [find_once(mask, 2), find_once(mask, factor=3)] == [18, 27] and find.calls == 3
    assert find_once(mask.clone()) == 9 and find.calls == 4, "another mask that happens to hold the same"
    assert [find_once(mask), find_once(mask, 2), find_once(mask, factor=3)] == [9, 18, 27] and find.calls == 4
    assert once_per_mask(lambda mask: -1)(mask) == -1, "another function"


@pytest.mark.parametrize("through_a_view", [True, False])
def test_a_change_in_place_is_noticed(through_a_view: bool) -> None:
    find, mask = Counter(), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    find_once = once_per_mask(find)
    find_once(mask)
    (mask[..., 0] if through_a_view else mask).fill_(False)
    assert find_once(mask) == (6 if through_a_view else 0)


def test_tensors_of_inference_mode_are_not_cached() -> None:
    find, mask = Counter(), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    find_once = once_per_mask(find)
    with torch.inference_mode():
        find_once(mask)
        inside = mask.clone()
    for _ in range(2):
        assert find_once(inside) == 9
    assert find.calls == 3
    assert find_once(mask) == 9 and find.calls == 4, "a tensor made in inference mode could not train"


@pytest.mark.parametrize("kind", ["padding", "causal", "arbitrary"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_nothing_keeps_a_mask_alive(kind: str, dtype: torch.dtype) -> None:
    visible = {
        "padding": torch.arange(9) < 6,
        "causal": torch.ones(9, 9).tril() > 0,
        "arbitrary": torch.rand(9, 9) < 0.5,
    }
    mask = visible[kind].expand(1, 1, 9, 9).clone()
    mask = mask if dtype == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    lengths = {"query_length": 9, "key_length": 9, "device": torch.device("cpu"), "is_causal": True}
    kept_before = len(visibility._cache)
    PrefixSums.from_mask(mask, **lengths)
    visible_neighbors(mask, width=3, is_cross=False, **lengths)
    assert len(visibility._cache) == kept_before + 1
    gone = weakref.ref(mask)
    del mask
    gc.collect()
    assert gone() is None and len(visibility._cache) == kept_before


@pytest.mark.parametrize("use_reentrant", [None, False])
def test_the_layers_of_a_model_share_the_cache(use_reentrant: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    original = visibility.boolean_mask
    monkeypatch.setattr(visibility, "boolean_mask", lambda mask: looks.append(1) or original(mask))
    model = build("bert", attention_drop=AttentionDropConfig(variant="blur")).train()
    if use_reentrant is not None:
        enable_checkpointing(model, use_reentrant=use_reentrant)
    for calls in (1, 2):
        model(**inputs("bert", padding="right")).loss.backward()
        assert len(looks) == calls < calls * model.config.num_hidden_layers
