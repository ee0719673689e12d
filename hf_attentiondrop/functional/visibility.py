"""Which keys each query sees, read from the masks that Transformers passes to an attention function."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary


T = TypeVar("T")

# An additive mask masks a key whose bias is this far below the maximum of its row: relative to that key its weight is
# exp(-64), or 2e-28, which vanishes in the sums of any dtype. Learned biases do not spread this far; ALiBi does at
# distances where the weight vanishes just as well. Masks do: -100 in the shifted windows of Swin, on top of a bias;
# -10000, -1e9, the minimum of a dtype or minus infinity.
MASKED_BELOW_MAXIMUM = 64.0
# And this far below zero in a fully masked row: relative to a key without a bias the weight vanishes even in float64.
MASKED_BELOW_ZERO = 1000.0

_cache = WeakTensorKeyDictionary()


def once_per_mask(fn: Callable[..., T]) -> Callable[..., T]:
    """Caches `fn(mask, *args)` per mask tensor until the mask is freed or modified in place.

    A model passes the same mask to all its layers, and activation checkpointing passes it again, so only the first
    call does the work. `fn` must not return anything that refers to the mask, or the mask would never be freed.
    In-place changes are detected by the version counter of the tensor, which writes through `.data` or a NumPy array
    that shares the memory bypass, as they bypass autograd. In compiled graphs and for tensors of inference mode, which
    have no version counter, nothing is cached. If threads share a mask, each may compute the value once.
    """

    @functools.wraps(fn)
    def cached(attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any) -> T:
        if attention_mask is None or torch.compiler.is_compiling() or _has_no_version(attention_mask):
            return fn(attention_mask, *args, **kwargs)
        version, values = _cache.get(attention_mask, (None, None))
        if version != attention_mask._version:
            values = {}
            _cache[attention_mask] = attention_mask._version, values
        arguments = (fn, args, *kwargs.items())
        if arguments not in values:
            values[arguments] = fn(attention_mask, *args, **kwargs)
        return values[arguments]

    return cached


def _has_no_version(mask: torch.Tensor) -> bool:
    # Tensors made in inference mode cannot be used in training later, even if the mask itself can.
    return torch.is_inference_mode_enabled() or mask.is_inference()


def boolean_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """The visible keys of a mask: a boolean mask itself, or where an additive mask is not far below any bias."""
    if attention_mask.dtype == torch.bool:
        return attention_mask
    attention_mask = attention_mask.detach()
    maximum = attention_mask.amax(dim=-1, keepdim=True)
    return attention_mask > maximum.sub_(MASKED_BELOW_MAXIMUM).clamp_min_(-MASKED_BELOW_ZERO)


def visible_keys(
    attention_mask: torch.Tensor | None, *, is_causal: bool, query_length: int, key_length: int, device: torch.device
) -> torch.Tensor | None:
    """The keys that each query sees under a mask argument.

    Args:
        attention_mask: boolean (true = may attend) or additive float, `(B|1, H|1, Q|1, K)`. An additive mask masks
            keys far below any bias: 64 below the maximum of the row, or 1000 below zero. `None` leaves causality alone
            to decide.
        is_causal: without a mask and with more than one query, query `i` sees keys `0..i`, the convention of SDPA.
        query_length: `Q`.
        key_length: `K`.
        device: device of a causal mask.

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
    return boolean_mask(attention_mask)


@once_per_mask
def num_visible_keys(
    attention_mask: torch.Tensor | None, *, is_causal: bool, query_length: int, key_length: int, device: torch.device
) -> torch.Tensor | None:
    """Number of visible keys of each query: integers `(B|1, H|1, Q|1, 1)`, or `None` where every query sees every key.

    Args:
        attention_mask, is_causal, query_length, key_length, device: as in [`visible_keys`].

    Example:

    >>> num_visible_keys(None, is_causal=True, query_length=3, key_length=2, device=torch.device("cpu")).flatten()
    tensor([1, 2, 2])
    """
    if attention_mask is not None:
        return boolean_mask(attention_mask).sum(dim=-1, keepdim=True)
    if not is_causal or query_length == 1:
        return None
    return torch.arange(1, query_length + 1, device=device).clamp(max=key_length).view(1, 1, -1, 1)


@once_per_mask
def query_offset(attention_mask: torch.Tensor, *, query_length: int, key_length: int) -> int | torch.Tensor:
    """Index of the key that belongs to the first query of self-attention.

    With a growing cache the queries belong to the last keys; in a static cache empty keys follow.

    Args:
        attention_mask: as in [`visible_keys`].
        query_length: `Q`, at most `K`.
        key_length: `K`.

    Returns:
        The number of earlier keys, read from the mask: causal queries see no key after their own. If the mask allows
        several offsets, the queries are the last ones. A tensor `()` that stays on the device, or 0 for `Q = K`.

    Example:

    >>> query_offset(torch.ones(1, 1, 2, 9).tril(3) > 0, query_length=2, key_length=9)
    tensor(3)
    """
    spare = key_length - query_length
    if spare == 0:
        return 0
    bits = boolean_mask(attention_mask).expand(-1, -1, query_length, -1).flip(-1).to(torch.uint8)
    offset = key_length - 1 - bits.argmax(dim=-1) - torch.arange(query_length, device=bits.device)
    # Padded queries see fewer keys, and the tokens of an image see each other, so the majority decides.
    is_vote = (bits.amax(dim=-1) > 0) & (offset >= 0) & (offset <= spare)
    votes = torch.zeros(spare + 1, dtype=torch.int64, device=bits.device)
    votes.scatter_add_(0, offset.clamp(0, spare).flatten(), is_vote.flatten().long())
    return spare - votes.flip(0).argmax()


