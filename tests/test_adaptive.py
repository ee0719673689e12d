"""An adaptive strength: the measured entropy, the gains of each head, and trainings."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_attentiondrop import (
    AdaptiveStrengthCallback,
    AttentionDropTrainer,
    AttentionDropTrainingArguments,
    HardMasking,
    configure,
    report,
)
from hf_attentiondrop.attention.entropy import EntropyMeter
from hf_attentiondrop.integration.functions import attention_drop_forward

from .attention import make_module, position_bias
from .cases import CASES, AttentionCase
from .models import build, inputs
from .reference import final_scores
from .test_schedule import bert, options, trained


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_entropy_equals_its_definition(case: AttentionCase) -> None:
    module, (query, key, value) = make_module(case, HardMasking(p=1.0)), case.tensors()
    module.attention_drop_state.meter = meter = EntropyMeter(rows=2)
    bias = position_bias(case)
    extras = {} if bias is None else {"position_bias": bias}
    for tensors in ((query, key, value), (key[:1].expand(3, -1, -1, -1), key, value)):
        if tensors[0].shape == query.shape:  # Only the first call counts.
            attention_drop_forward(module, *tensors, case.mask(), scaling=0.3, **extras)

    biases = sum(part for part in (bias, case.bias) if part is not None)
    scores = (final_scores(query, key, scaling=0.3, softcap=None) + biases).expand_as(case.visible)
    mask = case.mask()
    knows_padding = mask is not None and not case.is_cross and case.queries <= case.keys
    offset = case.keys - case.queries if case.name != "static_prefill" else 0
    for head in range(case.heads):
        found = []
        for sample in range(2):
            for row in range(case.queries):
                seen = case.visible[sample, head, row]
                is_padding = knows_padding and not seen[offset + row]
                if seen.sum() < 2 or is_padding:
                    continue
                shares = scores[sample, head, row][seen].softmax(dim=-1)
                found.append(-(shares * shares.log()).sum().item() / math.log(seen.sum()))
        expected = sum(found) / len(found) if found else math.nan
        assert meter.entropy[head].item() == pytest.approx(expected, abs=1e-9, nan_ok=True)


def adaptive(folder: Path, target: float, **arguments: Any) -> AttentionDropTrainingArguments:
    settings = {"attention_drop_target_entropy": target, "attention_drop_adaptive_interval": 2, **arguments}
    return AttentionDropTrainingArguments(**options(folder, **settings))


def test_peaked_heads_are_perturbed_more_than_flat_ones(tmp_path: Path) -> None:
    model = bert()
    for layer in model.bert.encoder.layer:
        # The first two heads attend almost uniformly, the others to a single key.
        factors = torch.tensor([0.0, 0.0, 300.0, 300.0]).repeat_interleave(8)[:, None]
        layer.attention.self.query.weight.data.mul_(factors)
    trainer, recorder = trained(AttentionDropTrainer, adaptive(tmp_path, 0.5, learning_rate=0.0), model=model)
    start, *_, end = recorder.values
    # The callbacks of the Trainer come first, so that its step has been measured.
    for p, values in zip((0.4, 0.2), start, strict=True):
        assert values[0] == values[1] == pytest.approx(p * 0.75, abs=1e-2) and values[2:] == (p, p)
    for p, values in zip((0.4, 0.2), end, strict=True):
        assert values[0] == values[1] == pytest.approx(p * 0.5, abs=2e-2) and values[2:] == (p, p)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    gains = [sum(values[0]) / 4 / 0.4 for values in recorder.values]
    for entry, gain in zip(logged, gains, strict=True):
        assert (
            entry["attention_drop_gain"] == pytest.approx(gain, abs=1e-2) and 0.45 < entry["attention_entropy"] < 0.7
        )
    assert {row.current for row in report(trainer.model).rows} == {()}, "the configured values hold after training"


def test_gains_stay_between_zero_and_one(tmp_path: Path) -> None:
    _, lowered = trained(AttentionDropTrainer, adaptive(tmp_path, 0.01, attention_drop_adaptive_interval=1))
    assert lowered.values[-1] == [(0.0,) * 4, (0.0,) * 4]
    _, raised = trained(AttentionDropTrainer, adaptive(tmp_path, 0.999, attention_drop_adaptive_interval=1))
    assert raised.values[-1] == [pytest.approx((0.4,) * 4, abs=0.01), pytest.approx((0.2,) * 4, abs=0.01)]


def test_a_resumed_training_continues_with_its_gains_and_a_schedule(tmp_path: Path) -> None:
    arguments = adaptive(tmp_path, 0.3, save_strategy="steps", save_steps=2, attention_drop_schedule="linear_down")
    trainer, whole = trained(AttentionDropTrainer, arguments)
    checkpoint = str(tmp_path / "checkpoint-2")
    _, resumed = trained(AttentionDropTrainer, arguments, resume_from_checkpoint=checkpoint)
    assert resumed.values == whole.values[2:] and len(set(whole.values[2][0])) > 1
    assert max(whole.values[3][0]) < 0.4 * 0.25 + 1e-9, "the schedule scales the gains"

    trainer.save_model()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["attention_drop_adaptive"] == {"target_entropy": 0.3, "interval": 2}
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| `adaptive strength` | target_entropy 0.3, interval 2 |" in card and "| `schedule` |" in card


def test_a_training_can_resume_with_a_target_that_it_did_not_have(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trained(AttentionDropTrainer, AttentionDropTrainingArguments(**options(tmp_path, **saving)))
    checkpoint = str(tmp_path / "checkpoint-2")
    _, resumed = trained(AttentionDropTrainer, adaptive(tmp_path, 0.3, **saving), resume_from_checkpoint=checkpoint)
    assert len(resumed.values) == 2
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists()


def test_gains_of_other_modules_are_refused(tmp_path: Path) -> None:
    arguments = adaptive(tmp_path, 0.3, save_strategy="steps", save_steps=2)
    trained(AttentionDropTrainer, arguments)
    model = build("bert", num_labels=3, attention_drop={"layers": [0]})
    with pytest.raises(ValueError, match=r"with these numbers of heads, \[4, 4\], .* modules with \[4\]"):
        trained(AttentionDropTrainer, arguments, model=model, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_configuration_of_other_modules_in_a_training_is_refused(tmp_path: Path) -> None:
    class Reconfigure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
            configure(model, {"p": 0.3, "layers": [0]})

    with pytest.raises(ValueError, match="The adaptive strength has gains for perturbed modules"):
        trained(AttentionDropTrainer, adaptive(tmp_path, 0.5), callbacks=[Reconfigure()])


@pytest.mark.parametrize("variant", ["blur", "dropkey", "drophead"])
def test_other_perturbations_adapt_too(variant: str, tmp_path: Path) -> None:
    model = build("bert", num_labels=3, attention_drop={"variant": variant})
    _, recorder = trained(AttentionDropTrainer, adaptive(tmp_path, 0.5), model=model)
    assert all(len(values) == 4 for values in recorder.values[-1])


@pytest.mark.xdist_group("two_processes")
def test_processes_average_what_they_measured(two_processes: Path) -> None:
    for rank in range(2):
        found = torch.load(two_processes / f"entropy.{rank}.pt")
        torch.testing.assert_close(found, torch.tensor([0.3, 0.5, torch.nan]), equal_nan=True)


@pytest.mark.slow
def test_a_measurement_compiles_in_one_graph() -> None:
    model, batch = build("llama", dropout=False, attention_drop={"p": 0.5}).train(), inputs("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    states = [module.attention_drop_state for module in model.modules() if hasattr(module, "attention_drop_state")]
    found = []
    for run in (model, compiled):
        for state in states:
            state.meter = EntropyMeter(rows=4)
        run(**batch)
        found.append(torch.stack([state.meter.entropy for state in states]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "interval", "message"),
    [
        (0.0, 50, r"`target_entropy` must be a number in \(0, 1\), got 0.0"),
        (1, 50, "`target_entropy` must be"),
        (0.5, 0, "`interval` must be an integer >= 1, got 0"),
    ],
)
def test_values_out_of_range_raise(target: Any, interval: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveStrengthCallback(target, interval)
    with pytest.raises(ValueError, match=message):
        adaptive(tmp_path, target, attention_drop_adaptive_interval=interval)


def test_two_targets_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one would undo the other"):
        trained(AttentionDropTrainer, adaptive(tmp_path, 0.5), callbacks=[AdaptiveStrengthCallback(0.1)])


def test_settings_that_would_have_no_effect_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no `attention_drop_target_entropy`: it would have no effect"):
        AttentionDropTrainingArguments(**options(tmp_path, attention_drop_adaptive_interval=10))
    unperturbed = build("bert", num_labels=3, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="a schedule would have no effect"):
        trained(AttentionDropTrainer, adaptive(tmp_path, 0.5), model=unperturbed)
