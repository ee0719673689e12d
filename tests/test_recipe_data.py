"""Data for fair comparisons: a test split, training rows and label noise drawn by the seed, and paired runs."""

import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification, AutoTokenizer

from hf_attentiondrop import AttentionDropTrainer, AttentionDropTrainingArguments
from hf_attentiondrop.evaluation.calibration import calibration_metrics, reliability
from hf_attentiondrop.evaluation.classifier import ClassifierEvaluation, predict

from .recipe_runs import error_line, load, read_json


QUICK = ["--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--save_strategy", "no"]
TINY_VIT = ["--num_hidden_layers", "1", "--hidden_size", "8", "--patch_size", "4", "--max_eval_samples", "24", *QUICK]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("image_classification", monkeypatch)


def classified(counts: dict[int, int]) -> DatasetDict:
    """Sorted by class, like folders; `number` tells the rows apart."""
    labels = [label for label, count in counts.items() for _ in range(count)]
    features = Features({"number": Value("int64"), "label": ClassLabel(names=[f"class {label}" for label in counts])})
    train = Dataset.from_dict({"number": range(len(labels)), "label": labels}, features=features)
    return DatasetDict(train=train, validation=train, test=train)


def rows(dataset: Dataset, columns: tuple[str, ...] = ("text",)) -> set[Any]:
    return set(zip(*(map(str, dataset[column]) for column in columns), strict=True))


@pytest.mark.parametrize("name", ["causal_lm", "image_classification", "text_classification", "translation"])
def test_test_fraction_holds_out_rows_before_anything_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(name, monkeypatch)
    types = {"image_classification": "ImageDataArguments", "translation": "TranslationDataArguments"}
    arguments = getattr(recipe, types.get(name, "TextDataArguments"))
    columns = {"image_classification": ("image", "label"), "translation": ("source", "target")}.get(name, ("text",))

    def data(**options: Any) -> DatasetDict:
        if name == "translation":
            return recipe.load_pairs(arguments(**options), recipe.cldr_pairs)
        return recipe.load_data(arguments(**options))

    plain, tested = data(), data(test_fraction=0.25, max_train_samples=50)
    assert list(plain) == ["train", "validation"] and list(tested) == ["train", "validation", "test"]
    total = sum(map(len, plain.values()))
    assert len(tested["test"]) == pytest.approx(total / 4, abs=1)
    assert len(tested["train"]) == 50 and len(tested["validation"]) == pytest.approx(0.2 * 0.75 * total, abs=2)
    other = data(test_fraction=0.25, validation_fraction=0.5)
    assert tested["test"].to_dict() == other["test"].to_dict()
    if name != "image_classification":  # digits repeat
        test, rest = rows(other["test"], columns), rows(other["train"], columns) | rows(other["validation"], columns)
        assert not test & rest
        assert len(test | rest) == len(rows(plain["train"], columns) | rows(plain["validation"], columns))


def test_drawn_rows_depend_on_the_seed_and_have_every_class(images: ModuleType) -> None:
    data = classified({0: 70, 1: 28, 2: 2})

    def draw(count: int | None, seed: int = 0, label_column: str | None = "label") -> DatasetDict:
        arguments = images.ImageDataArguments(train_samples=count)
        return images.draw_training_rows(data, arguments, seed, label_column)

    assert draw(None) is data
    drawn = draw(50)["train"]
    assert drawn["number"][:] == draw(50)["train"]["number"][:] == sorted(drawn["number"])
    assert drawn["number"][:] != draw(50, seed=1)["train"]["number"][:]
    assert Counter(drawn["label"]) == {0: 35, 1: 14, 2: 1}
    assert Counter(draw(3)["train"]["label"]) == {0: 1, 1: 1, 2: 1}
    assert set(draw(20)["train"]["number"]) < set(drawn["number"])
    assert draw(100)["train"].to_dict() == data["train"].to_dict()
    assert draw(50)["validation"] is data["validation"] and draw(50)["test"] is data["test"]
    # Each row of a class is drawn equally often.
    times = Counter(number for seed in range(200) for number in draw(10, seed)["train"]["number"])
    assert times[98] + times[99] == 200 and abs(times[98] - 100) < 40
    assert max(times[number] for number in range(98)) < 45  # expected: 18 to 21

    plain = draw(50, label_column=None)["train"]["number"][:]
    assert len(set(plain)) == 50 and plain == sorted(plain) != draw(50, 1, None)["train"]["number"][:]
    for count, label_column, message in (
        (2, "label", "expected a number from 3, one sample per class, to 100, all training data, got 2"),
        (101, "label", "from 3, one sample per class, to 100, all training data, got 101"),
        (101, None, "expected at most 100, all training data, got 101"),
    ):
        with pytest.raises(ValueError, match=f"--train_samples: .*{message}"):
            draw(count, label_column=label_column)


