"""How the tests run a recipe: as a program, as a module, with input that it must refuse, and once for all to read."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))
# The tests of one recipe share its short run, so one worker takes them all.
GROUPED_NAMES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in NAMES]

# What a short run takes from a file; the flag goes before the steps there.
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
ROBUSTNESS_SAMPLES = {"image_classification": 9, "text_classification": 5}


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python the way a user does, without the network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def launch(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `accelerate launch`, which must succeed."""
    result = run("-m", "accelerate.commands.launch", *command, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The recipe as a module, which finds its shared code beside itself as when it is run."""
    monkeypatch.syspath_prepend(RECIPES)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    return importlib.import_module(name)


def refusal(recipe: ModuleType, capfd: pytest.CaptureFixture[str], *flags: str | Path) -> str:
    """Runs a recipe that must refuse its input, and gives the one line in which it does."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        recipe.main([str(flag) for flag in flags])
    written = capfd.readouterr()
    line = written.err.rstrip("\n").splitlines()[-1]
    assert exit_.value.code == 2
    assert written.out == ""
    assert line.startswith(f"{recipe.__name__}.py: error: "), written.err
    return line


def short_run_flags(name: str, folder: Path) -> list[str]:
    """The arguments of the short run of a recipe, less those that measure; some are written to a file in a folder."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(SHORT_RUN_CONFIG))
    return ["--config", str(config), *SHORT_RUN, *SMALL[name]]


def run_shortly(name: str, folder: Path) -> Path:
    """Trains with a recipe for four steps, measures all that it can measure, and gives its output folder."""
    flags = [*short_run_flags(name, folder), "--output_dir", str(folder / "out")]
    if name in ROBUSTNESS_SAMPLES:
        flags += ["--evaluate_robustness", "--robustness_samples", str(ROBUSTNESS_SAMPLES[name])]
    with pytest.MonkeyPatch.context() as monkeypatch:
        load(name, monkeypatch).main(flags)
    return folder / "out"
