"""The consistency term in the Trainer: its gradients, its logs, and that it stays out of everything else."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import hf_attentiondrop.methods.blur as blur
from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.training.arguments import AttentionDropSeq2SeqTrainingArguments, AttentionDropTrainingArguments
from hf_attentiondrop.training.losses import consistency_loss
from hf_attentiondrop.training.trainer import (
    AttentionDropSeq2SeqTrainer,
    AttentionDropTrainer,
    ConsistencyTrainerMixin,
)

from .consistency_tasks import (
    SMOOTHINGS,
    TASKS,
    GradientRecorder,
    arguments,
    assert_same_step,
    build_model,
    collator,
    perturb_embeddings,
    plain_step,
    rows,
    tokenizer,
    train,
)
from .models import build, inputs


def first_logs(trainer: Trainer) -> dict[str, float]:
    return trainer.state.log_history[0]


class RowCounter:
    """Counts the rows of every forward pass of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        model.register_forward_hook(lambda module, args, kwargs, output: self.count(kwargs), with_kwargs=True)

    def count(self, kwargs: dict[str, Any]) -> None:
        self.rows.append(len(kwargs["input_ids"]))


# --- gradients


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("task", TASKS)
def test_one_step_is_the_formula_however_the_batch_is_cut(task: str, smoothing: float, tmp_path: Any) -> None:
    expected = plain_step(task, smoothing)
    assert expected[0]["consistency_loss"] > 0.05
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer, gradients = train(task, tmp_path, batch_size, accumulation, label_smoothing_factor=smoothing)
        assert_same_step((first_logs(trainer), gradients), expected)


@pytest.mark.parametrize(("task", "smoothing"), [("causal_lm", 0.0), *((task, 0.1) for task in TASKS)])
def test_equal_passes_take_the_step_of_the_stock_trainer_where_that_is_right(
    task: str, smoothing: float, tmp_path: Any
) -> None:
    """Without label smoothing it is not for heads that ignore the number of items, which are not among these."""
    values = {"strength": 0.0, "label_smoothing_factor": smoothing}
    _, stock = train(task, tmp_path, 2, 4, trainer_class=Trainer, arguments_class=TrainingArguments, **values)
    trainer, gradients = train(task, tmp_path, 2, 4, **values)
    assert first_logs(trainer)["consistency_loss"] < 1e-9
    for name, gradient in stock.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6)


def test_a_micro_batch_without_any_label_adds_nothing(tmp_path: Any) -> None:
    for task in ("causal_lm", "token_classification"):
        examples = rows(task)
        for example in examples[:5]:
            example["labels"] = [-100] * len(example["labels"])
        expected = plain_step(task, examples=examples)
        trainer, gradients = train(task, tmp_path, 1, 8, examples=examples)
        assert_same_step((first_logs(trainer), gradients), expected)


def test_without_averaging_over_devices_one_process_is_the_same(tmp_path: Any) -> None:
    trainer, gradients = train("causal_lm", tmp_path, 2, 4, average_tokens_across_devices=False)
    assert_same_step((first_logs(trainer), gradients), plain_step("causal_lm"))


def classifier_without_loss_arguments() -> nn.Module:
    """A model that the Trainer gives no number of items, and whose loss it divides by the accumulation steps."""
    model = build_model("classification")
    model.accepts_loss_kwargs = False
    return model


def test_a_model_that_takes_no_number_of_items_is_scaled_once(tmp_path: Any) -> None:
    trainer, gradients = train("classification", tmp_path, 2, 4, model=classifier_without_loss_arguments())
    assert_same_step((first_logs(trainer), gradients), plain_step("classification"))


