"""The attention functions, with the signature that Transformers calls."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.call import (
    Attend,
    AttentionCall,
    AttentionOutput,
    attend_if_any_key,
    base_attention,
    is_recomputing,
)
from ..functional import mixes_documents
from ..methods import LEARNED_METHODS
from ..methods.learned import LearnedWeights
from ..methods.method import Perturbation


ATTENTION_DROP = "attentiondrop"

SUPPORTED_KWARGS = ("position_bias", "softcap", "s_aux", "sinks")
# Tensors in `**kwargs` that attention does not depend on: keys and mask already contain the positions, and the others
# are for kernels without a mask, or for the loss.
IGNORED_KWARGS = (
    *("position_ids", "cache_position", "max_length_q", "max_length_k"),
    *("num_items_in_batch", "labels", "shift_labels"),
)
# Boundaries of packed documents, for kernels without a mask. Here the mask must contain them.
PACKING_KWARGS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")

Active = tuple[tuple[Perturbation, Tensor], ...]


def attention_drop_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    active: Active | None = None,
    **kwargs: Any,
) -> AttentionOutput:
    """Computes attention that is perturbed while `module.training` is true, and the base attention bit for bit
    otherwise.

    Args:
        module: the attention module; its config's `attention_drop` entry names the perturbations.
        query: `(B, H, Q, D)`.
        key: `(B, Hkv, K, D)`.
        value: `(B, Hkv, K, D)`.
        attention_mask: `(B|1, H|1, Q, K)`, boolean (true = may attend) or additive; or `None`.
        dropout: probability of dropout on the attention weights.
        scaling: factor of the scores, `D ** -0.5` by default.
        is_causal: whether a missing mask means causal; by default the module decides.
        active: perturbations to apply, in any mode and without counting the call; by default those of the module, in
            training.
        kwargs: `position_bias`, `softcap`, `s_aux` or `sinks`, and `output_attentions` are supported.

    Returns:
        The output, `(B, Q, H, D)`, and the weights, `(B, H, Q, K)`, if `output_attentions` is true, else `None`. A
        query that sees no key gets zeros where attention is perturbed.

    Raises:
        ValueError: for an unsupported tensor argument, and where a perturbation cannot act on the module.
        RuntimeError: if the module does not belong to a model that was built with this implementation.
    """
    _check_arguments(module, query, attention_mask, kwargs)
    call = _call(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    return _attend(call, _active(call) if active is None else active)


def reweighted_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    reweighting_states: Tensor | None = None,
    reweighting_memory: dict[str, Any] | None = None,
    active: Active | None = None,
    **kwargs: Any,
) -> AttentionOutput:
    """Computes attention with the learned weights of the module's `reweighting`, in training and in evaluation.

    Args:
        reweighting_states: `(B, Q, hidden_size)`, the hidden states that entered the module, from a hook.
        reweighting_memory: shared by the attention calls during one forward of the module, empty at first, from the
            same hook.
        others: see [`attention_drop_forward`]. Attention is perturbed in training if the config has an
            `attention_drop` entry.

    Returns:
        See [`attention_drop_forward`]; the attention weights are reweighted.

    Raises:
        ValueError: see [`attention_drop_forward`]; also if the hidden states do not fit the queries.
        RuntimeError: if the module has no learned weights, or got no hidden states.
    """
    _check_arguments(module, query, attention_mask, kwargs)
    call = _call(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    if not hasattr(module, "reweighting"):
        raise RuntimeError(
            f"{type(module).__name__} runs {module.config._attn_implementation!r} without learned weights, so it "
            "would compute plain attention. Build the whole model with this implementation, or call "
            "model.set_attn_implementation instead of changing the config."
        )
    active = _active(call) if active is None else active
    if module.reweighting is None:
        return _attend(call, active)
    states = _checked_states(call, reweighting_states)
    if reweighting_memory is not None:
        call = replace(call, memory=reweighting_memory)
    return _attend(call, active, module.reweighting, states)


def is_perturbable(module: nn.Module) -> bool:
    """Returns whether its config's perturbations apply to an attention module: always under `"attentiondrop"`, under a
    learned method only if the config has an `attention_drop` entry."""
    if not hasattr(module, "attention_drop_state"):
        return False
    name = module.config._attn_implementation
    return name == ATTENTION_DROP or (name in LEARNED_METHODS and module.attention_drop_state.is_configured)


def perturbations_of_module(module: nn.Module) -> Active:
    """Returns the perturbations of an attention module in training, each with its current value."""
    return module.attention_drop_state.active if is_perturbable(module) else ()


def check_perturbed(modules: Iterable[nn.Module]) -> None:
    """Checks that the perturbations of attention modules can act on them.

    Raises:
        ValueError: if one cannot.
    """
    for module in modules:
        for perturbation, _ in perturbations_of_module(module):
            perturbation.check_module(module)


def _call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    extras: dict[str, Any],
) -> AttentionCall:
    state = getattr(module, "attention_drop_state", None)
    known = {} if state is None else {"kind": state.place.kind, "base": state.base}
    return AttentionCall(
        module, query, key, value, mask, dropout, scaling, is_causal, extras, model_mask=mask, **known
    )


def _attend(
    call: AttentionCall, active: Active, learned: LearnedWeights | None = None, states: Tensor | None = None
) -> AttentionOutput:
    """Nests the methods around the base attention, and computes the call."""
    attend: Attend = base_attention
    if learned is not None and learned.acts_on_scores:
        attend = _around(learned, states, attend)
    if active:
        attend = attend_if_any_key if attend is base_attention else _for_queries_with_keys(attend)
        attend = _perturbed(attend, active, scales_output=False)
    if learned is not None and not learned.acts_on_scores:
        attend = _around(learned, states, attend)
    return _perturbed(attend, active, scales_output=True)(call)


def _perturbed(attend: Attend, active: Active, scales_output: bool) -> Attend:
    for perturbation, value in reversed(active):
        if perturbation.scales_output is scales_output:
            attend = _with_perturbation(perturbation, value, attend)
    return attend


def _with_perturbation(perturbation: Perturbation, value: Tensor, attend: Attend) -> Attend:
    def perturbed(call: AttentionCall) -> AttentionOutput:
        current = value
        if value.dim() > 0:  # One per head.
            current = value.to(call.query.device, torch.float32).view(-1, 1, 1)
        return perturbation.attend(call, attend, current)

    return perturbed


def _around(learned: LearnedWeights, states: Tensor | None, attend: Attend) -> Attend:
    return lambda call: learned(states, call, attend)


def _for_queries_with_keys(attend: Attend) -> Attend:
    return lambda call: attend_if_any_key(call, attend)


def _active(call: AttentionCall) -> Active:
    """Returns the perturbations that act in this call, and counts the call if there are any."""
    module = call.module
    if not module.training:
        return ()
    if not hasattr(module, "attention_drop_state"):
        name = module.config._attn_implementation or ATTENTION_DROP
        raise RuntimeError(
            f"{type(module).__name__} runs {name!r} in training, but does not belong to a model that was built with "
            "it, so its layer and kind are unknown. Build the whole model with "
            f'attn_implementation="{name}", or call model.set_attn_implementation("{name}") after adding modules.'
        )
    active = perturbations_of_module(module)
    if active and not is_recomputing():
        state = module.attention_drop_state
        state.calls.add_(1)
        if state.meter is not None:
            state.meter.measure(call)
    return active


def _check_arguments(module: nn.Module, query: Tensor, mask: Tensor | None, extras: dict[str, Any]) -> None:
    for name, value in extras.items():
        if name in PACKING_KWARGS and isinstance(value, torch.Tensor):
            if mixes_documents(mask, value, batch_size=len(query), length=query.shape[-2]):
                raise ValueError(
                    f"{type(module).__name__} passes `{name}` to its attention, so documents are packed into one row, "
                    "but its mask lets them attend to each other: they would leak into each other. Pass position_ids "
                    "that restart at 0 in each document, no attention_mask, and use_cache=False: Transformers then "
                    "builds the mask from them."
                )
        elif name not in SUPPORTED_KWARGS + IGNORED_KWARGS and (
            isinstance(value, torch.Tensor) or (name == "cache" and value is not None)
        ):
            raise ValueError(
                f"{type(module).__name__} passes `{name}` to its attention, which hf_attentiondrop does not support: "
                f"ignoring it would give wrong outputs. Supported arguments: {', '.join(SUPPORTED_KWARGS)}, "
                'is_causal, output_attentions. Load this model with attn_implementation="sdpa" or "eager", or '
                "remove the argument if you added it."
            )


def _checked_states(call: AttentionCall, states: Tensor | None) -> Tensor:
    name = type(call.module).__name__
    if states is None:
        raise RuntimeError(
            f"{name} did not pass the hidden states on to its attention function, so the learned weights cannot act. "
            "Its forward must pass its keyword arguments on; load the model with another attn_implementation."
        )
    batch_size, _, queries, _ = call.query.shape
    if states.shape[:2] != (batch_size, queries):
        raise ValueError(
            f"{name} projected hidden states of shape {tuple(states.shape)} to queries of shape "
            f"{tuple(call.query.shape)}: expected hidden states of shape ({batch_size}, {queries}, hidden_size), one "
            "per query. The learned weights cannot act on this model; load it with another attn_implementation."
        )
    return states
