"""The consistency term needs two different passes: sources of randomness, and warnings without one."""

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import hf_attentiondrop.methods.blur as blur
from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.training.trainer import (
    AttentionDropTrainer,
)

from .consistency_tasks import (
    arguments,
    build_model,
    first_logs,
    rows_of,
    train,
)
from .models import build, inputs


def test_the_divergence_grows_with_p(tmp_path: Any) -> None:
    divergences = []
    for p in (0.0, 0.1, 0.3):
        drop = AttentionDropConfig(p=p)
        model = build("bert", dropout=False, num_labels=3, initializer_range=0.2, attention_drop=drop)
        trainer, _ = train(
            "classification", tmp_path, model=model, amplitude=0.0, max_steps=20, logging_steps=20, learning_rate=0.0
        )
        divergences.append(first_logs(trainer)["consistency_loss"])
    assert divergences[0] == 0 and 0 < 1.5 * divergences[1] < divergences[2]


def test_the_two_halves_are_blurred_with_different_sigmas(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sigmas = []
    original = blur.blur_keys
    monkeypatch.setattr(blur, "blur_keys", lambda key, sigma, seen: sigmas.append(sigma) or original(key, sigma, seen))
    drop = AttentionDropConfig(variant="blur")
    model = build("bert", dropout=False, num_labels=3, initializer_range=0.2, attention_drop=drop)
    trainer, _ = train("classification", tmp_path, model=model, amplitude=0.0)
    assert first_logs(trainer)["consistency_loss"] > 0
    for sigma in sigmas:
        first, second = sigma.flatten().chunk(2)
        assert len(first) == 8 and first.ne(second).all()


def whisper() -> nn.Module:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=32,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_mel_bins=4,
            max_source_positions=8,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=1,
        )
    )


WARNING = "has no dropout above 0 and no active AttentionDrop"


@pytest.mark.parametrize("family", ["vit", "llama", "whisper"])
def test_a_model_without_randomness_warns_once_with_the_remedy(
    family: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if family == "whisper":  # its layer drop samples random numbers even at probability 0
        model = whisper()
        batch = {"input_features": torch.randn(4, 4, 16), "labels": torch.randint(2, 32, (4, 5))}
    else:
        model, batch = build(family, attn_implementation="sdpa"), inputs(family)
    trainer = AttentionDropTrainer(
        model=model,
        args=arguments(tmp_path, per_device_train_batch_size=2, max_steps=2),
        train_dataset=rows_of(batch),
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (message,) = [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]
    assert 'attn_implementation="attentiondrop"' in message and "consistency_weight=0" in message


@pytest.mark.parametrize("source", ["dropout", "attentiondrop"])
def test_a_model_with_randomness_does_not_warn(source: str, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    if source == "dropout":
        model = build_model("classification", dropout=True)
    else:
        model = build("bert", dropout=False, num_labels=3, attention_drop=AttentionDropConfig(p=0.3))
    with caplog.at_level(logging.WARNING):
        trainer, _ = train("classification", tmp_path, model=model, amplitude=0.0)
    assert first_logs(trainer)["consistency_loss"] > 0
    assert not [record for record in caplog.records if WARNING in record.getMessage()]


NO_METHOD = "trains like the plain Trainer"


@pytest.mark.parametrize("implementation", ["sdpa", "attentiondrop", "affine_scaled"])
def test_a_training_without_any_method_warns_once(
    implementation: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = build_model("classification", attn_implementation=implementation)
        train("classification", tmp_path, model=model, amplitude=0.0, max_steps=2, consistency_weight=0.0)
    messages = [record.getMessage() for record in caplog.records if NO_METHOD in record.getMessage()]
    assert len(messages) == (implementation == "sdpa")
    assert all(
        "AttentionDropTrainer" in text and 'set_attn_implementation("attentiondrop")' in text for text in messages
    )


def test_r_drop_is_a_method_and_does_not_warn(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train("classification", tmp_path, model=build_model("classification", dropout=True), amplitude=0.0)
    assert NO_METHOD not in caplog.text and WARNING not in caplog.text
