"""The translation recipe on files of every type, and without arguments."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BertConfig

from .recipe_runs import NO_EVALUATION, error_line, load, run_program


pytestmark = pytest.mark.xdist_group("translation")
FINE_TUNING = ["--max_steps", "2", "--max_eval_samples", "4", "--max_length", "12"]
QUICK = ["--num_layers", "1", *FINE_TUNING]
PAIRS = [(f"{number} cats", f"{number} Katzen") for number in range(2, 32)]


def write_lines(folder: Path, name: str, pairs: list[tuple[str, str]]) -> list[str]:
    for language, texts in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
        (folder / f"{name}.{language}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return [f"--{name}_file", str(folder / f"{name}.en.txt"), f"--{name}_target_file", str(folder / f"{name}.de.txt")]


def write_table(folder: Path, name: str, pairs: list[tuple[str, str]], ending: str) -> list[str]:
    dataset = Dataset.from_dict(dict(zip(("en", "de"), map(list, zip(*pairs, strict=True)), strict=True)))
    path = folder / f"{name}.{ending}"
    {"csv": dataset.to_csv, "json": dataset.to_json, "jsonl": dataset.to_json, "parquet": dataset.to_parquet}[ending](
        str(path), **({"lines": False, "orient": "records"} if ending == "json" else {})
    )
    return [f"--{name}_file", str(path), *COLUMNS]


def write_nested(folder: Path, name: str, pairs: list[tuple[str, str]]) -> list[str]:
    rows = [json.dumps({"translation": {"en": source, "de": target}}) for source, target in pairs]
    (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return [f"--{name}_file", str(folder / f"{name}.jsonl"), *COLUMNS]


COLUMNS = ["--source_column", "en", "--target_column", "de"]
WRITERS: dict[str, Callable[[Path, str, list[tuple[str, str]]], list[str]]] = {
    **{
        ending: lambda folder, name, pairs, ending=ending: write_table(folder, name, pairs, ending)
        for ending in ("csv", "json", "jsonl", "parquet")
    },
    "nested": write_nested,
    "txt": write_lines,
}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    return load("translation", monkeypatch)


@pytest.fixture
def checkpoint(short_run: Callable[[str], Path]) -> Path:
    """A small Marian with its tokenizer, saved by the recipe."""
    return short_run("translation")


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def translate(folder: Path, texts: list[str]) -> list[str]:
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        generated = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), max_length=64)
    return [text.strip() for text in tokenizer.batch_decode(generated, skip_special_tokens=True)]


@pytest.mark.slow
def test_shortened_run_without_data_translates(tmp_path: Path) -> None:
    """Half of the run without arguments, with a single pass, which takes half the time again."""
    flags = ["--num_train_epochs", "1.5", "--consistency_weight", "0", "--max_eval_samples", "100"]
    printed = run_program("translation", tmp_path, *flags)
    folder = tmp_path / "runs" / "translation"
    metrics = read(folder)
    assert metrics["eval_bleu"] > metrics["copy_bleu"] + 40
    assert metrics["eval_chrf"] > metrics["copy_chrf"] + 15
    assert f"{metrics['eval_bleu']:.1f} (copying the source: {metrics['copy_bleu']:.1f})" in printed
    # The folder translates without the recipe, and unseen text: the data has no date in that year.
    assert translate(folder, ["March 5, 2081"]) == ["5. März 2081"]


def test_held_out_phrases_are_not_in_the_training_data(recipe: ModuleType) -> None:
    data = recipe.load_pairs(recipe.TranslationDataArguments(), recipe.cldr_pairs)
    train, validation = ([set(data[split][name]) for name in ("source", "target")] for split in data)
    for seen, unseen in zip(train, validation, strict=True):
        assert not seen & unseen
    numbers = [{text.split()[0] for text in split[0] if text[0].isdigit()} for split in (train, validation)]
    assert len(numbers[1]) > 300
    assert not numbers[0] & numbers[1]
    lists = [
        {frozenset(text.replace(", and ", ", ").replace(" and ", ", ").split(", ")) for text in split[0]}
        for split in (train, validation)
    ]
    assert not lists[0] & lists[1]


@pytest.mark.parametrize("kind", WRITERS)
def test_local_files(recipe: ModuleType, tmp_path: Path, kind: str) -> None:
    flags = [*WRITERS[kind](tmp_path, "train", PAIRS[:20]), *WRITERS[kind](tmp_path, "validation", PAIRS[20:])]
    # Only the two files of lines differ from a table in more than how it is loaded.
    if kind in ("csv", "txt"):
        recipe.main([*flags, *QUICK, "--vocab_size", "300", "--output_dir", str(tmp_path / "out")])
        metrics = read(tmp_path / "out")
        assert (metrics["train_samples"], metrics["eval_samples"]) == (20, 4)
    arguments = recipe.TranslationDataArguments(
        **{name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    )
    data = recipe.load_pairs(arguments, recipe.cldr_pairs)
    for split, pairs in (("train", PAIRS[:20]), ("validation", PAIRS[20:])):
        columns = (data[split][arguments.source_column], data[split][arguments.target_column])
        assert list(zip(*columns, strict=True)) == pairs


def test_repeated_source_is_not_held_out(recipe: ModuleType, tmp_path: Path) -> None:
    flags = write_lines(tmp_path, "train", PAIRS + PAIRS)
    arguments = recipe.TranslationDataArguments(train_file=flags[1], train_target_file=flags[3])
    data = recipe.load_pairs(arguments, recipe.cldr_pairs)
    assert len(data["train"]) + len(data["validation"]) == len(PAIRS)


def test_model_folder_is_fine_tuned(recipe: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--model_name_or_path", str(checkpoint), *write_table(tmp_path, "train", PAIRS, "csv"), *FINE_TUNING]
    recipe.main([*flags, *NO_EVALUATION, "--learning_rate", "0", "--output_dir", str(tmp_path / "out")])
    before, after = (AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in (checkpoint, tmp_path / "out"))
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    tokenizers = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (checkpoint, tmp_path / "out")]
    assert tokenizers[0] == tokenizers[1]


def test_source_prefix_is_trained_on(recipe: ModuleType, checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    data = datasets.DatasetDict(train=Dataset.from_dict({"source": ["2 cats"], "target": ["2 Katzen"]}))
    arguments = recipe.TranslationModelArguments(source_prefix=">>deu<< ")
    row = recipe.tokenize(data, tokenizer, arguments, recipe.TranslationDataArguments())["train"][0]
    assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == ">>deu<< 2 cats"
    assert tokenizer.decode(row["labels"]) == "2 Katzen</s>"


def test_scores_are_those_of_sacrebleu(recipe: ModuleType) -> None:
    assert recipe.scores(["a b c d e"], ["a b c d e"]) == pytest.approx({"bleu": 100.0, "chrf": 100.0})
    # The first half of the words: all precisions are 1, the brevity penalty is exp(1 - 8/4).
    assert recipe.scores(["a b c d"], ["a b c d e f g h"])["bleu"] == pytest.approx(100 * 2.718281828**-1)


def test_evaluation_without_translating_gives_the_loss(recipe: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--model_name_or_path", str(checkpoint), "--do_train", "false", "--predict_with_generate", "false"]
    recipe.main([*flags, *FINE_TUNING, "--output_dir", str(tmp_path)])
    metrics = read(tmp_path)
    assert metrics["eval_loss"] > 0 and "eval_bleu" not in metrics


def test_consistency_arguments_reach_the_trainer(recipe: ModuleType, tmp_path: Path) -> None:
    flags = [*write_lines(tmp_path, "train", PAIRS), *QUICK, "--vocab_size", "300", "--logging_steps", "1"]
    for weight, is_logged in (("0.5", True), ("0", False)):
        folder = tmp_path / weight
        recipe.main([*flags, *NO_EVALUATION, "--consistency_weight", weight, "--output_dir", str(folder)])
        state = json.loads(next(folder.glob("checkpoint-*/trainer_state.json")).read_text())
        assert any("consistency_loss" in entry for entry in state["log_history"]) == is_logged


def test_bad_input_ends_in_one_line(
    recipe: ModuleType, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines, table = write_lines(tmp_path, "train", PAIRS), write_table(tmp_path, "train", PAIRS, "csv")
    (tmp_path / "short.txt").write_text("2 Katzen\n")
    gaps = tmp_path / "gaps.jsonl"
    gaps.write_text('{"source": "2 cats", "target": null}\n{"source": "3 cats", "target": "3 Katzen"}\n')
    not_seq2seq = tmp_path / "bert"
    shutil.copytree(checkpoint, not_seq2seq)
    BertConfig().save_pretrained(not_seq2seq)
    cases = [
        ([*lines[:2], "--train_target_file", tmp_path / "short.txt"], "has 30 lines and"),
        (lines[2:], "--train_file is missing"),
        ([*lines, *lines[:1], lines[1], "--validation_file", lines[1]], "--validation_target_file is missing"),
        ([*lines, "--dataset_name", "some/data"], "give one of them"),
        ([*lines[:2], "--train_target_file", "nowhere.txt"], "--train_target_file: expected an existing path"),
        (lines[:2], "--source_column: the train data has no column 'source'"),
        (table[:2], "--source_column: the train data has no column 'source'; its columns are en, de"),
        (["--train_file", gaps], "have no text in 'target'"),
        (["--model_name_or_path", not_seq2seq], "BertConfig"),
        (["--consistency_weight", "-1"], "`consistency_weight` must be a finite number >= 0"),
    ]
    for flags, message in cases:
        assert message in error_line(recipe, capfd, *flags, "--output_dir", tmp_path / "out"), flags
        assert not (tmp_path / "out").exists()
