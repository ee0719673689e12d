"""Two processes train like one."""

from pathlib import Path

import pytest
import torch

from .consistency_tasks import SMOOTHINGS, TASKS, assert_same_step, plain_step


@pytest.mark.xdist_group("two_processes")
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_take_the_step_of_one(task: str, smoothing: float, two_processes: Path) -> None:
    """Gradients and logs of a step of 2 processes × 2 accumulation steps × 2 rows."""
    num_processes, *step = torch.load(two_processes / "steps.pt")[task, smoothing]
    assert num_processes == 2
    assert step[0]["consistency_loss"] > 0.05
    assert_same_step(step, plain_step(task, smoothing))
