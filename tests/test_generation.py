"""The warning when text is generated with perturbed attention."""

import logging

import pytest

from hf_attentiondrop.integration import generation

from .models import build, inputs


@pytest.mark.parametrize("family", ["llama", "marian"])
def test_generating_in_training_mode_warns_once(family: str, caplog: pytest.LogCaptureFixture) -> None:
    generation._warn_once.cache_clear()
    model, batch = build(family, dropout=False, attention_drop={"p": 0.3}), inputs(family)
    prompt = {"input_ids": batch["input_ids"], "max_new_tokens": 2, "pad_token_id": 0}
    with caplog.at_level(logging.WARNING, logger="hf_attentiondrop"):
        model.generate(**prompt)
        model.train()(**batch)
        model.set_attn_implementation("sdpa")
        model.generate(**prompt)
        assert not caplog.records
        model.set_attn_implementation("attentiondrop")
        model.generate(**prompt)
        model.generate(**prompt)
    (record,) = caplog.records
    assert "generate() runs on a model in training mode" in record.getMessage()
    assert "Call model.eval() first" in record.getMessage()
