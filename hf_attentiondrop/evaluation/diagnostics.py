"""How a model attends: statistics of its attention weights, head by head."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..attention.modules import attention_modules
from ..attention.parts import configs_of, transformers_model
from ..integration.implementations import FUNCTIONS
from .running import check_batches, mode, to_device_of


SHOWS_WEIGHTS = ("eager", *FUNCTIONS)
# The masks that tell the real queries and keys of the weights that a model's output names.
MASKS = {
    "attentions": ("attention_mask", "attention_mask"),
    "encoder_attentions": ("attention_mask", "attention_mask"),
    "decoder_attentions": ("decoder_attention_mask", "decoder_attention_mask"),
    "cross_attentions": ("decoder_attention_mask", "attention_mask"),
}


@dataclass(frozen=True)
class AttentionStatistics:
    """How the heads of one stack attend, each value a mean over real queries; tensors are `(layers, heads)`, float64,
    NaN for heads that a layer does not have.

    Args:
        entropy: of the weights over the keys, in nats: 0 looks at one key, `log K` at all `K` alike.
        first_token_mass: share of the weight that the first key gets, padding left out, in [0, 1].
        top_k_mass: share of the `top_k` largest weights, in [0, 1].
        total_mass: sum of the weights: 1 under softmax, less beside a learned sink, the moving average of the scales
            under affine scaling.
        uniform_entropy: `(layers,)`, the entropy of attention spread evenly over the keys that each query sees, those
            that some head gives a weight: what `entropy` is at most.
        top_k: how many weights `top_k_mass` counts.
        queries: how many queries the means of the first layer are over.
        samples: how many samples those are of.
    """

    entropy: Tensor
    first_token_mass: Tensor
    top_k_mass: Tensor
    total_mass: Tensor
    uniform_entropy: Tensor
    top_k: int
    queries: int
    samples: int

    def means(self) -> dict[str, float]:
        """Every statistic as its mean over layers and heads."""
        return {name: getattr(self, name).nanmean().item() for name in MEASURES}

    def metrics(self) -> dict[str, float]:
        """The means, with the number of samples as `samples`."""
        return {**self.means(), "samples": self.samples}


MEASURES = ("entropy", "first_token_mass", "top_k_mass", "total_mass")


def attention_statistics(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, top_k: int = 5
) -> dict[str, AttentionStatistics]:
    """Measures how a model attends, in evaluation mode, head by head.

    Weights of learned methods may be negative and sum to anything; shares and entropy are those of their absolute
    values, brought to a sum of 1. Padding asks nothing: only the queries that a two-dimensional attention mask of the
    batch shows count, and all of them where there is none.

    The cost is a forward pass of each batch with materialised attention, `B·H·Q·K` weights per layer.

    Args:
        model: a Transformers model, or a wrapper around one.
        batches: keyword arguments of its forward pass, batch by batch.
        top_k: how many of the largest weights `top_k_mass` counts, at least 1.

    Returns:
        The statistics by stack, under the name that the model's output has for its weights: `"attentions"`, or
        `"encoder_attentions"`, `"decoder_attentions"` and `"cross_attentions"`.

    Raises:
        ValueError: for no batch, weights that the model does not return or that are not finite, masks that do not
            fit, or a `top_k` below 1.
        TypeError: for a single batch in place of several.

    Example:

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> statistics = attention_statistics(BertModel(config), [{"input_ids": torch.tensor([[2, 3, 4]])}])
    >>> statistics["attentions"].entropy.shape
    torch.Size([2, 4])
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"`top_k` must be an integer >= 1, got {top_k!r}. It counts the largest weights of a query.")
    check_batches(batches)
    sums: dict[str, list[Tensor]] = {}
    counts: dict[str, Tensor] = {}
    samples = 0
    with _showing_weights(model), torch.no_grad():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if "labels" not in name}
            outputs = model(**to_device_of(model, inputs), output_attentions=True)
            samples += len(next(value for value in inputs.values() if isinstance(value, Tensor)))
            for name, layers in _attentions_of(model, outputs).items():
                measured = [_measure(name, weights, batch, top_k) for weights in layers]
                count = torch.tensor([count for _, count in measured])
                previous = sums.get(name, [0.0] * len(layers))
                sums[name] = [total + sum_ for total, (sum_, _) in zip(previous, measured, strict=True)]
                counts[name] = counts.get(name, 0) + count
    if not any(count.any() for count in counts.values()):
        raise ValueError("There is nothing to measure: expected at least one batch with a query that is no padding.")
    statistics = {}
    for name, totals in sums.items():
        means = [total / count for total, count in zip(totals, counts[name], strict=True)]
        # Layers of one stack may differ in their numbers of heads.
        measures = pad_sequence([mean.mT for mean in means], batch_first=True, padding_value=math.nan)
        entropy, first_token_mass, top_k_mass, total_mass, uniform_entropy = measures.unbind(-1)
        queries = int(counts[name][0])
        statistics[name] = AttentionStatistics(
            entropy, first_token_mass, top_k_mass, total_mass, uniform_entropy[:, 0], top_k, queries, samples
        )
    return statistics


