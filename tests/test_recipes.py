"""What every recipe in `recipes/` promises, whatever its task; a new recipe is tested here by being there."""

import json
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_attentiondrop import AttentionDropConfig

from .recipe_runs import RECIPES, launch, load, refusal


NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
BAD_INPUT = {
    "probability above 1": (["--p", "2"], "`p` must be a probability in [0, 1], got 2.0"),
    "unknown perturbation": (["--variant", "harder"], "`variant` must be one of"),
    "text for a number": (["--k", "five"], "argument --k: invalid int value: 'five'"),
    "unknown flag": (["--learning_rat", "1"], "unknown argument --learning_rat. Did you mean --learning_rate?"),
    "bad training argument": (["--eval_strategy", "sometimes"], "sometimes is not a valid IntervalStrategy"),
    "missing configuration": (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read"),
    "missing model": (["--model_name_or_path", "./nowhere"], "--model_name_or_path: expected an existing path"),
    "missing checkpoint": (["--resume_from_checkpoint"], "expected a folder with a complete checkpoint"),
    "unknown attention": (["--attn_implementation", "attentiondorp"], "attentiondorp"),
    "base attention with other masks": (["--base_attention", "eager"], "cannot compute the base attention"),
    "base attention of nothing": (
        ["--attn_implementation", "sdpa", "--base_attention", "flex_attention"],
        "another base attention would have no effect",
    ),
}


@pytest.fixture(params=NAMES)
def recipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(request.param, monkeypatch)


def test_there_are_recipes() -> None:
    assert "image_classification" in NAMES


def test_help_lists_every_argument(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        recipe.main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert f"accelerate launch recipes/{recipe.__name__}.py" in text
    for name in ("config", "output_dir", "learning_rate", *(field.name for field in fields(AttentionDropConfig))):
        assert f"--{name} " in text
    assert "probability in [0, 1] with which each of the" in " ".join(text.split())


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_under_accelerate_launch(name: str, tmp_path: Path) -> None:
    result = launch(RECIPES / f"{name}.py", "--output_dir", tmp_path / "out", "--max_steps", "2")
    assert str(tmp_path / "out" / "metrics.json") in result.stdout
    assert "hard p=0.1 k=5 fill=mask" in result.stdout
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["train_loss"] > 0 and metrics["eval_loss"] > 0
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_run_file_reproduces_the_run(recipe: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    config = tmp_path / "config.yaml"
    config.write_text("seed: 7\nvariant: blur\nlayers: [0]\nmax_steps: 5\nlearning_rate: 1e-3\n")
    recipe.main(["--config", str(config), "--max_steps", "2", "--output_dir", str(first)])
    recipe.main(["--config", str(first / "run.yaml"), "--output_dir", str(second)])

    record = yaml.safe_load((second / "run.yaml").read_text())
    expected = {"seed": 7, "variant": "blur", "layers": [0], "max_steps": 2, "learning_rate": 1e-3}
    assert {name: record[name] for name in expected} == expected
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_base_attention_computes_what_is_blurred_and_left_alone(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = set()

    def kernel(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        modes.add(module.training)
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "kernel", kernel)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "kernel", sdpa_mask)
    flags = ["--variant", "blur", "--base_attention", "kernel", "--max_steps", "1"]
    recipe.main([*flags, "--output_dir", str(tmp_path)])
    assert modes == {True, False}
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["base_attention"] == "kernel"


@pytest.mark.parametrize(("flags", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_ends_in_one_line(
    recipe: ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], message: str
) -> None:
    assert message in refusal(recipe, capfd, *flags, "--output_dir", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat' in --config"),
        ("p: 2", "`p` must be a probability"),
        ("p: [0.1, 0.2]", "unknown argument"),
        ("- p", "must hold `argument: value` lines, got list"),
        ("p: :", "cannot be read"),
    ],
)
def test_bad_config_ends_in_one_line(
    recipe: ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path, contents: str, message: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(contents)
    assert message in refusal(recipe, capfd, "--config", config, "--output_dir", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [config]


def test_output_folder_is_not_overwritten_unasked(
    recipe: ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "results.txt").write_text("precious")
    (tmp_path / "checkpoint-900").mkdir()
    flags = ["--output_dir", str(tmp_path), "--max_steps", "1"]
    assert "is not empty" in refusal(recipe, capfd, *flags)
    assert len(list(tmp_path.iterdir())) == 2

    recipe.main([*flags, "--overwrite_output_dir"])
    assert (tmp_path / "results.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_output_folder_that_is_a_file_is_refused(
    recipe: ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("precious")
    assert "is a file" in refusal(recipe, capfd, "--output_dir", tmp_path / "out")


def test_resumed_run_equals_uninterrupted_run(recipe: ModuleType, tmp_path: Path) -> None:
    flags = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "9"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    recipe.main([*flags, "--output_dir", str(whole)])
    (resumed / "checkpoint-3").mkdir(parents=True)  # of a run killed while it saved
    (whole / "checkpoint-2").rename(resumed / "checkpoint-2")
    recipe.main([*flags, "--output_dir", str(resumed), "--resume_from_checkpoint"])

    expected, actual = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all((expected[name] == actual[name]).all() for name in expected)


def test_best_checkpoint_is_loaded_at_the_end(recipe: ModuleType, tmp_path: Path) -> None:
    every_second = ["--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps"]
    # Slowly enough the loss falls, so that with the highest as the best it is not the last checkpoint.
    best = [
        "--learning_rate",
        "1e-4",
        "--save_steps",
        "2",
        "--save_total_limit",
        "2",
        "--load_best_model_at_end",
        "--metric_for_best_model",
        "loss",
        "--greater_is_better",
    ]
    recipe.main([*every_second, *best, "true", "--output_dir", str(tmp_path)])
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(state["best_metric"], rel=1e-6)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_configs_hold_arguments_of_their_recipe(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load(next(name for name in NAMES if path.stem.startswith(name)), monkeypatch)
    # The model that the file names is not there offline: that it is missed means that every key was understood.
    message = refusal(recipe, capfd, "--config", path, "--output_dir", tmp_path / "out")
    assert "config" not in message and "connect" in message or "Can't load" in message
    assert not (tmp_path / "out").exists()
