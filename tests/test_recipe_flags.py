"""Flags of a recipe: precedence, and settings that would have no effect."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, CTRLConfig, MambaConfig

from hf_attentiondrop import AttentionDropConfig

from .recipe_runs import NO_EVALUATION, error_line, load, read_json


FINE_TUNING = ["--max_steps", "1", "--consistency_weight", "0", *NO_EVALUATION]
QUICK = ["--num_hidden_layers", "1", *FINE_TUNING]
HARD = {"variant": "hard", "p": 0.2, "k": 3}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("text_classification", monkeypatch)


def argument_types(recipe: ModuleType) -> tuple[type, ...]:
    return recipe.TextModelArguments, recipe.TextDataArguments, recipe.TextTrainingArguments


@pytest.mark.parametrize(
    ("settings", "flags", "expected", "left_out"),
    [
        (HARD, ["--attn_implementation", "affine_scaled"], None, "variant, p, k"),
        (HARD, ["--attn_implementation", "affine_scaled", "--p", "0.3"], {"p": 0.3}, "variant, k"),
        ({**HARD, "attn_implementation": "affine_scaled"}, [], HARD, None),
        (HARD, ["--attn_implementation", "attentiondrop", "--p", "0.3"], {**HARD, "p": 0.3}, None),
        (HARD, ["--attn_implementation", "sdpa"], None, "variant, p, k"),
        (
            {**HARD, "attn_implementation": "sdpa", "k": 5},
            ["--attn_implementation", "attentiondrop"],
            {"p": 0.2},
            None,
        ),
        (
            {"attn_implementation": "affine_scaled", "attention_reweighting": {"init": "paper"}, "p": 0.2},
            ["--attn_implementation", "attentiondrop"],
            {"p": 0.2},
            "attention_reweighting",
        ),
        (
            {"attn_implementation": "affine_scaled", "attention_reweighting": {"gate": True}},
            ["--attn_implementation", "attention_sink"],
            None,
            "attention_reweighting",
        ),
        ({**HARD, "layers": [0]}, ["--variant", "blur"], {"variant": "blur", "layers": [0]}, "p, k"),
        ({"variant": "dropkey", "p": 0.4, "axis": "column"}, ["--variant", "hard"], {"variant": "hard"}, "p, axis"),
    ],
)
def test_file_settings_apply_only_to_the_method_of_the_file(
    recipe: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    flags: list[str],
    expected: dict[str, Any] | None,
    left_out: str | None,
) -> None:
    from shared.output import RUN_FILE, write_record

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    parser = recipe.RecipeParser("", argument_types(recipe))
    attention = parser.parse(["--config", str(file), *flags], recipe.defaults)[-1]
    drop = None if expected is None else AttentionDropConfig(**expected)
    assert attention["attention_drop"] == drop
    write_record(parser, str(tmp_path), {})
    record = yaml.safe_load((tmp_path / RUN_FILE).read_text())
    assert {name: record[name] for name in ("p", "k", "layers") if name in record} == (
        {name: value for name, value in drop.to_dict().items() if name in ("p", "k", "layers") and value is not None}
        if drop
        else {}
    )
    notes = [line for line in capsys.readouterr().err.splitlines() if ": note: " in line]
    assert len(notes) == (left_out is not None)
    if left_out is not None:
        assert f"do not apply: {left_out}. " in notes[0] and str(file) in notes[0]


def test_do_eval_is_about_the_end_of_the_training(recipe: ModuleType) -> None:
    *_, training, _ = recipe.RecipeParser("", argument_types(recipe)).parse(["--do_eval", "false"], recipe.defaults)
    assert (training.do_eval, training.eval_strategy) == (False, "epoch")


def test_a_file_holds_yaml_for_every_argument(
    recipe: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("eval_strategy: no\nlr_scheduler_kwargs: {min_lr: 1.0e-5}\np: {from: 1.0e-5, to: 0.5}\n")
    parser = recipe.RecipeParser("", argument_types(recipe))
    *_, training, attention = parser.parse(["--config", str(file)], recipe.defaults)
    assert (training.eval_strategy, training.lr_scheduler_kwargs) == ("no", {"min_lr": 1e-5})
    assert attention["attention_drop"] == AttentionDropConfig(p={"from": 1e-5, "to": 0.5})
    file.write_text("p: 0.1\np: 0.2\n")
    assert "cannot be read: expected YAML, " in (line := error_line(recipe, capfd, "--config", file))
    assert "'p' is there twice" in line


def test_a_passed_default_of_transformers_is_recorded(recipe: ModuleType, tmp_path: Path) -> None:
    from shared.output import RUN_FILE, write_record

    for flags, expected in ((["--warmup_steps", "0"], 0), ([], 0.1)):
        parser = recipe.RecipeParser("", argument_types(recipe))
        parser.parse(flags, recipe.defaults)
        write_record(parser, str(tmp_path), {})
        assert yaml.safe_load((tmp_path / RUN_FILE).read_text())["warmup_steps"] == expected


DROPOUT = {
    "text_classification": {
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.25,
        "hidden_dropout_prob": 0.25,
    },
    "image_classification": {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.25},
    "translation": {"activation_dropout": 0.25, "attention_dropout": 0.0, "dropout": 0.25},
}


def test_sizes_of_a_model_from_scratch_are_an_error_for_a_checkpoint(
    recipe: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"hidden_size": 32, "num_hidden_layers": 2}))
    model = ["--model_name_or_path", tmp_path / "missing", "--output_dir", tmp_path / "out"]
    line = error_line(recipe, capfd, *model, "--hidden_size", 32, "--num_attention_heads", 2)
    assert "--hidden_size and --num_attention_heads would have no effect with --model_name_or_path" in line
    # A file for a model from scratch does not stand in the way of a model on the command line.
    assert "expected an existing path" in error_line(recipe, capfd, "--config", file, *model)
    file.write_text(yaml.safe_dump({"hidden_size": 32, "model_name_or_path": str(tmp_path / "missing")}))
    assert "--hidden_size would have no effect" in error_line(recipe, capfd, "--config", file, *model[2:])
    assert not (tmp_path / "out").exists()


def test_settings_of_the_consistency_term_without_it_are_an_error(
    recipe: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--consistency_warmup_steps", "5", "--consistency_divergence", "js", "--output_dir", tmp_path / "out"]
    line = error_line(recipe, capfd, *flags)
    assert "--consistency_divergence js and --consistency_warmup_steps would have no effect" in line
    # The file of a run has the weight that was not used; only a flag turns the term off on purpose.
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"consistency_weight": 0.0, "consistency_divergence": "symmetric_kl"}))
    assert "without --consistency_weight" in error_line(recipe, capfd, "--config", file, *flags)
    file.write_text(yaml.safe_dump({"consistency_weight": 0.5, "consistency_warmup_steps": 5}))
    parser = recipe.RecipeParser("", argument_types(recipe))
    *_, training, _ = parser.parse(["--config", str(file), "--consistency_weight", "0"], recipe.defaults)
    assert (training.consistency_weight, training.consistency_warmup_steps) == (0, 5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_of_the_model_is_set_and_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    recipe = load(name, monkeypatch)
    first, second = tmp_path / "first", tmp_path / "second"
    quick = [*FINE_TUNING, "--attn_implementation", "sdpa"]
    flags = ["--num_layers" if name == "translation" else "--num_hidden_layers", "1"]
    flags += ["--dropout", "0.25", "--attention_dropout", "0", "--dropconnect", "0.125"]
    recipe.main([*quick, *flags, "--output_dir", str(first)])
    metrics, config = read_json(first / "metrics.json"), read_json(first / "config.json")
    assert {field: metrics["dropout"][field] for field in DROPOUT[name]} == DROPOUT[name]
    # Default values are not in config.json.
    assert all(config.get(field, 0.0) == value for field, value in DROPOUT[name].items())
    record = yaml.safe_load((first / "run.yaml").read_text())
    assert (record["dropout"], record["dropconnect"], metrics["dropconnect"]) == (0.25, 0.125, 0.125)
    assert "dropout 0.25" in (first / "README.md").read_text().replace("_prob", "")

    # The flag also changes the dropout of a checkpoint.
    recipe.main([*quick, "--model_name_or_path", str(first), "--dropout", "0.125", "--output_dir", str(second)])
    metrics = read_json(second / "metrics.json")
    assert {metrics["dropout"][field] for field in DROPOUT[name]} == {0.125}
    assert "dropconnect" not in metrics


def test_dropout_acts_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("causal_lm", monkeypatch)
    arguments = recipe.LanguageModelArguments(num_hidden_layers=1, dropout=0.5)
    tokenizer = recipe.load_tokenizer(arguments, ["a text"])
    model = recipe.load_model(arguments, {"attn_implementation": "sdpa"}, tokenizer, 16).train()
    ids = torch.arange(12).view(1, 12)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


def test_dropout_that_cannot_be_set_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load("causal_lm", monkeypatch)
    cases = [
        ([f"--{flag}", "1"], f"--{flag}: expected a probability in [0, 1), got 1.0")
        for flag in ("dropout", "attention_dropout", "dropconnect")
    ]
    tokenizer = recipe.load_tokenizer(recipe.LanguageModelArguments(), ["a text"])
    for config, flag in (
        (CTRLConfig(vocab_size=300, n_embd=8, n_layer=1, n_head=2, dff=8, n_positions=64), "attention_dropout"),
        (MambaConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1), "dropout"),
    ):
        folder = tmp_path / type(config).__name__
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        flags = ["--model_name_or_path", folder, f"--{flag}", "0.1"]
        cases.append((flags, f"--{flag}: {type(config).__name__} has no {flag.replace('_', ' ')} to set"))
    for flags, message in cases:
        assert message in error_line(recipe, capfd, *flags, "--output_dir", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "flag", "default", "longest"),
    [("causal_lm", "block_size", 512, 64), ("text_classification", "max_length", 128, 32)],
)
def test_default_length_is_capped_at_the_limit_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    flag: str,
    default: int,
    longest: int,
) -> None:
    recipe = load(name, monkeypatch)
    first, second = tmp_path / "first", tmp_path / "second"
    recipe.main([*QUICK, f"--{flag}", str(longest), "--output_dir", str(first)])
    flags = [*FINE_TUNING, "--model_name_or_path", str(first)]
    capfd.readouterr()
    recipe.main([*flags, "--output_dir", str(second)])
    assert f"note: --{flag} is {longest}, the most tokens that the model takes, and not {default}" in (
        capfd.readouterr().err
    )
    assert yaml.safe_load((second / "run.yaml").read_text())[flag] == longest
    line = error_line(recipe, capfd, *flags, f"--{flag}", longest + 1, "--output_dir", tmp_path / "out")
    assert f"--{flag}: the model takes {longest} tokens, got {longest + 1}." in line


def test_settings_without_effect_are_errors(
    recipe: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = error_line(recipe, capfd, "--attn_implementation", "sdpa", "--p", "0.3", "--output_dir", tmp_path / "out")
    assert "--p: settings of AttentionDrop need --attn_implementation attentiondrop or" in line
    assert list(tmp_path.iterdir()) == []
