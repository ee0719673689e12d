"""Which blocks of scores FlexAttention may skip, computed from a mask tensor."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from .visibility import once_per_mask


BLOCK_SIZE = 128


def block_mask(
    visible: Tensor | None, is_causal: bool, num_queries: int, num_keys: int, device: torch.device
) -> BlockMask | None:
    """The blocks that FlexAttention can skip, and those in which it must mask single scores.

    `create_block_mask` would materialize a mask of all scores first.

    Args:
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all.
        is_causal: whether query `i` sees no key after `i`, if there is no `visible`.
        num_queries: `Q`.
        num_keys: `K`.
        device: device of index tensors.

    Returns:
        `None` if every query sees every key.
    """
    if visible is None and not is_causal:
        return None
    complete_rows, complete_columns = (_is_complete(length, device) for length in (num_queries, num_keys))
    shape = (len(complete_rows), len(complete_columns))
    if visible is None:
        any_visible = torch.ones(1, 1, *shape, dtype=torch.bool, device=device).tril()
        all_visible, mask_mod = any_visible.tril(-1), _is_not_later
    else:
        any_visible, all_visible = (blocks.expand(-1, -1, *shape) for blocks in _visible_blocks(visible))
        mask_mod = _look_up(visible.detach())
    # As in `create_block_mask`, incomplete blocks at the ends never count as fully visible.
    all_visible = all_visible & complete_rows[:, None] & complete_columns
    return BlockMask.from_kv_blocks(
        *_selected_first(any_visible & ~all_visible),
        *_selected_first(all_visible),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=mask_mod,
        seq_lengths=(num_queries, num_keys),
    )


def _is_complete(length: int, device: torch.device) -> Tensor:
    """Which blocks of a sequence are complete."""
    return torch.arange(0, length, BLOCK_SIZE, device=device) <= length - BLOCK_SIZE


@once_per_mask
def _visible_blocks(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks have any visible score and which have only visible scores, `(B|1, H|1, Q blocks|1, K blocks)`."""
    rows = min(BLOCK_SIZE, visible.shape[-2])
    padded = F.pad(visible, (0, -visible.shape[-1] % BLOCK_SIZE, 0, -visible.shape[-2] % rows))
    blocks = padded.unflatten(-1, (-1, BLOCK_SIZE)).unflatten(-3, (-1, rows))
    return blocks.any(dim=-1).any(dim=-2), blocks.all(dim=-1).all(dim=-2)


def _selected_first(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The number of selected blocks in each row, and block indices with the selected ones first."""
    blocks = blocks.to(torch.int32)
    indices = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), indices.to(torch.int32)


def _is_not_later(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _look_up(visible: Tensor) -> Callable[..., Tensor]:
    samples, heads, rows = (int(size > 1) for size in visible.shape[:-1])

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible[b.long() * samples, h.long() * heads, q.long() * rows, k]

    return mask_mod
