"""The table of attention calls: every kind of mask, and the visibility that it means."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_attentiondrop.functional import sample_masked_ranks


@dataclass(frozen=True)
class AttentionCase:
    """An attention call without its tensors.

    Args:
        mask: makes the mask argument, boolean or float, `(B|1, H|1, Q|1, K)`.
    """

    name: str
    mask: Callable[[], torch.Tensor | None] = lambda: None
    queries: int = 9
    keys: int = 9
    heads: int = 4
    kv_heads: int = 4
    is_causal: bool = False
    is_cross: bool = False
    position_bias: bool = False

    batch_size: int = 3

    @property
    def visible(self) -> torch.Tensor:
        """`(B, H, Q, K)`, true where a query sees a key."""
        mask = self.mask()
        if mask is None:
            ones = torch.ones(self.queries, self.keys, dtype=torch.bool)
            mask = ones.tril() if self.is_causal and self.queries > 1 else ones
        elif mask.dtype != torch.bool:
            mask = mask > mask.amax(dim=-1, keepdim=True).clamp_min(-500) - 50
        return mask.expand(self.batch_size, self.heads, self.queries, self.keys)

    @property
    def bias(self) -> torch.Tensor | None:
        mask = self.mask()
        return None if mask is None or mask.dtype == torch.bool else mask

    @property
    def own_view(self) -> torch.Tensor:
        """`(B, H, K, K)`: which keys the token of each key may attend to."""
        visible = self.visible
        view = visible.any(dim=-2, keepdim=True).expand(-1, -1, self.keys, -1).clone()
        if self.is_cross:
            return view
        if self.is_causal:
            view &= torch.ones(self.keys, self.keys, dtype=torch.bool).tril()
        if self.mask() is None:
            full = torch.ones(self.keys, self.keys, dtype=torch.bool)
            return (full.tril() if self.is_causal else full).expand_as(view)
        if self.queries <= self.keys:
            view[:, :, self.keys - self.queries :] = visible
        return view

    def masked_ranks(self, fill: str, k: int | float = 3, p: float = 0.5) -> torch.Tensor:
        """Which ranks are masked, `(B, H, Q, k)`, the same at every call."""
        visible = self.visible
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return sample_masked_ranks(visible.shape, visible.sum(dim=-1, keepdim=True), p=p, k=k, fill=fill)

    def tensors(self, dtype: torch.dtype = torch.float64, head_dim: int = 8) -> tuple[torch.Tensor, ...]:
        """Query, key and value, the same at every call."""
        generator = torch.Generator().manual_seed(7)
        shapes = [(self.heads, self.queries), (self.kv_heads, self.keys), (self.kv_heads, self.keys)]
        return tuple(
            torch.randn(self.batch_size, heads, length, head_dim, dtype=torch.float64, generator=generator).to(dtype)
            for heads, length in shapes
        )


def _lengths(keys: int, left: bool = False) -> torch.Tensor:
    """`(B, 1, 1, K)`: three samples that hold all, two thirds and one third of the keys."""
    keep = torch.arange(keys) < torch.tensor([keys, 2 * keys // 3, keys // 3])[:, None]
    return (keep.flip(-1) if left else keep)[:, None, None]


def _causal(queries: int = 9, keys: int = 9) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]


def _packed() -> torch.Tensor:
    documents = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    return (documents[:, None] == documents)[None, None]


def _random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) < 0.6


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def _additive(visible: torch.Tensor, hidden: float | None = None) -> torch.Tensor:
    hidden = torch.finfo(torch.float64).min if hidden is None else hidden
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, hidden)


def _fully_masked(visible: torch.Tensor) -> torch.Tensor:
    visible = visible.expand(3, 1, 9, 9).clone()
    visible[0, 0, 2:4] = False
    visible[2] = False
    return visible


CASES = [
    AttentionCase("none"),
    AttentionCase("one_query", queries=1, is_causal=True),
    AttentionCase("causal_without_mask", is_causal=True),
    AttentionCase("causal", _causal, is_causal=True),
    AttentionCase("causal_expanded_over_queries", lambda: _causal().expand(3, 1, 9, 9), is_causal=True),
    AttentionCase("padding_right", lambda: _lengths(9)),
    AttentionCase("padding_left", lambda: _lengths(9, left=True)),
    AttentionCase("causal_padding_right", lambda: _lengths(9) & _causal(), is_causal=True),
    AttentionCase("causal_padding_left", lambda: _lengths(9, left=True) & _causal(), is_causal=True),
    AttentionCase("packed", _packed),
    AttentionCase("causal_packed", lambda: _packed() & _causal(), is_causal=True),
    AttentionCase("sliding_window", lambda: _causal() & ~_causal().tril(-3), is_causal=True),
    AttentionCase("two_sided_window", lambda: (torch.arange(9)[:, None] - torch.arange(9)).abs()[None, None] < 3),
    AttentionCase("cross", queries=5, is_cross=True),
    AttentionCase("cross_padding", lambda: _lengths(9), queries=5, is_cross=True),
    AttentionCase("cross_as_long_as_self", lambda: _lengths(9).expand(3, 1, 9, 9), is_cross=True),
    AttentionCase("cross_random", lambda: _random(3, 1, 5, 9), queries=5, is_cross=True),
    AttentionCase("grouped_queries", kv_heads=2),
    AttentionCase("grouped_queries_causal", is_causal=True, kv_heads=1),
    AttentionCase("grouped_queries_padding", lambda: _lengths(9) & _causal(), kv_heads=2, is_causal=True),
    AttentionCase("masks_per_head", lambda: _random(3, 4, 9, 9)),
    AttentionCase("masks_per_head_grouped", lambda: _random(3, 4, 9, 9), kv_heads=2),
    AttentionCase("arbitrary", lambda: _random(1, 1, 9, 9)),
    AttentionCase("float_padding", lambda: _additive(_lengths(9).expand(3, 1, 9, 9))),
    AttentionCase("float_minus_infinity", lambda: _additive(_lengths(9).expand(3, 1, 9, 9), -torch.inf)),
    AttentionCase("float_minus_1e9_per_head", lambda: _additive(_random(3, 4, 9, 9), -1e9)),
    AttentionCase("float_minus_1e4", lambda: _additive(_causal() & _lengths(9, left=True), -1e4), is_causal=True),
    AttentionCase("float_minus_100_with_bias", lambda: _additive(_packed(), -100.0) + 3 * _noise(1, 4, 9, 9)),
    AttentionCase("float_bias_far_from_zero", lambda: _additive(_packed(), -1e4) + 3 * _noise(1, 4, 9, 9) - 80),
    AttentionCase("fully_masked_float_minus_1e9", lambda: _additive(_fully_masked(_causal()), -1e9), is_causal=True),
    AttentionCase("float_with_bias", lambda: _additive(_causal()) + _noise(1, 4, 9, 9), is_causal=True),
    AttentionCase("bias_grouped", lambda: _noise(3, 4, 9, 9), kv_heads=2),
    AttentionCase("position_bias", position_bias=True),
    AttentionCase("position_bias_causal", position_bias=True, is_causal=True),
    AttentionCase("position_bias_padding", lambda: _lengths(9).expand(3, 1, 9, 9), position_bias=True),
    AttentionCase("fully_masked", lambda: _fully_masked(_lengths(9))),
    AttentionCase("fully_masked_causal", lambda: _fully_masked(_causal()), is_causal=True),
    AttentionCase("fully_masked_float", lambda: _additive(_fully_masked(_lengths(9)))),
    AttentionCase("fully_masked_float_minus_infinity", lambda: _additive(_fully_masked(_lengths(9)), -torch.inf)),
    AttentionCase("fully_masked_position_bias", lambda: _fully_masked(_lengths(9)), position_bias=True),
    AttentionCase("cached", lambda: _causal(4, 9), queries=4, is_causal=True),
    AttentionCase("cached_padding_left", lambda: _lengths(9, left=True) & _causal(4, 9), queries=4, is_causal=True),
    AttentionCase("cached_one_query", lambda: _lengths(9, left=True), queries=1, is_causal=True),
    AttentionCase("static_prefill", queries=4, is_causal=True),
    AttentionCase("pooled_keys", queries=9, keys=5),
]
CASES_BY_NAME = {case.name: case for case in CASES}
