"""Running a model on a batch without changing its state."""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attention.parts import transformers_model
from .items import IGNORE_INDEX


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode; restores the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restores all buffers afterwards: a forward pass in training mode updates running averages."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Restores the random states of Python, NumPy and torch afterwards, of the CPU and of the model's devices.

    Some models draw with NumPy, such as those that mask spectrograms.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"}
    try:
        with torch.random.fork_rng(devices, device_type=next(iter(devices), torch.device("cuda")).type):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def to_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Moves a batch to the model's device, and floating-point inputs except labels to its dtype."""
    device = next(model.parameters()).device
    precision = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)

    def moved(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, precision if value.is_floating_point() and "labels" not in name else value.dtype)

    return {name: moved(name, value) for name, value in batch.items()}


def inputs_without_loss(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a forward pass on the model's device, without labels where only the loss needs them.

    A model that generates with a decoder of its own makes the inputs of that decoder from the labels if there are no
    others. Labels of -100 are padding, which its attention mask then says, too.
    """
    moved, base = to_device_of(model, batch), transformers_model(model)
    inputs, labels = {name: value for name, value in moved.items() if "labels" not in name}, moved.get("labels")
    if labels is None or not (base.config.is_encoder_decoder and base.can_generate()):
        return inputs
    if not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        inputs["labels"] = labels
    is_padding = labels == IGNORE_INDEX
    adapters = getattr(model, "peft_config", {}).values()
    if any(adapter.is_prompt_learning for adapter in adapters):
        return inputs  # Virtual tokens come first, which the mask does not show.
    if is_padding.any() and inputs.get("decoder_input_ids", labels).shape == labels.shape:
        inputs.setdefault("decoder_attention_mask", (~is_padding).long())
    return inputs


def first_samples(batches: Iterable[Mapping[str, Any]], samples: int) -> Iterator[dict[str, Any]]:
    """The first `samples` samples of batches with `labels`; the last batch is truncated."""
    for batch in batches:
        yield {name: value[:samples] if isinstance(value, Tensor) else value for name, value in batch.items()}
        samples -= len(batch["labels"])
        if samples <= 0:
            return


def labelled_samples(batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The samples of batches whose label is not -100."""
    for batch in batches:
        rows = batch["labels"] != IGNORE_INDEX
        if rows.all():
            yield dict(batch)
        elif rows.any():
            by_row = {
                name for name, value in batch.items() if isinstance(value, Tensor) and value.shape[:1] == rows.shape
            }
            yield {name: value[rows] if name in by_row else value for name, value in batch.items()}


def check_batches(batches: Any, *, many_times: bool = False) -> None:
    """Checks that `batches` is an iterable of batches.

    Args:
        batches: to check.
        many_times (`bool`, defaults to `False`): whether they will be iterated over more than once.

    Raises:
        TypeError: for a single batch, and for an iterator if `many_times`: it is empty after the first pass.
    """
    expected = "`batches` must be a list or a DataLoader of batches"
    if isinstance(batches, Mapping):
        raise TypeError(
            f"{expected}, got one batch with {sorted(batches)}: its keys would be taken for batches. Pass a list: "
            "[batch]."
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"{expected}, got {type(batches).__name__}, which is not iterable.")
    if many_times and isinstance(batches, Iterator):
        raise TypeError(
            f"{expected}, got the iterator {type(batches).__name__}: it is iterated over more than once, and is empty "
            "after the first pass. Pass list(batches)."
        )
