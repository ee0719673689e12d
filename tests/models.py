"""Tiny models of the four main families, built from their configs, with inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)


VOCAB_SIZE = 64
DROPOUT_OFF = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "vit": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "marian": {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
    "llama": {"attention_dropout": 0.0},
}


def _bert(**kwargs: Any) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=kwargs.pop("num_hidden_layers", 2),
        num_attention_heads=4,
        intermediate_size=64,
        **kwargs,
    )
    return BertForSequenceClassification(config)


def _vit(**kwargs: Any) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=kwargs.pop("num_hidden_layers", 2),
        num_attention_heads=4,
        intermediate_size=64,
        **kwargs,
    )
    return ViTForImageClassification(config)


def _marian(**kwargs: Any) -> MarianMTModel:
    config = MarianConfig(
        vocab_size=VOCAB_SIZE,
        d_model=32,
        encoder_layers=kwargs.pop("encoder_layers", 2),
        decoder_layers=kwargs.pop("decoder_layers", 2),
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        **kwargs,
    )
    return MarianMTModel(config)


def _llama(**kwargs: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=kwargs.pop("num_hidden_layers", 2),
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        **kwargs,
    )
    return LlamaForCausalLM(config)


BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "bert": _bert,
    "vit": _vit,
    "marian": _marian,
    "llama": _llama,
}


def build(family: str, *, dropout: bool = True, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Builds a tiny model in evaluation mode, the same for the same arguments."""
    torch.manual_seed(seed)
    config.setdefault("attn_implementation", "attentiondrop")
    return BUILDERS[family](**({} if dropout else DROPOUT_OFF[family]), **config).eval()


def inputs(
    family: str, *, batch_size: int = 4, length: int = 10, padding: str | None = None
) -> dict[str, torch.Tensor]:
    """Returns inputs with labels; with padding, the texts of a batch differ in length."""
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {
            "pixel_values": torch.randn(batch_size, 1, 8, 8, generator=generator),
            "labels": torch.arange(batch_size) % 2,
        }
    batch = {"input_ids": torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator)}
    if padding is not None:
        keep = torch.arange(length) < (length - torch.arange(batch_size) % 4)[:, None]
        keep = keep.flip(-1) if padding == "left" else keep
        batch["attention_mask"] = keep.long()
        batch["input_ids"] = batch["input_ids"].masked_fill(~keep, 0)
    if family == "bert":
        return batch | {"labels": torch.arange(batch_size) % 2}
    if family == "llama":
        labels = batch["input_ids"].clone()
        return batch | {"labels": labels if padding is None else labels.masked_fill(~keep, -100)}
    return batch | {"labels": torch.randint(3, VOCAB_SIZE, (batch_size, length - 2), generator=generator)}


def enable_checkpointing(model: PreTrainedModel, use_reentrant: bool) -> None:
    """Turns activation checkpointing on, by the name that it has in the installed Transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def require_one_graph(family: str) -> None:
    """Skips a test with `fullgraph=True` if the model cannot be compiled so with any attention."""
    if family == "marian" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("absent: before Transformers 5.23 layer drop breaks the graph of Marian")
