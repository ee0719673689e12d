"""Training steps with and without a shared trunk, for `test_trunk.py`, on one process or on several."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, set_seed

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.training.trainer import AttentionDropTrainer

from .consistency_tasks import arguments
from .models import build, inputs


UPPER = AttentionDropConfig(p=0.5, layers=[1])
WRAPPERS = ("ddp", "fsdp")


def perturbed(family: str, drop: Any = UPPER, num_layers: int | None = None, **config: Any) -> PreTrainedModel:
    """A model without dropout, with large weights, so that the perturbation reaches the logits."""
    config |= {"init_std" if family == "marian" else "initializer_range": 0.2}
    model = build(family, dropout=False, **config)
    whole = copy.deepcopy(model.config)
    whole.num_hidden_layers = num_layers or whole.num_hidden_layers
    whole.attention_drop = drop
    torch.manual_seed(0)
    return type(model)._from_config(whole, attn_implementation="attentiondrop")


def step(
    model: nn.Module, batch: dict[str, Tensor], folder: Any, runner: nn.Module | None = None, **values: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of one training step.

    Args:
        runner: what the Trainer calls, such as a compiled form of the model; by default the model.
    """
    trainer = AttentionDropTrainer(model=model, args=arguments(folder, **values))
    trainer.current_gradient_accumulation_steps = 1
    model.zero_grad()
    set_seed(0)
    loss = trainer.training_step(model if runner is None else runner, dict(batch))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss, {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
        for name, gradient in gradients.items()
    }


def steps(rank: int, num_processes: int, folder: Any) -> dict[tuple[str, bool], dict[str, Tensor]]:
    """The gradients of a process with each wrapper, with and without a trunk, and the rows in the first layer."""
    batch = {name: value[2 * rank : 2 * rank + 2] for name, value in inputs("llama", padding="right").items()}
    results = {}
    for wrapper in WRAPPERS:
        for is_shared in (False, True):
            model = perturbed("llama", AttentionDropConfig(p=0.5, layers=[2, 3]), 4)
            numbers: list[int] = []
            model.model.layers[0].mlp.register_forward_hook(lambda m, args, output, to=numbers: to.append(len(output)))
            runner: nn.Module = model
            if wrapper == "ddp":
                runner = DistributedDataParallel(model)
            else:
                mesh = dist.init_device_mesh("cpu", (num_processes,))
                for layer in (*model.model.layers, model):
                    fully_shard(layer, mesh=mesh)
            _, gradients = step(model, batch, folder, runner, consistency_shared_trunk=is_shared)
            results[wrapper, is_shared] = {**gradients, "rows": torch.tensor(numbers[-1])}
    return results
