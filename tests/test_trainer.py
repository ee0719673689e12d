"""The consistency term in the Trainer: gradients, weight and logs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_attentiondrop.training.losses import consistency_loss
from hf_attentiondrop.training.trainer import (
    AttentionDropTrainer,
    ConsistencyTrainerMixin,
)

from .consistency_tasks import (
    SMOOTHINGS,
    TASKS,
    GradientRecorder,
    RowCounter,
    assert_same_step,
    build_model,
    collator,
    first_logs,
    perturb_embeddings,
    plain_step,
    rows,
    train,
)


# --- gradients


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("task", TASKS)
def test_one_step_matches_the_formula_for_every_split_of_the_batch(task: str, smoothing: float, tmp_path: Any) -> None:
    expected = plain_step(task, smoothing)
    assert expected[0]["consistency_loss"] > 0.05
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer, gradients = train(task, tmp_path, batch_size, accumulation, label_smoothing_factor=smoothing)
        assert_same_step((first_logs(trainer), gradients), expected)


@pytest.mark.parametrize(("task", "smoothing"), [("causal_lm", 0.0), *((task, 0.1) for task in TASKS)])
def test_equal_passes_take_the_step_of_the_stock_trainer(task: str, smoothing: float, tmp_path: Any) -> None:
    """Where the stock step is right: without smoothing it is wrong for heads that ignore `num_items_in_batch`."""
    values = {"amplitude": 0.0, "label_smoothing_factor": smoothing}
    _, stock = train(task, tmp_path, 2, 4, trainer_class=Trainer, arguments_class=TrainingArguments, **values)
    trainer, gradients = train(task, tmp_path, 2, 4, **values)
    assert first_logs(trainer)["consistency_loss"] < 1e-9
    for name, gradient in stock.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6)


def test_a_micro_batch_without_labels_adds_nothing(tmp_path: Any) -> None:
    for task in ("causal_lm", "token_classification"):
        examples = rows(task)
        for example in examples[:5]:
            example["labels"] = [-100] * len(example["labels"])
        expected = plain_step(task, examples=examples)
        trainer, gradients = train(task, tmp_path, 1, 8, examples=examples)
        assert_same_step((first_logs(trainer), gradients), expected)


def test_one_process_does_not_depend_on_averaging_over_devices(tmp_path: Any) -> None:
    trainer, gradients = train("causal_lm", tmp_path, 2, 4, average_tokens_across_devices=False)
    assert_same_step((first_logs(trainer), gradients), plain_step("causal_lm"))


def classifier_without_loss_arguments() -> nn.Module:
    """A model that gets no `num_items_in_batch`; the Trainer divides its loss by the accumulation steps."""
    model = build_model("classification")
    model.accepts_loss_kwargs = False
    return model


def test_the_loss_of_a_model_without_loss_arguments_is_scaled_once(tmp_path: Any) -> None:
    trainer, gradients = train("classification", tmp_path, 2, 4, model=classifier_without_loss_arguments())
    assert_same_step((first_logs(trainer), gradients), plain_step("classification"))


def test_setting_the_weight_to_zero_in_training_restores_the_stock_step(tmp_path: Any) -> None:
    class TurnOff(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.consistency_weight = 0.0

    recorder = GradientRecorder()
    values = {"amplitude": 0.0, "learning_rate": 0.0, "max_steps": 2}
    trainer, _ = train(
        "classification",
        tmp_path,
        2,
        4,
        model=classifier_without_loss_arguments(),
        trainer_kwargs={"callbacks": [recorder, TurnOff()]},
        **values,
    )
    _, stock = train(
        "classification",
        tmp_path,
        2,
        4,
        model=classifier_without_loss_arguments(),
        trainer_class=Trainer,
        arguments_class=TrainingArguments,
        **values,
    )
    assert ["consistency_loss" in logs for logs in trainer.state.log_history[:2]] == [True, False]
    for name, gradient in stock.items():
        torch.testing.assert_close(recorder.gradients[name], gradient, rtol=0, atol=1e-6)


def mean_over_the_given_number(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    return cross_entropy(outputs.logits.flatten(0, -2), labels.flatten(), reduction="sum") / num_items_in_batch


def mean_over_the_batch(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    return cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())


@pytest.mark.parametrize("compute_loss_func", [mean_over_the_given_number, mean_over_the_batch])
def test_a_custom_loss_function_computes_the_task_loss(compute_loss_func: Any, tmp_path: Any) -> None:
    expected = plain_step("token_classification")
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer, gradients = train(
            "token_classification",
            tmp_path,
            batch_size,
            accumulation,
            trainer_kwargs={"compute_loss_func": compute_loss_func},
        )
        assert_same_step((first_logs(trainer), gradients), expected)
        assert trainer.compute_loss_func is compute_loss_func


def test_a_trainer_that_overrides_compute_loss_keeps_its_loss(tmp_path: Any) -> None:
    class Thrice(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = 3 * cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    class ThriceWithConsistency(ConsistencyTrainerMixin, Thrice):
        pass

    logs, _ = plain_step("classification")
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer, _ = train("classification", tmp_path, batch_size, accumulation, trainer_class=ThriceWithConsistency)
        assert first_logs(trainer)["task_loss"] == pytest.approx(3 * logs["task_loss"])
        assert first_logs(trainer)["loss"] == pytest.approx(3 * logs["task_loss"] + logs["consistency_loss"])


# --- weight, divergence, warm-up, logs


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_with_weight_zero_it_trains_like_the_stock_trainer(task: str, accumulation: int, tmp_path: Any) -> None:
    results = []
    for trainer_class in (Trainer, AttentionDropTrainer):
        model = build_model(task, dropout=True)
        counter = RowCounter(model)
        trainer, _ = train(
            task,
            tmp_path,
            4 // accumulation,
            accumulation,
            model=model,
            amplitude=0.0,
            trainer_class=trainer_class,
            arguments_class=TrainingArguments,
            max_steps=3,
        )
        timeless = [
            {k: v for k, v in logs.items() if "second" not in k and "time" not in k}
            for logs in trainer.state.log_history
        ]
        results.append((counter.rows, timeless, [p.detach() for p in model.parameters()]))
    (stock_rows, stock_logs, stock_weights), (our_rows, our_logs, our_weights) = results
    assert our_rows == stock_rows and our_logs == stock_logs
    assert all(torch.equal(*pair) for pair in zip(our_weights, stock_weights, strict=True))


@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl", "js"])
def test_the_divergence_and_its_weight_are_applied(divergence: str, tmp_path: Any) -> None:
    trainer, _ = train("classification", tmp_path, consistency_divergence=divergence, consistency_weight=2.5)
    model = build_model("classification").train()
    perturb_embeddings(model)
    batch = collator("classification")(rows("classification"))
    del batch["labels"]
    logits = model(**{name: torch.cat((value, value)) for name, value in batch.items()}).logits
    logs = first_logs(trainer)
    assert logs["consistency_loss"] == pytest.approx(consistency_loss(logits, divergence=divergence).item(), rel=1e-5)
    assert logs["loss"] == pytest.approx(logs["task_loss"] + 2.5 * logs["consistency_loss"], rel=1e-6)


def test_the_weight_warms_up_linearly(tmp_path: Any) -> None:
    trainer, _ = train("classification", tmp_path, max_steps=5, consistency_warmup_steps=4, consistency_weight=2.0)
    weights = [(logs["loss"] - logs["task_loss"]) / logs["consistency_loss"] for logs in trainer.state.log_history[:5]]
    assert weights == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0], abs=1e-5)


def test_logged_components_are_of_this_training(tmp_path: Any) -> None:
    trainer, _ = train("classification", tmp_path, max_steps=3, logging_steps=2, consistency_weight=1e-9)
    trainer.train()
    logs = first_logs(trainer)
    assert logs["task_loss"] == pytest.approx(logs["loss"], rel=1e-5)


def test_logged_components_are_means_over_the_steps_since_the_last_log(tmp_path: Any) -> None:
    each, _ = train("causal_lm", tmp_path, 2, 2, max_steps=5)
    pairs, _ = train("causal_lm", tmp_path, 2, 2, max_steps=5, logging_steps=2)
    for name in ("loss", "task_loss", "consistency_loss"):
        values = [logs[name] for logs in each.state.log_history[:5]]
        logged = [logs[name] for logs in pairs.state.log_history[:2]]
        assert logged == pytest.approx([sum(values[0:2]) / 2, sum(values[2:4]) / 2], rel=1e-5)
