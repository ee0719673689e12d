"""The batch twice over, for two passes in one forward."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.utils import ModelOutput


# Inputs that list images, clips or sounds of the whole batch in the order in which its rows use them, so that their
# first dimension need not be the batch size. Twice the rows use twice the list.
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
# Inputs without a batch dimension that every row shares.
SHARED_INPUTS = frozenset({"cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask"})
# Inputs whose batch dimension may be 1 for all rows.
BROADCAST_INPUTS = frozenset({"position_ids", "attention_mask", "decoder_attention_mask"})


def batch_size_of(inputs: Mapping[str, Any], main_input_name: str = "input_ids") -> int:
    """The number of rows of a batch.

    Args:
        inputs: what the model is called with.
        main_input_name: the model's own `main_input_name`.

    Raises:
        ValueError: if no input tells.
    """
    for name in (main_input_name, "input_ids", "inputs_embeds", "labels"):
        if isinstance(inputs.get(name), Tensor):
            return len(inputs[name])
    raise ValueError(
        f"Cannot tell the batch size: expected a tensor `{main_input_name}`, `input_ids`, `inputs_embeds` or "
        f"`labels`, got {sorted(inputs)}. The consistency term has to repeat every row. Set `consistency_weight=0` "
        "for this model."
    )


def double_batch(inputs: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """The batch, followed by the same batch again.

    Args:
        inputs (`Mapping[str, Any]`):
            What the model is called with.
        batch_size (`int`):
            Its number of rows `B`.

    Returns:
        `dict[str, Any]`: the inputs of `2B` rows. Batch-first tensors are repeated on dimension 0, position ids of
        several axes, `(3, B, L)`, on dimension 1. The offsets of packed documents (`cu_seq_lens_q`) are continued, and
        dropped for a single document: as rows of a batch its two copies need none.

    Raises:
        ValueError: for an input that is neither batch-first nor known, naming it.

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


def refuse_hidden_packing(inputs: Mapping[str, Any], attn_implementation: str) -> None:
    """Refuses packed documents that would mix: flash attention reads them off the position ids in a batch of one row,
    which doubling makes two.

    Args:
        inputs: what the model is called with.
        attn_implementation: the model's attention implementation.

    Raises:
        ValueError: if only the position ids mark the documents, and the implementation is one of flash attention.
    """
    position_ids = inputs.get("position_ids")
    if "flash" not in attn_implementation or position_ids is None or "cu_seq_lens_q" in inputs:
        return
    if len(position_ids) == 1 and (position_ids.diff(dim=-1) < 1).any():
        raise ValueError(
            f"`position_ids` mark packed documents, which {attn_implementation} does not see in the two rows of a "
            "consistency batch: documents would attend to each other. Pass `cu_seq_lens_q` and the like as well "
            "(DataCollatorWithFlattening(return_flash_attn_kwargs=True)), or use another attention implementation."
        )


def _not_batch_first(name: str, got: str, batch_size: int) -> ValueError:
    return ValueError(
        f"Cannot repeat the input `{name}` for the second pass: expected a first dimension of {batch_size}, the batch "
        f"size, got {got}. A wrong guess would train on mixed up rows. Leave `{name}` out of the batch, make it "
        "batch-first, or set `consistency_weight=0`."
    )


def first_half(outputs: Any, batch_size: int) -> Any:
    """What the model returned for the first pass: every tensor of `2 * batch_size` rows cut after `batch_size`."""
    return tree_map(
        lambda value: (
            value[:batch_size]
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == 2 * batch_size
            else value
        ),
        outputs,
    )
