"""DropKey (Li et al., CVPR 2023, arXiv 2208.02646)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.call import Attend, AttentionCall, AttentionOutput
from ..functional import AXES, dropkey_attention, flex_dropkey_attention, sample_key_mask
from ..validation import is_probability
from .card import MethodCard
from .long_sequences import can_replace, prefers_blocks, prefers_flex_attention
from .method import Perturbation
from .profile import ProfileLike


PAPER = """@inproceedings{li2023dropkey,
  title     = {DropKey for Vision Transformer},
  author    = {Li, Bonan and Hu, Yinhan and Nie, Xuecheng and Han, Congying and Jiang, Xiangjian and Guo, Tiande and \
Liu, Luoqi},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages     = {22700--22709},
  year      = {2023}
}"""


@dataclass(frozen=True, repr=False)
class DropKey(Perturbation):
    """DropKey: masks random keys before the softmax in training (arXiv 2208.02646).

    The softmax renormalizes the other weights; there is no further rescaling. A query keeps at least one key.
    Evaluation is unchanged.

    Args:
        p (`float`, `list` or `dict`, defaults to 0.1):
            Probability in [0, 1] with which each visible key is masked. A list has one value per
            layer; `{"from": 0.2, "to": 0.0}` changes it linearly with depth; `{"heads": [...]}` sets it per head.
        axis (`str`, defaults to `"score"`):
            `"score"` samples for every query and key. `"column"` samples once per key, sample and head for all
            queries, like HiddenKey for LoRA (arXiv 2403.00812).
        layers (`list[int]`, *optional*):
            Layers to act on, counted within each stack (encoder, decoder); negative from the end. All by default.
        attentions (`list[str]`, defaults to `("encoder_self", "decoder_self")`):
            Kinds of attention to act on: `"encoder_self"`, `"decoder_self"`, `"cross"`.

    Raises:
        ValueError: if a value is of the wrong type or out of range.

    Example:

    >>> DropKey(p=0.2, axis="column")
    DropKey(p=0.2, axis='column', layers=None, attentions=('encoder_self', 'decoder_self'))
    """

    variant = "dropkey"
    scheduled = "p"

    p: ProfileLike = 0.1
    axis: str = "score"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_profile(is_probability, "a probability in [0, 1]", "It is the chance that a key is masked.")
        self._check("axis", AXES.__contains__, f"one of {AXES}", "It decides which scores are masked together.")

    def attend(self, call: AttentionCall, attend: Attend, p: Tensor, /) -> AttentionOutput:
        states = call.query, call.key, call.value
        if can_replace(attend, call) and not self._has_one_row(call):
            if prefers_blocks(call):
                options: dict[str, Any] = {"is_causal": call.causal, "scaling": call.scaling, "dropout": call.dropout}
                return dropkey_attention(*states, call.mask, p=p, axis=self.axis, **options), None
            if self.axis == "score" and prefers_flex_attention(call):
                output = flex_dropkey_attention(*states, call.mask, p=p, is_causal=call.causal, scaling=call.scaling)
                return output, None
        shape, device = torch.Size([*call.query.shape[:-1], call.key.shape[-2]]), call.query.device
        kept = sample_key_mask(shape, call.mask, p=p, axis=self.axis, is_causal=call.causal, device=device)
        return attend(call.keeping(kept))

    def needs_score_matrix(self, dropout: float) -> bool:
        return self.axis == "score" and dropout > 0

    def cards(self) -> tuple[MethodCard, ...]:
        unit = {"score": "query, key", "column": "key"}[self.axis]
        index = {"score": "i,j", "column": "j"}[self.axis]
        card = MethodCard(
            "DropKey",
            f"In training, each key is masked with probability `p` before the softmax, independently per {unit}, head "
            "and sample; every query keeps at least one key. Evaluation is unchanged.",
            f"L'[i,j] = L[i,j] if m[{index}] = 1 else -∞,   m[{index}] ~ Bernoulli(1 - p),   L = scaling · Q Kᵀ",
            "dropkey",
            PAPER,
            self.card_settings(),
        )
        return (card,)

    def _has_one_row(self, call: AttentionCall) -> bool:
        """Returns whether all queries see and keep the same keys. SDPA with such a mask is as fast as without one."""
        is_shared = call.mask.shape[-2] == 1 if call.mask is not None else not call.causal
        return self.axis == "column" and is_shared
