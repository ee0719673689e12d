"""Two processes with unequal shares of a batch learn what one process with all of it learns."""

from pathlib import Path

import pytest
import torch

from .reweighting_processes import WRAPPERS, step


@pytest.mark.xdist_group("two_processes")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_equal_one(wrapper: str, two_processes: Path) -> None:
    wanted = step(None, slice(None))
    assert sum("average" in key for key in wanted) == 2
    for rank in range(2):
        found = torch.load(two_processes / f"reweighting.{rank}.pt")[wrapper]
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            tolerance = 1e-5 * max(1.0, tensor.abs().max().item())
            assert (found[key] - tensor).abs().max() < tolerance, key