def test_a_weight_set_to_zero_in_training_gives_back_the_stock_step(tmp_path: Any) -> None:
    class TurnOff(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.consistency_weight = 0.0

    recorder = GradientRecorder()
    values = {"strength": 0.0, "learning_rate": 0.0, "max_steps": 2}
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


def mean_of_the_number(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    return cross_entropy(outputs.logits.flatten(0, -2), labels.flatten(), reduction="sum") / num_items_in_batch


def mean_of_the_batch(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    return cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())


@pytest.mark.parametrize("compute_loss_func", [mean_of_the_number, mean_of_the_batch])
def test_a_loss_function_of_the_user_gives_the_task_loss(compute_loss_func: Any, tmp_path: Any) -> None:
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


def test_a_trainer_with_a_loss_of_its_own_keeps_it(tmp_path: Any) -> None:
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


# --- weight, divergence, ramp, logs


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_without_a_weight_it_is_the_stock_trainer(task: str, accumulation: int, tmp_path: Any) -> None:
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
            strength=0.0,
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
def test_the_divergence_and_its_weight_are_those_asked_for(divergence: str, tmp_path: Any) -> None:
    trainer, _ = train("classification", tmp_path, consistency_divergence=divergence, consistency_weight=2.5)
    model = build_model("classification").train()
    perturb_embeddings(model)
    batch = collator("classification")(rows("classification"))
    del batch["labels"]
    logits = model(**{name: torch.cat((value, value)) for name, value in batch.items()}).logits
    logs = first_logs(trainer)
    assert logs["consistency_loss"] == pytest.approx(consistency_loss(logits, divergence=divergence).item(), rel=1e-5)
    assert logs["loss"] == pytest.approx(logs["task_loss"] + 2.5 * logs["consistency_loss"], rel=1e-6)


def test_the_weight_ramps_up_linearly(tmp_path: Any) -> None:
    trainer, _ = train("classification", tmp_path, max_steps=5, consistency_warmup_steps=4, consistency_weight=2.0)
    weights = [(logs["loss"] - logs["task_loss"]) / logs["consistency_loss"] for logs in trainer.state.log_history[:5]]
    assert weights == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0], abs=1e-5)


def test_logged_components_are_means_over_the_steps_since_the_last_log(tmp_path: Any) -> None:
    each, _ = train("causal_lm", tmp_path, 2, 2, max_steps=5)
    pairs, _ = train("causal_lm", tmp_path, 2, 2, max_steps=5, logging_steps=2)
    for name in ("loss", "task_loss", "consistency_loss"):
        values = [logs[name] for logs in each.state.log_history[:5]]
        logged = [logs[name] for logs in pairs.state.log_history[:2]]
        assert logged == pytest.approx([sum(values[0:2]) / 2, sum(values[2:4]) / 2], rel=1e-5)


# --- what is stochastic


def test_passes_differ_the_more_the_more_attention_drops(tmp_path: Any) -> None:
    divergences = []
    for p in (0.0, 0.1, 0.3):
        drop = AttentionDropConfig(p=p)
        model = build("bert", dropout=False, num_labels=3, initializer_range=0.2, attention_drop=drop)
        trainer, _ = train(
            "classification", tmp_path, model=model, strength=0.0, max_steps=20, logging_steps=20, learning_rate=0.0
        )
        divergences.append(first_logs(trainer)["consistency_loss"])
    assert divergences[0] == 0 and 0 < 1.5 * divergences[1] < divergences[2]


def test_the_two_halves_are_blurred_by_different_sigmas(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    original = blur.blur_keys
    monkeypatch.setattr(blur, "blur_keys", lambda key, sigma, seen: drawn.append(sigma) or original(key, sigma, seen))
    drop = AttentionDropConfig(variant="blur")
    model = build("bert", dropout=False, num_labels=3, initializer_range=0.2, attention_drop=drop)
    trainer, _ = train("classification", tmp_path, model=model, strength=0.0)
    assert first_logs(trainer)["consistency_loss"] > 0
    for sigma in drawn:
        first, second = sigma.flatten().chunk(2)
        assert len(first) == 8 and first.ne(second).all()


def whisper() -> nn.Module:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=32,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_mel_bins=4,
            max_source_positions=8,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=1,
        )
    )


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    return [{name: value[index].tolist() for name, value in batch.items()} for index in range(len(batch["labels"]))]


WARNING = "has no dropout above 0 and no active AttentionDrop"


