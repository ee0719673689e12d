"""Repeats the rows of a batch, for two passes in one forward."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.utils import ModelOutput


# Inputs that list the images, clips or sounds of the whole batch in the order of its rows: their first dimension may
# differ from the batch size. The doubled batch repeats the whole list.
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


def double_batch(inputs: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Concatenates a batch with itself.

    Args:
        inputs (`Mapping[str, Any]`): Model inputs.
        batch_size (`int`): The number of rows `B`.

    Returns:
        `dict[str, Any]`: the inputs of `2B` rows. Batch-first tensors are repeated along dimension 0, position ids of
        several axes, `(3, B, L)`, along dimension 1. The offsets of packed documents (`cu_seq_lens_q`) are continued;
        for a single document they become `None`, because its two copies are two rows.

    Raises:
        ValueError: for an unknown input that is not batch-first.

    Example:

    >>> import torch
    >>> double_batch({"input_ids": torch.tensor([[1, 2], [3, 4]])}, batch_size=2)["input_ids"].tolist()
    [[1, 2], [3, 4], [1, 2], [3, 4]]
    """
    return {name: _double(name, value, batch_size) for name, value in inputs.items()}


def _double(name: str, value: Any, batch_size: int) -> Any:
    if isinstance(value, Tensor):
        return _double_tensor(name, value, batch_size)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (dict, ModelOutput)):
        return type(value)(**{key: _double(name, item, batch_size) for key, item in value.items()})
    if isinstance(value, tuple) and all(isinstance(item, Tensor) for item in value):
        return tuple(_double_tensor(name, item, batch_size) for item in value)
    if isinstance(value, list) and len(value) == batch_size:
        return value + value
    raise _not_batch_first(name, f"a {type(value).__name__}", batch_size)


def _double_tensor(name: str, value: Tensor, batch_size: int) -> Tensor | None:
    if value.dim() == 0 or name in SHARED_INPUTS:
        return value
    if name.startswith("cu_seq"):
        return torch.cat((value, value[1:] + value[-1])) if len(value) > 2 else None
    batch_dimension = 1 if name == "position_ids" and value.dim() == 3 else 0
    size = value.shape[batch_dimension]
    if size == 1 != batch_size and name in BROADCAST_INPUTS:
        return value
    if size == batch_size or name in LISTED_INPUTS:
        return torch.cat((value, value), dim=batch_dimension)
    raise _not_batch_first(name, f"shape {tuple(value.shape)}", batch_size)


def check_packing(inputs: Mapping[str, Any], attn_implementation: str) -> None:
    """Checks that doubling the batch does not mix packed documents. Flash attention infers documents from the position
    ids only in a batch of one row, and a doubled batch has two.

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
            "flash attention ignores the boundaries that these mark in a doubled batch of two rows, and documents "
            "would attend to each other. Use DataCollatorWithFlattening(return_flash_attn_kwargs=True), or another "
            "attention implementation."
        )


def _not_batch_first(name: str, got: str, batch_size: int) -> ValueError:
    return ValueError(
        f"Cannot repeat the input `{name}` for the second pass: expected a first dimension of {batch_size}, the batch "
        f"size, got {got}. A wrong guess would mix up rows. Remove `{name}` from the batch, make it batch-first, or "
        "set `consistency_weight=0`."
    )


def first_half(outputs: Any, batch_size: int) -> Any:
    """The outputs of the first pass.

    Args:
        outputs: The outputs of the model for the doubled batch, any nesting of tensors.
        batch_size (`int`): The number of rows `B` of one pass.

    Returns:
        the same structure: tensors of `2B` rows are cut to the first `B`, other values are kept.

    Example:

    >>> import torch
    >>> first_half({"logits": torch.tensor([[1], [2]]), "loss": torch.tensor(0.5)}, batch_size=1)
    {'logits': tensor([[1]]), 'loss': tensor(0.5000)}
    """
    return tree_map(
        lambda value: (
            value[:batch_size]
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == 2 * batch_size
            else value
        ),
        outputs,
    )
