"""Gemma 4 skips queries in the layers that share keys and values, and asks for the name of SDPA first."""

import pytest
import torch
from transformers import PreTrainedModel


transformers = pytest.importorskip("transformers.models.gemma4", reason="absent: this Transformers has no Gemma 4")


def gemma(name: str) -> PreTrainedModel:
    config = transformers.Gemma4TextConfig(
        vocab_size=50,
        vocab_size_per_layer_input=50,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=64,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        max_position_embeddings=64,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    return transformers.Gemma4ForCausalLM._from_config(config, attn_implementation=name).eval()


@pytest.mark.parametrize("name", ["attentiondrop", "affine_scaled"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_some_logits_are_those_of_all_and_of_sdpa(name: str, is_compiled: bool) -> None:
    ids = torch.arange(1, 13).view(1, 12)
    stock, model = gemma("sdpa"), gemma(name)
    run = torch.compile(model, backend="eager") if is_compiled else model
    with torch.no_grad():
        expected = stock(ids).logits[:, -4:]
        torch.testing.assert_close(run(ids, logits_to_keep=4).logits, expected)
        assert torch.equal(run(ids, logits_to_keep=4).logits, stock(ids, logits_to_keep=4).logits)
    assert model.config._attn_implementation == name


def test_a_static_cache_generates_as_sdpa() -> None:
    ids = torch.arange(1, 13).view(1, 12)
    options = {"cache_implementation": "static", "disable_compile": True, "max_new_tokens": 4, "do_sample": False}
    scores = [
        model.generate(ids, **options, output_scores=True, return_dict_in_generate=True).scores
        for model in (gemma("sdpa"), gemma("attentiondrop"))
    ]
    assert all(torch.equal(*pair) for pair in zip(*scores, strict=True))
