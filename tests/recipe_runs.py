"""Helpers that run a recipe: as a program, as a module, with bad input, and once for all tests that only read."""

import contextlib
import importlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))
# The tests of a recipe share its short run, so they run on one worker.
GROUPED_NAMES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in NAMES]

# The file of a short run; its flags override max_steps.
SHORT_RUN_CONFIG = {"seed": 7, "layers": [0], "max_steps": 9, "learning_rate": 1e-3}
SHORT_RUN = """
    --max_steps 4 --save_strategy steps --save_steps 2 --save_total_limit 9 --logging_steps 1 --max_eval_samples 24
    --consistency_weight 0.5
""".split()
SMALL = {
    "image_classification": ["--num_hidden_layers", "1"],
    "text_classification": ["--num_hidden_layers", "1"],
    "translation": ["--num_layers", "1", "--predict_with_generate", "false", "--max_train_samples", "300"],
    "causal_lm": ["--num_hidden_layers", "1", "--max_train_samples", "200"],
}
# For runs whose evaluation does not matter: it takes most of a run of few steps, its plots above all.
NO_EVALUATION = ["--do_eval", "false", "--eval_strategy", "no"]
ROBUSTNESS_SAMPLES = {"image_classification": 9, "text_classification": 5}


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python as a user does, without the network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def launch(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `accelerate launch` and checks that it succeeds."""
    result = run("-m", "accelerate.commands.launch", *command, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def run_program(name: str, folder: Path, *flags: str) -> str:
    """Runs the file of a recipe as a program does, within this process and in a folder; returns what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(RECIPES)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports the recipe as a module, with its folder on the path as when it is run."""
    monkeypatch.syspath_prepend(RECIPES)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    return importlib.import_module(name)


def error_line(recipe: ModuleType, capfd: pytest.CaptureFixture[str], *flags: str | Path) -> str:
    """Runs a recipe with bad input, checks that it exits with one line, and returns that line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        recipe.main([str(flag) for flag in flags])
    written = capfd.readouterr()
    line = written.err.rstrip("\n").splitlines()[-1]
    assert exit_.value.code == 2
    assert written.out == ""
    assert line.startswith(f"{recipe.__name__}.py: error: "), written.err
    return line


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def run_with_file(recipe: ModuleType, folder: Path, settings: dict[str, Any], *flags: str) -> Path:
    """Runs a recipe with a file of settings and flags that override it, and returns the output folder."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    recipe.main(["--config", str(file), *flags, "--output_dir", str(folder / "out")])
    return folder / "out"


def short_run_flags(name: str, folder: Path) -> list[str]:
    """The flags of the short run of a recipe, without extra measurements; writes its file into the folder."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(SHORT_RUN_CONFIG))
    return ["--config", str(config), *SHORT_RUN, *SMALL[name]]


def run_shortly(name: str, folder: Path) -> Path:
    """Trains for four steps with all measurements, and returns the output folder."""
    flags = [*short_run_flags(name, folder), "--output_dir", str(folder / "out")]
    if name in ROBUSTNESS_SAMPLES:
        flags += ["--evaluate_robustness", "--robustness_samples", str(ROBUSTNESS_SAMPLES[name])]
    with pytest.MonkeyPatch.context() as monkeypatch:
        load(name, monkeypatch).main(flags)
    return folder / "out"
