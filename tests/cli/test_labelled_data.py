"""Samples reach the model unchanged, and an error names the sample that cannot be read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, GPT2Config, PreTrainedTokenizerFast, ViTConfig, ViTImageProcessorPil

from hf_attentiondrop.cli.labelled_data import labelled_batches, load_labelled


PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})
VIT, BERT = ViTConfig(), BertConfig(vocab_size=10)
TEXT, IMAGE = {"--text_column": "text"}, {"--image_column": "image"}


def tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special)


def texts(*rows: str | None) -> Dataset:
    return Dataset.from_dict({"text": rows}, features=Features({"text": Value("string")}))


def images(*rows: Any) -> Dataset:
    return Dataset.from_dict({"image": rows}, features=Features({"image": Image()}))


def test_samples_come_in_the_order_asked_for() -> None:
    batches = labelled_batches(
        texts("a", "a b", "b"), [7, 8, 9], TEXT, BERT, tokenizer(pad_token="[PAD]"), 2, [2, 0, 1]
    )
    assert [batch["input_ids"].tolist() for batch in batches] == [[[3], [2]], [[2, 3]]]
    assert [batch["labels"].tolist() for batch in batches] == [[9, 7], [8]]


@pytest.mark.parametrize(
    ("special", "padding", "sizes"),
    [({"pad_token": "[PAD]"}, 0, [2, 1]), ({}, 0, [1] * 3), ({}, None, [1] * 3), ({"pad_token": "[PAD]"}, 5, [1] * 3)],
)
def test_texts_are_padded_only_with_the_padding_token_of_the_model(
    special: dict[str, str], padding: int | None, sizes: list[int]
) -> None:
    config = GPT2Config(vocab_size=10, pad_token_id=padding)
    batches = list(labelled_batches(texts("a b", "a", "b"), [0, 1, 0], TEXT, config, tokenizer(**special), 2))
    assert [len(batch["labels"]) for batch in batches] == sizes


def test_pixels_of_one_channel() -> None:
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 257
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    config = ViTConfig(num_channels=1)
    rows = images(PILImage.fromarray(grey), PILImage.fromarray(np.uint8(grey // 257)))
    (batch,) = labelled_batches(rows, [0, 1], IMAGE, config, processor)
    expected = torch.arange(64.0).view(1, 8, 8) / 255 * 2 - 1
    assert torch.allclose(batch["pixel_values"], expected.expand(2, 1, 8, 8), atol=1e-6)


def test_a_sample_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    good, broken, cut = tmp_path / "good.png", tmp_path / "broken.png", tmp_path / "cut.png"
    PILImage.effect_noise((32, 32), 50).save(good)
    broken.write_bytes(b"no image")
    cut.write_bytes(good.read_bytes()[:-200])
    wide = tmp_path / "wide.tiff"
    PILImage.new("F", (4, 4)).save(wide)
    cases = [
        (
            images(str(good), str(broken)),
            f"--image_column: row 1 of 'image', counted from 0, {broken}: cannot identify",
        ),
        (images(str(cut)), f"--image_column: row 0 of 'image', counted from 0, {cut}: "),
        (images(str(good), str(wide)), f"row 1 of 'image', counted from 0, {wide}: expected an image of 8 or 16 bits"),
        (images(str(good), None), "--image_column: row 1 of 'image', counted from 0: expected an image, got None"),
        (images(str(tmp_path / "none.png")), "none.png: "),
    ]
    for rows, message in cases:
        with pytest.raises(ValueError) as error:
            list(labelled_batches(rows, [0] * len(rows), IMAGE, VIT, PROCESSOR))
        assert message in str(error.value) and str(error.value).endswith("measured: repair it, or remove it.")
    with pytest.raises(ValueError, match="--text_column: row 2 of 'text', counted from 0: expected a text, got None"):
        list(labelled_batches(texts("a", "b", None), [0, 1, 0], TEXT, BERT, tokenizer(pad_token="[PAD]"), 1, [0, 2]))


def test_other_columns_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    values = {"text": ["a"], "image": [PILImage.new("L", (8, 8))], "other": [str(tmp_path / "broken.png")]}
    rows = Dataset.from_dict(values, features=Features({"text": Value("string"), "image": Image(), "other": Image()}))
    for columns, processor in ((TEXT, tokenizer()), (IMAGE, PROCESSOR)):
        assert len(list(labelled_batches(rows, [0], columns, BERT, processor))) == 1
    with pytest.raises(ValueError, match="row 0 of 'other'"):
        list(labelled_batches(rows, [0], {"--image_column": "other"}, BERT, PROCESSOR))


def test_columns_that_do_not_fit_are_refused() -> None:
    cases = [
        (
            texts("a"),
            {"--text_pair_column": "other"},
            tokenizer(),
            "--text_pair_column: the data has no column 'other'",
        ),
        (texts("a.png"), {"--image_column": "text"}, PROCESSOR, "--image_column: expected images in 'text', .*string"),
    ]
    for rows, columns, processor, message in cases:
        with pytest.raises(ValueError, match=message):
            labelled_batches(rows, [0], columns, BERT, processor)


def test_tokens_of_another_model_are_refused() -> None:
    config = BertConfig(vocab_size=3)
    with pytest.raises(ValueError, match="token ids below 3, for which the model has embeddings, got token id 3"):
        list(labelled_batches(texts("a", "b"), [0, 1], TEXT, config, tokenizer(pad_token="[PAD]")))
    with pytest.raises(ValueError, match="texts of at least one token"):
        list(labelled_batches(texts(""), [0], TEXT, BERT, tokenizer()))
    with pytest.raises(ValueError, match="texts of at least one token, got ''"):
        list(labelled_batches(texts("a", ""), [0, 1], TEXT, BERT, tokenizer(pad_token="[PAD]")))


def test_a_tokenizer_without_attention_masks() -> None:
    without = tokenizer(pad_token="[PAD]", model_input_names=["input_ids"])
    (batch,) = labelled_batches(texts("a", "b"), [0, 1], TEXT, BERT, without)
    assert set(batch) == {"input_ids", "labels"}


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_words_such_as_none_are_texts(suffix: str, separator: str, tmp_path: Path) -> None:
    rows = [("text", "label"), ("nan", "0"), ("None", "1"), ("NA, n/a", "1"), ("", "0")]
    lines = [separator.join(f'"{cell}"' if "," in cell else cell for cell in row) for row in rows]
    path = tmp_path / f"data[1].{suffix}"
    path.write_text("\n".join(lines) + "\n")
    loaded = load_labelled(str(path))
    assert loaded["text"][:] == ["nan", "None", "NA, n/a", None] and loaded["label"][:] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.csv", b"text,label\n", "'.*a.csv' cannot be loaded: it has no rows"),
        ("b.csv", b"", "it has no rows"),
        ("c.jsonl", b"", "it has no rows"),
        ("d.jsonl", b"\n", "it has no rows"),
        ("e.json", b"[]", "it has no rows"),
        ("f.csv", "text,label\ncafé,1\n".encode("latin-1"), "it is not in UTF-8: .* Save it as UTF-8."),
        ("g.jsonl", '{"text": "café"}\n'.encode("latin-1"), "it is not in UTF-8"),
        ("h.csv", b'text,label\n"a,1\n', "EOF inside string starting at row 1"),
        (
            "i.csv",
            None,
            "^--data: there is no such file or folder here, and as a data set on the Hub '.*i.csv' cannot",
        ),
    ],
)
def test_files_without_samples_are_refused(name: str, contents: bytes | None, message: str, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        load_labelled(str(tmp_path / name))
