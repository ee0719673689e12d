"""The attention weights of one layer: as they are, under one draw of its perturbations, and the difference."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention.call import AttentionCall
from ..attention.modules import ATTENTION_KINDS, Place, attention_modules
from ..attention.parts import transformers_model
from ..integration.functions import perturbations_of_module
from ..integration.implementations import FUNCTIONS
from ..validation import is_integer
from .running import inputs_without_loss, mode, random_state_kept


@dataclass(frozen=True)
class AttentionMaps:
    """The attention weights of one sample in one attention module, float32 on the CPU, without padding.

    Args:
        weights: `(H, Q, K)`, in evaluation. Rows sum to 1 under softmax, to less with a learned sink, and to the
            moving average of the scales under affine scaling.
        perturbed: `(H, Q, K)`, under one draw of the perturbations that act in training; `None` if none acts on the
            module.
        module: name of the module in the model.
        kind: `"encoder_self"`, `"decoder_self"` or `"cross"`.
        layer: position in its stack of layers.
        applied: perturbations of the draw, joined by " + "; empty for none.
        queries: `(Q,)`, positions of the queries in the sample with its padding.
        keys: `(K,)`, positions of the keys in the sample with its padding.
        grid: rows and columns of the image patches, which are the last keys; `None` for other keys.
    """

    weights: Tensor
    perturbed: Tensor | None
    module: str
    kind: str
    layer: int
    applied: str
    queries: Tensor
    keys: Tensor
    grid: tuple[int, int] | None = None

    @property
    def difference(self) -> Tensor | None:
        """`(H, Q, K)`, what the draw adds to each weight; `None` without perturbations."""
        return None if self.perturbed is None else self.perturbed - self.weights


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    batch: Mapping[str, Any],
    layer: int | str | None = None,
    kind: str | None = None,
    *,
    sample: int = 0,
    seed: int = 0,
) -> AttentionMaps:
    """Returns the attention weights of one layer, and the same under one draw of its perturbations.

    Both are of the same call in evaluation mode, so they differ by the perturbations of this layer alone: the layers
    before it are not perturbed, and there is no dropout. The draw is that of the whole batch in training mode.
    Nothing on the model changes, and neither does torch's random state.

    The cost is a forward pass, and `B·H·Q·K` weights of one layer, twice.

    Args:
        model (`torch.nn.Module`): a Transformers model with an attention implementation of this package, or a wrapper
            around one.
        batch (`Mapping[str, Any]`): keyword arguments of its forward pass.
        layer (`int` or `str`, *optional*):
            Number of the layer in its stack, negative from the end, or name of the module, as [`report`] shows it. By
            default the last layer that is perturbed, of self-attention if there is one, or else the last one.
        kind (`str`, *optional*): `"encoder_self"`, `"decoder_self"` or `"cross"`; any by default.
        sample (`int`, defaults to 0): row of the batch.
        seed (`int`, defaults to 0): of the draw.

    Returns:
        [`AttentionMaps`]: of the first call of the module, should the model call it several times.

    Raises:
        ValueError: if the model does not run an implementation of this package, has no such layer or several, or does
            not attend between the positions of one sample, and for weights that are not finite.
        TypeError: if `model` contains no Transformers model, or the batch is not a mapping.

    Example:

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> model = BertModel._from_config(config, attn_implementation="attentiondrop")
    >>> maps = attention_maps(model, {"input_ids": torch.tensor([[2, 3, 4]])})
    >>> maps.module, maps.weights.shape
    ('encoder.layer.1.attention.self', torch.Size([4, 3, 3]))
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"`batch` must be one batch, a mapping of the model's arguments, got {type(batch).__name__}. Pass one of "
            "your batches."
        )
    name, module = _select(model, layer, kind)
    inputs = inputs_without_loss(model, batch)
    batch_size = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
    if not (is_integer(sample) and -batch_size <= sample < batch_size):
        raise ValueError(f"`sample` must be a row of the batch, which has {batch_size}, got {sample!r}.")
    with mode(model, training=False), random_state_kept(model), _recording(module, seed) as calls:
        model(**inputs)
    if not calls:
        raise ValueError(f"The model did not run {name} on this batch, so it has no weights. Choose another layer.")
    call, weights, perturbed = calls[0]
    if len(weights) != batch_size:
        raise ValueError(
            f"Expected weights of {batch_size} samples from {name}, got shape {tuple(weights.shape)}: it attends "
            "within windows or other parts of a sample, which cannot be told apart. Choose another layer or model."
        )
    queries, keys = _not_padding(call, inputs, weights, sample)
    weights = weights[sample][:, queries][:, :, keys].float().cpu()
    if perturbed is not None:
        perturbed = perturbed[sample][:, queries][:, :, keys].float().cpu()
    if not weights.isfinite().all():
        raise ValueError(f"{name} has weights that are not finite: the model's outputs are invalid.")
    place: Place = module.attention_drop_state.place
    applied = " + ".join(perturbation.at(place).summary for perturbation, _ in perturbations_of_module(module))
    positions, grid = (queries.cpu(), keys.cpu()), _grid(module, batch, keys)
    return AttentionMaps(weights, perturbed, name, place.kind, place.layer, applied, *positions, grid)


