"""Two processes train like one."""

from pathlib import Path

import pytest
import torch

from .consistency_tasks import HALF_CASES, SMOOTHINGS, TASKS, assert_same_step, plain_step


@pytest.mark.xdist_group("two_processes")
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_take_the_step_of_one(task: str, smoothing: float, two_processes: Path) -> None:
    """Gradients and logs of a step of 2 processes × 2 accumulation steps × 2 rows."""
    check_step(two_processes, task, smoothing, 1.0)


@pytest.mark.xdist_group("two_processes")
@pytest.mark.parametrize(("task", "smoothing"), HALF_CASES)
def test_two_processes_repeat_half_of_the_rows_like_one(task: str, smoothing: float, two_processes: Path) -> None:
    check_step(two_processes, task, smoothing, 0.5)


def check_step(folder: Path, task: str, smoothing: float, fraction: float) -> None:
    num_processes, *step = torch.load(folder / "steps.pt")[task, smoothing, fraction]
    assert num_processes == 2
    assert step[0]["consistency_loss"] > 0.05
    assert_same_step(step, plain_step(task, smoothing, fraction=fraction))
