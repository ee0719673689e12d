"""The image recipe on PNG files, on a data set on disk, and without arguments."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from transformers import AutoConfig, AutoModelForImageClassification, BertConfig

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.evaluation.pretrained import AutoImageProcessor

from .recipe_runs import NO_EVALUATION, RECIPES, error_line, launch, load, run


pytestmark = pytest.mark.xdist_group("image_classification")
CLASSES = ["nought", "one", "two"]
QUICK = ["--max_steps", "2", "--max_eval_samples", "8"]
SMALL = ["--image_size", "8", "--patch_size", "4", "--num_hidden_layers", "1", *QUICK]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    return load("image_classification", monkeypatch)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PNG files of three digits, in folders at different depths."""
    root = tmp_path_factory.mktemp("images")
    folders = {"train": root / "train", "validation": root / "other" / "place" / "validation"}
    for number, (image, digit) in enumerate(some_digits()):
        folder = folders["train" if number % 4 else "validation"] / CLASSES[digit]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    return folders


@pytest.fixture
def checkpoint(short_run: Callable[[str], Path]) -> Path:
    """A model of ten digits with its image processor, saved by the recipe."""
    return short_run("image_classification")


def some_digits() -> Iterator[tuple[PILImage.Image, int]]:
    bunch = load_digits()
    for image, digit in zip(bunch.images[:120], bunch.target[:120], strict=True):
        if digit < len(CLASSES):
            yield PILImage.fromarray(np.uint8(image * (255 / 16))), int(digit)


def count_images(folder: Path) -> int:
    return len(list(folder.rglob("*.png")))


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def data_set(folder: Path, labels: list, label_type: str) -> Path:
    """A data set on disk with other column names than the recipe expects."""
    images = [image for image, _ in some_digits()]
    features = Features({"img": Image(), "digit": Value(label_type)})
    folder.mkdir()
    Dataset.from_dict({"img": images, "digit": labels}, features=features).to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.slow
def test_shortened_run_without_data_learns(tmp_path: Path) -> None:
    """A quarter of the run without arguments already classifies most digits."""
    result = launch(RECIPES / "image_classification.py", "--num_train_epochs", "5", cwd=tmp_path)
    folder = tmp_path / "runs" / "image_classification"
    metrics = read(folder, "metrics.json")
    assert metrics["eval_accuracy"] >= 0.9
    assert metrics["eval_samples"] == 360
    assert f"{metrics['eval_accuracy']:.4f} (always the most frequent class: 0." in result.stdout
    assert metrics["majority_accuracy"] < 0.2 and "360 held-out images" in result.stdout
    assert "hard p=0.1 k=5 fill=mask" in result.stdout

    # The saved model and processor give the reported accuracy on the raw images, without the recipe.
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    bunch = load_digits()
    images = [PILImage.fromarray(np.uint8(image * (255 / 16))).convert("RGB") for image in bunch.images]
    with torch.no_grad():
        predicted = model.eval()(**processor(images, return_tensors="pt")).logits.argmax(-1).numpy()
    assert np.mean(predicted == bunch.target) > 0.9


