"""Additive masks of any magnitude mask keys: masked keys do not influence perturbations and averages."""

from typing import Any

import pytest
import torch
from transformers import SwinConfig, SwinModel

from hf_attentiondrop import AffineScaledConfig, AttentionDropConfig

from .models import VOCAB_SIZE, build


METHODS: dict[str, dict[str, Any]] = {
    "hard_mask": {"attention_drop": AttentionDropConfig(p=0.5, k=3)},
    "hard_zero": {"attention_drop": AttentionDropConfig(p=0.5, k=3, fill="zero")},
    "hard_share": {"attention_drop": AttentionDropConfig(p=0.5, k=0.5)},
    "blur": {"attention_drop": AttentionDropConfig(variant="blur", sigma_max=2.0)},
    "affine": {"attn_implementation": "affine_scaled", "attention_reweighting": AffineScaledConfig(init="paper")},
}


@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -torch.inf, -1e9, -1e4, -100.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_mask_of_the_user_leaks_nothing_from_later_tokens(method: str, hidden: float) -> None:
    # In training all tokens, also later ones, update the average of affine scaling.
    model = build("llama", **METHODS[method]).train(method != "affine")
    visible = torch.ones(10, 10).tril()[None, None].expand(4, -1, -1, -1) > 0
    mask = torch.zeros(4, 1, 10, 10).masked_fill(~visible, hidden)
    first = torch.randint(3, VOCAB_SIZE, (4, 10))
    second = torch.cat([first[:, :6], torch.randint(3, VOCAB_SIZE, (4, 4))], dim=1)
    results = []
    for ids in (first, second):
        torch.manual_seed(0)
        results.append(model(ids, attention_mask=mask, use_cache=False).logits[:, :6])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["hard_mask", "hard_zero", "blur"])
def test_the_shifted_windows_of_swin_stay_apart(method: str) -> None:
    """A shift wraps the image around: the mask keeps patches of opposite edges apart, by a bias of -100."""
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4)
    config.attention_drop = METHODS[method]["attention_drop"]
    model = SwinModel._from_config(config, attn_implementation="attentiondrop").train()
    shifted = model.encoder.layers[0].blocks[1]
    states = torch.randn(1, 8, 8, 8)
    results = []
    for corner in (0.0, 1.0):
        states[0, 0, 0] = corner
        torch.manual_seed(0)
        results.append(shifted(states.flatten(1, 2), (8, 8))[0].view(8, 8, 8))
    changed = (results[0] != results[1]).any(dim=-1)
    assert changed[0, 0] and not changed[2:].any() and not changed[:, 2:].any()
