"""The text recipe on files of every type, on pairs, on its own models, and without arguments."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from sklearn.metrics import f1_score
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EvalPrediction,
    T5Config,
    T5ForSequenceClassification,
)

from .recipe_runs import NO_EVALUATION, error_line, load, run_program


pytestmark = pytest.mark.xdist_group("text_classification")
CLASSES = ["fruit", "tool"]
WORDS = {"fruit": ["apple", "pear", "plum", "fig"], "tool": ["hammer", "saw", "drill", "file"]}
# Without the consistency term, which most tests do not need, steps are cheaper.
FINE_TUNING = ["--max_steps", "2", "--max_eval_samples", "16", "--consistency_weight", "0"]
QUICK = ["--num_hidden_layers", "1", *FINE_TUNING]
COLUMNS = ["--text_column", "note", "--label_column", "kind"]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    return load("text_classification", monkeypatch)


@pytest.fixture
def checkpoint(short_run: Callable[[str], Path]) -> Path:
    """A small BERT with its tokenizer, saved by the recipe."""
    return short_run("text_classification")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A quarter of the run without arguments: its output folder, and what it printed."""
    folder = tmp_path_factory.mktemp("learned")
    flags = ["--num_train_epochs", "4", "--consistency_weight", "1"]
    printed = run_program("text_classification", folder, *flags)
    return folder / "runs" / "text_classification", printed


def rows(count: int = 40) -> list[dict[str, str]]:
    """Texts of two classes, with a comma, a quote and an umlaut."""
    return [
        {"note": f'Nr. {i}, "the {WORDS[kind][i % 4]}" für uns', "reply": f"no {kind}", "kind": kind}
        for i in range(count)
        for kind in (CLASSES[i % 2],)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows with other libraries than the recipe reads them with, if possible."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.mark.slow
def test_shortened_run_without_data_learns(learned: tuple[Path, str]) -> None:
    """It is already well above its baseline."""
    folder, printed = learned
    assert printed.count("runs/text_classification/metrics.json") == 1
    assert "hard p=0.1 k=5 fill=mask" in printed
    metrics = read(folder, "metrics.json")
    assert metrics["eval_accuracy"] > metrics["majority_accuracy"] + 0.15
    assert metrics["eval_macro_f1"] > metrics["majority_macro_f1"] + 0.1
    assert f"{metrics['eval_accuracy']:.4f} (always the most frequent class: {metrics['majority_accuracy']:.4f})" in (
        printed
    )
    history = read(next(folder.glob("checkpoint-*")), "trainer_state.json")["log_history"]
    assert all(entry["consistency_loss"] > 0 for entry in history if "loss" in entry)
    assert yaml.safe_load((folder / "run.yaml").read_text())["consistency_weight"] == 1.0


def test_saved_model_and_tokenizer_give_the_reported_metrics(recipe: ModuleType, checkpoint: Path) -> None:
    metrics = read(checkpoint, "metrics.json")
    held_out = recipe.load_data(recipe.TextDataArguments(max_eval_samples=24))["validation"]
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with torch.no_grad():
        logits = model(**tokenizer(held_out["text"][:], padding=True, truncation=True, return_tensors="pt")).logits
    labels = np.array(held_out["label"])
    assert metrics["eval_accuracy"] == np.mean(logits.argmax(-1).numpy() == labels)
    assert metrics["eval_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-4
    )
    assert model.config.id2label[0] == held_out.features["label"].names[0]


@pytest.mark.slow
def test_tokenizer_is_the_same_in_every_process(checkpoint: Path, learned: tuple[Path, str]) -> None:
    # Each process trains the tokenizer by itself, and so does a resumed run.
    here, there = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (checkpoint, learned[0]))
    assert here == there and len(here) > 1000


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_local_files(recipe: ModuleType, tmp_path: Path, suffix: str) -> None:
    # As in a pattern of names.
    files = [write(tmp_path / f"{name}[1].{suffix}", rows(count)) for name, count in (("train", 40), ("held_out", 12))]
    flags = ["--train_file", str(files[0]), "--validation_file", str(files[1]), *COLUMNS]
    data = recipe.load_data(recipe.TextDataArguments(**{flags[i][2:]: flags[i + 1] for i in range(0, len(flags), 2)}))
    assert data["train"]["note"][:] == [row["note"] for row in rows()]

    assert data["validation"]["note"][:] == [row["note"] for row in rows(12)]
    # From here on the formats do not differ.
    if suffix == "csv":
        recipe.main([*flags, *QUICK, "--output_dir", str(tmp_path / "out")])
        metrics = read(tmp_path / "out", "metrics.json")
        assert (metrics["train_samples"], metrics["eval_samples"], metrics["majority_accuracy"]) == (40, 12, 0.5)
        assert read(tmp_path / "out", "config.json")["label2id"] == {"fruit": 0, "tool": 1}


