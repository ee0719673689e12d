"""The methods as pure tensor functions: one method per file, torch alone (on CUDA, the Triton that comes with it too).

Shapes, everywhere in this package: `B` batch, `H` query heads, `Hkv` key/value heads (`H` is a multiple of it under
grouped-query attention), `Q` queries, `K` keys, `D` head dimension, `W` blur width. `(B|1, H|1, Q, K)` is a tensor
that broadcasts over batch or heads. A visibility mask is boolean and true where a query may see a key.
"""

from .affine import ACTIVATIONS, BIAS_LENGTHS, INITS, affine_bias, affine_scale, rescale_output, rescale_weights
from .block_mask import block_mask
from .blur import blur_keys, gaussian_window
from .dropconnect import drop_weights
from .gate import gate_output
from .hard.blockwise import hard_attention
from .hard.flex import flex_hard_attention
from .hard.masking import FILLS, draw_hits, draw_ranks, mask_top_scores, num_candidates
from .prefix_sums import VisibleSums, visible_sums
from .scores import attention_scores, expand_heads
from .sink import prepend_sink, show_sink
from .visibility import (
    mixes_documents,
    num_visible_keys,
    once_per_mask,
    query_offset,
    shown_keys,
    visible_keys,
    visible_neighbours,
)


__all__ = [
    "ACTIVATIONS",
    "BIAS_LENGTHS",
    "FILLS",
    "INITS",
    "VisibleSums",
    "affine_bias",
    "affine_scale",
    "attention_scores",
    "block_mask",
    "blur_keys",
    "draw_hits",
    "draw_ranks",
    "drop_weights",
    "expand_heads",
    "flex_hard_attention",
    "gate_output",
    "gaussian_window",
    "hard_attention",
    "mask_top_scores",
    "mixes_documents",
    "num_candidates",
    "num_visible_keys",
    "once_per_mask",
    "prepend_sink",
    "query_offset",
    "rescale_output",
    "rescale_weights",
    "show_sink",
    "shown_keys",
    "visible_keys",
    "visible_neighbours",
    "visible_sums",
]
