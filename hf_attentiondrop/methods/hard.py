"""Hard Attention Masking (AttentionDrop, arXiv 2504.12088, variant 1).

Long sequences avoid the score matrix: blockwise on the CPU, through FlexAttention on CUDA. Otherwise a score matrix
tells which scores are masked, and the base attention runs under a mask, so that bias, softcap, sinks and dropout keep
their effect.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..attention.call import SDPA, Attend, AttentionCall, AttentionOutput, attend_if_any_key
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
from .method import Perturbation
from .papers import ATTENTION_DROP


# Scores per head up to which the full score matrix is as fast as blocks on the CPU.
FEW_SCORES = 256 * 256
# Scores per head up to which the full score matrix is used on devices where FlexAttention trains. At 512 x 512 a batch
# of 32 with 12 heads has 0.4 GB of them, and the dozens of small kernels around FlexAttention take as long as several
# passes over that. The matrix grows with the square of the length, and the kernels do not.
FLEX_ATTENTION_BEYOND = {"cuda": 512 * 512}
FLEX_ATTENTION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLEX_ATTENTION_SIZES = range(16, 129)
# Candidates per row that fit into the registers of the kernel which finds them.
FLEX_ATTENTION_CANDIDATES = 64
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True, repr=False)
class HardMasking(Perturbation):
    """Masks some of each query's highest attention scores (AttentionDrop variant 1, arXiv 2504.12088).

    Args:
        p (`float`, defaults to 0.1):
            Probability in [0, 1] with which each of the `k` highest scores of a query is masked. The paper reports a
            loss of more than two points above 0.5.
        k (`int` or `float`, defaults to 5):
            How many of the highest visible scores of a query can be masked, an integer of at least 1; or a share of
            the keys that the query sees, a float between 0 and 1, rounded up for each query.
        fill (`str`, defaults to `"mask"`):
            What a masked score becomes. `"mask"` is -inf: the key is dropped. `"zero"` is 0, the paper's formula,
            which raises the weight of a key whose score was negative and depends on a constant shift of the scores.

    Raises:
        ValueError: if a value is of the wrong type or out of range.

    Example:

    >>> HardMasking(p=0.2)
    HardMasking(p=0.2, k=5, fill='mask', layers=None, attentions=('encoder_self', 'decoder_self'))
    """

    variant = "hard"
    scheduled = "p"

    p: float = 0.1
    k: int | float = 5
    fill: str = "mask"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            "p",
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
        # A kernel that computes attention itself leaves nothing to the methods that would run inside of this one.
        kernel = self._kernel(call) if attend is attend_if_any_key else None
        if kernel is not None:
            shape = torch.Size([*call.query.shape[:-1], call.key.shape[-2]])
            num_visible = num_visible_keys(call.mask, is_causal=call.causal, **call.lengths)
            drawn = sample_masked_ranks(shape, num_visible, p=p, k=self.k, fill=self.fill, device=call.query.device)
            options: dict[str, Any] = {"is_causal": call.causal, "scaling": call.scaling, "fill": self.fill}
            return kernel(call.query, call.key, call.value, drawn, call.mask, **options), None
        with torch.no_grad():
            masked = sample_masked_scores(call.scores(), call.visible, p=p, k=self.k, fill=self.fill)
        if self.fill == "mask":
            return attend(call.keeping(~masked))
        zeroed = masked if call.zeroed is None else masked | call.zeroed
        return attend(replace(call, zeroed=zeroed, base=SDPA))

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
        """Returns what attends without a score matrix, where that pays and only a mask shapes the scores."""
        if call.wants_eager or call.zeroed is not None or call.extras.get("position_bias") is not None:
            return None
        num_scores = call.query.shape[-2] * call.key.shape[-2]
        device, has_constant_mask = call.query.device.type, call.mask is None or not call.mask.requires_grad
        if device == "cpu" and num_scores > FEW_SCORES and has_constant_mask:
            return partial(hard_attention, dropout=call.dropout)
        if num_scores > FLEX_ATTENTION_BEYOND.get(device, math.inf) and self._flex_attention_can(call):
            return flex_hard_attention
        return None

    def _flex_attention_can(self, call: AttentionCall) -> bool:
        """Returns whether FlexAttention, which has no dropout of attention weights, can compute the call."""
        has_size = all(states.shape[-1] in FLEX_ATTENTION_SIZES for states in (call.query, call.value))
        is_boolean = call.mask is None or call.mask.dtype == torch.bool
        has_room = num_candidates(self.k, call.key.shape[-2]) <= FLEX_ATTENTION_CANDIDATES
        has_dtype = call.value.dtype in FLEX_ATTENTION_DTYPES
        return HAS_TRITON and has_size and is_boolean and has_dtype and has_room and call.dropout == 0