def test_label_noise_changes_training_labels_alone(images: ModuleType) -> None:
    data = classified({0: 3000, 1: 2000, 2: 1000})

    def noisy(p: float, seed: int = 0, data: DatasetDict = data) -> tuple[np.ndarray, dict[str, Any]]:
        changed, metrics = images.add_label_noise(data, images.ImageDataArguments(label_noise=p), seed)
        assert changed["validation"] is data["validation"] and changed["test"] is data["test"]
        assert changed["train"].features == data["train"].features
        assert changed["train"]["number"][:] == data["train"]["number"][:]
        return np.array(changed["train"]["label"]), metrics

    clean = np.array(data["train"]["label"])
    labels, metrics = noisy(0.3)
    is_changed = labels != clean
    assert metrics == {"label_noise": 0.3, "changed_labels": is_changed.sum()}
    assert is_changed.mean() == pytest.approx(0.3, abs=0.025)  # 4 standard deviations
    for label in range(3):
        for other in {0, 1, 2} - {label}:
            assert np.mean(labels[clean == label] == other) == pytest.approx(0.15, abs=0.05)
    assert (labels == noisy(0.3)[0]).all() and (labels != noisy(0.3, seed=1)[0]).any()
    weaker = noisy(0.1)[0]
    assert (is_changed | (weaker == clean)).all()
    # Of drawn rows, which are a view of the data.
    drawn = images.draw_training_rows(data, images.ImageDataArguments(train_samples=300), 0, "label")
    assert (noisy(0.5, data=drawn)[0] != np.array(drawn["train"]["label"])).mean() == pytest.approx(0.5, abs=0.12)
    assert images.add_label_noise(data, images.ImageDataArguments(), 0) == (data, {})


def test_every_method_sees_the_same_batches(
    images: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[str, int]] = []
    collate = images.collate

    def recording(examples: list[dict[str, Any]], **options: Any) -> Any:
        if len(examples) == 8:  # of training
            seen.extend((hashlib.md5(example["image"]["bytes"]).hexdigest(), example["label"]) for example in examples)
        return collate(examples, **options)

    monkeypatch.setattr(images, "collate", recording)
    batches = []
    for number, flags in enumerate(
        (
            ["--variant", "hard", "--p", "0.3", "--consistency_weight", "0.5"],
            ["--variant", "drophead", "--dropout", "0.2", "--hidden_size", "16"],
            ["--attn_implementation", "gated_attention", "--seed", "0"],
            ["--attn_implementation", "sdpa", "--seed", "1"],
        )
    ):
        seen.clear()
        shared = ["--train_samples", "32", "--label_noise", "0.5", "--test_fraction", "0.9", "--seed", "0"]
        shared += ["--do_eval", "false", "--do_predict", "false", "--num_train_epochs", "2"]
        images.main([*TINY_VIT, *shared, *flags, "--output_dir", str(tmp_path / str(number))])
        batches.append(tuple(seen))
    assert [len(one) for one in batches] == [64] * 4
    assert batches[0] == batches[1] == batches[2] != batches[3]
    assert batches[0][:32] != batches[0][32:] and set(batches[0][:32]) == set(batches[0][32:])
    metrics = [read_json(tmp_path / str(number) / "metrics.json") for number in range(4)]
    assert metrics[0]["changed_labels"] == metrics[2]["changed_labels"] > 0
    assert metrics[0]["train_samples"] == 32 and metrics[0]["test_samples"] > 1000
    assert not any(name.startswith("test_") and name != "test_samples" for name in metrics[0])


