"""torch.compile in training: no graph breaks, no recompilation by counters, same results as eager mode."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from hf_attentiondrop import AffineScaledConfig, configure, report, scale_attention_drop
from hf_attentiondrop.methods import long_sequences
from hf_attentiondrop.methods.method import Perturbation

from .methods import examples
from .models import build, enable_checkpointing, inputs, require_one_graph


DROPS = examples()


# Every perturbation in one family, and every family with perturbations of different kinds.
CASES = [
    *itertools.product(["llama"], DROPS),
    ("bert", "blur"),
    ("bert", "dropkey_column"),
    ("vit", "hard_zero"),
    ("marian", "hard_mask"),
    ("marian", "blur"),
]
# One case per mechanism: a score matrix, blocks, and checkpointing.
pytestmark = pytest.mark.quick(
    "test_training_compiles_in_one_graph_whatever_the_value[llama-hard_mask]",
    "test_training_compiles_in_one_graph_whatever_the_value[bert-blur]",
    "test_hard_in_blocks_compiles_in_one_graph[bert-hard_mask]",
    "test_compile_and_gradient_checkpointing_together",
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def tiny(family: str, drop: Perturbation) -> PreTrainedModel:
    """A model without dropout in training mode, with one layer in each stack, because compilation takes long."""
    layers = ["encoder_layers", "decoder_layers"] if family == "marian" else ["num_hidden_layers"]
    return build(family, dropout=False, attention_drop=drop, **dict.fromkeys(layers, 1)).train()


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_training_compiles_in_one_graph_whatever_the_value(family: str, variant: str) -> None:
    check_one_graph(family, variant)


@pytest.mark.parametrize(("family", "variant"), [("bert", "hard_mask"), ("llama", "hard_zero")])
def test_hard_in_blocks_compiles_in_one_graph(family: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_sequences, "FEW_SCORES", 0)
    check_one_graph(family, variant)


def check_one_graph(family: str, variant: str) -> None:
    """Calls, counts, draws, other values and factors of a schedule all run the graph of the first call."""
    require_one_graph(family)
    drop, batch = DROPS[variant], inputs(family)
    model = tiny(family, drop)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def compare() -> Tensor:
        wanted, found = (seeded_loss(run, batch) for run in (model, compiled))
        found.backward()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        return wanted

    for calls in (2, 4, 6):
        compare()
        assert {row.calls for row in report(model).active} == {calls}
    for value in (0.1, 0.9, 0.5):
        configure(model, replace(drop, **{drop.scheduled: value}))
        fresh = tiny(family, replace(drop, **{drop.scheduled: value}))
        torch.testing.assert_close(seeded_loss(fresh, batch), compare(), rtol=0, atol=1e-5)
    for factor in (0.1, 0.9, 0.0, None):
        scale_attention_drop(model, factor)
        compare()
    assert counters["stats"]["unique_graphs"] == 1, "a count, a draw or a value made the model compile again"


def seeded_loss(run: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)
    return run(**batch).loss


@pytest.mark.parametrize("padding", [None, "left"])
def test_gradients_of_compiled_affine_scaling_are_those_of_eager(padding: str | None) -> None:
    config = AffineScaledConfig(init="paper", gate=True)
    options = {"attn_implementation": "affine_scaled", "attention_reweighting": config, "num_hidden_layers": 1}
    model, batch = build("llama", dropout=False, **options).train(), inputs("llama", padding=padding)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        run(**batch).loss.backward()
        gradients.append({name.removeprefix("_orig_mod."): p.grad for name, p in run.named_parameters()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_inductor_trains() -> None:
    model, batch = tiny("bert", DROPS["blur"]), inputs("bert", padding="right")
    compiled = torch.compile(model, fullgraph=True)
    first, second = compiled(**batch).loss, compiled(**batch).loss
    second.backward()
    assert first.isfinite() and first != second
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert {row.calls for row in report(model).rows} == {2}


def test_compile_and_gradient_checkpointing_together() -> None:
    model, batch = tiny("llama", DROPS["hard_mask"]), inputs("llama")
    enable_checkpointing(model, use_reentrant=False)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch).loss.backward()
    compiled(**batch).loss.backward()
    assert {row.calls for row in report(model).rows} == {2}


@pytest.mark.parametrize("part", ["model", "attention"])
def test_a_repeated_forward_does_not_move_the_average_of_compiled_affine_scaling(part: str) -> None:
    options = {"attn_implementation": "affine_scaled", "attention_reweighting": AffineScaledConfig(init="paper")}
    model, batch = build("llama", dropout=False, num_hidden_layers=1, **options).train(), inputs("llama")
    checkpointed = copy.deepcopy(model)
    enable_checkpointing(checkpointed, use_reentrant=False)
    compiled: Any = checkpointed
    if part == "model":
        compiled = torch.compile(checkpointed, backend="aot_eager")
    else:
        checkpointed.model.layers[0].self_attn.compile(backend="aot_eager")
    for _ in range(2):
        gradients = []
        for run, parameters in ((model, model), (compiled, checkpointed)):
            run.zero_grad()
            run(**batch).loss.backward()
            gradients.append({name: p.grad for name, p in parameters.named_parameters()})
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)
        averages = [m.model.layers[0].self_attn.reweighting.average for m in (model, checkpointed)]
        torch.testing.assert_close(*averages)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_share_of_the_keys_does_not_compile_again_for_other_masks_or_lengths(
    in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_sequences, "FEW_SCORES", 0 if in_blocks else 256 * 256)
    model = tiny("bert", DROPS["hard_share"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (10, 13, 17):
        batch = inputs("bert", length=length, padding="right")
        wanted, found = (seeded_loss(run, batch) for run in (model, compiled))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
