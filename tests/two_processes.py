"""Training steps on two processes: the Trainer, learned attention, a shared trunk; launched once for all tests.

accelerate launch --multi_gpu --num_processes 2 --module tests.two_processes results
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_attentiondrop.training.adaptive import mean_over_processes

from . import consistency_tasks, reweighting_processes, trunk_steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    consistency_tasks.main(str(folder / "steps.pt"), "2", "2")
    # The trainers have initialized the process group.
    rank = dist.get_rank()
    torch.save(trunk_steps.steps(rank, dist.get_world_size(), folder / "trunk"), folder / f"trunk.{rank}.pt")
    torch.save(reweighting_processes.steps(rank, dist.get_world_size()), folder / f"reweighting.{rank}.pt")
    entropy = torch.tensor([0.2 + 0.2 * rank, torch.nan if rank else 0.5, torch.nan])
    torch.save(mean_over_processes(entropy), folder / f"entropy.{rank}.pt")
