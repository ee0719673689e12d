"""Compares forwards of a model in training, without an effect on the training."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


def are_close(value: Tensor, other: Tensor, dtypes: list[torch.dtype] | None = None) -> bool:
    """Whether two tensors are equal to half of the digits of the coarsest dtype, relative to the largest entry.

    Args:
        value (`torch.Tensor`): A tensor.
        other (`torch.Tensor`): Another one; integers and booleans must be equal.
        dtypes (`list[torch.dtype]`, *optional*): Floating-point dtypes that took part in computing them.

    Example:

    >>> ones = torch.ones(2)
    >>> are_close(ones, ones + 1e-6), are_close(ones, ones + 1e-3), are_close(ones, ones + 1e-3, [torch.bfloat16])
    (True, False, True)
    """
    if value.shape != other.shape or torch.equal(value, other) or not value.is_floating_point():
        return torch.equal(value, other)
    rounding = max(torch.finfo(dtype).eps for dtype in (value.dtype, *(dtypes or ()))) ** 0.5
    return bool((value - other).abs().max() <= rounding * other.abs().max())


def generator_states(device: torch.device) -> list[Tensor]:
    """The states of torch's default generators on the CPU and on a device.

    Args:
        device (`torch.device`): Any device.

    Example:

    >>> before = generator_states(torch.device("cpu"))
    >>> nn.functional.dropout(torch.ones(2), p=0.0).tolist()
    [1.0, 1.0]
    >>> all(map(torch.equal, before, generator_states(torch.device("cpu"))))
    True
    """
    others = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *others]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Context manager that restores the random number generators, and of a model the training mode of its modules, its
    buffers and the counts of perturbed calls.

    Args:
        model (`torch.nn.Module`): The model, without the wrappers of a launcher.

    Example:

    >>> dropout = nn.Dropout()
    >>> with preserved(dropout):
    ...     _ = dropout.eval()
    >>> dropout.training
    True
    """
    modes = {module: module.training for module in model.modules()}
    states = [module.attention_drop_state.calls for module in modes if hasattr(module, "attention_drop_state")]
    copies = [(tensor, tensor.clone()) for tensor in (*model.buffers(), *states)]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"}
    device_type = next((device.type for device in devices), "cuda")
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device.index or 0 for device in devices], device_type=device_type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, mode in modes.items():
            module.training = mode
        for tensor, copy in copies:
            tensor.copy_(copy)