def test_pairs_of_a_data_set_reach_the_model(recipe: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.parquet", rows())
    arguments = recipe.TextDataArguments(
        dataset_name=str(tmp_path / "data"), text_column="note", text_pair_column="reply", label_column="kind"
    )
    data = recipe.load_data(arguments)
    tokenizer = recipe.load_tokenizer(recipe.TextModelArguments(), arguments, data)
    tokenized = recipe.tokenize(data, tokenizer, arguments)["train"]
    pieces = tokenizer.decode(tokenized[0]["input_ids"]).split(tokenizer.sep_token)
    assert [data["train"][0]["reply"] in piece for piece in pieces] == [False, True, False]
    assert set(tokenized[0]["token_type_ids"]) == {0, 1}


def test_inputs_that_the_model_does_not_take_are_left_out(
    recipe: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = [row["note"] for row in rows()]
    tokenizer = BertTokenizer().train_new_from_iterator(texts, 100, show_progress=False)
    assert "token_type_ids" in tokenizer(texts[0])
    tokenizer.save_pretrained(tmp_path / "model")
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=16, n_heads=2, n_layers=1, hidden_dim=32)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    files = ["--model_name_or_path", str(tmp_path / "model"), "--train_file", str(write(tmp_path / "a.csv", rows()))]
    steps = ["--max_steps", "2", "--max_length", "6", "--output_dir", str(tmp_path / "out")]
    recipe.main([*files, *COLUMNS, *steps])
    assert read(tmp_path / "out", "metrics.json")["calibration"]["brier_score"] > 0
    # Each of these texts is longer.
    assert "--max_length 6: 32 of 32 rows in train, 8 of 8 rows in validation have" in capfd.readouterr().err


def test_model_folder_is_fine_tuned_for_other_classes(recipe: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    first, second = checkpoint, tmp_path / "second"
    file = write(tmp_path / "train.csv", rows())
    flags = ["--model_name_or_path", str(first), "--train_file", str(file), *COLUMNS, "--max_length", "32"]
    recipe.main([*flags, *FINE_TUNING, *NO_EVALUATION, "--learning_rate", "0", "--output_dir", str(second)])
    before, after = (AutoModelForSequenceClassification.from_pretrained(folder) for folder in (first, second))
    weights = after.bert.state_dict()
    assert after.num_labels == 2 < before.num_labels
    assert all(torch.equal(value, weights[name]) for name, value in before.bert.state_dict().items())
    assert AutoTokenizer.from_pretrained(second).get_vocab() == AutoTokenizer.from_pretrained(first).get_vocab()
    # Transformers' default for fine-tuning, not the one for training from scratch.
    assert "weight_decay" not in yaml.safe_load((second / "run.yaml").read_text())


def saved_classifier(checkpoint: Path, folder: Path, names: list[str], predicted: str) -> Path:
    """A copy of the checkpoint with a head that predicts one class, in bfloat16."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("checkpoint-*", "plots", "*.safetensors"))
    config = AutoConfig.from_pretrained(checkpoint, id2label=dict(enumerate(names)))
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data[names.index(predicted)] = 9.0
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("names", [["tool", "fruit"], ["tool", "other", "fruit"]])
def test_saved_classifier_keeps_its_classes(
    recipe: ModuleType, checkpoint: Path, tmp_path: Path, names: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    model = saved_classifier(checkpoint, tmp_path / "model", names, "tool")
    files = [write(tmp_path / "train.csv", rows()), write(tmp_path / "tools.csv", rows()[1::2])]
    assert {row["kind"] for row in rows()[1::2]} == {"tool"}
    flags = ["--train_file", str(files[0]), "--validation_file", str(files[1]), *COLUMNS, "--max_length", "32"]
    evaluation = ["--model_name_or_path", str(model), "--do_train", "false", *flags]
    recipe.main([*evaluation, "--output_dir", str(tmp_path / "out")])
    assert read(tmp_path / "out", "metrics.json")["eval_accuracy"] == 1.0

    others = write(tmp_path / "others.csv", [{**row, "kind": f"{row['kind']}s"} for row in rows()])
    line = error_line(
        recipe, capfd, *evaluation[:4], "--train_file", others, *COLUMNS, "--output_dir", tmp_path / "others"
    )
    assert "--label_column: 'kind' has classes that the model does not know, fruits, tools; it knows tool" in line
    numbers = write(tmp_path / "numbers.csv", [{**row, "kind": names.index(row["kind"])} for row in rows()])
    numbered = [
        "--train_file",
        str(numbers),
        *COLUMNS,
        "--max_length",
        "32",
        "--output_dir",
        str(tmp_path / "numbered"),
    ]
    recipe.main([*evaluation[:4], *numbered])
    assert read(tmp_path / "numbered", "metrics.json")["eval_accuracy"] == 0.5
    encoder = tmp_path / "encoder"
    shutil.copytree(model, encoder)
    AutoModelForSequenceClassification.from_pretrained(model).bert.save_pretrained(encoder)
    line = error_line(
        recipe, capfd, *["--model_name_or_path", encoder, *evaluation[2:]], "--output_dir", tmp_path / "others"
    )
    assert "would be initialized at random" in line


def test_a_classifier_that_is_trained_further_keeps_its_classes(recipe: ModuleType) -> None:
    data = DatasetDict(train=Dataset.from_dict({"note": ["fig", "saw", "file"], "kind": ["fruit", "tool", "tool"]}))
    saved = BertConfig(id2label={0: "tool", 1: "fruit"})
    train = recipe.encode_labels(data, "kind", saved)["train"]
    assert train["kind"][:] == [1, 0, 0] and train.features["kind"].names == ["tool", "fruit"]
    others = recipe.encode_labels(data, "kind", BertConfig(id2label={0: "x", 1: "y"}))["train"]
    assert others["kind"][:] == [0, 1, 1] and others.features["kind"].names == ["fruit", "tool"]


def test_half_precision_is_trained_in_float32_and_an_earlier_model_goes(
    recipe: ModuleType, checkpoint: Path, tmp_path: Path
) -> None:
    model = saved_classifier(checkpoint, tmp_path / "model", CLASSES, "tool")
    flags = ["--model_name_or_path", str(model), "--train_file", str(write(tmp_path / "train.csv", rows())), *COLUMNS]
    flags += [*FINE_TUNING, *NO_EVALUATION, "--max_length", "32", "--output_dir", str(tmp_path / "out")]
    recipe.main(flags)
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.float32
    recipe.main([*flags, "--dtype", "auto", "--overwrite_output_dir"])
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    recipe.main([*flags, "--save_model", "false", "--overwrite_output_dir"])
    assert (tmp_path / "out" / "metrics.json").exists() and not (tmp_path / "out" / "model.safetensors").exists()


def test_consistency_arguments_reach_the_trainer(recipe: ModuleType, tmp_path: Path) -> None:
    losses = {}
    for weight in ("0", "50"):
        folder = tmp_path / weight
        flags = ["--consistency_weight", weight, "--consistency_divergence", "js", "--logging_steps", "1"]
        recipe.main([*QUICK, *flags, *NO_EVALUATION, "--save_strategy", "steps", "--output_dir", str(folder)])
        losses[weight] = read(folder / "checkpoint-2", "trainer_state.json")["log_history"][0]
    assert "consistency_loss" not in losses["0"]
    entry = losses["50"]
    assert entry["loss"] == pytest.approx(entry["task_loss"] + 50 * entry["consistency_loss"], rel=1e-3)


def test_plain_attention_leaves_an_ordinary_configuration(recipe: ModuleType, tmp_path: Path) -> None:
    recipe.main([*QUICK, *NO_EVALUATION, "--attn_implementation", "sdpa", "--output_dir", str(tmp_path)])
    assert "attention_drop" not in read(tmp_path, "config.json")
    assert AutoConfig.from_pretrained(tmp_path).hidden_dropout_prob > 0


def test_metrics_of_known_predictions(recipe: ModuleType) -> None:
    generator = np.random.default_rng(0)
    labels, logits = generator.integers(0, 3, 200), 2 * generator.normal(size=(200, 3))
    probabilities = torch.softmax(torch.tensor(logits), -1).numpy()
    confidence, predicted = probabilities.max(-1), probabilities.argmax(-1)
    error = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            gap = abs(confidence[inside].mean() - (predicted == labels)[inside].mean())
            error += inside.mean() * gap
    metrics = recipe.classification_metrics(EvalPrediction(logits, labels))
    assert metrics["accuracy"] == np.mean(predicted == labels)
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert metrics["expected_calibration_error"] == pytest.approx(error, abs=1e-12)
    sure = EvalPrediction(1e4 * np.eye(3)[labels], labels)
    assert recipe.classification_metrics(sure) == {"accuracy": 1, "macro_f1": 1, "expected_calibration_error": 0}


def test_training_passages_do_not_contain_held_out_ones(recipe: ModuleType) -> None:
    from shared.documentation import word_ngrams

    data = recipe.load_data(recipe.TextDataArguments())
    seen = set().union(*map(word_ngrams, data["train"]["text"]))
    assert max(len(word_ngrams(text) & seen) / len(word_ngrams(text)) for text in data["validation"]["text"]) < 0.5
    counts = np.bincount(data["train"]["label"])
    assert len(counts) >= 6 and counts.min() >= 30
    assert set(data["validation"]["label"]) == set(range(len(counts)))


def test_bad_data_ends_in_one_line(recipe: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train = write(tmp_path / "train.csv", rows())
    other = write(tmp_path / "other.jsonl", rows())
    gaps = write(tmp_path / "gaps.jsonl", [{"note": None, "kind": "fruit"}, *rows()])
    unseen = write(tmp_path / "unseen.csv", [{"note": "a", "reply": "b", "kind": "animal"}])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"note": "a"')
    notes = shutil.copy(train, tmp_path / "notes.docx")
    cases = [
        (["--train_file", tmp_path / "nowhere.csv"], "--train_file: expected an existing path"),
        (["--train_file", train, "--validation_file", tmp_path / "no.csv"], "--validation_file: expected an existing"),
        (["--train_file", notes], "--train_file: expected a file that ends in .csv"),
        (["--train_file", train, "--validation_file", other], "--validation_file: expected a .csv file"),
        (["--train_file", broken], "broken.jsonl"),
        (["--train_file", train, "--dataset_name", tmp_path], "give one of them"),
        (["--validation_file", train], "--train_file, which is missing"),
        (["--train_file", train], "--text_column: the train data has no column 'text'; its columns are note"),
        (["--train_file", train, *COLUMNS, "--text_pair_column", "answer"], "--text_pair_column: the train data has"),
        (["--train_file", train, *COLUMNS[:2], "--label_column", "class"], "--label_column: the train data has no"),
        (["--train_file", gaps, *COLUMNS], "--text_column: 1 rows of the train data have no text in 'note'"),
        (["--train_file", train, "--validation_file", unseen, *COLUMNS], "not in the training data: animal"),
    ]
    for flags, message in cases:
        assert message in error_line(recipe, capfd, *flags, "--output_dir", tmp_path / "out"), flags
        assert not (tmp_path / "out").exists()


def test_max_length_above_the_limit_of_the_model_is_an_error(
    recipe: ModuleType, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_name_or_path", checkpoint, "--max_length", "65", "--output_dir", tmp_path / "out"]
    assert "--max_length: the model takes 64 tokens, got 65" in error_line(recipe, capfd, *flags)


def test_model_that_cannot_be_attacked_is_an_error_before_training(
    recipe: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = recipe.train_encoder_tokenizer([row["note"] for row in rows()], 300, 32)
    config = T5Config(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=1, vocab_size=len(tokenizer))
    for saved in (T5ForSequenceClassification(config), tokenizer):
        saved.save_pretrained(tmp_path / "model")
    file = write(tmp_path / "train.csv", rows())
    flags = ["--model_name_or_path", tmp_path / "model", "--train_file", file, *COLUMNS, "--max_length", "32"]
    line = error_line(recipe, capfd, *flags, "--evaluate_robustness", "--output_dir", tmp_path / "out")
    assert "--evaluate_robustness: expected a classifier that takes embeddings instead of token ids, got T5" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_words_such_as_none_are_texts(recipe: ModuleType, tmp_path: Path, ending: str) -> None:
    words = ["nan", "None", "NA", "null"]
    file = write(tmp_path / f"train{ending}", [{"note": words[i % 4], "kind": CLASSES[i // 4 % 2]} for i in range(40)])
    arguments = recipe.TextDataArguments(train_file=str(file), text_column="note", label_column="kind")
    data = recipe.load_data(arguments)
    assert {text for split in data.values() for text in split["note"]} == set(words)