def test_image_folders(recipe: ModuleType, folders: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--train_dir", str(folders["train"]), "--validation_dir", str(folders["validation"])]
    recipe.main([*flags, "--image_size", "8", "--patch_size", "4", "--max_steps", "1", "--output_dir", str(tmp_path)])

    metrics, counts = read(tmp_path, "metrics.json"), {name: count_images(folder) for name, folder in folders.items()}
    assert (metrics["train_samples"], metrics["eval_samples"]) == (counts["train"], counts["validation"])
    assert "robustness" not in metrics
    assert set(read(tmp_path, "config.json")["id2label"].values()) == set(CLASSES)


def test_image_folder_without_validation_folder_holds_some_out(
    recipe: ModuleType, folders: dict[str, Path], tmp_path: Path
) -> None:
    flags = ["--train_dir", str(folders["train"]), "--validation_fraction", "0.5", "--max_train_samples", "5"]
    recipe.main([*flags, *SMALL, "--output_dir", str(tmp_path)])
    metrics = read(tmp_path, "metrics.json")
    assert (metrics["train_samples"], metrics["eval_samples"]) == (5, 8)


def test_model_folder_is_fine_tuned_for_other_classes(
    recipe: ModuleType, folders: dict[str, Path], checkpoint: Path, tmp_path: Path
) -> None:
    flags = ["--model_name_or_path", str(checkpoint), "--train_dir", str(folders["train"]), "--learning_rate", "0"]
    recipe.main([*flags, *QUICK, *NO_EVALUATION, "--output_dir", str(tmp_path)])
    before, after = (AutoModelForImageClassification.from_pretrained(folder) for folder in (checkpoint, tmp_path))
    assert after.classifier.out_features == len(CLASSES)
    weights = after.vit.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in before.vit.state_dict().items())
    # Transformers' default for fine-tuning, not the one for training from scratch.
    assert "weight_decay" not in yaml.safe_load((tmp_path / "run.yaml").read_text())


@pytest.mark.parametrize("label_type", ["string", "int64"])
def test_data_set_with_other_columns(recipe: ModuleType, tmp_path: Path, label_type: str) -> None:
    names = CLASSES if label_type == "string" else [70, 8, 9]
    folder = data_set(tmp_path / "data", [names[digit] for _, digit in some_digits()], label_type)
    flags = ["--dataset_name", str(folder), "--image_column", "img", "--label_column", "digit"]
    recipe.main([*flags, *SMALL, *NO_EVALUATION, "--output_dir", str(tmp_path / "out")])
    assert set(read(tmp_path / "out", "config.json")["id2label"].values()) == {str(name) for name in names}


def test_subset_has_every_class(recipe: ModuleType, folders: dict[str, Path]) -> None:
    # Files are sorted by class, so the first ones would all be of one class.
    arguments = recipe.ImageDataArguments(train_dir=str(folders["train"]), max_train_samples=15)
    assert set(recipe.load_data(arguments)["train"]["label"]) == {0, 1, 2}


def test_held_out_digits_do_not_depend_on_the_seed(recipe: ModuleType) -> None:
    held_out = []
    for seed in (1, 2):
        transformers.set_seed(seed)
        held_out.append(recipe.load_data(recipe.ImageDataArguments())["validation"])
    assert held_out[0]["label"] == held_out[1]["label"]
    assert set(held_out[0]["label"]) == set(range(10))


def test_attention_arguments_reach_the_model(recipe: ModuleType, tmp_path: Path) -> None:
    flags = ["--variant", "blur", "--sigma_max", "0.5", "--width", "3", "--layers", "0", "-1"]
    recipe.main([*flags, "--num_hidden_layers", "3", *QUICK, *NO_EVALUATION, "--output_dir", str(tmp_path / "drop")])
    config = AutoConfig.from_pretrained(tmp_path / "drop")
    assert config.attention_drop == AttentionDropConfig(variant="blur", sigma_max=0.5, width=3, layers=[0, -1])

    plain = ["--attn_implementation", "sdpa", *SMALL, *NO_EVALUATION]
    recipe.main([*plain, "--output_dir", str(tmp_path / "plain")])
    assert "attention_drop" not in read(tmp_path / "plain", "config.json")


