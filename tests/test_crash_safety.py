"""A run that is killed at any moment and resumed gives the result of an uninterrupted run, bit for bit on CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .recipe_runs import RECIPES, ROOT, load, run


RECIPE = RECIPES / "text_classification.py"
# An epoch has eight optimizer steps of two batches each, so runs resume within an epoch.
FLAGS = """
    --max_steps 20 --save_strategy steps --save_steps 3 --save_total_limit 9 --logging_steps 1 --eval_strategy no
    --max_train_samples 60 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --max_eval_samples 8
    --disable_tqdm true --consistency_weight 0.5 --num_hidden_layers 2 --attention_drop_schedule v_shaped
    --attention_drop_target_entropy 0.5 --attention_drop_adaptive_interval 2
""".split()
STATE_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
# Runs a script that kills itself after creating a file, before writing to it.
DIE_WRITING = """
import os, runpy, signal, sys
script, file = sys.argv.pop(1), sys.argv.pop(1)
def die(event, arguments):
    if event == "open" and str(arguments[0]).endswith(file) and arguments[1] == "w":
        os.close(os.open(arguments[0], os.O_CREAT))
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


def kill_writing(file: str, folder: Path, *flags: str) -> None:
    """Runs the recipe until it has created a file."""
    result = run("-c", DIE_WRITING, RECIPE, file, *FLAGS, "--output_dir", folder, *flags)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (folder / file).stat().st_size == 0


def kill_after(num_steps: int, folder: Path, *flags: str) -> None:
    """Runs the recipe until it has logged a number of steps."""
    command = [sys.executable, RECIPE, *FLAGS, "--output_dir", folder, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        list(map(str, command)), env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        written = ""
        for line in process.stdout:
            written += line
            num_steps -= "'consistency_loss'" in line
            if num_steps == 0:
                process.kill()
    assert process.returncode == -signal.SIGKILL, written


def log(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "checkpoint-20" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
def test_run_killed_three_times_ends_as_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only runs that are killed need a separate process.
    recipe = load(RECIPE.stem, monkeypatch)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    recipe.main([*FLAGS, "--output_dir", str(whole)])

    # While saving, which leaves incomplete checkpoints: at the beginning and at the end of one.
    kill_writing("checkpoint-9/config.json", killed)
    kill_writing("checkpoint-12/trainer_state.json", killed, "--resume_from_checkpoint")
    # Between steps 10 and 14; step 12 is saved.
    kill_after(5, killed, "--resume_from_checkpoint")
    assert (killed / "checkpoint-12" / "trainer_state.json").stat().st_size > 0
    assert not (killed / "model.safetensors").exists()
    recipe.main([*FLAGS, "--output_dir", str(killed), "--resume_from_checkpoint"])

    # If the runs diverge, the log shows at which step.
    assert [entry["step"] for entry in log(whole)] == list(range(1, 21))
    assert log(killed) == log(whole)
    assert all(entry["consistency_loss"] > 0 for entry in log(killed))
    for name in STATE_FILES:
        expected, actual = (folder / "checkpoint-20" / name for folder in (whole, killed))
        assert actual.read_bytes() == expected.read_bytes(), name
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
