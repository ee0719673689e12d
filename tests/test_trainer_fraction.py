"""A share of the rows runs twice: the expected step is that of all rows, and it does not depend on the split."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, Trainer, TrainingArguments, default_data_collator

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.training.batch import ConsistencyBatch
from hf_attentiondrop.training.trainer import AttentionDropTrainer

from .consistency_tasks import (
    HALF_CASES,
    TASKS,
    RowCounter,
    arguments,
    assert_same_step,
    build_model,
    collator,
    first_logs,
    gradients_of,
    perturb_embeddings,
    plain_step,
    rows,
    rows_of,
    tokenizer,
    train,
    train_half,
)
from .models import build, inputs
from .test_trainer import mean_over_the_given_number


NEVER = 1e-9


@pytest.mark.parametrize(("task", "smoothing"), HALF_CASES)
def test_one_step_matches_the_formula_for_every_split_of_the_batch(task: str, smoothing: float, tmp_path: Any) -> None:
    expected = plain_step(task, smoothing, fraction=0.5)
    assert expected[0]["consistency_loss"] > 0.05
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer, gradients = train_half(task, tmp_path, batch_size, accumulation, label_smoothing_factor=smoothing)
        assert_same_step((first_logs(trainer), gradients), expected)


def test_a_custom_loss_function_gets_the_number_of_items_of_both_passes(tmp_path: Any) -> None:
    trainer_kwargs = {"compute_loss_func": mean_over_the_given_number}
    trainer, gradients = train_half("token_classification", tmp_path, 2, 4, trainer_kwargs=trainer_kwargs)
    assert_same_step((first_logs(trainer), gradients), plain_step("token_classification", fraction=0.5))


# --- expectation


def question_answering() -> nn.Module:
    torch.manual_seed(0)
    return BertForQuestionAnswering(
        build("bert", dropout=False, initializer_range=0.2, attn_implementation="sdpa").config
    )


def answer_batch(number: int) -> dict[str, Tensor]:
    """Answers of which some lie beyond the text: unequal numbers of start and end positions."""
    answers = torch.tensor([(1, 2), (3, 9), (0, 6), (7, 8)])[:number]
    batch = {"input_ids": torch.arange(2, 2 + 6 * number).view(number, 6)}
    return {**batch, "start_positions": answers[:, 0], "end_positions": answers[:, 1]}


def step(
    trainer: Trainer,
    batch: dict[str, Tensor],
    repeated: Tensor | None,
    fraction: float,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Tensor]:
    """The loss and the gradients of a step on one batch of which the given rows run twice."""
    sampled = lambda whole, fraction: replace(whole, rows=repeated, fraction=fraction)  # noqa: E731
    monkeypatch.setattr(ConsistencyBatch, "sample_rows", sampled)
    trainer.args.consistency_fraction = fraction
    trainer.model.zero_grad()
    num_items = trainer._make_batch(batch).num_items
    loss = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=num_items)
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(trainer.model)}


def samples(batch_size: int) -> Iterator[tuple[Tensor | None, float, float]]:
    """All samples of rows, each with its probability and the fraction."""
    if batch_size == 1:
        yield torch.tensor([], dtype=torch.long), 0.7, 0.3
        yield None, 0.3, 0.3
    else:
        for subset in itertools.combinations(range(4), 2):
            yield torch.tensor(subset), 1 / 6, 0.5


@pytest.mark.parametrize("batch_size", [4, 1])
@pytest.mark.parametrize(("task", "smoothing"), [*HALF_CASES, ("question_answering", 0.0)])
def test_the_expected_step_is_that_of_all_rows(
    task: str, smoothing: float, batch_size: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over all samples of rows and over both orders of the passes, which are equally likely."""
    expected, mean = {}, {}
    for swaps_passes in (False, True):
        model = (build_model(task) if task in TASKS else question_answering()).double()
        perturb_embeddings(model, swaps_passes=swaps_passes)
        args = arguments(tmp_path, consistency_weight=2.0, label_smoothing_factor=smoothing)
        trainer = AttentionDropTrainer(model=model, args=args)
        is_answer = task == "question_answering"
        batch = answer_batch(batch_size) if is_answer else dict(collator(task, model)(rows(task, batch_size)))
        for repeated, probability, fraction in samples(batch_size):
            for name, value in step(trainer, batch, repeated, fraction, monkeypatch).items():
                mean[name] = mean.get(name, 0.0) + probability / 2 * value
        for name, value in step(trainer, batch, None, 1.0, monkeypatch).items():
            expected[name] = expected.get(name, 0.0) + value / 2
        logged = trainer._component_sums
    assert logged[1] / logged[2] > 0.02
    assert mean.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(mean[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, of=name: of + text)


# --- batches of which no row runs twice


@pytest.mark.parametrize("task", ["causal_lm", "token_classification"])
def test_without_repeated_rows_it_takes_the_step_of_one_pass(task: str, tmp_path: Any) -> None:
    stock, expected = train(
        task, tmp_path, amplitude=0.5, trainer_class=Trainer, arguments_class=TrainingArguments, max_steps=1
    )
    model = build_model(task)
    counter = RowCounter(model)
    trainer, gradients = train(task, tmp_path, 1, 8, model=model, consistency_fraction=NEVER)
    logs = first_logs(trainer)
    assert counter.rows == [1] * 8 and logs["consistency_loss"] == 0
    assert [logs["loss"], logs["task_loss"]] == pytest.approx([first_logs(stock)["loss"]] * 2, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6)


def test_the_warning_about_equal_passes_waits_for_a_repeated_row(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for fraction, warnings in ((NEVER, 0), (0.5, 1)):
        with caplog.at_level(logging.WARNING):
            train("causal_lm", tmp_path, 1, 8, amplitude=0.0, consistency_fraction=fraction)
        assert caplog.text.count("has no dropout above 0") == warnings


# --- other batches


def test_outputs_returned_in_training_are_those_of_the_first_pass(tmp_path: Any) -> None:
    trainer, _ = train("classification", tmp_path, consistency_fraction=0.5)
    counter = RowCounter(trainer.model.train())
    batch = collator("classification")(rows("classification"))
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert counter.rows == [12] and loss.requires_grad and outputs.logits.shape == (8, 3)


def test_images_are_repeated_by_row(tmp_path: Any) -> None:
    model = build("vit", attention_drop=AttentionDropConfig(p=0.3))
    counts = []
    model.register_forward_hook(lambda module, args, output: counts.append(len(output.logits)))
    trainer = AttentionDropTrainer(
        model=model,
        args=arguments(tmp_path, per_device_train_batch_size=4, consistency_fraction=0.25),
        train_dataset=rows_of(inputs("vit")),
        data_collator=default_data_collator,
    )
    trainer.train()
    assert counts == [5] and first_logs(trainer)["consistency_loss"] > 0


def test_a_packed_row_runs_twice_or_once(tmp_path: Any) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from .test_trainer_sft import ConsistencySFTTrainer

    model = build("llama", attention_drop=AttentionDropConfig(p=0.3), initializer_range=0.2)
    counter = RowCounter(model)
    args = trl.SFTConfig(
        tmp_path,
        max_steps=6,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        packing=True,
        max_length=16,
    )
    args.per_device_train_batch_size = 1
    trainer = ConsistencySFTTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows("causal_lm")]),
        processing_class=tokenizer(),
        consistency_weight=1.0,
        consistency_fraction=0.5,
    )
    trainer.train()
    assert set(counter.rows) == {1, 2}
    logged = [entry["consistency_loss"] > 0 for entry in trainer.state.log_history[:6]]
    assert logged == [number == 2 for number in counter.rows]