@contextmanager
def _showing_weights(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with an attention that returns its weights."""
    base = transformers_model(model)
    configs = {id(config): config for config in configs_of(base.config)}
    configs |= {id(module.config): module.config for _, module in attention_modules(base)}
    names = {key: config._attn_implementation for key, config in configs.items()}
    with mode(model, training=False):
        try:
            for key, config in configs.items():
                if names[key] not in SHOWS_WEIGHTS:
                    config._attn_implementation = "eager"
            yield
        finally:
            for key, config in configs.items():
                config._attn_implementation = names[key]


def _attentions_of(model: nn.Module, outputs: Any) -> dict[str, tuple[Tensor, ...]]:
    found = {name: outputs.get(name) for name in MASKS}
    found = {name: layers for name, layers in found.items() if layers}
    if not found or any(weights is None for layers in found.values() for weights in layers):
        raise ValueError(
            f"{type(transformers_model(model)).__name__} does not return attention weights for "
            "output_attentions=True, so there is nothing to measure."
        )
    return found


def _measure(name: str, weights: Tensor, batch: Mapping[str, Any], top_k: int) -> tuple[Tensor, int]:
    """Sums of the measures over the real queries, `(5, heads)`, and how many queries those are."""
    if not weights.isfinite().all():
        raise ValueError(f"`{name}` holds weights that are not finite: the model's outputs are broken already.")
    queries, keys = (
        _real_tokens(name, mask, batch, weights, dim) for mask, dim in zip(MASKS[name], (2, 3), strict=True)
    )
    magnitude = weights.double().abs()
    shares = magnitude / magnitude.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    first = keys.int().argmax(dim=-1).view(-1, 1, 1, 1).expand(*shares.shape[:-1], 1)
    seen = (magnitude > 0).sum(dim=-1).amax(dim=1, keepdim=True).clamp_min(1)
    measures = (
        torch.special.entr(shares).sum(dim=-1),
        shares.gather(-1, first).squeeze(-1),
        shares.topk(min(top_k, shares.shape[-1])).values.sum(dim=-1),
        weights.double().sum(dim=-1),
        seen.double().log().expand(shares.shape[:-1]),
    )
    sums = torch.stack([(measure * queries[:, None]).sum(dim=(0, 2)) for measure in measures])
    return sums.cpu(), int(queries.sum())


def _real_tokens(name: str, mask_name: str, batch: Mapping[str, Any], weights: Tensor, dim: int) -> Tensor:
    """Which tokens on one side of the weights are no padding, `(B, Q)` or `(B, K)`."""
    mask, shape = batch.get(mask_name), (weights.shape[0], weights.shape[dim])
    if mask is None or mask.dim() != 2:
        return torch.ones(shape, dtype=torch.bool, device=weights.device)
    if mask.shape != shape:
        raise ValueError(
            f"`{mask_name}` is {tuple(mask.shape)} and `{name}` are weights of {shape} tokens: which of them are "
            "padding is unknown. Expected masks of the sequences that the model attends between, without a cache."
        )
    return mask.to(weights.device).bool()
