"""Two processes with unequal shares of a batch learn what one process with all of it learns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .reweighting_processes import step


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_processes_equal_one(wrapper: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.reweighting_processes", wrapper, str(tmp_path / "results.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    wanted = step(None, slice(None))
    assert sum("average" in key for key in wanted) == 2
    for rank in range(2):
        found = torch.load(tmp_path / f"results.pt.{rank}")
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            tolerance = 1e-5 * max(1.0, tensor.abs().max().item())
            assert (found[key] - tensor).abs().max() < tolerance, key
