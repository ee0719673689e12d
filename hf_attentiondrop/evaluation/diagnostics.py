"""Statistics of attention weights, per head."""

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
from .running import check_batches, inputs_without_loss, mode


SHOWS_WEIGHTS = ("eager", *FUNCTIONS)
# Field of the model output -> the masks that mark its queries and keys that are not padding.
MASKS = {
    "attentions": ("attention_mask", "attention_mask"),
    "encoder_attentions": ("attention_mask", "attention_mask"),
    "decoder_attentions": ("decoder_attention_mask", "decoder_attention_mask"),
    "cross_attentions": ("decoder_attention_mask", "attention_mask"),
}


@dataclass(frozen=True)
class AttentionStatistics:
    """Attention statistics of one stack of layers, as means over all queries that are not padding.

    Tensors are `(layers, heads)`, float64, with NaN for heads that a layer does not have.

    Args:
        entropy: of the weights over the keys, in nats: 0 for a single key, `log K` for uniform attention to `K` keys.
        first_token_mass: share of the weight on the first key that is not padding, in [0, 1].
        top_k_mass: share of the `top_k` largest weights, in [0, 1].
        total_mass: sum of the weights: 1 under softmax, less with a learned sink, the moving average of the scales
            under affine scaling.
        uniform_entropy: `(layers,)`, the entropy of uniform attention to the visible keys of each query, which are
            those with a nonzero weight in some head: the upper bound of `entropy`.
        top_k: number of weights in `top_k_mass`.
        queries: number of queries in the means of the first layer.
        samples: number of samples that they come from.
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
        """The mean of every statistic over layers and heads."""
        return {name: getattr(self, name).nanmean().item() for name in MEASURES}

    def metrics(self) -> dict[str, float]:
        """The means, and the number of samples as `samples`."""
        return {**self.means(), "samples": self.samples}


MEASURES = ("entropy", "first_token_mass", "top_k_mass", "total_mass")


def attention_statistics(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, top_k: int = 5
) -> dict[str, AttentionStatistics]:
    """Measures attention statistics in evaluation mode, per head.

    Learned methods can produce negative weights with any sum; shares and entropy are those of the absolute values,
    normalized to a sum of 1. Padding queries are left out if the batch has a two-dimensional attention mask, those of
    a decoder also if its labels are -100.

    The cost is a forward pass of each batch with materialized attention, `B·H·Q·K` weights per layer.

    Args:
        model (`torch.nn.Module`): a Transformers model, or a wrapper around one.
        batches (`Iterable[Mapping[str, Any]]`): keyword arguments of its forward pass.
        top_k (`int`, defaults to 5): number of the largest weights in `top_k_mass`, at least 1.

    Returns:
        `dict[str, AttentionStatistics]`: by stack, with the keys of the model output: `"attentions"`, or
        `"encoder_attentions"`, `"decoder_attentions"` and `"cross_attentions"`.

    Raises:
        ValueError: for no batch, attention weights that are not returned or not finite, masks of another shape, or a
            `top_k` below 1.
        TypeError: for a single batch instead of several.

    Example:

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> statistics = attention_statistics(BertModel(config), [{"input_ids": torch.tensor([[2, 3, 4]])}])
    >>> statistics["attentions"].entropy.shape
    torch.Size([2, 4])
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(
            f"`top_k` must be an integer >= 1, got {top_k!r}. It is the number of largest weights per query."
        )
    check_batches(batches)
    sums: dict[str, list[Tensor]] = {}
    counts: dict[str, Tensor] = {}
    samples = 0
    with _showing_weights(model), torch.no_grad():
        for batch in batches:
            inputs = inputs_without_loss(model, batch)
            outputs = model(**inputs, output_attentions=True)
            samples += len(next(value for value in inputs.values() if isinstance(value, Tensor)))
            for name, layers in _attentions_of(model, outputs).items():
                measured = [_measure(name, weights, inputs, top_k) for weights in layers]
                count = torch.tensor([count for _, count in measured])
                previous = sums.get(name, [0.0] * len(layers))
                sums[name] = [total + sum_ for total, (sum_, _) in zip(previous, measured, strict=True)]
                counts[name] = counts.get(name, 0) + count
    if not any(count.any() for count in counts.values()):
        raise ValueError("Expected at least one batch with a query that is not padding: there is nothing to measure.")
    statistics = {}
    for name, totals in sums.items():
        means = [total / count for total, count in zip(totals, counts[name], strict=True)]
        # The layers of a stack can differ in their numbers of heads.
        measures = pad_sequence([mean.mT for mean in means], batch_first=True, padding_value=math.nan)
        entropy, first_token_mass, top_k_mass, total_mass, uniform_entropy = measures.unbind(-1)
        queries = int(counts[name][0])
        statistics[name] = AttentionStatistics(
            entropy, first_token_mass, top_k_mass, total_mass, uniform_entropy[:, 0], top_k, queries, samples
        )
    return statistics


@contextmanager
def _showing_weights(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with an attention implementation that returns its weights."""
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
            f"{type(transformers_model(model)).__name__} returns no attention weights for output_attentions=True, so "
            "there is nothing to measure."
        )
    return found


def _measure(name: str, weights: Tensor, batch: Mapping[str, Any], top_k: int) -> tuple[Tensor, int]:
    """Sums of the measures over queries that are not padding, `(5, heads)`, and the number of these queries."""
    if not weights.isfinite().all():
        raise ValueError(f"`{name}` contains weights that are not finite: the model's outputs are invalid.")
    queries, keys = (
        _not_padding(name, mask, batch, weights, dim) for mask, dim in zip(MASKS[name], (2, 3), strict=True)
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


def _not_padding(name: str, mask_name: str, batch: Mapping[str, Any], weights: Tensor, dim: int) -> Tensor:
    """Whether each query `(B, Q)` or key `(B, K)` is not padding."""
    mask, shape = batch.get(mask_name), (weights.shape[0], weights.shape[dim])
    if mask is None or mask.dim() != 2:
        return torch.ones(shape, dtype=torch.bool, device=weights.device)
    if mask.shape != shape:
        raise ValueError(
            f"`{mask_name}` has shape {tuple(mask.shape)}, expected {shape} as in `{name}`: padding cannot be told "
            "apart. Pass masks of the sequences that the model attends between, without a cache."
        )
    return mask.to(weights.device).bool()
