"""A classifier is loaded with the tokenizer or image processor that it was trained with, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_attentiondrop.cli.checkpoint import load_classifier
from hf_attentiondrop.evaluation.perturbation_space import check_attackable
from hf_attentiondrop.evaluation.pretrained import longest_text


SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
TEXTS = ["a red house", "an old tree"]


def bert(**options: Any) -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**SMALL, vocab_size=60, **options))


def gpt2() -> GPT2ForSequenceClassification:
    return GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=60, n_positions=20))


def t5() -> T5ForSequenceClassification:
    return T5ForSequenceClassification(T5Config(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=1, vocab_size=60))


def bart() -> BartForSequenceClassification:
    layers = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    widths = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return BartForSequenceClassification(BartConfig(**layers, **widths, vocab_size=60))


def roberta() -> RobertaForSequenceClassification:
    config = RobertaConfig(**SMALL, vocab_size=60, max_position_embeddings=20, type_vocab_size=1)
    return RobertaForSequenceClassification(config)


def mpnet() -> MPNetForSequenceClassification:
    return MPNetForSequenceClassification(MPNetConfig(**SMALL, vocab_size=60, max_position_embeddings=20))


def vit(channels: int) -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=channels))


def tokenizer() -> BertTokenizer:
    return BertTokenizer().train_new_from_iterator(TEXTS, 60, show_progress=False)


@pytest.mark.parametrize("model", [bert(), gpt2(), t5(), mpnet()], ids=lambda model: model.config.model_type)
def test_a_model_without_its_tokenizer_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^expected the model's own (tokenizer|Tokenizer) in '.*' ?"):
        load_classifier(str(tmp_path))


def test_a_small_vocabulary_is_accepted(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5, "b": 6}).save_pretrained(
        tmp_path
    )
    assert len(load_classifier(str(tmp_path))[1]) == 7


def test_an_image_classifier_without_its_processor_is_refused(tmp_path: Path) -> None:
    vit(3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^expected the model's own ImageProcessor in .* cannot be loaded"):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "longest"),
    [(bert(max_position_embeddings=20), 20), (gpt2(), 20), (roberta(), 18), (mpnet(), 18)],
    ids=lambda value: getattr(getattr(value, "config", None), "model_type", ""),
)
def test_the_longest_text_has_a_position_for_every_token(model: PreTrainedModel, longest: int) -> None:
    assert longest_text(model) == longest
    ids = torch.full((1, longest), 7)
    assert model(input_ids=ids).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(input_ids=torch.full((1, longest + 1), 7))


def test_the_tokenizer_truncates_to_the_positions_of_the_model(tmp_path: Path) -> None:
    model = roberta()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = load_classifier(str(tmp_path))[1]
    assert loaded.model_max_length == 18
    loaded = tokenizer()
    loaded.model_max_length = 5  # It can be lower than the limit of the model.
    loaded.save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path))[1].model_max_length == 5
    assert longest_text(t5()) == float("inf")


@pytest.mark.parametrize(
    ("channels", "options", "is_good"),
    [
        (3, {}, True),
        (1, {"image_mean": [0.5], "image_std": [0.5]}, True),
        (1, {}, False),
        (1, {"image_mean": [0.5], "image_std": [0.5], "do_convert_rgb": True}, False),
        (4, {"image_mean": [0.5] * 4, "image_std": [0.5] * 4}, False),
    ],
)
def test_model_and_processor_have_the_same_channels(
    channels: int, options: dict[str, Any], is_good: bool, tmp_path: Path
) -> None:
    vit(channels).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, **options).save_pretrained(tmp_path)
    if is_good:
        assert load_classifier(str(tmp_path))[0].config.num_channels == channels
    else:
        with pytest.raises(ValueError, match=f"got a model for {channels} and a ViTImageProcessor"):
            load_classifier(str(tmp_path))


def test_names_that_are_not_models_are_refused(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "model" / "config.json", "is a file, and weights .* Name its folder"),
        (tmp_path / "none", f"there is nothing at '{tmp_path}/none'"),
        (tmp_path / "empty", "has no config.json"),
        ("nobody/nothing", "'nobody/nothing' is no folder here, and cannot be read as one"),
    ]
    for name, message in cases:
        with pytest.raises(ValueError, match=message):
            load_classifier(str(name))


def changed(weights: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    """Weights with a common mistake."""
    if change == "no head":
        return {key: value for key, value in weights.items() if "classifier" not in key}
    if change == "other classes":
        return weights | {"classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)}
    return {change + key: value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no head", "2 are missing, classifier.bias, classifier.weight: they would .* no head before"),
        ("other classes", r"got classifier.bias \(3,\) instead of \(2,\), classifier.weight"),
        (
            "_orig_mod.",
            r"are missing, bert\..*, …: they would .* names with '_orig_mod.' in front, which",
        ),
        ("_orig_mod.module.", "names with '_orig_mod.' and 'module.' in front"),
        ("", None),
    ],
)
def test_randomly_initialized_weights_are_refused(change: str, message: str | None, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = changed(load_file(path), change)
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})
    if message is None:
        assert torch.equal(load_classifier(str(tmp_path))[0].classifier.weight, weights["classifier.weight"])
    else:
        with pytest.raises(ValueError, match=f"^.*{message}"):
            load_classifier(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "contents",
    [None, b"", b"\xff" * 5000, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"],
    ids=["none", "empty", "junk", "pointer"],
)
def test_weights_that_cannot_be_read_are_refused(name: str, contents: bytes | None, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    message = "^expected the model's weights in .*, and they cannot be read: "
    with pytest.raises(ValueError, match=message) as error:
        load_classifier(str(tmp_path))
    assert "git lfs pull" in str(error.value) and "weights_only" not in str(error.value)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    contents = path.read_bytes()
    path.unlink()
    path.write_bytes(contents[: len(contents) // 2])
    with pytest.raises(ValueError, match="cannot be read: SafetensorError, "):
        load_classifier(str(tmp_path))


def test_encoder_decoder_classifiers_cannot_be_attacked() -> None:
    for model in (bert(), gpt2(), vit(3)):
        check_attackable(model)
    for model in (t5(), bart()):
        with pytest.raises(
            ValueError, match=rf"embeddings instead of token ids, got {type(model).__name__}, .* without attacks\."
        ):
            check_attackable(model)
        with pytest.raises(NotImplementedError, match="embeddings"):  # Transformers' own error, in the forward pass.
            model(inputs_embeds=torch.zeros(1, 4, 32))