def test_evaluation_without_training_gives_the_same_accuracy(
    recipe: ModuleType, checkpoint: Path, tmp_path: Path
) -> None:
    flags = ["--model_name_or_path", str(checkpoint), "--do_train", "false", "--max_eval_samples", "24"]
    recipe.main([*flags, "--output_dir", str(tmp_path)])
    metrics, trained = read(tmp_path, "metrics.json"), read(checkpoint, "metrics.json")
    assert metrics["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
    assert not (tmp_path / "model.safetensors").exists()


def test_bad_data_ends_in_one_line(
    recipe: ModuleType,
    folders: dict[str, Path],
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    train, empty, unseen = folders["train"], tmp_path / "empty", tmp_path / "unseen"
    empty.mkdir()
    for name in (*CLASSES, "three"):
        (unseen / name).mkdir(parents=True)
        PILImage.new("RGB", (8, 8)).save(unseen / name / "image.png")
    heights = data_set(tmp_path / "heights", [digit / 2 for _, digit in some_digits()], "float32")
    gaps = data_set(tmp_path / "gaps", [digit or None for _, digit in some_digits()], "int64")
    columns = ["--image_column", "img", "--label_column", "digit"]
    cases = [
        (["--train_dir", tmp_path / "nowhere"], "--train_dir: expected an existing path"),
        (["--train_dir", train, "--validation_dir", tmp_path / "nowhere"], "--validation_dir: expected an existing"),
        (["--train_dir", empty], "it has no rows"),
        (["--train_dir", train / CLASSES[0]], "expected at least two classes"),
        (["--train_dir", train, "--validation_dir", unseen], "classes that are not in the training data: three"),
        (
            ["--train_dir", train, "--label_column", "class"],
            "--label_column: the train data has no column 'class'; its",
        ),
        (["--train_dir", train, "--image_column", "label"], "--image_column: expected images in 'label'"),
        (["--train_dir", train, "--dataset_name", train], "give one of them"),
        (["--remove_unused_columns", "true"], "unknown argument --remove_unused_columns"),
        (["--validation_dir", train], "--train_dir, which is missing"),
        (["--dataset_name", "./nowhere"], "--dataset_name: expected an existing path"),
        (["--dataset_name", "nobody/nothing"], "nobody/nothing"),
        (["--dataset_name", heights, "--validation_split", "test", *columns], "has no split 'test'; it has train"),
        (["--dataset_name", heights, *columns], "expected class names or numbers as labels"),
        (["--dataset_name", gaps, *columns], "'digit' has samples without a label"),
    ]
    for flags, message in cases:
        assert message in error_line(recipe, capfd, *flags, "--output_dir", tmp_path / "out"), flags
        assert not (tmp_path / "out").exists()


def test_bad_model_ends_in_one_line(
    recipe: ModuleType, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    no_processor, no_images = tmp_path / "no_processor", tmp_path / "no_images"
    shutil.copytree(checkpoint, no_processor, ignore=shutil.ignore_patterns("preprocessor_config.json"))
    shutil.copytree(checkpoint, no_images)
    BertConfig().save_pretrained(no_images)
    for folder, message in ((no_processor, "Can't load image processor"), (no_images, "BertConfig")):
        line = error_line(recipe, capfd, "--model_name_or_path", folder, "--output_dir", tmp_path / "out")
        assert message in line
        assert not (tmp_path / "out").exists()


def test_bad_input_ends_a_process_with_code_2(tmp_path: Path) -> None:
    result = run(RECIPES / "image_classification.py", "--p", "2", "--output_dir", tmp_path / "out")
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "`p` must be a probability" in result.stderr


def test_pushing_without_a_login_fails_before_training(
    recipe: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = error_line(recipe, capfd, "--push_to_hub", *SMALL, "--output_dir", tmp_path / "out")
    assert "offline" in line
    unsaved = ("--push_to_hub", "--save_model", "false")
    line = error_line(recipe, capfd, *unsaved, *SMALL, "--output_dir", tmp_path / "out")
    assert "--push_to_hub uploads the trained model, which --save_model false would not write." in line
    assert not (tmp_path / "out").exists()


def test_push_uploads_the_finished_folder(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = []
    monkeypatch.setattr(recipe.AttentionDropTrainer, "init_hf_repo", lambda trainer: None)
    monkeypatch.setattr(
        recipe.AttentionDropTrainer,
        "push_to_hub",
        lambda trainer, *args, **kwargs: uploaded.append({path.name for path in tmp_path.iterdir()}),
    )
    flags = ["--push_to_hub", "--hub_strategy", "end", *SMALL, "--output_dir", str(tmp_path)]
    recipe.main(flags)
    assert {"model.safetensors", "preprocessor_config.json", "metrics.json", "run.yaml"} <= uploaded[-1]
