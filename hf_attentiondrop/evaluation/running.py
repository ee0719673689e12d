"""Running a model on a batch, and leaving it as it was found."""

from collections.abc import Iterable, Iterator, Mapping
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
    """A batch where the model is, pixels and other floating inputs in the model's precision; labels keep theirs."""
    device = next(model.parameters()).device
    precision = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)

    def moved(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, precision if value.is_floating_point() and "labels" not in name else value.dtype)

    return {name: moved(name, value) for name, value in batch.items()}


def first_samples(batches: Iterable[Mapping[str, Any]], samples: int) -> Iterator[dict[str, Any]]:
    """The first samples of batches with `labels`, as many whatever the size of a batch: the last one is cut."""
    for batch in batches:
        yield {name: value[:samples] if isinstance(value, Tensor) else value for name, value in batch.items()}
        samples -= len(batch["labels"])
        if samples <= 0:
            return


def check_batches(batches: Any, *, many_times: bool = False) -> None:
    """Refuses what is no sequence of batches.

    Args:
        batches: what was given.
        many_times: whether they are gone through more than once.

    Raises:
        TypeError: for a single batch; for an iterator, which is empty after the first time, if `many_times`.
    """
    expected = "`batches` must be a list or a DataLoader of batches"
    if isinstance(batches, Mapping):
        raise TypeError(
            f"{expected}, got one batch with {sorted(batches)}: its names would be taken for batches. "
            "Put it into a list: [batch]."
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"{expected}, got {type(batches).__name__}: there is nothing to go through.")
    if many_times and isinstance(batches, Iterator):
        raise TypeError(
            f"{expected}, got the iterator {type(batches).__name__}: they are gone through more than once, and it is "
            "empty after the first time. Make it a list: list(batches)."
        )
