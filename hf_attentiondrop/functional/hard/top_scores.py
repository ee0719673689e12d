# mypy: allow-untyped-defs
"""Finds the highest scores of each query by a Triton kernel that computes scores tile by tile and stores none.

Triton comes with the CUDA builds of torch only, so import this module only inside functions that need it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


# Ampere and Hopper GPUs can rank these tiles in registers, up to head size 256 in half precision and 128 in float32.
QUERIES_PER_TILE = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}
KEYS_PER_TILE = 32


@torch.library.custom_op("hf_attentiondrop::top_score_indices", mutates_args=())
def top_score_indices(
    query: Tensor, key: Tensor, k: int, visible: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Finds each query's `k` highest visible scores, in O(Q·k) memory.

    Args:
        query: `(B, H, Q, D)` in float16, bfloat16 or float32.
        key: `(B, Hkv, K, D)` in the same dtype.
        k: number of scores to find, at least 1.
        visible: boolean `(B|1, H|1, Q|1, K)`, or `None` for all.
        is_causal: whether query `i` sees only visible keys `0..i`.

    Returns:
        The keys of these scores from the highest down, int32 `(B, H, Q, k)`, -1 beyond the visible keys of a query.
        Scores are ranked in float32, ties in any order, without scaling: a positive factor changes no rank.
    """
    index = _empty_result(query, key, k)
    batch_size, num_heads, num_queries, size = query.shape
    rows = QUERIES_PER_TILE[query.dtype]
    precision = _precision(query.dtype)
    mask, mask_strides = index, (0, 0, 0, 0)
    if visible is not None:
        mask = visible.expand(batch_size, num_heads, num_queries, key.shape[-2]).view(torch.uint8)
        mask_strides = mask.stride()
    if triton.knobs.runtime.interpret:
        # The interpreter, which runs kernels on CPU, would multiply the bits of bfloat16 as integers.
        query, key = query.float(), key.float()
    # A one-dimensional grid: only the first axis of a grid may be longer than 65535.
    grid = (batch_size * num_heads * triton.cdiv(num_queries, rows),)
    with torch.cuda.device_of(query):
        _find_top_scores[grid](
            query,
            key,
            mask,
            index,
            *query.stride(),
            *key.stride(),
            *mask_strides,
            num_heads,
            num_heads // key.shape[1],
            num_queries,
            key.shape[-2],
            SIZE=size,
            PADDED_SIZE=max(16, triton.next_power_of_2(size)),
            K=k,
            PADDED_K=triton.next_power_of_2(k),
            IS_CAUSAL=is_causal,
            HAS_MASK=visible is not None,
            PRECISION=precision,
            ROWS=rows,
            COLUMNS=KEYS_PER_TILE,
        )
    return index


@top_score_indices.register_fake
def _empty_result(query: Tensor, key: Tensor, k: int, *others: object) -> Tensor:
    return query.new_empty(*query.shape[:-1], k, dtype=torch.int32)


def _precision(dtype: torch.dtype) -> str:
    """Input precision of tensor cores; float32 by three products in TF32, which are as accurate as float32 sums."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


@triton.jit
def _find_top_scores(
    query,
    key,
    mask,
    index,
    query_stride_b,
    query_stride_h,
    query_stride_q,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_k,
    key_stride_d,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    num_heads,
    heads_per_key_head,
    num_queries,
    num_keys,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per tile of queries of one head: keeps the best keys of each row in slots."""
    tiles_per_head = tl.cdiv(num_queries, ROWS)
    tile = tl.program_id(0) % tiles_per_head
    row = tl.program_id(0) // tiles_per_head  # of all heads of all samples
    # Offsets can exceed 32 bits.
    sample = (row // num_heads).to(tl.int64)
    head = (row % num_heads).to(tl.int64)
    query += sample * query_stride_b + head * query_stride_h
    key += sample * key_stride_b + head // heads_per_key_head * key_stride_h
    mask += sample * mask_stride_b + head * mask_stride_h

    rows = tile * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_queries
    components = tl.arange(0, PADDED_SIZE)[None, :]
    is_component = components < SIZE
    query_offsets = rows[:, None].to(tl.int64) * query_stride_q + components * query_stride_d
    queries = tl.load(query + query_offsets, mask=is_row[:, None] & is_component, other=0.0)

    # Padding slots (the number of slots is a power of two) hold infinity, which no score replaces.
    slots = tl.arange(0, PADDED_K)[None, :]
    best = tl.full([ROWS, PADDED_K], -float("inf"), tl.float32)
    best = tl.where(slots < K, best, float("inf"))
    best_keys = tl.full([ROWS, PADDED_K], -1, tl.int32)

    end = num_keys
    if IS_CAUSAL:
        end = tl.minimum(num_keys, (tile + 1) * ROWS)
    for start in range(0, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_column = columns < num_keys
        visible = is_row[:, None] & is_column[None, :]
        if IS_CAUSAL:
            visible = visible & (columns[None, :] <= rows[:, None])
        if HAS_MASK:
            mask_offsets = rows[:, None].to(tl.int64) * mask_stride_q + columns[None, :].to(tl.int64) * mask_stride_k
            visible = visible & (tl.load(mask + mask_offsets, mask=visible, other=0) != 0)
        if tl.max(tl.max(visible.to(tl.int32), 1), 0) > 0:
            key_offsets = columns[:, None].to(tl.int64) * key_stride_k + components * key_stride_d
            keys = tl.load(key + key_offsets, mask=is_column[:, None] & is_component, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            scores = tl.where(visible, scores, -float("inf"))
            best, best_keys = _keep_best(scores, start, best, best_keys, PADDED_K, COLUMNS)

    row = row.to(tl.int64) * num_queries + rows
    best = tl.where(slots < K, best, -float("inf"))
    for rank in range(K):
        _, slot = tl.max(best, 1, return_indices=True)
        is_next = slots == slot[:, None]
        tl.store(index + row * K + rank, tl.sum(tl.where(is_next, best_keys, 0), 1), mask=is_row)
        best = tl.where(is_next, -float("inf"), best)
        best_keys = tl.where(is_next, -1, best_keys)


@triton.jit
def _keep_best(scores, start, best, best_keys, PADDED_K: tl.constexpr, COLUMNS: tl.constexpr):
    """Replaces the lowest kept score of each row by the highest score of the tile while any row has a higher one.

    The first tiles fill the slots; in later tiles few scores are among the best, so few rounds are needed.
    """
    slots = tl.arange(0, PADDED_K)[None, :]
    columns = tl.arange(0, COLUMNS)[None, :]
    highest, column = tl.max(scores, 1, return_indices=True)
    lowest, slot = tl.min(best, 1, return_indices=True)
    while tl.max((highest > lowest).to(tl.int32), 0) > 0:
        enters = (highest > lowest)[:, None] & (slots == slot[:, None])
        best = tl.where(enters, highest[:, None], best)
        best_keys = tl.where(enters, (start + column)[:, None], best_keys)
        scores = tl.where(columns == column[:, None], -float("inf"), scores)
        highest, column = tl.max(scores, 1, return_indices=True)
        lowest, slot = tl.min(best, 1, return_indices=True)
    return best, best_keys
