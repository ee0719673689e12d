"""Models whose last layers share keys and values, and which skip queries there: Gemma 4.

With `logits_to_keep`, the shared layers see the last queries only. Without a mask these would count as the first ones,
so under the name of SDPA the model keeps all queries then. The implementations of this package run SDPA.
"""

from typing import Any

from transformers import PreTrainedModel

from .implementations import FUNCTIONS
from .wrapping import wrapped


_SLICING = "_maybe_slice_kv_shared_inputs"


def keep_queries_as_sdpa(model_class: type[PreTrainedModel]) -> None:
    """Makes a class that skips queries do so for the implementations of this package as for SDPA."""
    if _SLICING in vars(model_class):
        setattr(model_class, _SLICING, wrapped(vars(model_class)[_SLICING], _slice_as_sdpa))


def _slice_as_sdpa(self: PreTrainedModel, original: Any, *args: Any, **kwargs: Any) -> Any:
    name = self.config._attn_implementation
    if name not in FUNCTIONS:
        return original(self, *args, **kwargs)
    # Not by the property, which would check and record a switch.
    self.config._attn_implementation_internal = "sdpa"
    try:
        return original(self, *args, **kwargs)
    finally:
        self.config._attn_implementation_internal = name
