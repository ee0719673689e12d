"""Gradient noise and gradient norms."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, variance
from typing import Any

import torch
from torch import nn

from .running import buffers_kept, check_batches, mode, to_device_of


@dataclass(frozen=True)
class GradientNoise:
    """The variance of mini-batch gradients at fixed weights.

    Args:
        variance: trace of the covariance matrix, the unbiased mean of `||g - mean||²`.
        mean_norm: norm of the mean gradient.
        batches: number of mini-batches.
    """

    variance: float
    mean_norm: float
    batches: int


@dataclass(frozen=True)
class GradientNorms:
    """Statistics of the gradient norms of a training run.

    Args:
        mean: of the norms.
        variance: of the norms, unbiased.
        spikes: number of norms above `SPIKE_FACTOR` times the median of the previous `SPIKE_WINDOW` norms.
        steps: number of norms.
    """

    mean: float
    variance: float
    spikes: int
    steps: int


SPIKE_FACTOR = 3.0
SPIKE_WINDOW = 20


def gradient_noise(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> GradientNoise:
    """Measures the variance of mini-batch gradients in training mode, with perturbations and dropout.

    The AttentionDrop paper reports about 10 % less of it (arXiv 2504.12088). Weights, gradients, buffers and modes do
    not change; random numbers come from torch's global generator.

    The cost is a forward and backward pass of each batch, and memory for two more gradients.

    Args:
        model (`torch.nn.Module`): a model whose output has a `loss`.
        batches (`Iterable[Mapping[str, Any]]`): keyword arguments of its forward pass with labels, at least two.

    Raises:
        ValueError: for fewer than two batches, no trainable weights, or a loss that is missing or not finite.
        TypeError: for a single batch instead of several.

    Example:

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> batches = [{"input_ids": torch.tensor([[2, 3]]), "labels": torch.tensor([label])} for label in (0, 1)]
    >>> gradient_noise(BertForSequenceClassification(config), batches).batches
    2
    """
    check_batches(batches)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("Expected parameters with requires_grad=True, got none: there are no gradients to measure.")
    means = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    count, squares = 0, 0.0
    with mode(model, training=True), buffers_kept(model), torch.enable_grad():
        for batch in batches:
            loss = getattr(model(**to_device_of(model, batch)), "loss", None)
            if loss is None or not loss.isfinite().item():
                raise ValueError(f"Expected a finite loss from a batch with labels, got {loss!r}: it has no gradient.")
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            count += 1
            # Welford's update avoids the cancellation of large sums of squares.
            for mean, gradient in zip(means, gradients, strict=True):
                deviation = (0.0 if gradient is None else gradient.float()) - mean
                mean += deviation / count
                squares += (1 - 1 / count) * deviation.double().square().sum().item()
    if count < 2:
        raise ValueError(f"`batches` must contain at least two batches for a variance, got {count}.")
    mean_norm = math.sqrt(sum(mean.double().square().sum().item() for mean in means))
    return GradientNoise(squares / (count - 1), mean_norm, count)


def gradient_norms(norms: Sequence[float]) -> GradientNorms:
    """Summarizes the gradient norms of training steps as in the affine attention paper (arXiv 2602.23057).

    Args:
        norms (`Sequence[float]`): one per step, in order, at least two.

    Raises:
        ValueError: for fewer than two norms, or one that is not finite.

    Example:

    >>> gradient_norms([1.0, 1.0, 9.0, 1.0]).spikes
    1
    """
    if len(norms) < 2 or not all(map(math.isfinite, norms)):
        raise ValueError(f"Expected at least two gradient norms, all finite, got {list(norms)}.")
    spikes, window = 0, deque[float](maxlen=SPIKE_WINDOW)
    for norm in norms:
        spikes += bool(window) and norm > SPIKE_FACTOR * median(window)
        window.append(norm)
    return GradientNorms(fmean(norms), variance(norms), spikes, len(norms))
