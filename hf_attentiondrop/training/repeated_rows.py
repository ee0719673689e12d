"""The rows of a batch and their repetitions, in the tensors that enter and leave a layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import Cache

from .deterministic import KEEP_OUT


# Position ids of several axes have the batch in dimension 1: `(3, B, L)`.
AXES = 3


@dataclass(frozen=True, eq=False)
class RepeatedRows:
    """The layout of a batch of `B` rows that are followed by repetitions of all or some of them.

    Args:
        batch_size (`int`): `B`.
        rows (`torch.Tensor` of shape `(n,)`, *optional*):
            Which of the `B` rows are repeated, each once. By default all, in their order.

    Example:

    >>> layout = RepeatedRows(2, torch.tensor([1]))
    >>> layout.repeat(torch.tensor([5, 6])), layout.cut(torch.tensor([5, 6, 6]))
    (tensor([5, 6, 6]), tensor([5, 6]))
    """

    batch_size: int
    rows: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """The number of all rows, `B + n`."""
        return self.batch_size + (self.batch_size if self.rows is None else len(self.rows))

    def cut(self, value: Tensor, dim: int = 0) -> Tensor:
        """The first `B` rows."""
        return value.narrow(dim, 0, self.batch_size)

    def repeat(self, value: Tensor, dim: int = 0) -> Tensor:
        """All rows, from the first `B`."""
        return torch.cat((value, value if self.rows is None else value.index_select(dim, self.rows)), dim)

    def map(self, value: Any, change: Callable[[Tensor, int], Tensor], layer: nn.Module) -> Any:
        """Changes each tensor of all rows among the arguments of a layer.

        Args:
            value: An argument, any nesting of tuples, lists and dicts.
            change: Called with a tensor of all rows and the dimension of the rows.
            layer: The layer, for the message.

        Raises:
            ValueError: for an object of another type, which may hold rows.
        """
        if isinstance(value, Tensor):
            dim = self._batch_dimension(value)
            return value if dim is None else change(value, dim)
        if type(value) is tuple:
            return tuple(self.map(item, change, layer) for item in value)
        if type(value) in (list, dict):
            # A layer may write into its lists and dicts, so those without rows stay the same objects.
            if all(self._batch_dimension(leaf) is None for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
                return value
            if type(value) is list:
                return [self.map(item, change, layer) for item in value]
            return {key: self.map(item, change, layer) for key, item in value.items()}
        if value is None or isinstance(value, (bool, int, float, str, torch.Size, Cache)):
            return value
        raise ValueError(
            f"The shared trunk cannot cut the rows of a {type(value).__name__}, an argument of "
            f"{type(layer).__name__}: expected tensors, tuples, lists, dicts, numbers and caches. A wrong guess would "
            f"mix up rows. Use the base attention 'sdpa', {KEEP_OUT}."
        )

    def is_ambiguous(self, states: Tensor, values: Any) -> bool:
        """Whether the size of some tensor does not show whether its first dimension is that of the rows.

        Tensors of three and more dimensions start with the rows, except for position ids of several axes. Tensors of
        one or two may also start with a length, the dimension 1 of `(rows, length, features)`.

        Args:
            states (`torch.Tensor`): The hidden states, of all rows.
            values: All arguments of the layer.
        """
        rows, shapes = self.num_rows, [leaf.shape for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        lengths = {*states.shape[1:-1], *(shape[1] for shape in shapes if len(shape) == 3 and shape[0] == rows)}
        if rows in lengths and any(0 < len(shape) < 3 and shape[0] == rows for shape in shapes):
            return True
        has_few = AXES in (self.batch_size, rows)
        return has_few and any(len(shape) > 2 and shape[:2] == (AXES, rows) for shape in shapes)

    def _batch_dimension(self, value: Tensor) -> int | None:
        """The dimension of all rows; `None` if a tensor is shared by the rows, or cut already."""
        if value.dim() > 0 and len(value) == self.num_rows:
            return 0
        has_axes = value.dim() > 2 and len(value) == AXES != self.batch_size
        return 1 if has_axes and value.shape[1] == self.num_rows else None