@once_per_mask
def visible_neighbors(
    attention_mask: torch.Tensor | None,
    *,
    width: int,
    is_causal: bool,
    is_cross: bool,
    query_length: int,
    key_length: int,
    device: torch.device,
) -> torch.Tensor:
    """The neighbors of each key that may be blended into it.

    In self-attention a key blends with the neighbors that its own token may attend to, so padding never enters,
    nothing leaks from later tokens and packed documents do not mix. The query rows belong to the keys that
    [`query_offset`] finds; keys without a row (a cache) follow key padding and the causal order. In cross-attention a
    neighbor counts if any query sees it.

    Args:
        attention_mask: as in [`visible_keys`].
        width: `W`, odd.
        is_causal: whether keys without a mask row exclude later neighbors.
        is_cross: whether keys and queries come from different sequences.
        query_length: `Q`.
        key_length: `K`.
        device: device of index tensors.

    Returns:
        Boolean `(B|1, H|1, K, W)`: entry `[..., j, t]` is for key `j + t - W // 2`.

    Example:

    >>> visible_neighbors(
    ...     None, width=3, is_causal=True, is_cross=False, query_length=3, key_length=3, device=torch.device("cpu")
    ... )[0, 0]
    tensor([[False,  True, False],
            [ True,  True, False],
            [ True,  True, False]])
    """
    half = width // 2
    offset = torch.arange(-half, half + 1, device=device)
    neighbor = torch.arange(key_length, device=device)[:, None] + offset  # (K, W)
    in_order = (offset <= 0) if is_causal and not is_cross else torch.ones_like(offset, dtype=torch.bool)
    if attention_mask is None:
        return ((neighbor >= 0) & (neighbor < key_length) & in_order)[None, None]

    visible = boolean_mask(attention_mask).expand(-1, -1, query_length, -1)
    # Keys that any query sees: the only information about a key without a query row.
    seen_by_any = F.pad(visible.any(dim=-2), (half, half)).unfold(-1, width, 1)  # (B|1, H|1, K, W)
    if is_cross:
        return seen_by_any
    if query_length > key_length:
        return seen_by_any & in_order

    own_keys = query_offset(attention_mask, query_length=query_length, key_length=key_length)
    own_keys = own_keys + torch.arange(query_length, device=device)
    # Outside of the sequence the index is clamped, and the result is discarded.
    own = neighbor[own_keys]  # (Q, W)
    index = own.clamp(0, key_length - 1).expand(*visible.shape[:2], -1, -1)
    own_rows = visible.gather(-1, index) & (own >= 0) & (own < key_length)
    return own_rows if query_length == key_length else (seen_by_any & in_order).index_copy(-2, own_keys, own_rows)


def mixes_documents(
    attention_mask: torch.Tensor | None, packing: torch.Tensor, *, batch_size: int, length: int
) -> bool:
    """Whether a mask of self-attention lets packed documents see each other.

    Args:
        attention_mask: as in [`visible_keys`].
        packing: the document of each token, `(B|1, L)`; or the start of each document among all `B * L` tokens and the
            end of the last one, `(documents + 1,)`.
        batch_size: `B`.
        length: `L`.

    Returns:
        Whether the first token of a document sees the last one of the document before it. In a compiled graph, which
        cannot branch on tensor values, only a missing mask counts.

    Example:

    >>> mixes_documents(torch.ones(4, 4).tril()[None, None] > 0, torch.tensor([0, 2, 4]), batch_size=1, length=4)
    True
    """
    if packing.dim() == 1 and len(packing) <= 2:
        return False
    if attention_mask is None:
        return packing.dim() == 1 or torch.compiler.is_compiling() or _has_several_documents(packing)
    if attention_mask.shape[-1] != length or torch.compiler.is_compiling():
        return False
    return _attends_across_documents(attention_mask, packing, batch_size, length)


# All layers get the same tensors, and reading their values synchronizes with the device.
@once_per_mask
def _has_several_documents(documents: torch.Tensor) -> bool:
    return bool((documents != documents[..., :1]).any())


@once_per_mask
def _attends_across_documents(
    attention_mask: torch.Tensor, packing: torch.Tensor, batch_size: int, length: int
) -> bool:
    packing = packing.to(attention_mask.device)
    if packing.dim() == 1:
        tokens = torch.arange(batch_size * length, device=packing.device)
        starts = torch.isin(tokens, packing[1:-1]).view(batch_size, length)[:, 1:]
        starts = starts & (packing[-1] == batch_size * length)  # Otherwise the offsets count other tokens.
    else:
        starts = packing[:, 1:] != packing[:, :-1]
    visible = boolean_mask(attention_mask).expand(-1, -1, length, -1).diagonal(offset=-1, dim1=-2, dim2=-1)
    return bool((visible & starts[:, None]).any())
