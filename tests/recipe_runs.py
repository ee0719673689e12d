"""How the tests run a recipe: as a program, as a module, and with input that it must refuse."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"


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
