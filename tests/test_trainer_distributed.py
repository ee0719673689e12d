"""Two processes train as one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .consistency_tasks import SMOOTHINGS, TASKS, assert_same_step, plain_step


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Gradients and logs of a step of 2 processes × 2 accumulation steps × 2 rows, for every task."""
    output = tmp_path_factory.mktemp("distributed") / "results.pt"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, "--module", "tests.consistency_tasks", str(output), "2", "2"]
    root = Path(__file__).parents[1]
    run = subprocess.run(
        command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return torch.load(output)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_take_the_step_of_one(task: str, smoothing: float, two_processes: dict) -> None:
    num_processes, *step = two_processes[task, smoothing]
    assert num_processes == 2
    assert step[0]["consistency_loss"] > 0.05
    assert_same_step(step, plain_step(task, smoothing))
