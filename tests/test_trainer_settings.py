"""The consistency trainers beyond training: evaluation, settings, unsupported settings, model card."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Seq2SeqTrainer,
    Trainer,
    TrainingArguments,
)

from hf_attentiondrop import consistency_loss
from hf_attentiondrop.training.arguments import AttentionDropSeq2SeqTrainingArguments, AttentionDropTrainingArguments
from hf_attentiondrop.training.trainer import (
    AttentionDropSeq2SeqTrainer,
    AttentionDropTrainer,
    ConsistencyTrainerMixin,
)

from .consistency_tasks import (
    RowCounter,
    arguments,
    build_model,
    collator,
    first_logs,
    rows,
    tokenizer,
    train,
)


CLASSES = [0.2, 0.3, 0.5]


# --- evaluation and prediction


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_evaluation_and_prediction_run_one_pass(task: str, tmp_path: Any) -> None:
    results = []
    for trainer_class, arguments_class in (
        (Trainer, TrainingArguments),
        (AttentionDropTrainer, AttentionDropTrainingArguments),
    ):
        model = build_model(task, dropout=True)
        counter = RowCounter(model)
        trainer = trainer_class(
            model=model,
            args=arguments(tmp_path, arguments_class, per_device_eval_batch_size=3, label_smoothing_factor=0.1),
            eval_dataset=rows(task),
            data_collator=collator(task),
            compute_metrics=lambda prediction: {"sum": float(prediction.predictions.sum())},
        )
        metrics = trainer.evaluate()
        predictions = trainer.predict(trainer.eval_dataset).predictions
        results.append((metrics["eval_loss"], metrics["eval_sum"], predictions.tolist(), counter.rows))
    assert results[0] == results[1]


def test_sequence_to_sequence_evaluation_generates_like_the_stock_trainer(tmp_path: Any) -> None:
    results = []
    for trainer_class, arguments_class in (
        (Seq2SeqTrainer, AttentionDropSeq2SeqTrainingArguments),
        (AttentionDropSeq2SeqTrainer, AttentionDropSeq2SeqTrainingArguments),
    ):
        model = build_model("seq2seq")
        trainer = trainer_class(
            model=model,
            args=arguments(tmp_path, arguments_class, predict_with_generate=True, generation_max_length=8),
            train_dataset=rows("seq2seq"),
            eval_dataset=rows("seq2seq"),
            data_collator=collator("seq2seq", model),
            processing_class=tokenizer(),
        )
        output = trainer.predict(trainer.eval_dataset)
        results.append((output.predictions.tolist(), output.metrics["test_loss"]))
    assert results[0] == results[1]
    trainer.train()
    assert "consistency_loss" in first_logs(trainer)


def test_outputs_returned_in_training_are_those_of_the_first_pass(tmp_path: Any) -> None:
    trainer, _ = train("classification", tmp_path)
    batch = collator("classification")(rows("classification"))
    loss, outputs = trainer.compute_loss(trainer.model.train(), dict(batch), return_outputs=True)
    assert loss.requires_grad and outputs.logits.shape == (8, 3)


# --- settings


def test_settings_come_from_the_constructor_then_the_arguments_then_the_defaults(tmp_path: Any) -> None:
    model = build_model("classification")
    ours = arguments(tmp_path, consistency_weight=0.25, consistency_divergence="js")
    trainer = AttentionDropTrainer(model=model, args=ours, consistency_weight=4.0)
    assert (trainer.args.consistency_weight, trainer.args.consistency_divergence) == (4.0, "js")
    trainer = AttentionDropTrainer(model=model, args=arguments(tmp_path, TrainingArguments))
    assert (trainer.args.consistency_weight, trainer.args.consistency_divergence) == (0.0, "symmetric_kl")
    assert trainer.args.consistency_warmup_steps == 0
    with pytest.raises(ValueError, match="`consistency_weight` must be a finite number >= 0, got -1"):
        AttentionDropTrainer(model=model, args=ours, consistency_weight=-1)


def test_data_parallel_raises(tmp_path: Any) -> None:
    values = arguments(tmp_path)
    values._n_gpu = 2
    with pytest.raises(ValueError, match="nn.DataParallel .2 GPUs in one process.*accelerate launch"):
        AttentionDropTrainer(model=build_model("classification"), args=values)
    values.consistency_weight = 0.0
    AttentionDropTrainer(model=build_model("classification"), args=values)


def test_context_parallelism_raises(tmp_path: Any) -> None:
    class InContextParallel(AttentionDropTrainer):
        def get_cp_size(self) -> int:
            return 2

    with pytest.raises(ValueError, match="context or sequence parallelism.*split the sequences"):
        InContextParallel(model=build_model("causal_lm"), args=arguments(tmp_path))


def test_a_loss_of_two_forward_passes_raises(tmp_path: Any) -> None:
    class TwoForwards(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict, **kwargs: Any) -> Tensor:
            return model(**inputs).loss + model(**inputs).loss

    class WithConsistency(ConsistencyTrainerMixin, TwoForwards):
        pass

    with pytest.raises(ValueError, match="Expected one forward with gradients for one loss, got 2"):
        train("classification", tmp_path, trainer_class=WithConsistency)


def test_an_override_that_skips_the_term_raises(tmp_path: Any) -> None:
    class Weighted(AttentionDropTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict, **kwargs: Any) -> Tensor:
            return nn.functional.cross_entropy(model(**inputs).logits, inputs["labels"], weight=torch.tensor(CLASSES))

    with pytest.raises(ValueError, match="Weighted overrides `compute_loss` or .*: each batch ran once"):
        train("classification", tmp_path, trainer_class=Weighted)
    trainer, _ = train("classification", tmp_path, trainer_class=Weighted, consistency_weight=0.0)
    assert trainer.state.global_step == 1

    class Halved(AttentionDropTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().compute_loss(*args, **kwargs) / 2

    class Conditional(AttentionDropTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Tensor:
            self.is_second = not getattr(self, "is_second", True)
            return model(**inputs).loss if self.is_second else super().compute_loss(model, inputs, *args, **kwargs)

    trainer, _ = train("classification", tmp_path, trainer_class=Conditional, max_steps=3, batch_size=2)
    assert trainer.state.global_step == 3
    trainer, _ = train("classification", tmp_path, trainer_class=Halved)
    assert first_logs(trainer)["consistency_loss"] > 0


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", None])
def test_soft_labels_are_compared_as_the_config_says(problem_type: str | None, tmp_path: Any) -> None:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        captured.append(outputs.logits.detach())
        return nn.functional.cross_entropy(outputs.logits, labels)

    captured: list[Tensor] = []
    examples = [{**row, "labels": torch.rand(len(CLASSES)).softmax(-1).tolist()} for row in rows("classification")]
    model = build_model("classification")
    model.config.problem_type = problem_type
    settings: dict[str, Any] = {"model": model, "examples": examples, "trainer_kwargs": {"compute_loss_func": loss}}
    if problem_type is None:
        with pytest.raises(ValueError, match="Set `config.problem_type` to"):
            train("classification", tmp_path, **settings)
        return
    trainer, _ = train("classification", tmp_path, **settings)
    expected = consistency_loss(captured[0], problem_type=problem_type).item()
    assert first_logs(trainer)["consistency_loss"] == pytest.approx(expected, rel=1e-4)


def test_an_input_of_unknown_layout_raises_with_its_name(tmp_path: Any) -> None:
    class OddCollator:
        def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
            return {**collator("classification")(features), "bias_table": torch.zeros(5, 3)}

    with pytest.raises(ValueError, match=r"`bias_table`.*first dimension of 8.*got shape \(5, 3\)"):
        train("classification", tmp_path, trainer_kwargs={"data_collator": OddCollator()}, remove_unused_columns=False)


# --- model card


def test_the_consistency_term_has_a_card_if_the_two_passes_differed(tmp_path: Any) -> None:
    trainer, _ = train("classification", tmp_path, consistency_divergence="js")
    (card,) = trainer.method_cards
    assert card.settings["consistency_divergence"] == "js"
    equal, _ = train("classification", tmp_path, amplitude=0.0)
    assert first_logs(equal)["consistency_loss"] == 0 and equal.method_cards == ()
    plain, _ = train("classification", tmp_path, consistency_weight=0.0)
    assert plain.method_cards == ()


def test_a_training_without_logs_has_a_card(tmp_path: Any) -> None:
    trainer, _ = train("classification", tmp_path, logging_strategy="no", consistency_warmup_steps=3)
    assert not any("consistency_loss" in entry for entry in trainer.state.log_history)
    (card,) = trainer.method_cards
    assert card.settings["consistency_warmup_steps"] == 3
