"""Tests of every recipe in `recipes/`, whatever its task; a new recipe is found by its file."""

import json
import shutil
from collections.abc import Callable
from functools import cache
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

from .recipe_runs import GROUPED_NAMES, NAMES, RECIPES, SHORT_RUN_CONFIG, SMALL, error_line, load, short_run_flags


CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
# The loss falls in small steps, so with the highest loss as the best, the last checkpoint is not the best.
HIGHEST_LOSS = """
    --max_steps 4 --eval_strategy steps --eval_steps 2 --save_strategy steps --save_steps 2 --save_total_limit 9
    --learning_rate 1e-4 --load_best_model_at_end --metric_for_best_model loss --greater_is_better true
""".split()
BAD_INPUT = {
    "probability above 1": (["--p", "2"], "`p` must be a probability in [0, 1], got 2.0"),
    "unknown perturbation": (["--variant", "harder"], "`variant` must be one of"),
    "field of another perturbation": (
        ["--variant", "blur", "--p", "0.3"],
        "variant='blur' does not use it, so 0.3 would have no effect. It is a setting of hard, drophead and dropkey.",
    ),
    "text for a number": (["--k", "five"], "argument --k: invalid number value: 'five'"),
    "unknown flag": (["--learning_rat", "1"], "unknown argument --learning_rat. Did you mean --learning_rate?"),
    "bad training argument": (["--eval_strategy", "sometimes"], "sometimes is not a valid IntervalStrategy"),
    "missing configuration": (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read"),
    "missing model": (["--model_name_or_path", "./nowhere"], "--model_name_or_path: expected an existing path"),
    "checkpoint without training": (
        ["--resume_from_checkpoint", "--do_train", "false"],
        "--do_train false leaves it out: the checkpoint would not be loaded",
    ),
    "missing checkpoint": (["--resume_from_checkpoint"], "expected a folder with a complete checkpoint"),
    "unknown attention": (["--attn_implementation", "attentiondorp"], "attentiondorp"),
    "base attention with other masks": (["--base_attention", "eager"], "cannot compute the base attention"),
    "base attention of nothing": (
        ["--attn_implementation", "sdpa", "--base_attention", "flex_attention"],
        "another base attention would have no effect",
    ),
}


@pytest.fixture(params=GROUPED_NAMES)
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
    for name in (
        "config",
        "output_dir",
        "learning_rate",
        "attention_drop",
        "variant",
        "p",
        "k",
        "sigma_max",
        "layers",
    ):
        assert f"--{name} " in text
    assert "hard: Probability in [0, 1] with which each of the" in " ".join(text.split())


def test_run_file_reproduces_the_run(recipe: ModuleType, short_run: Callable[[str], Path], tmp_path: Path) -> None:
    first = short_run(recipe.__name__)
    recipe.main(["--config", str(first / "run.yaml"), "--output_dir", str(tmp_path)])

    record = yaml.safe_load((tmp_path / "run.yaml").read_text())
    expected = {**SHORT_RUN_CONFIG, "max_steps": 4}
    assert {name: record[name] for name in expected} == expected
    weights = [load_file(folder / "model.safetensors") for folder in (first, tmp_path)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


@pytest.fixture(scope="module")
def second_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, set[bool]]]:
    """Returns a function from recipe name to a run with settings that do not affect each other: its base attention is
    new, its output folder is not empty, and its best checkpoint is not the last.

    The function returns the output folder, and in which modes (training or not) the base attention ran."""

    @cache
    def run(name: str) -> tuple[Path, set[bool]]:
        folder, modes = tmp_path_factory.mktemp(name), set()

        def kernel(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            modes.add(module.training)
            return sdpa_attention_forward(module, *args, **kwargs)

        (folder / "results.txt").write_text("precious")
        (folder / "checkpoint-900").mkdir()
        flags = ["--variant", "blur", "--base_attention", "kernel", *SMALL[name], "--max_eval_samples", "24"]
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setitem(AttentionInterface._global_mapping, "kernel", kernel)
            monkeypatch.setitem(AttentionMaskInterface._global_mapping, "kernel", sdpa_mask)
            recipe = load(name, monkeypatch)
            recipe.main([*flags, *HIGHEST_LOSS, "--output_dir", str(folder), "--overwrite_output_dir"])
        return folder, modes

    return run


def test_base_attention_runs_in_training_and_evaluation(
    recipe: ModuleType, second_run: Callable[[str], tuple[Path, set[bool]]]
) -> None:
    folder, modes = second_run(recipe.__name__)
    assert modes == {True, False}
    assert yaml.safe_load((folder / "run.yaml").read_text())["base_attention"] == "kernel"


@pytest.mark.parametrize(("flags", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_ends_in_one_line(
    recipe: ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], message: str
) -> None:
    assert message in error_line(recipe, capfd, *flags, "--output_dir", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat' in --config"),
        ("p: 2", "`p` must be a probability"),
        ("k: [1, 2]", "unknown argument"),
        ("p: [0.1]", "`p` must have one value per layer, got 1 values"),
        ("- p", "must hold `argument: value` lines, got list"),
        ("p: :", "cannot be read"),
    ],
)
def test_bad_config_ends_in_one_line(
    recipe: ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path, contents: str, message: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(contents)
    assert message in error_line(recipe, capfd, "--config", config, "--output_dir", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [config]


def test_output_folder_is_not_overwritten_by_default(
    recipe: ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "results.txt").write_text("precious")
    (tmp_path / "checkpoint-900").mkdir()
    assert "is not empty" in error_line(recipe, capfd, "--output_dir", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_overwriting_replaces_checkpoints_alone(
    recipe: ModuleType, second_run: Callable[[str], tuple[Path, set[bool]]]
) -> None:
    folder, _ = second_run(recipe.__name__)
    assert (folder / "results.txt").read_text() == "precious"
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_output_folder_that_is_a_file_is_an_error(
    recipe: ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("precious")
    assert "is a file" in error_line(recipe, capfd, "--output_dir", tmp_path / "out")


def test_resumed_run_equals_uninterrupted_run(
    recipe: ModuleType, short_run: Callable[[str], Path], tmp_path: Path
) -> None:
    whole, resumed = short_run(recipe.__name__), tmp_path / "resumed"
    (resumed / "checkpoint-3").mkdir(parents=True)  # of a run killed while saving
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    flags = short_run_flags(recipe.__name__, tmp_path)
    recipe.main([*flags, "--output_dir", str(resumed), "--resume_from_checkpoint"])

    expected, actual = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all((expected[name] == actual[name]).all() for name in expected)


def test_best_checkpoint_is_loaded_at_the_end(
    recipe: ModuleType, second_run: Callable[[str], tuple[Path, set[bool]]]
) -> None:
    folder, _ = second_run(recipe.__name__)
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(state["best_metric"], rel=1e-6)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_configs_hold_arguments_of_their_recipe(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load(next(name for name in NAMES if path.stem.startswith(name)), monkeypatch)
    # The model of the file is not available offline; the error about it shows that every key was accepted.
    message = error_line(recipe, capfd, "--config", path, "--output_dir", tmp_path / "out")
    assert "config" not in message and "connect" in message or "Can't load" in message
    assert not (tmp_path / "out").exists()
