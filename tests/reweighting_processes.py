"""For `test_reweighting_processes.py`: one step of a tiny model, on a part of the batch in each process."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_attentiondrop import AffineScaledConfig

from .models import build, inputs


WRAPPERS = ("ddp", "fsdp")


def step(wrapper: str | None, samples: slice, num_processes: int = 1) -> dict[str, torch.Tensor]:
    """Averages and gradients after a forward and a backward pass over some samples."""
    config = AffineScaledConfig(gate=True, momentum=0.5)
    model = build("llama", dropout=False, attn_implementation="affine_scaled", attention_reweighting=config)
    generator = torch.Generator().manual_seed(23)
    for key, tensor in model.state_dict().items():
        if "reweighting" in key:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    batch = {name: tensor[samples] for name, tensor in inputs("llama", padding="left").items()}
    runner: nn.Module = model.train()
    if wrapper == "ddp":
        runner = DistributedDataParallel(model)
    elif wrapper == "fsdp":
        mesh = dist.init_device_mesh("cpu", (num_processes,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    logits = runner(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # The processes' gradients are averaged: times their number it is the sum over the whole batch.
    (logits[batch["attention_mask"].bool()].square().sum() * num_processes).backward()
    results = {key: buffer for key, buffer in model.named_buffers() if "average" in key}
    for key, parameter in model.named_parameters():
        gradient = parameter.grad
        results[f"{key}.grad"] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return results


def steps(rank: int, num_processes: int) -> dict[str, dict[str, torch.Tensor]]:
    """What a process finds with each wrapper."""
    # Unequal parts: a mean of the processes' means would be another number.
    samples = [slice(0, 3), slice(3, 4)][rank]
    return {wrapper: step(wrapper, samples, num_processes) for wrapper in WRAPPERS}
