"""Learned reweighting matches its float64 references, forward and backward, for every kind of mask.

Weights are random and the average is not 1 in every comparison: at the identity a mistake in the bias would not show.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

from hf_attentiondrop import AffineScaledConfig, AttentionDropConfig, AttentionSinkConfig, GatedAttentionConfig
from hf_attentiondrop.integration.functions import reweighted_attention_forward
from hf_attentiondrop.methods.learned import Dimensions, LearnedMethod
from hf_attentiondrop.methods.method import Perturbation

from . import reference
from .attention import defined, make_module, position_bias
from .cases import CASES, CASES_BY_NAME, AttentionCase
from .methods import examples
from .models import enable_checkpointing


HIDDEN_SIZE, HEAD_DIM = 12, 8
NOTHING = AttentionDropConfig(p=0.0)
LEARNED = examples(LearnedMethod)
AFFINE = {name: example for name, example in LEARNED.items() if isinstance(example, AffineScaledConfig)}
PERTURBED = examples()


def make_reweighted(
    case: AttentionCase,
    config: LearnedMethod,
    drop: Perturbation = NOTHING,
    module_class: type[nn.Module] = nn.Module,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """Builds an attention module with random learned weights and averages."""
    module = make_module(case, drop, module_class)
    module.config._attn_implementation = config.method
    dimensions = Dimensions(HIDDEN_SIZE, case.heads, HEAD_DIM)
    module.reweighting = config.weights(config, dimensions, dtype=dtype)
    generator = torch.Generator().manual_seed(17)
    for tensor in module.reweighting.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module


def states_of(case: AttentionCase) -> torch.Tensor:
    generator = torch.Generator().manual_seed(19)
    return torch.randn(case.batch_size, case.queries, HIDDEN_SIZE, dtype=torch.float64, generator=generator)


def stock(case: AttentionCase, *tensors: torch.Tensor) -> torch.Tensor:
    bias = position_bias(case)
    extras = {} if bias is None else {"position_bias": bias}
    return sdpa_attention_forward(make_module(case, NOTHING), *tensors, case.mask(), scaling=0.3, **extras)[0]


def definition(
    case: AttentionCase,
    config: LearnedMethod,
    drop: Perturbation,
    parameters: dict[str, torch.Tensor],
    states: torch.Tensor,
    *tensors: torch.Tensor,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns output and weights by the reference."""
    sinks = parameters["weight"] if isinstance(config, AttentionSinkConfig) else None
    perturbed = defined(case, [drop] if drop.is_active else [], *tensors)
    output, weights = replace(perturbed, scale=torch.ones(1, 1, 1, 1)).attend(sinks=sinks, dropout=dropout)
    gate = parameters.get("gate.weight")
    if isinstance(config, GatedAttentionConfig):
        gate = parameters["weight"]
    if not drop.is_active and sinks is None:  # Fully masked queries get the output of the base attention.
        fully_masked = ~case.visible.any(dim=-1).transpose(1, 2).unsqueeze(-1)
        output = torch.where(fully_masked, stock(case, *tensors), output)
    if isinstance(config, AffineScaledConfig):
        weights = F.pad(weights, (0, case.keys - weights.shape[-1]))
        alpha = reference.affine_scales(states, parameters["weight"], activation=config.activation, init=config.init)
        weights = reference.affine_weights(weights, case.visible, alpha, parameters["average"], config.bias_length)
        value = tensors[2].repeat_interleave(case.heads // case.kv_heads, dim=1)
        fully_masked = ~case.visible.any(dim=-1).transpose(1, 2).unsqueeze(-1)
        output = torch.where(
            fully_masked, alpha.transpose(1, 2) * output, torch.einsum("bhqk,bhkd->bqhd", weights, value)
        )
    if gate is not None:
        factor = 1.0 if config.init == "paper" else 2.0
        output = output * factor * torch.sigmoid(states @ gate.T).view_as(output)
    return output * perturbed.scale.transpose(1, 2), weights * perturbed.scale


def run(
    module: nn.Module, case: AttentionCase, states: torch.Tensor, *tensors: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    bias = position_bias(case)
    if bias is not None:
        kwargs["position_bias"] = bias.to(tensors[0].dtype)
    return reweighted_attention_forward(
        module, *tensors, case.mask(), scaling=0.3, reweighting_states=states, **kwargs
    )


def compare(module: nn.Module, case: AttentionCase, drop: Perturbation, dropout: float = 0.0) -> None:
    """Compares output and gradients of query, key, value, states and all learned weights, within 1e-10."""
    leaves = [tensor.requires_grad_() for tensor in (states_of(case), *case.tensors())]
    learned = dict(module.reweighting.named_parameters())
    torch.manual_seed(3)
    found, _ = run(module, case, *leaves, dropout=dropout)
    torch.manual_seed(3)
    parameters = learned | dict(module.reweighting.named_buffers())  # After the update of the average.
    wanted, _ = definition(case, module.reweighting.config, drop, parameters, *leaves, dropout=dropout)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    direction = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(13))
    names = ["states", "query", "key", "value", *learned]
    leaves = [*leaves, *learned.values()]
    gradients = [
        torch.autograd.grad(output, leaves, direction, allow_unused=True, materialize_grads=True)
        for output in (found, wanted)
    ]
    for name, a, b in zip(names, *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_definition_forward_and_backward(case: AttentionCase, name: str, training: bool) -> None:
    compare(make_reweighted(case, LEARNED[name]).train(training), case, NOTHING)


# The weights of the default are those of all: with a gate and with a sink, one case of every kind.
FEW_CASES = [
    "none", "causal_without_mask", "padding_left", "position_bias", "cached_one_query", "fully_masked",
    "masks_per_head_grouped",
]  # fmt: skip


@pytest.mark.parametrize("variant", PERTURBED)
@pytest.mark.parametrize(
    ("case", "name"),
    [
        *((case, "default") for case in CASES),
        *((CASES_BY_NAME[case], name) for case in FEW_CASES for name in ("gate", "sink")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_attention_drop_acts_below_in_training(case: AttentionCase, name: str, variant: str) -> None:
    drop = PERTURBED[variant]
    dropout = 0.1 if name != "sink" else 0.0  # The reference has no dropout mask for the sink's column.
    module = make_reweighted(case, LEARNED[name], drop)
    compare(module, case, drop, dropout)
    assert module.attention_drop_state.calls == 1
    compare(module.eval(), case, NOTHING)
    assert module.attention_drop_state.calls == 1


def test_without_an_entry_attention_is_not_perturbed() -> None:
    case = CASES_BY_NAME["causal_without_mask"]
    module = make_reweighted(case, AFFINE["default"], PERTURBED["hard_mask"])
    module.config.attention_drop = None
    compare(module, case, NOTHING)
    assert module.attention_drop_state.calls == 0


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize(
    "case_name", ["none", "causal_without_mask", "padding_left", "masks_per_head_grouped", "cached_one_query"]
)
def test_returned_weights_are_the_ones_used(case_name: str, name: str) -> None:
    case = CASES_BY_NAME[case_name]
    module = make_reweighted(case, LEARNED[name], module_class=Gemma2Attention).eval()
    states, tensors = states_of(case), case.tensors()
    parameters = module.reweighting.state_dict()
    output, weights = run(module, case, states, *tensors, output_attentions=True)
    wanted_output, wanted_weights = definition(case, module.reweighting.config, NOTHING, parameters, states, *tensors)
    torch.testing.assert_close(weights, wanted_weights, rtol=0, atol=2e-6)
    torch.testing.assert_close(output, wanted_output, rtol=0, atol=2e-6)
    assert run(module, case, states, *tensors)[1] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["default", "gate", "sink"])
@pytest.mark.parametrize("case_name", ["causal_padding_left", "arbitrary", "grouped_queries", "fully_masked"])
def test_half_precision_is_finite_and_close(case_name: str, name: str, dtype: torch.dtype) -> None:
    case = CASES_BY_NAME[case_name]
    module = make_reweighted(case, LEARNED[name], dtype=dtype).eval()
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (states_of(case), *case.tensors())]
    output, _ = run(module, case, *leaves)
    parameters = {key: tensor.double() for key, tensor in module.reweighting.state_dict().items()}
    exact = [leaf.detach().double() for leaf in leaves]
    wanted, _ = definition(case, module.reweighting.config, NOTHING, parameters, *exact)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), wanted, rtol=0.03, atol=0.05)
    gradients = torch.autograd.grad(output.sum(), leaves + list(module.reweighting.parameters()), allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(("length", "window"), [(16384, None), (4096, 1024)])
def test_bfloat16_is_close_over_many_tokens(length: int, window: int | None) -> None:
    case = AttentionCase("long", queries=length, keys=length, heads=1, kv_heads=1, is_causal=True)
    object.__setattr__(case, "batch_size", 1)
    module = make_reweighted(case, AFFINE["default"], dtype=torch.float32).eval()
    query, key, value = (torch.randn(1, 1, length, HEAD_DIM) for _ in range(3))
    tensors = [states_of(case).float(), query, key, value + 1.0]
    rounded = [tensor.to(torch.bfloat16) for tensor in tensors]
    mask = None
    if window is not None:
        position = torch.arange(length)
        mask = (position <= position[:, None]) & (position > position[:, None] - window)
        mask = mask[None, None]

    def output(module: nn.Module, states: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return reweighted_attention_forward(module, *tensors, mask, reweighting_states=states)[0]

    module.reweighting.weight.data = module.reweighting.weight.data.to(torch.bfloat16).float()
    wanted = output(module, *(tensor.float() for tensor in rounded))
    found = output(module.to(torch.bfloat16), *rounded)
    assert module.reweighting.average.dtype == torch.float32
    assert (found.float() - wanted)[:, 64:].abs().max() < 1e-2 * wanted.abs().max()


def updated_average(
    case: AttentionCase, is_real: torch.Tensor, config: AffineScaledConfig = AFFINE["default"]
) -> None:
    module = make_reweighted(case, config)
    states, before = states_of(case), module.reweighting.average.clone()
    run(module, case, states, *case.tensors())
    alpha = reference.affine_scales(
        states, module.reweighting.weight, activation=config.activation, init=config.init
    ).squeeze(-1)
    is_real = is_real.expand_as(alpha)
    mean = torch.stack([alpha[:, head][is_real[:, head]].mean() for head in range(case.heads)])
    wanted = config.momentum * before + (1 - config.momentum) * mean
    torch.testing.assert_close(module.reweighting.average, wanted.float(), rtol=0, atol=1e-6)
    assert not torch.equal(module.reweighting.average, before)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["none", "causal_without_mask", "cross", "cross_padding", "one_query", "packed"])
def test_the_average_moves_towards_the_mean_over_all_queries(name: str, momentum: float) -> None:
    case = CASES_BY_NAME[name]
    everyone = torch.ones(1, 1, case.queries, dtype=torch.bool)
    updated_average(case, everyone, AffineScaledConfig(momentum=momentum))


@pytest.mark.parametrize(
    "name", ["padding_right", "padding_left", "causal_padding_left", "float_padding", "cached_padding_left"]
)
def test_padded_queries_do_not_move_the_average(name: str) -> None:
    case = CASES_BY_NAME[name]
    keep = torch.tensor([9, 6, 3])[:, None] > torch.arange(9)
    keep = keep.flip(-1) if "left" in name else keep
    updated_average(case, keep[:, None, 9 - case.queries :])


def test_masks_per_head_tell_each_head_its_own_queries() -> None:
    case = CASES_BY_NAME["masks_per_head"]
    updated_average(case, case.mask().diagonal(dim1=-2, dim2=-1))


def test_the_average_is_frozen_in_evaluation_and_without_real_queries() -> None:
    case = CASES_BY_NAME["fully_masked"]
    module = make_reweighted(case, AFFINE["default"])
    before = module.reweighting.average.clone()
    run(module.eval(), case, states_of(case), *case.tensors())
    assert torch.equal(module.reweighting.average, before)
    nobody = AttentionCase("nobody", lambda: torch.zeros(3, 1, 9, 9, dtype=torch.bool))
    output, _ = run(module.train(), nobody, states_of(nobody), *nobody.tensors())
    assert torch.equal(module.reweighting.average, before) and (output == 0).all()


def test_the_average_is_detached() -> None:
    case = CASES_BY_NAME["none"]
    module = make_reweighted(case, AFFINE["default"])
    assert not module.reweighting.average.requires_grad
    run(module, case, states_of(case), *case.tensors())[0].sum().backward()
    assert not module.reweighting.average.requires_grad and module.reweighting.average.grad is None


def test_a_sink_raises_for_a_softcap() -> None:
    case = CASES_BY_NAME["none"]
    module = make_reweighted(case, AttentionSinkConfig(), module_class=Gemma2Attention)
    with pytest.raises(ValueError, match="caps its scores"):
        run(module, case, states_of(case), *case.tensors(), softcap=2.0)


def test_missing_and_misplaced_states_raise() -> None:
    case = CASES_BY_NAME["none"]
    module = make_reweighted(case, AFFINE["default"])
    with pytest.raises(RuntimeError, match="did not pass the hidden states on"):
        run(module, case, None, *case.tensors())
    with pytest.raises(ValueError, match=r"expected hidden states of shape \(3, 9, hidden_size\)"):
        run(module, case, states_of(case)[:, 1:], *case.tensors())
    del module.reweighting
    with pytest.raises(RuntimeError, match="without learned weights"):
        run(module, case, states_of(case), *case.tensors())


def test_attention_dropout_with_a_sink_is_unbiased() -> None:
    """The reference has no dropout mask for the sink's column, so only means can be compared."""
    case = next(case for case in CASES if "causal" in case.name)
    module = make_reweighted(case, LEARNED["sink"])
    leaves = (states_of(case), *case.tensors())
    expected, _ = run(module, case, *leaves)
    draws = torch.stack([run(module, case, *leaves, dropout=0.5)[0] for _ in range(2000)])
    error = (draws.mean(dim=0) - expected).abs()
    assert draws.std(dim=0).amax() > 0.1
    assert (error <= 5 * draws.std(dim=0) / len(draws) ** 0.5 + 1e-12).all()


@pytest.mark.parametrize("how", ["eager", "checkpointing", "compiled"])
def test_a_module_that_attends_twice_moves_its_average_once(how: str) -> None:
    """DiffLlama calls attention twice per forward, once for each half of its values."""
    config = DiffLlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    config.attention_reweighting = AffineScaledConfig(init="paper", momentum=0.5)
    model = DiffLlamaForCausalLM._from_config(config, attn_implementation="affine_scaled").train()
    reweighting, ids = model.model.layers[0].self_attn.reweighting, torch.randint(32, (2, 5))
    run = model
    if how == "checkpointing":
        enable_checkpointing(model, use_reentrant=False)
    elif how == "compiled":
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        before = reweighting.average.clone()
        run(ids, labels=ids).loss.backward()
        states = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
        alpha = reference.affine_scales(states, reweighting.weight, activation="linear_clip", init="paper")
        wanted = before.lerp(alpha.mean(dim=(0, 2, 3)), 0.5)
        torch.testing.assert_close(reweighting.average, wanted.detach(), rtol=0, atol=1e-6)
