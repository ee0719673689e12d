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
    """Which blocks of scores FlexAttention may leave out, and in which it must ask for every score.

    `create_block_mask` would first make a mask of all scores of what it is given as a function.

    Args:
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all.
        is_causal: whether query `i` sees no key after `i`, if there is no `visible`.
        num_queries: `Q`.
        num_keys: `K`.
        device: where index tensors are made.

    Returns:
        `None` where every query sees every key.
    """
    if visible is None and not is_causal:
        return None
    whole_rows, whole_columns = (_whole_blocks(length, device) for length in (num_queries, num_keys))
    shape = (len(whole_rows), len(whole_columns))
    if visible is None:
        shows_any = torch.ones(1, 1, *shape, dtype=torch.bool, device=device).tril()
        shows_all, mask_mod = shows_any.tril(-1), _is_not_later
    else:
        shows_any, shows_all = (blocks.expand(-1, -1, *shape) for blocks in _visible_blocks(visible))
        mask_mod = _look_up(visible.detach())
    # As `create_block_mask` has it, the ragged blocks at the ends are never in full view.
    shows_all = shows_all & whole_rows[:, None] & whole_columns
    return BlockMask.from_kv_blocks(
        *_in_order(shows_any & ~shows_all),
        *_in_order(shows_all),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=mask_mod,
        seq_lengths=(num_queries, num_keys),
    )


def _whole_blocks(length: int, device: torch.device) -> Tensor:
    """Which blocks of a sequence do not reach beyond its end."""
    return torch.arange(0, length, BLOCK_SIZE, device=device) <= length - BLOCK_SIZE


@once_per_mask
def _visible_blocks(visible: Tensor) -> tuple[Tensor, Tensor]:
    """In which blocks some score is visible and in which all are, `(B|1, H|1, Q blocks|1, K blocks)`."""
    rows = min(BLOCK_SIZE, visible.shape[-2])
    padded = F.pad(visible, (0, -visible.shape[-1] % BLOCK_SIZE, 0, -visible.shape[-2] % rows))
    blocks = padded.unflatten(-1, (-1, BLOCK_SIZE)).unflatten(-3, (-1, rows))
    return blocks.any(dim=-1).any(dim=-2), blocks.all(dim=-1).all(dim=-2)


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are meant, and their numbers first."""
    blocks = blocks.to(torch.int32)
    numbers = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), numbers.to(torch.int32)


def _is_not_later(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _look_up(visible: Tensor) -> Callable[..., Tensor]:
    samples, heads, rows = (int(size > 1) for size in visible.shape[:-1])

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible[b.long() * samples, h.long() * heads, q.long() * rows, k]

    return mask_mod
