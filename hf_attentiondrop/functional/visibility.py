"""Who sees whom: visibility read off the masks that Transformers hands to an attention function."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary


T = TypeVar("T")

# An additive mask hides a key this far below the best one of its row: beside that it has exp(-64), or 2e-28, of the
# weight, and nothing is left of it in the sums of any dtype. No learned bias spreads so far; ALiBi does at distances
# where it hides just as well. Masks do: by -100 in the shifted windows of Swin, on top of a bias; by -10000, -1e9, the
# minimum of a dtype or minus infinity.
HIDDEN_BELOW_BEST = 64.0
# And this far below zero, where it sees none: beside a key without a bias nothing is left of it even in float64.
HIDDEN_BELOW_ZERO = 1000.0

_found = WeakTensorKeyDictionary()


def once_per_mask(find: Callable[..., T]) -> Callable[..., T]:
    """Decorates a function of a mask and of what it is to find there: what it returns is kept for as long as the mask
    lives and stays as it is.

    A model hands one and the same mask to all its layers, and activation checkpointing hands it over once more: what
    they have to know about it need not be found out by each of them. What was found goes when the mask goes, so `find`
    must return nothing that refers to the mask; and it is found anew after a change in place, which the version of a
    tensor counts. (Like autograd, this trusts that nobody writes behind its back, through `.data` or a NumPy array
    that shares the memory.) A compiled graph has no tensors to remember, and those of inference mode have no version.
    Threads do not share masks, and if they did, the worst would be that both of them find out.
    """

    @functools.wraps(find)
    def find_once(attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any) -> T:
        if attention_mask is None or torch.compiler.is_compiling() or _has_no_version(attention_mask):
            return find(attention_mask, *args, **kwargs)
        version, known = _found.get(attention_mask, (None, None))
        if version != attention_mask._version:
            known = {}
            _found[attention_mask] = attention_mask._version, known
        question = (find, args, *kwargs.items())
        if question not in known:
            known[question] = find(attention_mask, *args, **kwargs)
        return known[question]

    return find_once


def _has_no_version(mask: torch.Tensor) -> bool:
    # What is made of a mask in inference mode could not train later, even where the mask itself could.
    return torch.is_inference_mode_enabled() or mask.is_inference()


def shown_keys(attention_mask: torch.Tensor) -> torch.Tensor:
    """Where a mask shows a key: a boolean mask itself, and what an additive one does not push far below any bias."""
    if attention_mask.dtype == torch.bool:
        return attention_mask
    attention_mask = attention_mask.detach()
    best = attention_mask.amax(dim=-1, keepdim=True)
    return attention_mask > best.sub_(HIDDEN_BELOW_BEST).clamp_min_(-HIDDEN_BELOW_ZERO)


def visible_keys(
    attention_mask: torch.Tensor | None, *, is_causal: bool, query_length: int, key_length: int, device: torch.device
) -> torch.Tensor | None:
    """The visibility that a mask argument stands for.

    Args:
        attention_mask: boolean (true = may attend) or additive float, `(B|1, H|1, Q|1, K)`. An additive mask hides
            what lies far below any bias: 64 below the best key of a row, or 1000 below zero. `None` leaves causality
            alone to decide.
        is_causal: without a mask and with more than one query, query `i` sees keys `0..i`, the convention of SDPA.
        query_length: `Q`.
        key_length: `K`.
        device: where a causal mask is made.

    Returns:
        Boolean `(B|1, H|1, Q|1, K)`, or `None` where every query sees every key.

    Example:

    >>> visible_keys(None, is_causal=True, query_length=2, key_length=3, device=torch.device("cpu"))[0, 0]
    tensor([[ True, False, False],
            [ True,  True, False]])
    """
    if attention_mask is None:
        if not is_causal or query_length == 1:
            return None
        return torch.ones(1, 1, query_length, key_length, dtype=torch.bool, device=device).tril()
    return shown_keys(attention_mask)


@once_per_mask
def num_visible_keys(
    attention_mask: torch.Tensor | None, *, is_causal: bool, query_length: int, key_length: int, device: torch.device
) -> torch.Tensor | None:
    """How many keys each query sees: integers `(B|1, H|1, Q|1, 1)`, or `None` where every query sees every key.

    Args:
        attention_mask, is_causal, query_length, key_length, device: as in [`visible_keys`].

    Example:

    >>> num_visible_keys(None, is_causal=True, query_length=3, key_length=2, device=torch.device("cpu")).flatten()
    tensor([1, 2, 2])
    """
    if attention_mask is not None:
        return shown_keys(attention_mask).sum(dim=-1, keepdim=True)
    if not is_causal or query_length == 1:
        return None
    return torch.arange(1, query_length + 1, device=device).clamp(max=key_length).view(1, 1, -1, 1)


@once_per_mask
def query_offset(attention_mask: torch.Tensor, *, query_length: int, key_length: int) -> int | torch.Tensor:
    """Which key belongs to the first query of self-attention: those of a growing cache are the last keys, and those of
    a static one are followed by empty keys.

    Args:
        attention_mask: as in [`visible_keys`].
        query_length: `Q`, at most `K`.
        key_length: `K`.

    Returns:
        The number of keys before, read off the mask: causal queries see no key after their own. Where the mask
        leaves a choice, the queries are the last. A tensor `()` that stays on the device, or 0 for `Q = K`.

    Example:

    >>> query_offset(torch.ones(1, 1, 2, 9).tril(3) > 0, query_length=2, key_length=9)
    tensor(3)
    """
    spare = key_length - query_length
    if spare == 0:
        return 0
    bits = shown_keys(attention_mask).expand(-1, -1, query_length, -1).flip(-1).to(torch.uint8)
    offset = key_length - 1 - bits.argmax(dim=-1) - torch.arange(query_length, device=bits.device)
    # Padded queries see less, and the tokens of an image each other: what most queries say is right.
    is_vote = (bits.amax(dim=-1) > 0) & (offset >= 0) & (offset <= spare)
    votes = torch.zeros(spare + 1, dtype=torch.int64, device=bits.device)
    votes.scatter_add_(0, offset.clamp(0, spare).flatten(), is_vote.flatten().long())
    return spare - votes.flip(0).argmax()


@once_per_mask
def visible_neighbours(
    attention_mask: torch.Tensor | None,
    *,
    width: int,
    is_causal: bool,
    is_cross: bool,
    query_length: int,
    key_length: int,
    device: torch.device,
) -> torch.Tensor:
    """For every key, which keys around it may be blended into it.

    In self-attention a key blends with the neighbours that its own token may attend to, so padding never enters,
    nothing leaks from later tokens and packed documents do not mix. The query rows belong to the keys that
    [`query_offset`] finds; keys without a row (a cache) take key padding and the causal order. In cross-attention a
    neighbour counts if any query sees it.

    Args:
        attention_mask: as in [`visible_keys`].
        width: `W`, odd.
        is_causal: whether later keys are out of reach where no mask row says so.
        is_cross: whether the keys come from another sequence than the queries.
        query_length: `Q`.
        key_length: `K`.
        device: where index tensors are made.

    Returns:
        Boolean `(B|1, H|1, K, W)`: entry `[..., j, t]` speaks of key `j + t - W // 2`.

    Example:

    >>> visible_neighbours(
    ...     None, width=3, is_causal=True, is_cross=False, query_length=3, key_length=3, device=torch.device("cpu")
    ... )[0, 0]
    tensor([[False,  True, False],
            [ True,  True, False],
            [ True,  True, False]])
    """
    half = width // 2
    offset = torch.arange(-half, half + 1, device=device)
    neighbour = torch.arange(key_length, device=device)[:, None] + offset  # (K, W)
    in_order = (offset <= 0) if is_causal and not is_cross else torch.ones_like(offset, dtype=torch.bool)
    if attention_mask is None:
        return ((neighbour >= 0) & (neighbour < key_length) & in_order)[None, None]

    visible = shown_keys(attention_mask).expand(-1, -1, query_length, -1)
    # Keys that some query sees: all that is known of a key without a query row of its own.
    seen = F.pad(visible.any(dim=-2), (half, half)).unfold(-1, width, 1)  # (B|1, H|1, K, W)
    if is_cross:
        return seen
    if query_length > key_length:
        return seen & in_order

    own_keys = query_offset(attention_mask, query_length=query_length, key_length=key_length)
    own_keys = own_keys + torch.arange(query_length, device=device)
    # Outside of the sequence the index is clamped, and what it reads there is thrown away.
    own = neighbour[own_keys]  # (Q, W)
    index = own.clamp(0, key_length - 1).expand(*visible.shape[:2], -1, -1)
    own_rows = visible.gather(-1, index) & (own >= 0) & (own < key_length)
    return own_rows if query_length == key_length else (seen & in_order).index_copy(-2, own_keys, own_rows)


def mixes_documents(
    attention_mask: torch.Tensor | None, packing: torch.Tensor, *, batch_size: int, length: int
) -> bool:
    """Whether a mask of self-attention lets packed documents see each other.

    Args:
        attention_mask: as in [`visible_keys`].
        packing: which document each token belongs to, `(B|1, L)`; or where each document starts among all `B * L`
            tokens and where the last one ends, `(documents + 1,)`.
        batch_size: `B`.
        length: `L`.

    Returns:
        Whether the first token of a document sees the last one of the document before it. In a compiled graph, which
        cannot choose by what a tensor holds, only a missing mask counts.

    Example:

    >>> mixes_documents(torch.ones(4, 4).tril()[None, None] > 0, torch.tensor([0, 2, 4]), batch_size=1, length=4)
    True
    """
    if packing.dim() == 1 and len(packing) <= 2:
        return False
    if attention_mask is None:
        return packing.dim() == 1 or torch.compiler.is_compiling() or _names_several(packing)
    if attention_mask.shape[-1] != length or torch.compiler.is_compiling():
        return False
    return _shows_across(attention_mask, packing, batch_size, length)


# All layers get the same tensors, and the look at what they hold waits for the device.
@once_per_mask
def _names_several(documents: torch.Tensor) -> bool:
    return bool((documents != documents[..., :1]).any())


@once_per_mask
def _shows_across(attention_mask: torch.Tensor, packing: torch.Tensor, batch_size: int, length: int) -> bool:
    packing = packing.to(attention_mask.device)
    if packing.dim() == 1:
        tokens = torch.arange(batch_size * length, device=packing.device)
        starts = torch.isin(tokens, packing[1:-1]).view(batch_size, length)[:, 1:]
        starts = starts & (packing[-1] == batch_size * length)  # Offsets among other tokens say nothing of these.
    else:
        starts = packing[:, 1:] != packing[:, :-1]
    shown = shown_keys(attention_mask).expand(-1, -1, length, -1).diagonal(offset=-1, dim1=-2, dim2=-1)
    return bool((shown & starts[:, None]).any())
