"""The methods as pure tensor functions: one method per file, torch alone.

Shapes, everywhere in this package: `B` batch, `H` query heads, `Hkv` key/value heads (`H` is a multiple of it under
grouped-query attention), `Q` queries, `K` keys, `D` head dimension, `W` blur width. `(B|1, H|1, Q, K)` is a tensor
that broadcasts over batch or heads. A visibility mask is boolean and true where a query may see a key.
"""

from .blur import blur_keys, gaussian_window
from .hard import FILLS, draw_hits, mask_top_scores
from .scores import attention_scores, expand_heads
from .visibility import visible_keys, visible_neighbours


__all__ = [
    "FILLS",
    "attention_scores",
    "blur_keys",
    "draw_hits",
    "expand_heads",
    "gaussian_window",
    "mask_top_scores",
    "visible_keys",
    "visible_neighbours",
]
