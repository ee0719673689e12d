"""Schedules: the factor in every step, in real trainings, in config.json, logs and cards."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_attentiondrop import (
    AttentionDropSchedule,
    AttentionDropScheduleCallback,
    AttentionDropTrainer,
    AttentionDropTrainingArguments,
    configure,
    report,
    scale_attention_drop,
)

from .consistency_tasks import collator, rows
from .models import build


def slow_start(progress: float) -> float:
    return progress**2


def name_of(shape: Any) -> str:
    return getattr(shape, "__name__", shape)


FORMULAS = {
    "linear_up": lambda x: x,
    "linear_down": lambda x: 1 - x,
    "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
    "v_shaped": lambda x: abs(2 * x - 1),
    slow_start: lambda x: x * x,
}


@pytest.mark.parametrize(("start", "end", "first", "last"), [(0, 1.0, 0, 40), (0.25, 0.75, 10, 30), (8, 0.5, 8, 20)])
@pytest.mark.parametrize("shape", FORMULAS, ids=name_of)
def test_every_step_has_the_factor_of_the_formula(shape: Any, start: float, end: float, first: int, last: int) -> None:
    schedule = AttentionDropSchedule(shape, start=start, end=end)
    for step in range(41):
        progress = 0 if step < first else 1 if step > last else (step - first) / (last - first)
        assert schedule.factor(step, 40) == pytest.approx(FORMULAS[shape](progress), abs=1e-12), step


def test_a_v_shape_turns_where_it_is_told() -> None:
    schedule = AttentionDropSchedule("v_shaped", turn=0.2)
    assert [round(schedule.factor(step, 10), 9) for step in (0, 1, 2, 6, 10)] == [1.0, 0.5, 0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": "linear"}, r"`shape` must be one of \('constant', .*got 'linear'"),
        ({"shape": "linear_up", "start": -1}, "`start` must be a number of optimizer steps, or .*got -1"),
        ({"shape": "linear_up", "end": math.inf}, "`end` must be a number of optimizer steps, .*got inf"),
        ({"shape": "linear_up", "end": 1.5}, "`end` must be a number of optimizer steps, .*got 1.5"),
        ({"shape": "linear_up", "start": 0.5, "end": 0.5}, "`start` must be before `end`, got 0.5 and 0.5"),
        ({"shape": "linear_up", "start": 20, "end": 10}, "`start` must be before `end`"),
        ({"shape": "v_shaped", "turn": 1.0}, r"`turn` must be in \(0, 1\), got 1.0"),
        ({"shape": "cosine", "turn": 0.2}, "'cosine' has no turning point"),
        ({"end": 100}, "a constant factor depends on neither"),
    ],
)
def test_a_schedule_that_makes_no_sense_raises(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionDropSchedule(**values)
    arguments = {f"attention_drop_schedule_{name}": value for name, value in values.items() if name != "shape"}
    with pytest.raises(ValueError, match=message):
        AttentionDropTrainingArguments(tmp_path, attention_drop_schedule=values.get("shape", "constant"), **arguments)


def test_errors_that_take_the_number_of_steps() -> None:
    with pytest.raises(ValueError, match="`start` must be before `end`, got 8 and 0.5, which are the steps 8 and 5"):
        AttentionDropSchedule("linear_up", start=8, end=0.5).factor(0, 10)
    with pytest.raises(
        ValueError, match="before the last of 10 optimizer steps, got 10: the factor would never change"
    ):
        AttentionDropSchedule("linear_up", start=10, end=20).factor(0, 10)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 2.0 at progress 1"):
        AttentionDropSchedule(lambda progress: 2 * progress).factor(10, 10)


class ValueRecorder(TrainerCallback):
    """Records the values of every layer in each step."""

    def __init__(self) -> None:
        self.values: list[list[float]] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.values.append([value for row in report(model).rows for value in row.current])


def options(folder: Path, **arguments: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }


def bert() -> BertForSequenceClassification:
    return build("bert", num_labels=3, attention_drop={"p": {"from": 0.4, "to": 0.2}})


def trained(trainer_class: type[Trainer], args: TrainingArguments, **settings: Any) -> tuple[Trainer, ValueRecorder]:
    recorder = ValueRecorder()
    callbacks = [*settings.pop("callbacks", []), recorder]
    data = {"train_dataset": rows("classification"), "data_collator": collator("classification")}
    trainer = trainer_class(settings.pop("model", None) or bert(), args, callbacks=callbacks, **data)
    trainer.train(**settings)
    return trainer, recorder


@pytest.mark.parametrize("shape", ["linear_down", "v_shaped", slow_start], ids=name_of)
def test_the_trainer_runs_the_schedule_of_its_arguments(shape: Any, tmp_path: Path) -> None:
    arguments = options(tmp_path, attention_drop_schedule=shape, gradient_accumulation_steps=2)
    trainer, recorder = trained(AttentionDropTrainer, AttentionDropTrainingArguments(**arguments))
    factors = [FORMULAS[shape](step / 4) for step in range(4)]
    # Two micro-batches in each step.
    for values, factor in zip(recorder.values, [factor for factor in factors for _ in range(2)], strict=True):
        assert values == pytest.approx([0.4 * factor, 0.2 * factor])
    logged = [entry["attention_drop_factor"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(factors)
    assert {row.current for row in report(trainer.model).rows} == {()}, "the configured values hold after training"

    trainer.save_model()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["attention_drop"]["p"] == {"from": 0.4, "to": 0.2}
    name = shape if isinstance(shape, str) else f"{__name__}.slow_start"
    turn = {"turn": 0.5} if shape == "v_shaped" else {}
    record = {"shape": name, "start": 0, "end": 4, **turn, "num_steps": 4}
    assert saved["attention_drop_schedule"] == AutoConfig.from_pretrained(tmp_path).attention_drop_schedule == record
    assert json.loads(trainer.args.to_json_string())["attention_drop_schedule"] == name
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"| `schedule` | shape {name}, start 0, end 4, " in card and "{'from': 0.4, 'to': 0.2}" in card

    configure(trainer.model, {"p": 0.1})
    assert not hasattr(trainer.model.config, "attention_drop_schedule")


def test_the_callback_runs_in_any_trainer(tmp_path: Path) -> None:
    schedule = AttentionDropScheduleCallback(AttentionDropSchedule("linear_up", end=2))
    trainer, recorder = trained(Trainer, TrainingArguments(**options(tmp_path)), callbacks=[schedule])
    assert recorder.values == [pytest.approx([0.4 * factor, 0.2 * factor]) for factor in (0, 0.5, 1, 1)]
    logged = [entry["attention_drop_factor"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [0.0, 0.5, 1.0, 1.0]
    assert trainer.model.config.attention_drop_schedule["shape"] == "linear_up"
    # The record describes the last training only.
    trained(AttentionDropTrainer, AttentionDropTrainingArguments(**options(tmp_path)), model=trainer.model)
    assert not hasattr(trainer.model.config, "attention_drop_schedule")


def test_a_resumed_training_continues_the_schedule(tmp_path: Path) -> None:
    arguments = options(tmp_path, attention_drop_schedule="cosine", save_strategy="steps", save_steps=2)
    _, whole = trained(AttentionDropTrainer, AttentionDropTrainingArguments(**arguments))
    checkpoint = tmp_path / "checkpoint-2"
    assert json.loads((checkpoint / "config.json").read_text())["attention_drop"]["p"] == {"from": 0.4, "to": 0.2}
    _, resumed = trained(
        AttentionDropTrainer, AttentionDropTrainingArguments(**arguments), resume_from_checkpoint=str(checkpoint)
    )
    assert resumed.values == whole.values[2:]


def test_a_schedule_without_a_perturbation_raises(tmp_path: Path) -> None:
    arguments = AttentionDropTrainingArguments(**options(tmp_path, attention_drop_schedule="cosine"))
    with pytest.raises(ValueError, match="so a schedule would have no effect"):
        trained(AttentionDropTrainer, arguments, model=build("bert", num_labels=3, attn_implementation="sdpa"))
    with pytest.raises(ValueError, match="one would undo the other"):
        trained(AttentionDropTrainer, arguments, callbacks=[AttentionDropScheduleCallback("linear_up")])


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_training_leaves_the_configured_values(tmp_path: Path) -> None:
    model = bert()
    arguments = options(tmp_path, attention_drop_schedule="linear_down", attention_drop_target_entropy=0.1)
    with pytest.raises(KeyboardInterrupt):
        trained(
            AttentionDropTrainer, AttentionDropTrainingArguments(**arguments), model=model, callbacks=[Interrupt()]
        )
    assert {row.current for row in report(model).rows} == {()}
    # In another Trainer only the next training can end it.
    callbacks = [AttentionDropScheduleCallback("linear_up"), Interrupt()]
    with pytest.raises(KeyboardInterrupt):
        trained(Trainer, TrainingArguments(**options(tmp_path)), model=model, callbacks=callbacks)
    assert [row.current for row in report(model).rows] == [(0.0,), (0.0,)]
    _, recorder = trained(AttentionDropTrainer, AttentionDropTrainingArguments(**options(tmp_path)), model=model)
    assert recorder.values == [[]] * 4


class Reconfigure(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        if state.global_step == 1:
            configure(model, {"p": 0.8})


def test_a_new_configuration_is_scaled_by_the_schedule_that_runs(tmp_path: Path) -> None:
    arguments = options(tmp_path, attention_drop_schedule="linear_up", attention_drop_target_entropy=0.999)
    arguments |= {"attention_drop_adaptive_interval": 1}
    trainer, recorder = trained(
        AttentionDropTrainer, AttentionDropTrainingArguments(**arguments), callbacks=[Reconfigure()]
    )
    expected = [0.8 * factor for factor in (0.25, 0.5, 0.75)]
    assert [max(values[0]) for values in recorder.values[1:]] == pytest.approx(expected, rel=0.02)
    assert trainer.model.config.attention_drop_schedule["shape"] == "linear_up"
    assert trainer.model.config.attention_drop_adaptive["target_entropy"] == 0.999


def test_a_callback_takes_a_function(tmp_path: Path) -> None:
    callback = AttentionDropScheduleCallback(lambda progress: progress**2)
    _, recorder = trained(Trainer, TrainingArguments(**options(tmp_path)), callbacks=[callback])
    assert [values[0] for values in recorder.values] == pytest.approx([0.4 * (step / 4) ** 2 for step in range(4)])
    with pytest.raises(ValueError, match="`shape` must be one of"):
        AttentionDropScheduleCallback(0.5)


def test_a_function_in_the_arguments_must_be_importable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be importable, got .*<lambda>.*Define the function at the top level"):
        AttentionDropTrainingArguments(tmp_path, attention_drop_schedule=lambda progress: progress)


def test_a_plain_loop_takes_one_call_per_step() -> None:
    model, schedule = bert(), AttentionDropSchedule("linear_up")
    for step in range(4):
        scale_attention_drop(model, schedule.factor(step, 4))
        assert [row.current for row in report(model).rows] == [(0.4 * step / 4,), (0.2 * step / 4,)]
