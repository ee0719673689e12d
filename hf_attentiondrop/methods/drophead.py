"""DropHead (Zhou et al., EMNLP Findings 2020, arXiv 2004.13342)."""

from dataclasses import dataclass

from torch import Tensor

from ..attention.call import Attend, AttentionCall, AttentionOutput
from ..functional.drophead import sample_head_scale
from ..validation import is_probability
from .card import MethodCard
from .method import Perturbation
from .profile import ProfileLike


PAPER = """@inproceedings{zhou2020scheduled,
  title     = {Scheduled DropHead: A Regularization Method for Transformer Models},
  author    = {Zhou, Wangchunshu and Ge, Tao and Wei, Furu and Zhou, Ming and Xu, Ke},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2020},
  pages     = {1971--1980},
  year      = {2020}
}"""


@dataclass(frozen=True, repr=False)
class DropHead(Perturbation):
    """DropHead: drops whole attention heads of each sample in training (arXiv 2004.13342).

    The outputs of the other heads are multiplied by `H / (heads kept)`. At least one head of each sample is kept.
    Evaluation is unchanged.

    Args:
        p (`float`, `list` or `dict`, defaults to 0.1):
            Probability in [0, 1] with which each head of a sample is dropped in a layer. A list has one value per
            layer; `{"from": 0.2, "to": 0.0}` changes it linearly with depth; `{"heads": [...]}` sets it per head.
        layers (`list[int]`, *optional*):
            Layers to act on, counted within each stack (encoder, decoder); negative from the end. All by default.
        attentions (`list[str]`, defaults to `("encoder_self", "decoder_self")`):
            Kinds of attention to act on: `"encoder_self"`, `"decoder_self"`, `"cross"`.

    Raises:
        ValueError: if a value is of the wrong type or out of range.

    Example:

    >>> DropHead(p=0.2)
    DropHead(p=0.2, layers=None, attentions=('encoder_self', 'decoder_self'))
    """

    variant = "drophead"
    scheduled = "p"
    scales_output = True

    p: ProfileLike = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_profile(is_probability, "a probability in [0, 1]", "It is the chance that a head is dropped.")

    def attend(self, call: AttentionCall, attend: Attend, p: Tensor, /) -> AttentionOutput:
        batch_size, num_heads = call.query.shape[:2]
        p = p if p.dim() == 0 else p.flatten()
        scale = sample_head_scale(batch_size, num_heads, p=p, dtype=call.value.dtype, device=call.value.device)
        output, weights = attend(call)
        output = output * scale.view(batch_size, 1, num_heads, 1)
        return output, None if weights is None else weights * scale.view(batch_size, num_heads, 1, 1)

    def cards(self) -> tuple[MethodCard, ...]:
        card = MethodCard(
            "DropHead",
            "In training, each attention head of a sample is dropped with probability `p`, and the outputs of the "
            "others are scaled up; one head always survives. Evaluation is unchanged.",
            "O'[h] = m[h] · H / Σ_g m[g] · O[h],   m[h] ~ Bernoulli(1 - p), drawn per sample and layer",
            "drophead",
            PAPER,
            self.card_settings(),
        )
        return (card,)