def candidates_of(model: nn.Module) -> dict[str, tuple[nn.Module, Place]]:
    """The attention modules that run an implementation of this package, by name."""
    return {
        name: (module, module.attention_drop_state.place)
        for name, module in attention_modules(model)
        if module.config._attn_implementation in FUNCTIONS and hasattr(module, "attention_drop_state")
    }


def _select(model: nn.Module, layer: int | str | None, kind: str | None) -> tuple[str, nn.Module]:
    owner = transformers_model(model)
    candidates = candidates_of(model)
    if not candidates:
        raise ValueError(
            f"{type(owner).__name__} uses attn_implementation={owner.config._attn_implementation!r}, so there is no "
            'perturbation to show. Call model.set_attn_implementation("attentiondrop") first, or load the model with '
            "it."
        )
    if kind is not None and kind not in ATTENTION_KINDS:
        raise ValueError(f"`kind` must be one of {ATTENTION_KINDS} or None, got {kind!r}.")
    if not (layer is None or is_integer(layer) or isinstance(layer, str)):
        raise ValueError(f"`layer` must be the number of a layer, the name of a module or None, got {layer!r}.")
    found = {name: item for name, item in candidates.items() if _is_at(name, item[1], layer, kind)}
    if not found or (is_integer(layer) and len(found) > 1):
        places = ", ".join(f"{name} ({place.kind}, layer {place.layer})" for name, (_, place) in candidates.items())
        raise ValueError(
            f"layer={layer!r}, kind={kind!r} selects {', '.join(found) or 'no attention'} of {type(owner).__name__}, "
            f"expected one module. Pass the kind, or its name as `layer`; the modules are {places}."
        )

    def rank(name: str) -> tuple[bool, bool]:
        module, place = found[name]
        return bool(perturbations_of_module(module)), place.kind != "cross"

    name = max(reversed(found), key=rank)  # The last one of the highest rank.
    return name, found[name][0]


def _is_at(name: str, place: Place, layer: int | str | None, kind: str | None) -> bool:
    layers = (None, name, place.layer, place.layer - place.num_layers)
    return layer in layers and kind in (None, place.kind)


@contextmanager
def _recording(module: nn.Module, seed: int) -> Iterator[list[tuple[AttentionCall, Tensor, Tensor | None]]]:
    """Records the first call of an attention module in evaluation mode: the call, its weights, and those of one draw.

    The function that the module looks up in the attention interface is replaced for that time, which leaves the model
    and its hooks as they are. Other modules get what they would get without.
    """
    name = module.config._attn_implementation
    attend: Any = FUNCTIONS[name]
    calls: list[tuple[AttentionCall, Tensor, Tensor | None]] = []

    def weights_of(caller: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return attend(caller, *args, **{**kwargs, "output_attentions": True})[1]

    def recorded(
        caller: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        states = (query, key, value, mask)
        if caller is module and not calls:
            weights, perturbed = weights_of(caller, *states, *args, **kwargs), None
            if active := perturbations_of_module(module):
                torch.manual_seed(seed)
                perturbed = weights_of(caller, *states, *args, **kwargs, active=active)
            kind, is_causal = module.attention_drop_state.place.kind, kwargs.get("is_causal")
            calls.append((AttentionCall(module, *states, 0.0, None, is_causal, {}, kind), weights, perturbed))
        return attend(caller, *states, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = recorded
    try:
        # Compiled code would not look the function up again.
        with torch.compiler.set_stance("force_eager"):
            yield calls
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def _not_padding(call: AttentionCall, batch: Mapping[str, Any], weights: Tensor, sample: int) -> tuple[Tensor, Tensor]:
    """Positions of the queries and keys of a sample that are not padding."""
    batch_size, heads, queries, keys = weights.shape
    real, visible = call.real_queries, call.visible
    if call.kind == "cross" and (mask := batch.get("decoder_attention_mask")) is not None:
        real = mask[:, None].to(weights.device).bool()
    is_query = torch.ones(queries, dtype=torch.bool, device=weights.device)
    if real is not None:
        is_query = real.expand(batch_size, -1, queries)[sample].any(dim=0)
    is_key = torch.ones(keys, dtype=torch.bool, device=weights.device)
    if visible is not None:
        # No query sees padding.
        is_key = visible.expand(batch_size, -1, queries, keys)[sample][:, is_query].any(dim=(0, 1))
    return is_query.nonzero().flatten(), is_key.nonzero().flatten()


def _grid(module: nn.Module, batch: Mapping[str, Any], keys: Tensor) -> tuple[int, int] | None:
    """Rows and columns of the patches if the keys are those of an image, after class tokens."""
    pixels, size = batch.get("pixel_values"), getattr(module.config, "patch_size", None)
    sizes = (size, size) if is_integer(size) else size
    if pixels is None or not isinstance(sizes, Sequence) or len(sizes) != 2:
        return None
    rows, columns = (length // side for length, side in zip(pixels.shape[-2:], sizes, strict=True))
    return (rows, columns) if 0 < rows * columns <= len(keys) else None
