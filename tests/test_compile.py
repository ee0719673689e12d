"""torch.compile in training: no graph breaks, no recompilation by counters, same results as eager mode."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from hf_attentiondrop import AffineScaledConfig, configure, report
from hf_attentiondrop.methods import long_sequences

from .methods import examples
from .models import build, enable_checkpointing, inputs, require_one_graph


DROPS = examples()


# One case per mechanism: a score matrix, blocks, a changed factor, and checkpointing.
pytestmark = pytest.mark.quick(
    "test_training_compiles_in_one_graph_and_counts[llama-hard_mask]",
    "test_training_compiles_in_one_graph_and_counts[vit-hard_zero]",
    "test_training_compiles_in_one_graph_and_counts[bert-blur]",
    "test_hard_in_blocks_compiles_in_one_graph[bert-hard_mask]",
    "test_a_schedule_does_not_compile_again[llama-hard_mask]",
    "test_compile_and_gradient_checkpointing_together",
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        *itertools.product(["vit", "marian"], ["hard_mask", "hard_zero", "blur"]),
        *itertools.product(["bert", "llama"], DROPS),
    ],
)
def test_training_compiles_in_one_graph_and_counts(family: str, variant: str) -> None:
    check_one_graph(family, variant)


@pytest.mark.parametrize("variant", ["hard_mask", "hard_zero"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_hard_in_blocks_compiles_in_one_graph(family: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_sequences, "FEW_SCORES", 0)
    check_one_graph(family, variant)


def check_one_graph(family: str, variant: str) -> None:
    require_one_graph(family)
    model, batch = build(family, dropout=False, attention_drop=DROPS[variant]).train(), inputs(family)
    torch.manual_seed(0)
    wanted = model(**batch).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for calls in range(2, 5):
        torch.manual_seed(0)
        loss = compiled(**batch).loss
        loss.backward()
        torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-5)
        assert {row.calls for row in report(model).active} == {calls}
    assert counters["stats"]["unique_graphs"] == 1, "a count or a draw made the model compile again"


@pytest.mark.parametrize(
    ("family", "variant"), [*itertools.product(["llama"], DROPS), ("marian", "hard_mask"), ("marian", "blur")]
)
def test_a_schedule_does_not_compile_again(family: str, variant: str) -> None:
    require_one_graph(family)
    drop = DROPS[variant]
    model, batch = build(family, dropout=False, attention_drop=drop).train(), inputs(family)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for value in (0.1, 0.9, 0.5):
        configure(model, replace(drop, **{drop.scheduled: value}))
        torch.manual_seed(0)
        wanted = model(**batch).loss
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(**batch).loss, wanted, rtol=0, atol=1e-5)
        fresh = build(family, dropout=False, attention_drop=replace(drop, **{drop.scheduled: value})).train()
        torch.manual_seed(0)
        torch.testing.assert_close(fresh(**batch).loss, wanted, rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1, "another value made the model compile again"


@pytest.mark.parametrize("padding", [None, "left"])
def test_gradients_of_compiled_affine_scaling_are_those_of_eager(padding: str | None) -> None:
    config = AffineScaledConfig(init="paper", gate=True)
    model = build("llama", dropout=False, attn_implementation="affine_scaled", attention_reweighting=config).train()
    batch = inputs("llama", padding=padding)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        run(**batch).loss.backward()
        gradients.append({name.removeprefix("_orig_mod."): p.grad for name, p in run.named_parameters()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_inductor_trains() -> None:
    model, batch = build("bert", dropout=False, attention_drop=DROPS["blur"]).train(), inputs("bert", padding="right")
    compiled = torch.compile(model, fullgraph=True)
    first, second = compiled(**batch).loss, compiled(**batch).loss
    second.backward()
    assert first.isfinite() and first != second
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert {row.calls for row in report(model).rows} == {2}


def test_compile_and_gradient_checkpointing_together() -> None:
    model, batch = build("llama", dropout=False, attention_drop=DROPS["hard_mask"]).train(), inputs("llama")
    enable_checkpointing(model, use_reentrant=False)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch).loss.backward()
    compiled(**batch).loss.backward()
    assert {row.calls for row in report(model).rows} == {2}


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_share_of_the_keys_does_not_compile_again_for_other_masks_or_lengths(
    in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_sequences, "FEW_SCORES", 0 if in_blocks else 256 * 256)
    model = build("bert", dropout=False, attention_drop=DROPS["hard_share"]).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (10, 13, 17):
        batch = inputs("bert", length=length, padding="right")
        torch.manual_seed(0)
        wanted = model(**batch).loss
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(**batch).loss, wanted, rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
