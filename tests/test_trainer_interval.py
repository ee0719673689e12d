"""The term in every k-th optimizer step: the others are plain steps, whatever the split of the batch."""

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator

from .consistency_tasks import RowCounter, assert_same_step, build_model, first_logs, plain_step, train
from .test_trainer_items import ANSWERS, answer_rows, question_answering


MODELS = {
    "classification": lambda: build_model("classification"),
    "token_classification": lambda: build_model("token_classification"),
    "causal_lm": lambda: build_model("causal_lm"),
    "question_answering": question_answering,
}


def counted(model: nn.Module) -> tuple[nn.Module, RowCounter]:
    return model, RowCounter(model)


@pytest.mark.parametrize("task", MODELS)
def test_steps_without_the_term_are_those_of_the_stock_trainer(
    task: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    values: dict[str, Any] = {"max_steps": 2, "learning_rate": 0.0}
    if task == "question_answering":
        values["examples"] = answer_rows(ANSWERS["within"])
        values |= {"amplitude": 0.0, "trainer_kwargs": {"data_collator": default_data_collator}}
    # In one micro-batch: with several, Transformers weights the means of some heads wrongly.
    _, expected = train(
        task,
        tmp_path,
        8,
        1,
        model=MODELS[task](),
        trainer_class=Trainer,
        arguments_class=TrainingArguments,
        **values,
    )
    model, counter = counted(MODELS[task]())
    with caplog.at_level(logging.WARNING):
        trainer, gradients = train(task, tmp_path, 2, 4, model=model, consistency_interval=2, **values)
    assert counter.rows == [4] * 4 + [2] * 4
    assert ["consistency_loss" in logs for logs in trainer.state.log_history[:2]] == [True, False]
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6)
    assert "trains like the plain Trainer" not in caplog.text


def test_the_step_with_the_term_and_its_logs_do_not_depend_on_the_interval(tmp_path: Any) -> None:
    """The logged divergence is a mean over the steps that had the term, here the first and the fourth."""
    trainer, _ = train(
        "causal_lm", tmp_path, 2, 4, max_steps=5, logging_steps=5, consistency_interval=3, learning_rate=0
    )
    _, gradients = train("causal_lm", tmp_path, 2, 4, max_steps=1, consistency_interval=3)
    logs, expected = plain_step("causal_lm")
    assert first_logs(trainer)["consistency_loss"] == pytest.approx(logs["consistency_loss"], rel=1e-5)
    steps, _ = train("causal_lm", tmp_path, 2, 4, max_steps=3, consistency_interval=3, learning_rate=0)
    logs_of_first, others = first_logs(steps), [entry["loss"] for entry in steps.state.log_history[1:3]]
    assert_same_step((logs_of_first, gradients), (logs, expected))
    for name in ("loss", "task_loss"):
        expected = (2 * logs[name] + others[0] + others[1] + others[0]) / 5
        assert first_logs(trainer)[name] == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_keeps_the_steps_of_the_term(tmp_path: Any) -> None:
    values = {"max_steps": 4, "consistency_interval": 3, "save_strategy": "steps", "save_steps": 2}
    model, counter = counted(build_model("classification"))
    train("classification", str(tmp_path), model=model, **values)
    assert counter.rows == [16, 8, 8, 16]
    model, counter = counted(build_model("classification"))
    train("classification", str(tmp_path), model=model, resume_from=str(tmp_path / "checkpoint-2"), **values)
    assert counter.rows == [8, 16]
