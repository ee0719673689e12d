"""Running a model on a batch, and leaving it as it was found."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode, and every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers as they were afterwards: a forward pass in training mode moves running averages."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Torch's random states as they were afterwards, of the processor and of the devices that the model is on."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"}
    with torch.random.fork_rng(devices, device_type=next(iter(devices), torch.device("cuda")).type):
        yield


def to_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch where the model is."""
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
