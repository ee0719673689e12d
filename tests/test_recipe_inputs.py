"""Unusable data and models are one-line errors before anything is written; unusual but usable ones work."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from .recipe_runs import GROUPED_NAMES, error_line, load


QUICK = ["--max_steps", "1", "--max_eval_samples", "8", "--consistency_weight", "0"]
LENGTHS = {"causal_lm": ["--block_size", "64"], "text_classification": ["--max_length", "32"]}
SMALL_IMAGES = ["--image_size", "8", "--patch_size", "4", "--num_hidden_layers", "1", *QUICK]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def with_weights(checkpoint: Path, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy of a checkpoint with other weights."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    weights = change(load_file(checkpoint / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", GROUPED_NAMES)
def test_unusable_weights_are_errors(
    name: str,
    short_run: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = load(name, monkeypatch)
    checkpoint = short_run(name)
    cut = with_weights(checkpoint, tmp_path / "cut", dict)
    contents = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").unlink()
    (cut / "model.safetensors").write_bytes(contents[: len(contents) // 2])
    wrapped = with_weights(
        checkpoint, tmp_path / "wrapped", lambda weights: {f"_orig_mod.{key}": weights[key] for key in weights}
    )
    short = with_weights(
        checkpoint,
        tmp_path / "short",
        lambda weights: {
            key: value for key, value in weights.items() if "layers.0." not in key and "layer.0." not in key
        },
    )
    junk = with_weights(checkpoint, tmp_path / "junk", dict)
    (junk / "config.json").write_text("{")
    for folder, message in (
        (cut, "--model_name_or_path: expected the model's weights in '.*', and they cannot be read: SafetensorError"),
        (wrapped, "they would be initialized at random. The file has names with '_orig_mod.' in front"),
        (short, "they would be initialized at random. Name a checkpoint that holds them"),
        (junk, "JSON" if name in ("causal_lm", "translation") else "--model_name_or_path: expected the model's own"),
    ):
        flags = ["--model_name_or_path", folder, *QUICK, *LENGTHS.get(name, [])]
        line = error_line(recipe, capfd, *flags, "--output_dir", tmp_path / "out")
        assert all(part in line for part in message.split(".*")), line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in GROUPED_NAMES if "image_classification" not in name.values])
def test_unusable_tokenizers_are_errors(
    name: str,
    short_run: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = load(name, monkeypatch)
    junk, other = (with_weights(short_run(name), tmp_path / part, dict) for part in ("junk", "other"))
    (junk / "tokenizer.json").write_text("{}")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for token in ("e", "a"):
        vocabulary[token] = 100_000 + vocabulary[token]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for folder, message in (
        (junk, "--model_name_or_path: expected the model's own Tokenizer in"),
        (other, "for which the model has embeddings, got token 100"),
    ):
        flags = ["--model_name_or_path", folder, *QUICK, *LENGTHS.get(name, [])]
        line = error_line(recipe, capfd, *flags, "--output_dir", tmp_path / "out")
        assert message in line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "contents"),
    [("a.csv", "text,label\ncafé,1\nthé,0\n"), ("b.jsonl", '{"text": "café", "label": 1}\n'), ("c.txt", "café\n")],
)
def test_text_in_another_encoding_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, contents: str
) -> None:
    recipe = load("causal_lm", monkeypatch)
    bad, good = tmp_path / f"bad_{name}", tmp_path / f"good_{name}"
    bad.write_bytes(contents.encode("latin-1"))
    good.write_bytes(contents.encode())
    for flags, flag in (
        (["--train_file", bad], "--train_file"),
        (["--train_file", good, "--validation_file", bad], "--validation_file"),
    ):
        line = error_line(recipe, capfd, *flags, "--output_dir", tmp_path / "out")
        assert f"error: {flag}: '{bad}' cannot be loaded: it is not in UTF-8: " in line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("suffix", "labels", "row"),
    [
        ("csv", ["1", "", "0", "1", "0"], 1),
        ("jsonl", ["a", "b", "", "a", "b"], 2),
        ("csv", ["a", "b", "a", " ", "b"], 3),
    ],
)
def test_empty_label_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    suffix: str,
    labels: list[str],
    row: int,
) -> None:
    recipe = load("text_classification", monkeypatch)
    file = tmp_path / f"train.{suffix}"
    lines = {
        "csv": ["text,label", *(f"text {number},{label}" for number, label in enumerate(labels))],
        "jsonl": [json.dumps({"text": f"text {number}", "label": label}) for number, label in enumerate(labels)],
    }
    file.write_text("\n".join(lines[suffix]) + "\n")
    line = error_line(recipe, capfd, "--train_file", file, "--output_dir", tmp_path / "out")
    assert (
        f"--label_column: 'label' has samples without a label, as test splits often do, the first in row {row} "
        in line
    )
    assert not (tmp_path / "out").exists()


def pictures() -> list[tuple[PILImage.Image, int]]:
    bunch = load_digits()
    return [
        (PILImage.fromarray(np.uint8(image * (255 / 16))).resize((32, 32)), int(digit))
        for image, digit in zip(bunch.images[:80], bunch.target[:80], strict=True)
        if digit < 3
    ]


def test_broken_image_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load("image_classification", monkeypatch)
    folder = tmp_path / "images"
    for number, (image, digit) in enumerate(pictures()):
        (folder / str(digit)).mkdir(parents=True, exist_ok=True)
        image.save(folder / str(digit) / f"{number}.jpg")
    broken = folder / "1" / "1.jpg"
    contents = broken.read_bytes()
    for cut in (contents[: len(contents) // 2], b"no image", b""):
        broken.write_bytes(cut)
        line = error_line(recipe, capfd, "--train_dir", folder, *SMALL_IMAGES, "--output_dir", tmp_path / "out")
        assert "--image_column: the " in line and f"of 'image', counted from 0, {broken}: " in line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("storage", ["image", "struct", "bytes"])
def test_images_stored_as_bytes_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, storage: str) -> None:
    recipe = load("image_classification", monkeypatch)
    files = []
    for image, _ in pictures():
        file = BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    column, values = {
        "image": (datasets.Image(), [{"bytes": file, "path": None} for file in files]),
        "struct": (
            {"bytes": Value("binary"), "path": Value("string")},
            [{"bytes": file, "path": "a.png"} for file in files],
        ),
        "bytes": (Value("binary"), files),
    }[storage]
    rows = Dataset.from_dict(
        {"image": values, "label": [digit for _, digit in pictures()]},
        features=Features({"image": column, "label": Value("int64")}),
    )
    if storage != "image":
        rows = rows.with_format(None)
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    arguments = recipe.ImageDataArguments(dataset_name=str(tmp_path / "data"))
    data = recipe.load_data(arguments)
    processor = recipe.load_image_processor(recipe.ImageModelArguments(image_size=8))
    batch = recipe.collate([data["train"][0]], processor, arguments)
    assert batch["pixel_values"].shape == (1, 3, 8, 8) and batch["pixel_values"].std() > 0.1
    if storage == "bytes":
        flags = ["--dataset_name", str(tmp_path / "data"), *SMALL_IMAGES, "--output_dir", str(tmp_path / "out")]
        recipe.main(flags)
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["eval_samples"] == 6
