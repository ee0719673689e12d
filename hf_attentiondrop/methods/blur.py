"""Blurred Attention Smoothing (AttentionDrop, arXiv 2504.12088, variant 2)."""

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..attention.call import Attend, AttentionCall, AttentionOutput
from ..functional import blur_keys, expand_heads, visible_neighbors
from ..validation import is_integer, is_number
from .card import MethodCard
from .method import Perturbation
from .papers import ATTENTION_DROP
from .profile import ProfileLike


# Name of the cap of attention scores in modules.
SOFTCAP_NAME = "attn_logit_softcapping"


@dataclass(frozen=True, repr=False)
class BlurredSmoothing(Perturbation):
    """Blurred Attention Smoothing: smooths the scores along the keys in training (AttentionDrop variant 2).

    Evaluation is unchanged. Images are blurred in raster order, class token first. Source: arXiv 2504.12088.

    Args:
        sigma_max (`float`, `list` or `dict`, defaults to 1.0):
            Largest standard deviation of the Gaussian in tokens. It is sampled uniformly from [0, `sigma_max`] for
            each sample in each layer. A list has one value per layer; `{"from": 2.0, "to": 0.0}` changes it linearly
            with depth; `{"heads": [...]}` sets it per head, for which grouped keys are repeated.
        width (`int`, defaults to 5):
            Width of the Gaussian's window in tokens, odd, at least 1. The paper reports a loss of more than two
            points above 9.
        layers (`list[int]`, *optional*):
            Layers to act on, counted within each stack (encoder, decoder); negative from the end. All by default.
        attentions (`list[str]`, defaults to `("encoder_self", "decoder_self")`):
            Kinds of attention to act on: `"encoder_self"`, `"decoder_self"`, `"cross"`.

    Raises:
        ValueError: if a value is of the wrong type or out of range.

    Example:

    >>> BlurredSmoothing(sigma_max=0.5).to_dict()
    {'variant': 'blur', 'sigma_max': 0.5, 'width': 5, 'layers': None, 'attentions': ['encoder_self', 'decoder_self']}
    """

    variant = "blur"
    scheduled = "sigma_max"

    sigma_max: ProfileLike = 1.0
    width: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_profile(
            lambda sigma_max: is_number(sigma_max) and 0 <= sigma_max < math.inf,
            "a finite number >= 0",
            "It is the largest standard deviation of the blur in tokens; 1.0 is the paper's.",
        )
        self._check(
            "width",
            lambda width: is_integer(width) and width >= 1 and width % 2 == 1,
            "an odd integer >= 1",
            "The blur window needs a center; 5 is the paper's, above 9 it costs accuracy.",
        )

    @property
    def can_act(self) -> bool:
        return self.width > 1

    def attend(self, call: AttentionCall, attend: Attend, sigma_max: Tensor, /) -> AttentionOutput:
        # Scores are linear in the keys, so attention over blurred keys is attention with blurred scores.
        if call.extras.get("softcap") is not None:
            raise _softcap_error(call.module, call.extras["softcap"])
        neighbors = visible_neighbors(
            call.model_mask,
            width=self.width,
            is_causal=call.causal,
            is_cross=call.kind == "cross",
            **call.lengths,
        )
        dtype = torch.promote_types(call.key.dtype, torch.float32)
        sigma = torch.rand(call.key.shape[0], dtype=dtype, device=call.key.device)
        sigma = sigma_max * sigma if sigma_max.dim() == 0 else sigma_max.flatten() * sigma[:, None]
        key = blur_keys(call.key, sigma, neighbors)
        if key.shape[1] == call.key.shape[1]:
            return attend(replace(call, key=key))
        # Masks or blurs per query head took one key per query head, which the base attention must not repeat again.
        ungrouped = copy.copy(call.module)
        ungrouped.num_key_value_groups = 1
        return attend(replace(call, module=ungrouped, key=key, value=expand_heads(call.value, key.shape[1])))

    def check_module(self, module: nn.Module) -> None:
        if (softcap := getattr(module, SOFTCAP_NAME, None)) is not None:
            raise _softcap_error(module, softcap)

    def cards(self) -> tuple[MethodCard, ...]:
        card = MethodCard(
            "AttentionDrop: blurred attention smoothing",
            "In training, attention scores are smoothed along the keys by a Gaussian whose width is sampled anew for "
            "every sample and layer, over the neighbors that each key may attend to itself. Evaluation is unchanged.",
            "L'[i,j] = Σ_t g_t m[j,j+t] L[i,j+t] / Σ_t g_t m[j,j+t],   |t| ≤ (width - 1) / 2\n"
            "L = scaling · Q Kᵀ,   g: Gaussian with σ ~ U(0, sigma_max),   m[j,j+t] = 1 if j may see j+t, else 0",
            "attentiondrop",
            ATTENTION_DROP,
            self.card_settings(),
        )
        return (card,)


def _softcap_error(module: nn.Module, softcap: float) -> ValueError:
    return ValueError(
        f"AttentionDrop's blur cannot act on {type(module).__name__}, which caps its scores (softcap={softcap}): "
        "because of its tanh, blurring the keys does not blur the scores. Use another perturbation, such as "
        'variant="hard", or set the softcap of the model config to None.'
    )
