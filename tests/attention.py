"""Attention calls for the tests: modules, expected results by the references, and comparisons."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_attentiondrop.attention.modules import Place
from hf_attentiondrop.integration.config_entries import perturbations_of
from hf_attentiondrop.integration.functions import attention_drop_forward
from hf_attentiondrop.methods.method import Perturbation
from hf_attentiondrop.methods.state import ModuleState

from . import reference
from .cases import AttentionCase
from .methods import Definition, reference_of


def make_module(
    case: AttentionCase,
    perturbations: Perturbation | Sequence[Perturbation],
    module_class: type[nn.Module] = nn.Module,
) -> nn.Module:
    """Builds an attention module with the attributes that the attention function reads."""
    module = module_class.__new__(module_class)
    nn.Module.__init__(module)
    module.is_causal = case.is_causal
    module.num_key_value_groups = case.heads // case.kv_heads
    kind = "cross" if case.is_cross else "encoder_self"
    if isinstance(perturbations, Perturbation):
        perturbations = [perturbations]
    entries = [perturbation.to_dict() | {"attentions": [kind]} for perturbation in perturbations]
    module.config = PreTrainedConfig(attention_drop=entries)
    module.config._attn_implementation = "attentiondrop"
    module.attention_drop_state = ModuleState(module.config, Place(kind, "layers", 0, 1))
    module.attention_drop_state.configure(perturbations_of(module.config))
    return module


def position_bias(case: AttentionCase) -> torch.Tensor | None:
    if not case.position_bias:
        return None
    generator = torch.Generator().manual_seed(11)
    return torch.randn(1, case.heads, case.queries, case.keys, dtype=torch.float64, generator=generator)


def defined(
    case: AttentionCase,
    perturbations: Sequence[Perturbation],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    softcap: float | None = None,
) -> Definition:
    """Applies the references, consuming random numbers in the order of the library: the first method wraps the others,
    and methods that scale the output wrap those that do not."""
    bias = sum(bias for bias in (position_bias(case), case.bias) if bias is not None)
    scores = reference.final_scores(query, key, scaling=0.3, softcap=softcap)
    definition = Definition(case, scores, bias, case.visible, value)
    for perturbation in sorted(perturbations, key=lambda perturbation: not perturbation.scales_output):
        definition = reference_of(perturbation)(perturbation, definition)
    return definition


def expected(
    case: AttentionCase,
    perturbations: Sequence[Perturbation],
    *tensors: torch.Tensor,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns output and weights by the references."""
    return defined(case, perturbations, *tensors, softcap=softcap).attend(dropout=dropout, sinks=sinks)


def with_gradients(function: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    torch.manual_seed(3)
    output = function(*leaves)
    direction = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(13))
    output.backward(direction)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-10) -> None:
    for name, a, b in zip(("output", "query", "key", "value"), found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def check_against_the_definition(case: AttentionCase, perturbations: Sequence[Perturbation], dropout: float) -> None:
    """Compares output and gradients in float64."""
    module = make_module(case, perturbations)

    def library(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        bias = position_bias(case)
        extras = {} if bias is None else {"position_bias": bias}
        return attention_drop_forward(module, query, key, value, case.mask(), dropout=dropout, scaling=0.3, **extras)[
            0
        ]

    def definition(*tensors: torch.Tensor) -> torch.Tensor:
        return expected(case, perturbations, *tensors, dropout=dropout)[0]

    tensors = case.tensors()
    assert_same(with_gradients(library, *tensors), with_gradients(definition, *tensors))
    assert module.attention_drop_state.calls == 1


def check_half_precision(case: AttentionCase, perturbation: Perturbation, dtype: torch.dtype) -> None:
    """Checks that everything is finite, and that fully masked queries get zeros."""
    module = make_module(case, perturbation)
    bias, mask = position_bias(case), case.mask()
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.clamp_min(torch.finfo(dtype).min) if mask.min() > -torch.inf else mask
        mask = mask.to(dtype)
    extras = {} if bias is None else {"position_bias": bias.to(dtype)}

    def library(*tensors: torch.Tensor) -> torch.Tensor:
        return attention_drop_forward(module, *tensors, mask, scaling=0.3, **extras)[0]

    results = with_gradients(library, *case.tensors(dtype))
    assert all(tensor.isfinite().all() for tensor in results)
    fully_masked = ~case.visible.any(dim=-1).transpose(1, 2)
    assert (results[0][fully_masked] == 0).all()
    assert (results[1].transpose(1, 2)[fully_masked] == 0).all()
