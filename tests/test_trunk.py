"""The shared trunk: the loss and the gradients of the plain form, for fewer rows in the lower layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from hf_attentiondrop import AttentionDropConfig, DropHead, apply_dropconnect, configure, report
from hf_attentiondrop.attention.modules import places_of
from hf_attentiondrop.training.repeated_rows import RepeatedRows
from hf_attentiondrop.training.trainer import AttentionDropTrainer
from hf_attentiondrop.training.trunk import SharedTrunk

from .consistency_tasks import arguments, collator, mixtral, rows, train
from .models import build, enable_checkpointing, inputs
from .trunk_steps import UPPER, WRAPPERS, perturbed, step


def assert_shared(model: nn.Module, batch: dict[str, Tensor], tmp_path: Any, layers: list[str], **values: Any) -> None:
    """Compares a step with a trunk of these layers to the plain form, and counts the rows in its layers."""
    model = model.double()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    size = len(next(iter(batch.values())))
    loss, gradients = step(model, batch, tmp_path, **values)
    assert list(SharedTrunk(model).layers) == layers
    numbers: dict[str, set[int]] = {}

    def count(name: str, output: Any) -> None:
        if torch.is_grad_enabled():
            numbers.setdefault(name, set()).add(len(output))

    stacks = tuple(f"{place.stack}." for place in places_of(model).values())
    for name, module in model.named_modules():
        if name.startswith(stacks) and isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, output, name=name: count(name, output))
    shared_loss, shared = step(model, batch, tmp_path, consistency_shared_trunk=True, **values)
    # Norms of LLaMA and T5 compute in float32.
    norms = ("LlamaRMSNorm", "T5LayerNorm")
    rounding = 1e-5 if any(type(module).__name__ in norms for module in model.modules()) else 1e-12
    assert abs(shared_loss - loss) <= rounding * loss
    assert shared.keys() == gradients.keys() and shared
    for name, gradient in gradients.items():
        assert (shared[name] - gradient).abs().max() <= rounding * max(1e-3, gradient.abs().max()), name
    for name, sizes in numbers.items():
        assert sizes == {size if name.startswith(tuple(f"{layer}." for layer in layers)) else 2 * size}, name


# --- equality with the plain form


@pytest.mark.parametrize(
    ("family", "padding", "layers"),
    [
        ("bert", "right", ["bert.encoder.layer.0"]),
        ("vit", None, ["vit.layers.0"]),
        ("llama", "right", ["model.layers.0"]),
        ("llama", "left", ["model.layers.0"]),
        ("marian", "right", ["model.encoder.layers.0"]),
    ],
)
def test_a_step_equals_that_of_the_plain_form(
    family: str, padding: str | None, layers: list[str], tmp_path: Any
) -> None:
    model = perturbed(family)
    assert_shared(model, inputs(family, padding=padding), tmp_path, layers)


def test_an_encoder_without_randomness_is_shared_with_the_lower_decoder(tmp_path: Any) -> None:
    drop = AttentionDropConfig(p=0.5, layers=[1], attentions=["decoder_self"])
    layers = [f"model.encoder.layers.{i}" for i in range(2)] + ["model.decoder.layers.0"]
    assert_shared(perturbed("marian", drop), inputs("marian", padding="right"), tmp_path, layers)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_shared_rows(use_reentrant: bool, tmp_path: Any) -> None:
    model = perturbed("llama", AttentionDropConfig(p=0.5, layers=[2, 3]), 4)
    enable_checkpointing(model, use_reentrant)
    layers = ["model.layers.0", "model.layers.1"]
    assert_shared(model, inputs("llama", padding="right"), tmp_path, layers)


def test_a_classifier_that_pools_by_its_tokens(tmp_path: Any) -> None:
    config = perturbed("llama").config
    torch.manual_seed(0)
    model = LlamaForSequenceClassification._from_config(config, attn_implementation="attentiondrop")
    batch = {**inputs("llama", padding="right"), "labels": torch.arange(4) % 2}
    assert_shared(model, batch, tmp_path, ["model.layers.0"])


@pytest.mark.parametrize("drop", [None, UPPER])
def test_a_position_bias_leaves_the_trunk_with_all_rows(drop: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    config.dropout_rate, config.attention_drop = 0.0, drop or DropHead(p=0.5, layers=[1], attentions=["decoder_self"])
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="attentiondrop")
    layers = ["encoder.block.0"] if drop else ["encoder.block.0", "encoder.block.1", "decoder.block.0"]
    assert_shared(model, inputs("marian", padding="right", batch_size=3), tmp_path, layers)


def test_a_lora_adapter_gets_the_same_gradients(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model = perturbed("llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    assert_shared(model, inputs("llama", padding="right"), tmp_path, ["base_model.model.model.layers.0"])
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_dropout=0.1)
    model = peft.get_peft_model(perturbed("llama", AttentionDropConfig(p=0.0)), config)
    with pytest.raises(ValueError, match=r"got p=0\.1 in \S+layers\.0\.self_attn\.q_proj\.lora_dropout"):
        SharedTrunk(model)


def test_training_has_the_same_logs_calls_and_weights(tmp_path: Any) -> None:
    """Also with a last batch of another size, and evaluation in between."""
    runs = []
    for is_shared in (False, True):
        model = perturbed("bert", num_labels=3).double()
        trainer, _ = train(
            "classification",
            tmp_path,
            3,
            model=model,
            amplitude=0.0,
            trainer_kwargs={"eval_dataset": rows("classification")},
            consistency_shared_trunk=is_shared,
            max_steps=6,
            eval_strategy="steps",
            eval_steps=2,
        )
        runs.append((trainer.state.log_history, [row.calls for row in report(model).rows], model.state_dict()))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    (logs, calls, weights), (shared_logs, shared_calls, shared_weights) = runs
    assert calls == shared_calls
    for entry, shared in zip(logs[:-1], shared_logs[:-1], strict=True):
        for name in entry.keys() & {"loss", "task_loss", "consistency_loss", "eval_loss"}:
            assert shared[name] == pytest.approx(entry[name], rel=1e-10), name
    torch.testing.assert_close(shared_weights, weights, rtol=0, atol=1e-9)
    assert logs[0]["consistency_loss"] > 1e-5


def test_the_checks_change_no_random_number(tmp_path: Any) -> None:
    batch, states = inputs("bert"), []
    for is_shared in (False, True):
        model = perturbed("bert")
        step(model, batch, tmp_path, consistency_shared_trunk=is_shared)
        states.append(torch.get_rng_state())
        assert model.training
    assert torch.equal(*states)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_compiled_model_shares_its_trunk_in_one_graph(family: str, tmp_path: Any) -> None:
    torch._dynamo.reset()
    rows_of_layers: list[list[int]] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        linear = [node for node in graph.graph.nodes if node.target is nn.functional.linear]
        rows_of_layers.append([node.meta["example_value"].shape[0] for node in linear])
        return graph.forward

    model, batch = perturbed(family), inputs(family, padding="right")
    wanted = step(model, batch, tmp_path)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        found = step(model, batch, tmp_path, compiled, consistency_shared_trunk=True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    (numbers,) = rows_of_layers
    lower = 6 if family == "bert" else 7
    assert numbers[: 2 * lower] == [4] * lower + [8] * lower


@pytest.mark.xdist_group("two_processes")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_share_a_trunk(wrapper: str, two_processes: Path) -> None:
    for rank in range(2):
        results = torch.load(two_processes / f"trunk.{rank}.pt")
        plain, shared = results[wrapper, False], results[wrapper, True]
        assert (plain.pop("rows"), shared.pop("rows")) == (4, 2)
        torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-5)


# --- which batches and arguments


def test_a_batch_of_ambiguous_arguments_runs_in_the_plain_form(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Position ids `(rows, length)` may be `(length, ...)` if both are equal."""
    batch = inputs("llama", batch_size=5)
    batch["position_ids"] = torch.arange(10).expand(5, -1).clone()
    model = perturbed("llama").double()
    loss, gradients = step(model, batch, tmp_path)
    shared_loss, shared = step(model, batch, tmp_path, consistency_shared_trunk=True)
    assert "runs without the shared trunk: its 10 rows are also the length" in caplog.text
    assert torch.equal(loss, shared_loss) and all(torch.equal(shared[name], gradients[name]) for name in gradients)
    # Masks of four dimensions and rotary embeddings of three start with the batch.
    assert_shared(model, inputs("llama", batch_size=5, padding="right"), tmp_path, ["model.layers.0"])