def test_tests_an_image_classifier_on_a_folder(images: ModuleType, tmp_path: Path) -> None:
    for split, count in (("train", 20), ("test", 6)):
        for name, dark in (("dark", 60), ("light", 180)):
            (tmp_path / split / name).mkdir(parents=True)
            pixels = np.random.default_rng(0).integers(dark - 60, dark + 60, (count, 8, 8, 3), dtype=np.uint8)
            for number, image in enumerate(pixels):
                PILImage.fromarray(image).save(tmp_path / split / name / f"{number}.png")
    folders = ["--train_dir", str(tmp_path / "train"), "--test_dir", str(tmp_path / "test")]
    small = ["--image_size", "8", "--train_samples", "16", "--label_noise", "0.25"]
    images.main([*TINY_VIT, *folders, *small, "--output_dir", str(tmp_path / "out")])

    metrics = read_json(tmp_path / "out" / "metrics.json")
    counts = [metrics[f"{name}_samples"] for name in ("train", "eval", "test")]
    assert counts == [16, 8, 12] and metrics["label_noise"] == 0.25
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    arguments = images.ImageDataArguments(train_dir=folders[1], test_dir=folders[3])
    processor = images.load_image_processor(images.ImageModelArguments(image_size=8))
    tested = images.load_data(arguments)["test"]
    logits, labels = predict(model, [images.collate(list(tested), processor, arguments)])
    assert metrics["test_accuracy"] == (logits.argmax(-1) == labels).double().mean()
    expected = calibration_metrics(logits, labels)
    assert {name: metrics[f"test_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert all(isinstance(metrics[f"test_{name}"], (float, int)) for name in ("loss", *expected))
    # At the temperature of the validation data, which so few samples may not have.
    args = AttentionDropTrainingArguments(str(tmp_path / "again"), use_cpu=True, remove_unused_columns=False)
    collate = partial(images.collate, processor=processor, arguments=arguments)
    trainer = AttentionDropTrainer(model, args, data_collator=collate)
    evaluation = ClassifierEvaluation({"calibration": {"temperature": 2.0}}, reliability(logits, labels), {}, {})
    again = images.evaluate_classifier_on_test(trainer, tested, evaluation)
    scaled = calibration_metrics(logits / 2, labels)
    assert {name: again[f"test_{name}_after_temperature"] for name in scaled} == pytest.approx(scaled, rel=1e-4)
    assert again["test_brier_score"] == pytest.approx(expected["brier_score"], rel=1e-4)
    # A model without an error there has no temperature, and all metrics nevertheless.
    evaluation = ClassifierEvaluation({"calibration": {}}, reliability(logits, labels), {}, {})
    unscaled = images.evaluate_classifier_on_test(trainer, tested, evaluation)
    assert all(unscaled[f"test_{name}_after_temperature"] == unscaled[f"test_{name}"] for name in scaled)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| Brier score | {metrics['test_brier_score']:.4g} |" in card
    assert "train, tested on test" in card and "| Test | 12 |" in card
    assert "On the test data, 12 samples, measured once, after the training:" in card
    assert "The metrics below are those of the evaluation data." in card
    assert f"Label noise: {metrics['changed_labels']} of the training labels were replaced" in card
    record = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert (record["train_samples"], record["label_noise"]) == (16, 0.25)


def test_tests_a_language_model_on_a_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load("causal_lm", monkeypatch)
    texts = [f"{number} plus {number} is {2 * number}." for number in range(120)]
    for name, part in (("train", slice(80)), ("final", slice(80, 120))):
        (tmp_path / "data").mkdir(exist_ok=True)
        lines = (json.dumps({"text": text}) for text in texts[part])
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "data" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        "  - split: final\n    path: final.jsonl\n---\n"
    )
    flags = ["--dataset_name", str(tmp_path / "data"), "--test_split", "final", "--train_samples", "40"]
    small = ["--num_hidden_layers", "1", "--hidden_size", "16", "--vocab_size", "300", "--block_size", "32"]
    recipe.main([*flags, *small, *QUICK, "--output_dir", str(tmp_path / "out")])
    metrics = read_json(tmp_path / "out" / "metrics.json")
    arguments = recipe.TextDataArguments(dataset_name=str(tmp_path / "data"), test_split="final", block_size=32)
    data = recipe.load_data(arguments)
    assert data["test"]["text"][:] == texts[80:]
    packed = recipe.pack(data, AutoTokenizer.from_pretrained(tmp_path / "out"), arguments)
    assert metrics["test_samples"] == len(packed["test"])
    assert 0 < metrics["test_perplexity"] != metrics["eval_perplexity"]
    assert metrics["test_expected_calibration_error"] > 0
    assert "label_noise" not in metrics


def test_tests_a_translator_on_text_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load("translation", monkeypatch)
    flags = {}
    for split, count in (("train", 20), ("test", 3)):
        for language, flag in (("en", "file"), ("de", "target_file")):
            path = tmp_path / f"{split}.{language}.txt"
            path.write_text("".join(f"{split} {language} {number}\n" for number in range(count)))
            flags[f"{split}_{flag}"] = str(path)
    data = recipe.load_pairs(recipe.TranslationDataArguments(**flags), recipe.cldr_pairs)
    assert [len(data[split]) for split in ("train", "validation", "test")] == [16, 4, 3]
    assert data["test"][0] == {"source": "test en 0", "target": "test de 0"}
    del flags["test_target_file"]
    with pytest.raises(ValueError, match="--test_target_file is missing"):
        recipe.load_pairs(recipe.TranslationDataArguments(**flags), recipe.cldr_pairs)


def test_unusable_test_data_and_draws_are_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train, good, other = (tmp_path / f"{name}.csv" for name in ("train", "good", "other"))
    for path in (train, good):
        path.write_text("text,label\n" + "a word,yes\nanother,no\n" * 20)
    other.write_text("text,label\na word,maybe\n")
    (tmp_path / "folder").mkdir()
    data = ["--train_file", train]
    for name, flags, message in (
        (
            "text_classification",
            [*data, "--test_file", other],
            "the test data has classes that are not in the training data: maybe.",
        ),
        ("text_classification", [*data, "--test_file", train], "--test_file: expected data for the test alone, got"),
        (
            "text_classification",
            [*data, "--validation_file", train],
            "--validation_file: expected data for the evaluation alone, got",
        ),
        ("causal_lm", ["--block_size", 1], "--block_size: expected at least 2, got 1"),
        (
            "text_classification",
            ["--dtype", "bfloat16"],
            "--dtype bfloat16 would have no effect without --model_name_or",
        ),
        (
            "text_classification",
            ["--dtype", "half", "--model_name_or_path", tmp_path],
            "--dtype: expected one of float32, bfloat16, float16, auto, got half",
        ),
        ("text_classification", [*data, "--test_file", tmp_path / "no.csv"], "--test_file: expected an existing path"),
        ("text_classification", ["--test_file", other], "--test_file needs --train_file, which is missing."),
        (
            "text_classification",
            ["--test_split", "test", "--train_split", "all"],
            "--train_split all and --test_split test would have no effect without --dataset_name.",
        ),
        (
            "text_classification",
            [*data, "--test_file", good, "--test_fraction", 0.1],
            "--test_fraction: expected no other test data",
        ),
        (
            "text_classification",
            [*data, "--test_fraction", 1],
            "--test_fraction: expected a share in [0, 1), got 1.0.",
        ),
        (
            "text_classification",
            [*data, "--validation_fraction", 7],
            "--validation_fraction: expected a share in (0, 1), got 7.0.",
        ),
        (
            "text_classification",
            [*data, "--validation_file", good, "--validation_fraction", 0.1],
            "--validation_fraction would have no effect: there are validation data.",
        ),
        (
            "text_classification",
            [*data, "--train_samples", 33],
            "--train_samples: expected a number from 2, one sample per class, to",
        ),
        ("text_classification", [*data, "--train_samples", 0], "--train_samples: expected at least 1, got 0."),
        (
            "text_classification",
            [*data, "--robustness_epsilon", 1],
            "--robustness_epsilon would have no effect",
        ),
        (
            "text_classification",
            [*data, "--robustness_samples", 9],
            "--robustness_samples would have no effect without --evaluate_robustness",
        ),
        (
            "image_classification",
            ["--evaluate_robustness", "--robustness_epsilon", 8],
            "--robustness_epsilon: expected a share of the pixel range, at most 1, got 8.0",
        ),
        (
            "image_classification",
            ["--evaluate_robustness", "--robustness_epsilon", -1],
            "--robustness_epsilon: expected a number above 0, got -1.0.",
        ),
        (
            "text_classification",
            [*data, "--label_noise", 1],
            "--label_noise: expected a probability in [0, 1), got 1.0.",
        ),
        (
            "image_classification",
            ["--test_dir", tmp_path / "folder"],
            "--test_dir needs --train_dir, which is missing.",
        ),
        ("causal_lm", ["--label_noise", 0.1], "unknown argument --label_noise."),
        ("translation", ["--label_noise", 0.1], "unknown argument --label_noise."),
    ):
        line = error_line(load(name, monkeypatch), capfd, *flags, "--output_dir", tmp_path / "out")
        assert message in line
        assert not (tmp_path / "out").exists()
