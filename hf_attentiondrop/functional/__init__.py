"""The methods as pure tensor functions: one method per file or folder. They need torch alone, and on CUDA Triton,
which comes with it.

Shapes, everywhere in this package: `B` batch, `H` query heads, `Hkv` key/value heads (`H` is a multiple of `Hkv` under
grouped-query attention), `Q` queries, `K` keys, `D` head dimension, `W` blur width. `(B|1, H|1, Q, K)` is a tensor
that broadcasts over batch or heads. A visibility mask is boolean and true where a query may attend to a key.
"""

from .affine import ACTIVATIONS, BIAS_LENGTHS, INITS, affine_bias, affine_scale, rescale_output, rescale_weights
from .block_mask import block_mask
from .blur import blur_keys, gaussian_window
from .dropconnect import drop_weights
from .drophead import sample_head_scale
from .dropkey.blockwise import dropkey_attention
from .dropkey.flex import flex_dropkey_attention
from .dropkey.masking import AXES, sample_key_mask
from .gate import gate_output
from .hard.blockwise import hard_attention
from .hard.flex import flex_hard_attention
from .hard.masking import FILLS, mask_top_scores, num_candidates, sample_masked_ranks, sample_masked_scores
from .prefix_sums import PrefixSums
from .scores import attention_scores, expand_heads
from .sink import prepend_sink, prepend_sink_to_mask
from .visibility import (
    boolean_mask,
    mixes_documents,
    num_visible_keys,
    once_per_mask,
    query_offset,
    visible_keys,
    visible_neighbors,
)


__all__ = [
    "ACTIVATIONS",
    "AXES",
    "BIAS_LENGTHS",
    "FILLS",
    "INITS",
    "PrefixSums",
    "affine_bias",
    "affine_scale",
    "attention_scores",
    "block_mask",
    "blur_keys",
    "boolean_mask",
    "drop_weights",
    "dropkey_attention",
    "expand_heads",
    "flex_dropkey_attention",
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
    "prepend_sink_to_mask",
    "query_offset",
    "rescale_output",
    "rescale_weights",
    "sample_head_scale",
    "sample_key_mask",
    "sample_masked_ranks",
    "sample_masked_scores",
    "visible_keys",
    "visible_neighbors",
]
