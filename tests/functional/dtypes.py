"""What is drawn must not depend on the default dtype: half precision has too few numbers for a small probability."""

from collections.abc import Callable

import torch
from torch import Tensor


def drawn_in_default_dtypes(draw: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Draws with one seed, in float32 and in bfloat16 as the default dtype."""
    drawn = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        torch.set_default_dtype(dtype)
        try:
            drawn.append(draw())
        finally:
            torch.set_default_dtype(torch.float32)
    return drawn[0], drawn[1]
