"""How noisy a model's gradients are."""

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
    """How far the gradients of mini-batches lie from each other, at one state of the weights.

    Args:
        variance: trace of their covariance matrix, the unbiased mean of `||g - mean||²`.
        mean_norm: norm of their mean.
        batches: how many there were.
    """

    variance: float
    mean_norm: float
    batches: int


@dataclass(frozen=True)
class GradientNorms:
    """The gradient norms of a training.

    Args:
        mean: their mean.
        variance: their unbiased variance.
        spikes: how many are more than `SPIKE_FACTOR` times the median of the `SPIKE_WINDOW` norms before them.
        steps: how many norms there are.
    """

    mean: float
    variance: float
    spikes: int
    steps: int


SPIKE_FACTOR = 3.0
SPIKE_WINDOW = 20


def gradient_noise(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> GradientNoise:
    """Measures the variance of mini-batch gradients in training mode, perturbations and dropout included.

    The AttentionDrop paper reports about a tenth less of it (arXiv 2504.12088). Weights, their gradients, buffers and
    modes stay as they were; draws come from torch's global generator.

    The cost is a forward and backward pass of each batch, and memory for two more gradients.

    Args:
        model: a model whose output has a `loss`.
        batches: keyword arguments of its forward pass with labels, at least two.

    Raises:
        ValueError: for fewer than two batches, no trainable weights, or a loss that is missing or not finite.
        TypeError: for a single batch in place of several.

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
        raise ValueError("The model has no weights to train, so it has no gradients: expected requires_grad on some.")
    means = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    count, squares = 0, 0.0
    with mode(model, training=True), buffers_kept(model), torch.enable_grad():
        for batch in batches:
            loss = getattr(model(**to_device_of(model, batch)), "loss", None)
            if loss is None or not loss.isfinite().item():
                raise ValueError(f"Expected a finite loss from a batch with labels, got {loss!r}: it has no gradient.")
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            count += 1
            # Welford's update, in which nothing large is subtracted from something large.
            for mean, gradient in zip(means, gradients, strict=True):
                deviation = (0.0 if gradient is None else gradient.float()) - mean
                mean += deviation / count
                squares += (1 - 1 / count) * deviation.double().square().sum().item()
    if count < 2:
        raise ValueError(f"The variance of gradients needs at least two batches, got {count}.")
    mean_norm = math.sqrt(sum(mean.double().square().sum().item() for mean in means))
    return GradientNoise(squares / (count - 1), mean_norm, count)


def gradient_norms(norms: Sequence[float]) -> GradientNorms:
    """Summarises the gradient norms of training steps, as the affine paper does (arXiv 2602.23057).

    Args:
        norms: one per step, in order, at least two.

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