@pytest.mark.parametrize("family", ["vit", "llama", "whisper"])
def test_a_model_without_randomness_is_reported_once_with_the_remedy(
    family: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if family == "whisper":  # draws random numbers for its layer drop even at 0
        model = whisper()
        batch = {"input_features": torch.randn(4, 4, 16), "labels": torch.randint(2, 32, (4, 5))}
    else:
        model, batch = build(family, attn_implementation="sdpa"), inputs(family)
    trainer = AttentionDropTrainer(
        model=model,
        args=arguments(tmp_path, per_device_train_batch_size=2, max_steps=2),
        train_dataset=rows_of(batch),
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (message,) = [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]
    assert 'attn_implementation="attentiondrop"' in message and "consistency_weight=0" in message


@pytest.mark.parametrize("source", ["dropout", "attentiondrop"])
def test_a_model_with_randomness_is_not_reported(source: str, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    if source == "dropout":
        model = build_model("classification", dropout=True)
    else:
        model = build("bert", dropout=False, num_labels=3, attention_drop=AttentionDropConfig(p=0.3))
    with caplog.at_level(logging.WARNING):
        trainer, _ = train("classification", tmp_path, model=model, strength=0.0)
    assert first_logs(trainer)["consistency_loss"] > 0
    assert not [record for record in caplog.records if WARNING in record.getMessage()]


NOTHING = "trains as the plain Trainer would"


@pytest.mark.parametrize("implementation", ["sdpa", "attentiondrop", "affine_scaled"])
def test_a_training_without_any_method_is_reported_once(
    implementation: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = build_model("classification", attn_implementation=implementation)
        train("classification", tmp_path, model=model, strength=0.0, max_steps=2, consistency_weight=0.0)
    messages = [record.getMessage() for record in caplog.records if NOTHING in record.getMessage()]
    assert len(messages) == (implementation == "sdpa")
    assert all(
        "AttentionDropTrainer" in text and 'set_attn_implementation("attentiondrop")' in text for text in messages
    )


def test_r_drop_is_a_method_and_not_reported(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train("classification", tmp_path, model=build_model("classification", dropout=True), strength=0.0)
    assert NOTHING not in caplog.text and WARNING not in caplog.text


# --- evaluation and prediction


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_evaluation_and_prediction_are_one_ordinary_pass(task: str, tmp_path: Any) -> None:
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


def test_sequence_to_sequence_evaluation_generates_as_the_stock_trainer_does(tmp_path: Any) -> None:
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


def test_outputs_asked_for_in_training_are_those_of_the_first_pass(tmp_path: Any) -> None:
    trainer, _ = train("classification", tmp_path)
    batch = collator("classification")(rows("classification"))
    loss, outputs = trainer.compute_loss(trainer.model.train(), dict(batch), return_outputs=True)
    assert loss.requires_grad and outputs.logits.shape == (8, 3)


# --- settings and refusals


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


def test_data_parallel_is_refused(tmp_path: Any) -> None:
    values = arguments(tmp_path)
    values._n_gpu = 2
    with pytest.raises(ValueError, match="nn.DataParallel .2 GPUs in one process.*accelerate launch"):
        AttentionDropTrainer(model=build_model("classification"), args=values)
    values.consistency_weight = 0.0
    AttentionDropTrainer(model=build_model("classification"), args=values)


def test_context_parallelism_is_refused(tmp_path: Any) -> None:
    class InContextParallel(AttentionDropTrainer):
        def get_cp_size(self) -> int:
            return 2

    with pytest.raises(ValueError, match="context or sequence parallelism.*cut the sequences"):
        InContextParallel(model=build_model("causal_lm"), args=arguments(tmp_path))


def test_a_loss_of_two_forward_passes_is_refused(tmp_path: Any) -> None:
    class TwoForwards(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict, **kwargs: Any) -> Tensor:
            return model(**inputs).loss + model(**inputs).loss

    class WithConsistency(ConsistencyTrainerMixin, TwoForwards):
        pass

    with pytest.raises(ValueError, match="WithConsistency called the model 2 times"):
        train("classification", tmp_path, trainer_class=WithConsistency)


def test_an_input_of_unknown_layout_is_refused_by_name(tmp_path: Any) -> None:
    class OddCollator:
        def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
            return {**collator("classification")(features), "bias_table": torch.zeros(5, 3)}

    with pytest.raises(ValueError, match=r"`bias_table`.*first dimension of 8.*got shape \(5, 3\)"):
        train("classification", tmp_path, trainer_kwargs={"data_collator": OddCollator()}, remove_unused_columns=False)