def test_arguments_are_cut_by_their_layout() -> None:
    layout, layer = RepeatedRows(2), nn.Linear(1, 1)

    def shapes(*sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [tuple(value.shape) for value in layout.map([torch.zeros(size) for size in sizes], layout.cut, layer)]

    assert shapes((4, 7, 8), (1, 7), (3, 4, 7), (7,), (4,), ()) == [(2, 7, 8), (1, 7), (3, 2, 7), (7,), (2,), ()]
    empty: dict[str, Any] = {}
    assert layout.map(empty, layout.cut, layer) is empty
    with pytest.raises(ValueError, match="cannot cut the rows of a Linear, an argument of Linear"):
        layout.map(layer, layout.cut, layer)


@pytest.mark.parametrize(
    ("batch_size", "length", "others", "is_ambiguous"),
    [
        (2, 7, [(4, 7), (4, 1, 7, 7), (7, 8), (7,)], False),
        (2, 4, [(4, 1, 4, 4), (1, 4), (1, 4, 8)], False),
        (2, 4, [(4,)], True),
        (2, 4, [(4, 8)], True),
        (2, 7, [(4, 4, 8), (4, 7)], True),  # A decoder, of which the encoder has as many positions as there are rows.
        (4, 7, [(3, 8, 7)], False),
        (3, 7, [(3, 6, 7)], True),
    ],
)
def test_sizes_that_do_not_show_the_rows(
    batch_size: int, length: int, others: list[tuple[int, ...]], is_ambiguous: bool
) -> None:
    states = torch.zeros(2 * batch_size, length, 8)
    values = [states, *(torch.zeros(size) for size in others)]
    assert RepeatedRows(batch_size).is_ambiguous(states, values) is is_ambiguous


def test_some_rows_are_repeated(tmp_path: Any) -> None:
    model = perturbed("llama").double().train()
    batch, rows = inputs("llama", padding="left"), torch.tensor([3, 0])
    batch = {name: torch.cat((value, value[rows])) for name, value in batch.items()}
    trunk, results = SharedTrunk(model), []
    for is_shared in (False, True):
        with trunk.installed():
            if is_shared:
                trunk.start(model, batch, batch_size=4, rows=rows)
            torch.manual_seed(0)
            outputs = model(**batch)
            outputs.loss.backward()
        results.append((outputs.logits, *(parameter.grad for parameter in model.parameters())))
        model.zero_grad()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


# --- refusals


def no_trunk(**config: Any) -> Callable[[], PreTrainedModel]:
    return lambda: build("bert", dropout=False, **config)


def dropconnect() -> PreTrainedModel:
    model = perturbed("bert")
    apply_dropconnect(model, p=0.1, target_modules=["query"])
    return model


def lower_dropout() -> PreTrainedModel:
    model = perturbed("bert")
    model.bert.encoder.layer[0].output.dropout.p = 0.1
    return model


def embedding_dropout() -> PreTrainedModel:
    model = perturbed("bert")
    model.bert.embeddings.dropout.p = model.config.hidden_dropout_prob = 0.1
    return model


class RandomReLU(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.rrelu(states, training=self.training)


class SeldomRandom(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return states * (torch.rand(()) < 2 if self.training else 1)


def seldom_random() -> PreTrainedModel:
    model = perturbed("bert")
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = SeldomRandom()
    return model


def unknown_randomness() -> PreTrainedModel:
    model = perturbed("bert")
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = RandomReLU()
    return model


class MixedRows(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return states + states.cumsum(0) * (len(states) == 4)


def mixed_rows() -> PreTrainedModel:
    model = perturbed("bert")
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = MixedRows()
    return model


def experts() -> PreTrainedModel:
    return mixtral(attn_implementation="attentiondrop", attention_drop=UPPER, output_router_logits=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            no_trunk(attention_drop=AttentionDropConfig(p=0.1)),
            r"the perturbation 'hard' in \S+0\.attention\.self\S*: .*layers=\[1\]",
        ),
        (lower_dropout, r"got p=0\.1 in bert\.encoder\.layer\.0\.output\.dropout"),
        (
            lambda: build("bert"),
            r"in the config: .*hidden_dropout_prob=0\.1.*, or set `consistency_shared_trunk=False`",
        ),
        (dropconnect, r"got DropConnect in bert\.encoder\.layer\.0\.attention\.self\.query"),
        (no_trunk(attention_drop=AttentionDropConfig(p=0.0)), r"nothing in BertForSeq\S+ is random.*layers=\[1\]"),
        (
            lambda: build("marian", dropout=False, encoder_layerdrop=0.1),
            "runs all its layers, got encoder_layerdrop=0.1",
        ),
        (
            embedding_dropout,
            r"differ at bert\.encoder\.layer\.0.*embeddings .above 0 in the config: hidden_dropout_prob=0\.1",
        ),
        (unknown_randomness, r"in training mode a row and its repetition differ at bert\.encoder\.layer\.0"),
        (seldom_random, r"its layers draw random numbers at bert\.encoder\.layer\.0"),
        (mixed_rows, r"has other `logits` with it in evaluation mode: its layers bert\.encoder\.layer\.0"),
        (experts, "does not work with `output_router_logits`"),
    ],
)
def test_it_raises_where_sharing_would_change_the_training(make: Any, message: str, tmp_path: Any) -> None:
    model = make()
    family = model.config.model_type.replace("mixtral", "llama")
    with pytest.raises(ValueError, match=message):
        step(model, inputs(family), tmp_path, consistency_shared_trunk=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["output_hidden_states", "cu_seq_lens_q"])
def test_inputs_that_count_all_rows_raise(name: str, tmp_path: Any) -> None:
    value = torch.tensor([0, 10]) if "cu" in name else True
    with pytest.raises(ValueError, match=f"shared trunk does not work with `{name}`"):
        step(
            perturbed("llama"), {**inputs("llama", batch_size=1), name: value}, tmp_path, consistency_shared_trunk=True
        )


def test_prefix_tuning_raises(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model = perturbed("llama")
    model = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="needs an empty cache"):
        step(model, inputs("llama"), tmp_path, consistency_shared_trunk=True)


def test_a_trunk_without_a_second_pass_raises(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="`consistency_shared_trunk=True` needs `consistency_weight` > 0, got 0"):
        arguments(tmp_path, consistency_weight=0, consistency_shared_trunk=True)


def test_a_perturbation_that_starts_in_the_trunk_shrinks_it(tmp_path: Any) -> None:
    """`configure` may start a perturbation of a layer that was shared."""
    drops = [DropHead(p=0.5, layers=[3]), AttentionDropConfig(p=0.0, layers=[1])]
    model = perturbed("bert", drops, 4, num_labels=3)
    found = []

    class Start(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append(len(trainer._trunk.layers))
            configure(model, [drops[0], AttentionDropConfig(p=0.5, layers=[1])])

    trainer = AttentionDropTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=2, consistency_shared_trunk=True),
        train_dataset=rows("classification"),
        data_collator=collator("classification"),
        callbacks=[Start()],
    )
    trainer.train()
    assert found == [3, 1]
    configure(model, attention_drop=AttentionDropConfig(p=0.5))
    with pytest.raises(ValueError, match="needs a first layer in which nothing is random"):
        trainer.train()
