"""A learned attention sink, one of the methods that Affine-Scaled Attention (arXiv 2602.23057) compares with."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ..attention.call import SDPA, Attend, AttentionCall, AttentionOutput
from ..functional import prepend_sink, prepend_sink_to_mask
from ..validation import is_number
from .card import MethodCard
from .learned import Dimensions, LearnedMethod, LearnedWeights
from .papers import AFFINE_SCALED


class AttentionSink(LearnedWeights):
    """One learned score per head that joins every softmax without a key or value."""

    # Perturbations must act on the model's keys only, so the sink is added inside of them.
    acts_on_scores = True

    def __init__(self, config: Any, dimensions: Dimensions, **factory: Any) -> None:
        super().__init__(config, dimensions)
        self.weight = nn.Parameter(torch.empty(dimensions.num_heads, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.constant_(self.weight, self.config.init)

    def forward(self, states: Tensor, call: AttentionCall, attend: Attend) -> AttentionOutput:
        if call.extras.get("softcap") is not None:
            raise ValueError(
                f"A learned sink cannot act on {type(call.module).__name__}, which caps its scores (softcap="
                f"{call.extras['softcap']}): the sink's score would be capped too. Set the softcap of the model "
                'config to None, or use attn_implementation="affine_scaled".'
            )
        scaling = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        query, key, value = prepend_sink(call.query, call.key, call.value, self.weight, scaling=scaling)
        # Without a mask, prepending the sink to the keys alone would shift causal order by one. With one more query in
        # front, query i + 1 sees keys 0 to i + 1.
        added = int(call.mask is None and call.causal and query.shape[-2] > 1)
        padding = (1, 0, added, 0)
        extras = call.extras
        if extras.get("position_bias") is not None:
            extras = extras | {"position_bias": F.pad(extras["position_bias"], padding)}
        output, weights = attend(
            replace(
                call,
                query=F.pad(query, (0, 0, added, 0)),
                key=key,
                value=value,
                mask=None if call.mask is None else prepend_sink_to_mask(call.mask),
                scaling=scaling,
                extras=extras,
                base=SDPA,
                zeroed=None if call.zeroed is None else F.pad(call.zeroed, padding),
            )
        )
        return output[:, added:, :, :-1].contiguous(), None if weights is None else weights[:, :, added:, 1:]


@dataclass(frozen=True, repr=False)
class AttentionSinkConfig(LearnedMethod):
    """A learned attention sink: a score per head that joins the softmax, so a query can attend to no key.

    The settings of `attn_implementation="attention_sink"`. Source: arXiv 2602.23057, as a baseline.

    Args:
        init (`float`, defaults to -4.0):
            Initial score of the sinks. With -4 a model starts close to the base model, though not exactly at it; with
            much lower values the sinks hardly learn.
        layers (`list[int]`, *optional*):
            Layers to act on, counted within each stack (encoder, decoder); negative from the end. All by default.

    Raises:
        ValueError: if a value is of the wrong type or out of range.

    Example:

    >>> AttentionSinkConfig().to_dict()
    {'method': 'attention_sink', 'init': -4.0, 'layers': None}
    """

    method = "attention_sink"
    weights = AttentionSink

    init: float = -4.0

    def __post_init__(self) -> None:
        self._make_plain("layers")
        self._check(
            "init",
            lambda value: is_number(value) and math.isfinite(value),
            "a finite number",
            "It is the initial score of the sinks; at minus infinity they could not learn.",
        )
        self._check_layers()

    def cards(self) -> tuple[MethodCard, ...]:
        card = MethodCard(
            "Learned attention sink",
            "Every head learns a score that takes part in the softmax with nothing to give, so that a query can put "
            "its weight on no key: one of the methods that Affine-Scaled Attention compares with.",
            "weights[i,j] = exp(L[i,j]) / (exp(s) + Σ_t exp(L[i,t])),   s: learned, one per head, starts at init",
            "attention-sink",
            AFFINE_SCALED,
            {"init": self.init, "layers": self.layers},
        )
        return (card,)
