"""The attention functions, with the signature that Transformers calls."""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..attention.call import AttentionCall, base_attention, is_recomputing
from ..functional import mixes_documents
from ..methods.blur import attend_blurred
from ..methods.configuration import AttentionDropConfig
from ..methods.hard import attend_hard
from ..methods.sites import SDPA


NAME = "attentiondrop"

HONOURED = ("position_bias", "softcap", "s_aux", "sinks")
# Tensors that travel along in `**kwargs` without a say in attention: positions are in the keys and the mask by now,
# and the rest is for kernels that take no mask, or for the loss.
BYSTANDERS = (
    *("position_ids", "cache_position", "max_length_q", "max_length_k"),
    *("num_items_in_batch", "labels", "shift_labels"),
)
# Where packed documents begin and end, for kernels that take no mask. Here the mask has to say the same.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def attention_drop_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention that is perturbed while `module.training` is true, and the base attention bit for bit otherwise.

    Args:
        module: the attention module; its config's `attention_drop` entry says what to do.
        query: `(B, H, Q, D)`.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, D)`.
        attention_mask: `(B|1, H|1, Q, K)`, boolean (true = may attend) or additive; or `None`.
        dropout: rate of dropout on the attention weights.
        scaling: factor of the scores, `D ** -0.5` by default.
        is_causal: whether a missing mask means causal; by default as the module says.
        kwargs: `position_bias`, `softcap`, `s_aux` or `sinks`, and `output_attentions` are honoured.

    Returns:
        The output, `(B, Q, H, D)`, and the weights used, `(B, H, Q, K)`, if `output_attentions` is true, else `None`.
        A query that sees no key gets zeros where attention is perturbed.

    Raises:
        ValueError: for a tensor argument that is not honoured, or a softcap under blur.
        RuntimeError: if the module never got its place in a model.
    """
    _refuse_unknown_arguments(module, query, attention_mask, kwargs)
    call = _call(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    return _attend(call, _perturbation(module, by_default=True))


def reweighted_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    reweighting_states: torch.Tensor | None = None,
    reweighting_memory: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention under what the module's `reweighting` has learned, in training and in evaluation.

    Args:
        reweighting_states: `(B, Q, hidden_size)`, the hidden states that entered the module; a hook hands them over.
        reweighting_memory: what the attention calls of one pass through the module share, empty at first; the hook
            makes it.
        others: as in [`attention_drop_forward`]. Attention is perturbed in training if the config has an
            `attention_drop` entry, and the base attention otherwise, before it is reweighted.

    Returns:
        As [`attention_drop_forward`]; the weights are the reweighted ones.

    Raises:
        ValueError: as [`attention_drop_forward`], and for hidden states that do not fit the queries.
        RuntimeError: if nothing was attached to the module, or no hidden states arrived.
    """
    _refuse_unknown_arguments(module, query, attention_mask, kwargs)
    call = _call(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    if not hasattr(module, "reweighting"):
        raise RuntimeError(
            f"{type(module).__name__} runs {module.config._attn_implementation!r} without learned weights: it would "
            "be plain attention under another name. Build the whole model with it, or call "
            "model.set_attn_implementation instead of changing the config."
        )
    attend = functools.partial(_attend, drop=_perturbation(module, by_default=False))
    if module.reweighting is None:
        return attend(call)
    _refuse_misplaced_states(call, reweighting_states)
    if reweighting_memory is not None:
        call = replace(call, memory=reweighting_memory)
    return module.reweighting(reweighting_states, call, attend)


def runs_attention_drop(module: nn.Module) -> bool:
    """Whether AttentionDrop governs a module that has its site: always under its own name, else where configured."""
    is_configured = hasattr(module, "reweighting") and module.attention_drop_site.is_configured
    return module.config._attn_implementation == NAME or is_configured


def _call(module: nn.Module, *arguments: Any) -> AttentionCall:
    site = getattr(module, "attention_drop_site", None)
    return AttentionCall(module, *arguments, base=SDPA if site is None else site.base)


def _attend(call: AttentionCall, drop: AttentionDropConfig | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The base attention, perturbed or not."""
    if drop is None:
        return base_attention(call)
    if not is_recomputing():
        call.module.attention_drop_site.calls.add_(1)
    attend = {"hard": attend_hard, "blur": attend_blurred}[drop.variant]
    return attend(call, drop)


def _perturbation(module: nn.Module, *, by_default: bool) -> AttentionDropConfig | None:
    """What AttentionDrop does to the module now; where its config has no entry, the defaults or nothing."""
    if not module.training:
        return None
    site = getattr(module, "attention_drop_site", None)
    if site is None:
        name = module.config._attn_implementation or NAME
        raise RuntimeError(
            f"{type(module).__name__} runs {name!r} in training without belonging to a model that was built with "
            "it, so its layer and kind are unknown. Build the whole model with "
            f'attn_implementation="{name}", or call model.set_attn_implementation("{name}") after adding modules.'
        )
    return site.perturbation if by_default or site.is_configured else None


def _refuse_unknown_arguments(
    module: nn.Module, query: torch.Tensor, mask: torch.Tensor | None, extras: dict[str, Any]
) -> None:
    for name, value in extras.items():
        if name in PACKING and isinstance(value, torch.Tensor):
            if mixes_documents(mask, value, batch_size=len(query), length=query.shape[-2]):
                raise ValueError(
                    f"{type(module).__name__} passes `{name}` to its attention, which says that documents are packed "
                    "into one row, and its mask lets them see each other: they would leak into each other. Pass "
                    "position_ids that start anew with each document, no attention_mask, and use_cache=False: "
                    "Transformers then makes the mask from them."
                )
        elif name not in HONOURED + BYSTANDERS and (
            isinstance(value, torch.Tensor) or (name == "cache" and value is not None)
        ):
            raise ValueError(
                f"{type(module).__name__} passes `{name}` to its attention, which hf_attentiondrop does not honour: "
                f"ignoring it would give wrong outputs. Arguments that are honoured: {', '.join(HONOURED)}, "
                'is_causal, output_attentions. Load this model with attn_implementation="sdpa" or "eager", or '
                "drop an argument of your own."
            )


def _refuse_misplaced_states(call: AttentionCall, states: torch.Tensor | None) -> None:
    name = type(call.module).__name__
    if states is None:
        raise RuntimeError(
            f"{name} did not pass the hidden states on to its attention function, so nothing learned could act. Its "
            "forward must hand its keyword arguments over; load the model with another attn_implementation."
        )
    batch_size, _, queries, _ = call.query.shape
    if states.shape[:2] != (batch_size, queries):
        raise ValueError(
            f"{name} received hidden states of shape {tuple(states.shape)} and made queries of shape "
            f"{tuple(call.query.shape)} from them: expected ({batch_size}, {queries}, hidden_size), one state for "
            "each query. The learned weights cannot act on this model; load it with another attn_implementation."
        )
