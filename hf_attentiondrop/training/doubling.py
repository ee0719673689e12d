"""Repeats the rows of a batch, for two passes in one forward."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.utils import ModelOutput


# Inputs that list the images, clips or sounds of the whole batch in the order of its rows: their first dimension may
# differ from the batch size. They are repeated whole.
LISTED_INPUTS = frozenset(
    {
        "pixel_values",
        "pixel_values_videos",
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
        "image_sizes",
        "pixel_attention_mask",
        "input_features",
        "feature_attention_mask",
    }
)
# Inputs without a batch dimension, shared by all rows.
SHARED_INPUTS = frozenset({"cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask"})
# Inputs whose batch dimension may be 1, which broadcasts to all rows.
BROADCAST_INPUTS = frozenset({"position_ids", "attention_mask", "decoder_attention_mask"})


def batch_size_of(inputs: Mapping[str, Any], main_input_name: str = "input_ids") -> int:
    """The number of rows of a batch.

    Args:
        inputs (`Mapping[str, Any]`): Model inputs.
        main_input_name (`str`, defaults to `"input_ids"`): The `main_input_name` of the model.

    Raises:
        ValueError: if there is no tensor to read it from.
    """
    for name in (main_input_name, "input_ids", "inputs_embeds", "labels"):
        if isinstance(inputs.get(name), Tensor):
            return len(inputs[name])
    raise ValueError(
        f"Cannot tell the batch size: expected a tensor `{main_input_name}`, `input_ids`, `inputs_embeds` or "
        f"`labels`, got {sorted(inputs)}. The consistency term repeats every row, so it needs their number. Set "
        "`consistency_weight=0` for this model."
    )


def repeat_rows(
    inputs: Mapping[str, Any], batch_size: int, rows: Tensor | None = None, main_input_name: str = "input_ids"
) -> dict[str, Any]:
    """Appends the rows of a batch, or some of them, to the batch.

    Args:
        inputs (`Mapping[str, Any]`): Model inputs.
        batch_size (`int`): The number of rows `B`.
        rows (`torch.Tensor` of shape `(n,)`, *optional*):
            Indices of the rows to append, on the device of the inputs. By default all rows, in their order.
        main_input_name (`str`, defaults to `"input_ids"`): The `main_input_name` of the model.

    Returns:
        `dict[str, Any]`: the inputs of `B + n` rows. Batch-first tensors are repeated along dimension 0, position ids
        of several axes, `(3, B, L)`, along dimension 1. The offsets of packed documents (`cu_seq_lens_q`) are
        continued; for a single document they become `None`, because its two copies are two rows.

    Raises:
        ValueError: for an unknown input that is not batch-first, and if only some rows are to be repeated, for offsets
            of packed documents and for lists of images whose rows are unknown.

    Example:

    >>> import torch
    >>> batch = {"input_ids": torch.tensor([[1, 2], [3, 4]])}
    >>> repeat_rows(batch, batch_size=2)["input_ids"].tolist()
    [[1, 2], [3, 4], [1, 2], [3, 4]]
    >>> repeat_rows(batch, batch_size=2, rows=torch.tensor([1]))["input_ids"].tolist()
    [[1, 2], [3, 4], [3, 4]]
    """
    if rows is not None and len(rows) == 0:
        return dict(inputs)
    repetition = _Repetition(batch_size, rows, LISTED_INPUTS - {main_input_name})
    return {name: repetition.of_value(name, value) for name, value in inputs.items()}


@dataclass(frozen=True)
class _Repetition:
    """Appends `rows` to a batch of `batch_size` rows; `None` appends all. `listed` are the names of the inputs whose
    rows are unknown."""

    batch_size: int
    rows: Tensor | None
    listed: frozenset[str]

    def of_value(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.of_tensor(name, value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (dict, ModelOutput)):
            # Masks by the kind of attention are masks, too.
            names = {key: name if name in BROADCAST_INPUTS else key for key in value}
            return type(value)(**{key: self.of_value(names[key], item) for key, item in value.items()})
        if isinstance(value, tuple) and all(isinstance(item, Tensor) for item in value):
            return tuple(self.of_tensor(name, item) for item in value)
        if isinstance(value, list) and len(value) == self.batch_size:
            self.check_rows(name)
            return value + (value if self.rows is None else [value[row] for row in self.rows.tolist()])
        raise _not_batch_first(name, f"a {type(value).__name__}", self.batch_size)

    def of_tensor(self, name: str, value: Tensor) -> Tensor | None:
        if value.dim() == 0 or name in SHARED_INPUTS:
            return value
        self.check_rows(name)
        if name.startswith("cu_seq"):
            return torch.cat((value, value[1:] + value[-1])) if len(value) > 2 else None
        batch_dimension = 1 if name == "position_ids" and value.dim() == 3 else 0
        size = value.shape[batch_dimension]
        if size == 1 != self.batch_size and name in BROADCAST_INPUTS:
            return value
        if size == self.batch_size or name in self.listed:
            repeated = value if self.rows is None else value.index_select(batch_dimension, self.rows)
            return torch.cat((value, repeated), dim=batch_dimension)
        raise _not_batch_first(name, f"shape {tuple(value.shape)}", self.batch_size)

    def check_rows(self, name: str) -> None:
        """Checks that the entries of an input belong to rows, if only some rows are repeated."""
        if self.rows is None or not (name.startswith("cu_seq") or name in self.listed):
            return
        kind = "the offsets of packed documents" if name.startswith("cu_seq") else "images, clips or sounds"
        raise ValueError(
            f"Cannot repeat a part of the rows: the input `{name}` lists {kind} of all {self.batch_size} rows in one "
            "sequence, and a row may own several or none. A wrong guess would mix up rows. Set "
            "`consistency_fraction=1`, or `per_device_train_batch_size=1`: a batch of one row repeats it whole or "
            "not at all."
        )


def check_packing(inputs: Mapping[str, Any], attn_implementation: str) -> None:
    """Checks that repeating the rows does not mix packed documents. Flash attention infers documents from the position
    ids only in a batch of one row, and its repetition makes two.

    Args:
        inputs (`Mapping[str, Any]`): Model inputs.
        attn_implementation (`str`): The attention implementation of the model.

    Raises:
        ValueError: if only the position ids mark the documents, and the model uses flash attention.
    """
    position_ids = inputs.get("position_ids")
    if "flash" not in attn_implementation or position_ids is None or "cu_seq_lens_q" in inputs:
        return
    if len(position_ids) == 1 and (position_ids.diff(dim=-1) < 1).any():
        raise ValueError(
            f"Expected `cu_seq_lens_q` for packed documents under {attn_implementation}, got `position_ids` alone: "
            "flash attention ignores the boundaries that these mark in a batch of two passes, and documents "
            "would attend to each other. Use DataCollatorWithFlattening(return_flash_attn_kwargs=True), or another "
            "attention implementation."
        )


def _not_batch_first(name: str, got: str, batch_size: int) -> ValueError:
    return ValueError(
        f"Cannot repeat the input `{name}` for the second pass: expected a first dimension of {batch_size}, the batch "
        f"size, got {got}. A wrong guess would mix up rows. Remove `{name}` from the batch, make it batch-first, or "
        "set `consistency_weight=0`."
    )


def first_pass(outputs: Any, batch_size: int, repeated: int) -> Any:
    """The outputs of the first pass.

    Args:
        outputs: The outputs of the model for both passes, any nesting of tensors.
        batch_size (`int`): The number of rows `B` of the first pass.
        repeated (`int`): The number of rows `n` of the second pass.

    Returns:
        the same structure: tensors of `B + n` rows are cut to the first `B`, other values are kept.

    Example:

    >>> import torch
    >>> first_pass({"logits": torch.tensor([[1], [2]]), "loss": torch.tensor(0.5)}, batch_size=1, repeated=1)
    {'logits': tensor([[1]]), 'loss': tensor(0.5000)}
    """
    return tree_map(
        lambda value: (
            value[:batch_size]
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch_size + repeated
            else value
        ),
        outputs,
    )
