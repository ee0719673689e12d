"""Kernels other than SDPA for the base attention, and the translation of SDPA's masks for them.

If a kernel cannot express a mask, SDPA computes the attention, so the choice of kernel changes only speed and memory.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from ..functional import block_mask, once_per_mask


FLEX = "flex_attention"
# Arguments that describe packed documents to FlashAttention. Here they are derived from the mask instead.
PACKING_OPTIONS = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def can_be_base(name: str) -> bool:
    """Returns whether an attention implementation is FlashAttention, FlexAttention, or takes the masks of SDPA."""
    return name == FLEX or _is_flash(name) or AttentionMaskInterface().get(name) is sdpa_mask


def serves_cross_attention(name: str) -> bool:
    """Returns whether a kernel supports cross-attention masks; FlashAttention would treat them as query padding."""
    return not _is_flash(name)


def attend_with(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    **options: Any,
) -> Tensor | None:
    """Computes attention by a kernel, if it can express the mask.

    Args:
        name: the attention implementation.
        module: the attention module.
        query: `(B, H, Q, D)`.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, D)`.
        mask: `(B|1, H|1, Q|1, K)`, or `None`.
        is_causal: whether a missing mask means causal.
        options: further arguments of the attention implementation.

    Returns:
        The output `(B, Q, H, D)`, or `None` if the kernel cannot express the mask.
    """
    attend = AttentionInterface()[name]
    states = (query, key, value)
    if name == FLEX:
        # FlexAttention would look a position bias of one sample up for each sample of the batch.
        if options.get("position_bias") is not None or (mask is not None and mask.dtype != torch.bool):
            return None
        blocks = block_mask(mask, is_causal and query.shape[-2] > 1, query.shape[-2], key.shape[-2], query.device)
        return attend(module, *states, blocks, is_causal=is_causal, **options)[0]
    if _is_flash(name):
        return _attend_with_flash(attend, _named(module, name), states, mask, is_causal, options)
    return attend(module, *states, mask, is_causal=is_causal, **options)[0]


@dataclass(frozen=True)
class Packing:
    """The non-padding tokens of a batch as one sequence, split into documents that do not attend to each other.

    Args:
        index: `(N,)`, positions of the non-padding tokens among all `B * L`.
        starts: `(documents + 1,)`, int32, index of the first token of each document, then `N`.
        longest: number of tokens in the longest document.
    """

    index: Tensor
    starts: Tensor
    longest: int

    @classmethod
    def of_mask(cls, mask: Tensor, batch_size: int, is_causal: bool, window: int | None = None) -> "Packing | None":
        """Derives the packing from a self-attention mask.

        Args:
            mask: `(B|1, H|1, Q|1, L)`.
            batch_size: `B`.
            is_causal: whether later tokens are masked.
            window: tokens at this distance or more are masked; `None` masks none.

        Returns:
            The packing, or `None` if the mask differs from documents, padding, causal order and window.

        Example:

        >>> mask = torch.tensor([[True, True, False, True, True]]) & torch.ones(5, 5, dtype=torch.bool).tril()
        >>> mask[3:, :2] = False
        >>> Packing.of_mask(mask[None, None], 1, is_causal=True)
        Packing(index=tensor([0, 1, 3, 4]), starts=tensor([0, 2, 4], dtype=torch.int32), longest=2)
        """
        length = mask.shape[-1]
        if mask.dtype != torch.bool or mask.shape[1] > 1:
            return None
        mask = mask[:, 0].expand(batch_size, length, length)
        is_real = mask.diagonal(dim1=-2, dim2=-1)
        is_start = ~F.pad(mask.diagonal(offset=-1, dim1=-2, dim2=-1), (1, 0))
        run = is_start.cumsum(-1)
        position = torch.arange(length, device=mask.device)
        distance = position[:, None] - position
        expected = (run[:, :, None] == run[:, None, :]) & is_real[:, None, :]
        expected &= (distance >= 0) if is_causal else (distance.abs() < length)
        if window is not None:
            expected &= distance.abs() < window
        # Rows of padding queries do not matter: their outputs are not used.
        if not torch.equal(mask & is_real[..., None], expected & is_real[..., None]):
            return None
        index = is_real.flatten().nonzero().squeeze(-1)
        starts = is_start.flatten()[index].nonzero().squeeze(-1)
        starts = F.pad(starts, (0, 1), value=len(index)).int()
        return cls(index, starts, int(starts.diff().max()) if len(index) else 0)


_packing_of_mask = once_per_mask(Packing.of_mask)


def _attend_with_flash(
    attend: Callable[..., tuple[Tensor, None]],
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    is_causal: bool,
    options: dict[str, Any],
) -> Tensor | None:
    batch_size, _, queries, _ = states[0].shape
    if queries != states[1].shape[-2] or options.get("position_bias") is not None:
        return None
    options = {name: value for name, value in options.items() if name not in PACKING_OPTIONS}
    options["is_causal"] = is_causal
    if mask is None:
        return attend(module, *states, None, **options)[0]
    packing = _packing_of_mask(mask, batch_size, is_causal, options.get("sliding_window"))
    if packing is None or packing.longest == 0:
        return None
    query, key, value = (x.transpose(1, 2).flatten(0, 1)[packing.index].transpose(0, 1)[None] for x in states)
    runs = {f"cu_seq_lens_{side}": packing.starts for side in "qk"}
    runs |= {f"max_length_{side}": packing.longest for side in "qk"}
    output = attend(module, query, key, value, None, **options, **runs)[0][0]  # (N, H, D)
    padded = output.new_zeros(batch_size * queries, *output.shape[1:])
    return padded.index_copy(0, packing.index, output).unflatten(0, (batch_size, queries))


def _is_flash(name: str) -> bool:
    return is_flash_attention_requested(requested_attention_implementation=name)


def _named(module: nn.Module, name: str) -> nn.Module:
    """Returns a copy of the module whose config names the kernel, from which FlashAttention takes its version."""
    module = copy.copy(module)
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = name  # The public property would change shared sub-configs.
    return module
