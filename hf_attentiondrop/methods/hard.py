"""Hard Attention Masking (AttentionDrop, arXiv 2504.12088, variant 1).

Long sequences avoid the score matrix: blockwise on the CPU, through FlexAttention on CUDA. Otherwise a score matrix
tells which scores are masked, and the base attention runs under a mask, so that bias, softcap, sinks and dropout keep
their effect.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention.call import Attend, AttentionCall, AttentionOutput
from ..functional import (
    FILLS,
    flex_hard_attention,
    hard_attention,
    num_candidates,
    num_visible_keys,
    sample_masked_ranks,
    sample_masked_scores,
)
from ..validation import is_integer, is_probability
from .card import MethodCard
from .long_sequences import can_replace, prefers_blocks, prefers_flex_attention
from .method import Perturbation
from .papers import ATTENTION_DROP
from .profile import ProfileLike


# Candidates per row that fit into the registers of the kernel which finds them.
FLEX_ATTENTION_CANDIDATES = 64


@dataclass(frozen=True, repr=False)
class HardMasking(Perturbation):
    """Hard Attention Masking: masks some of each query's highest scores in training (AttentionDrop variant 1).

    Evaluation is unchanged. Source: arXiv 2504.12088.

    Args:
        p (`float`, `list` or `dict`, defaults to 0.1):
            Probability in [0, 1] with which each of the `k` highest scores of a query is masked. The paper reports a
            loss of more than two points above 0.5. A list has one value per layer; `{"from": 0.2, "to": 0.0}` changes
            it linearly with depth; `{"heads": [...]}` sets it per head.
        k (`int` or `float`, defaults to 5):
            Number of highest visible scores of a query that can be masked, at least 1; or a fraction between 0 and 1
            of the keys that the query sees, rounded up for each query.
        fill (`str`, defaults to `"mask"`):
            Value of a masked score. `"mask"` is -inf: the key gets no weight, and a query keeps at least one key.
            `"zero"` is 0, the paper's formula, which raises the weight of a key with a negative score and is not
            invariant to a constant shift of the scores.
        layers (`list[int]`, *optional*):
            Layers to act on, counted within each stack (encoder, decoder); negative from the end. All by default.
        attentions (`list[str]`, defaults to `("encoder_self", "decoder_self")`):
            Kinds of attention to act on: `"encoder_self"`, `"decoder_self"`, `"cross"`.

    Raises:
        ValueError: if a value is of the wrong type or out of range.

    Example:

    >>> HardMasking(p=0.2)
    HardMasking(p=0.2, k=5, fill='mask', layers=None, attentions=('encoder_self', 'decoder_self'))
    """

    variant = "hard"
    scheduled = "p"

    p: ProfileLike = 0.1
    k: int | float = 5
    fill: str = "mask"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_profile(
            is_probability,
            "a probability in [0, 1]",
            "It is the chance that a high score is masked; 0.1 is the paper's, above 0.5 it costs accuracy.",
        )
        self._check(
            "k",
            lambda k: (is_integer(k) and k >= 1) or (isinstance(k, float) and 0 < k < 1),
            "an integer >= 1 or a share between 0 and 1",
            "It is the number of highest scores per row that can be masked, such as 5, the paper's, or the share of "
            "the row's visible keys, such as 0.1.",
        )
        self._check("fill", FILLS.__contains__, f"one of {FILLS}", "It decides what a masked score becomes.")

    def attend(self, call: AttentionCall, attend: Attend, p: Tensor, /) -> AttentionOutput:
        kernel = self._kernel(call) if can_replace(attend, call) else None
        if kernel is not None:
            shape = torch.Size([*call.query.shape[:-1], call.key.shape[-2]])
            num_visible = num_visible_keys(call.mask, is_causal=call.causal, **call.lengths)
            device = call.query.device
            masked_ranks = sample_masked_ranks(shape, num_visible, p=p, k=self.k, fill=self.fill, device=device)
            options: dict[str, Any] = {"is_causal": call.causal, "scaling": call.scaling, "fill": self.fill}
            return kernel(call.query, call.key, call.value, masked_ranks, call.mask, **options), None
        # Under a mask the base attention computes the scores itself, and these need no gradient.
        with torch.set_grad_enabled(self.fill == "zero" and torch.is_grad_enabled()):
            scores = call.scores()
        masked = sample_masked_scores(scores.detach(), call.visible, p=p, k=self.k, fill=self.fill)
        return attend(call.zeroing(masked, scores) if self.fill == "zero" else call.keeping(~masked))

    def needs_score_matrix(self, dropout: float) -> bool:
        return dropout > 0

    def cards(self) -> tuple[MethodCard, ...]:
        effect, value = {
            "mask": ("dropped with probability `p`, and the rest renormalized; one key always survives", "-∞"),
            "zero": ("given a score of 0 with probability `p`", "0"),
        }[self.fill]
        card = MethodCard(
            "AttentionDrop: hard attention masking",
            f"In training, each of the `k` strongest keys of every query is {effect}. Evaluation is unchanged.",
            f"L'[i,j] = {value} with probability p, for each j of S_i\n"
            "L = scaling · Q Kᵀ,   S_i: the k highest scores L[i,j] of the keys that query i sees",
            "attentiondrop",
            ATTENTION_DROP,
            self.card_settings(),
        )
        return (card,)

    def _kernel(self, call: AttentionCall) -> Callable[..., Tensor] | None:
        """Returns the function that computes attention without a score matrix, if there is a better one."""
        if prefers_blocks(call):
            return partial(hard_attention, dropout=call.dropout)
        has_room = num_candidates(self.k, call.key.shape[-2]) <= FLEX_ATTENTION_CANDIDATES
        return flex_hard_attention if has_room and prefers_flex_attention(call) else None
