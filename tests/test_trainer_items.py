"""The items of the task loss: steps without items, answers beyond the text, heads with and without label shift."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertForQuestionAnswering,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_attentiondrop.training.arguments import AttentionDropTrainingArguments
from hf_attentiondrop.training.losses import consistency_loss
from hf_attentiondrop.training.trainer import AttentionDropTrainer, ConsistencyTrainerMixin

from .consistency_tasks import GradientRecorder, arguments, gradients_of, mixtral, perturb_embeddings
from .models import VOCAB_SIZE, build


STOCK = (Trainer, TrainingArguments)
OURS = (AttentionDropTrainer, AttentionDropTrainingArguments)
# Without a gradient the optimizer does not change a weight.
PLAIN_SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}


MODELS = {
    "mixtral": lambda: mixtral(initializer_range=0.2, output_router_logits=True),
    "llama": lambda: build("llama", initializer_range=0.2, attn_implementation="sdpa"),
}


def examples(labelled: list[bool]) -> list[dict[str, list[int]]]:
    """Rows of tokens, with labels for all tokens or for none."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, VOCAB_SIZE, (len(labelled), 6), generator=generator)
    labels = torch.where(torch.tensor(labelled)[:, None], tokens, -100)
    return [{"input_ids": row, "labels": of_row} for row, of_row in zip(tokens.tolist(), labels.tolist(), strict=True)]


def run(
    kind: tuple[type, type], model: nn.Module, rows: list[dict[str, Any]], tmp_path: Any, **values: Any
) -> tuple[Trainer, dict[str, Tensor]]:
    """Trains a model on rows in their order; returns the trainer and the gradients of the last step."""
    trainer_class, arguments_class = kind
    recorder = GradientRecorder()
    if issubclass(trainer_class, ConsistencyTrainerMixin):
        values.setdefault("consistency_weight", 1.0)
    trainer = trainer_class(
        model=model,
        args=arguments(tmp_path, arguments_class, train_sampling_strategy="sequential", **{**PLAIN_SGD, **values}),
        train_dataset=rows,
        callbacks=[recorder],
    )
    trainer.train()
    return trainer, recorder.gradients


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# --- steps without items


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("family", MODELS)
def test_a_step_without_labels_matches_the_stock_trainer(family: str, accumulation: int, tmp_path: Any) -> None:
    """The load balancing loss of experts still applies; without experts the weights do not change."""
    before, after = weights(MODELS[family]()), []
    for kind in (STOCK, OURS):
        model = MODELS[family]()
        # The stock Trainer sums the load balancing losses of the micro-batches instead of averaging them.
        scale = 1 if kind is OURS else 1 / accumulation
        trainer, _ = run(
            kind,
            model,
            examples([False] * 2 * accumulation),
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.1 * scale,
        )
        after.append(weights(model))
    logs = trainer.state.log_history[0]
    assert logs["loss"] == logs["task_loss"] == logs["consistency_loss"] == 0
    moved = [name for name in before if not torch.equal(before[name], after[1][name])]
    assert bool(moved) == (family == "mixtral")
    for name, expected in after[0].items():
        torch.testing.assert_close(after[1][name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_a_step_without_labels_between_others_adds_nothing(family: str, tmp_path: Any) -> None:
    model = MODELS[family]()
    perturb_embeddings(model)
    rows = examples([True] * 2 + [False] * 2 + [True] * 2)
    values = {"per_device_train_batch_size": 2, "max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3}
    trainer, _ = run(OURS, model, rows, tmp_path, **values)
    assert all(weight.isfinite().all() for weight in weights(model).values())
    logs = trainer.state.log_history[:3]
    assert [entry["consistency_loss"] > 0 for entry in logs] == [True, False, True]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["consistency_loss"], abs=1e-6)
    # A log over all three steps holds their mean.
    model = MODELS[family]()
    perturb_embeddings(model)
    trainer, _ = run(OURS, model, rows, tmp_path, **values, logging_steps=3)
    for name in ("loss", "task_loss", "consistency_loss"):
        assert trainer.state.log_history[0][name] == pytest.approx(sum(e[name] for e in logs) / 3, abs=1e-5), name


def test_a_loss_that_divides_by_the_number_of_labels_sends_no_nan(tmp_path: Any) -> None:
    class Divides(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            targets = labels[:, 1:]
            seen = targets.ne(-100)
            log_probs = outputs.logits[:, :-1].log_softmax(-1)
            loss = -(log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * seen).sum() / seen.sum()
            return (loss, outputs) if return_outputs else loss

    class DividesWithConsistency(ConsistencyTrainerMixin, Divides):
        pass

    for labelled in ([False] * 2, [True, False]):
        model = MODELS["llama"]()
        run(
            (DividesWithConsistency, AttentionDropTrainingArguments),
            model,
            examples(labelled),
            tmp_path,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
        )
        assert all(weight.isfinite().all() for weight in weights(model).values())


# --- answers beyond the text


def question_answering() -> PreTrainedModel:
    torch.manual_seed(0)
    config = build("bert", dropout=False, initializer_range=0.2, attn_implementation="sdpa").config
    model = BertForQuestionAnswering(config)
    perturb_embeddings(model)
    return model


LENGTH = 6
# Whole answers lie beyond the text, or only their ends, or all answers of a step.
ANSWERS = {
    "within": [(1, 2), (0, 5), (3, 3), (2, 4), (1, 1), (4, 5), (0, 0), (2, 3)],
    "whole answers": [(6, 6), (0, 5), (9, 9), (2, 4), (1, 1), (6, 7), (8, 9), (2, 3)],
    "ends": [(1, 8), (6, 7), (3, 9), (2, 4), (5, 6), (4, 5), (7, 9), (-1, 3)],
    "every end": [(1, 8), (6, 7), (3, 9), (2, 6), (5, 6), (4, 7), (7, 9), (0, 6)],
    "all": [(7, 8)] * 8,
}


def answer_rows(answers: list[tuple[int, int]]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, VOCAB_SIZE, (len(answers), LENGTH), generator=generator).tolist()
    return [
        {"input_ids": row, "start_positions": start, "end_positions": end}
        for row, (start, end) in zip(tokens, answers, strict=True)
    ]


def answer_step(answers: list[tuple[int, int]]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The expected logs and gradients of one step on all rows, from the formulas."""
    model = question_answering().train()
    rows = answer_rows(answers)
    outputs = model(input_ids=torch.tensor([row["input_ids"] for row in rows] * 2))
    task, divergence = 0.0, 0.0
    for index, logits in enumerate((outputs.start_logits, outputs.end_logits)):
        positions = torch.tensor([answer[index] for answer in answers]).clamp(min=0)
        seen = positions < LENGTH
        if not seen.any():
            task, divergence = task + 0 * logits.sum(), divergence + 0 * logits.sum()
            continue
        both = torch.cat((seen, seen))
        task = task + cross_entropy(logits[both], positions[seen].repeat(2)) / 2
        divergence = divergence + consistency_loss(logits[both]) / 2
    (task + divergence).backward()
    logs = {"loss": task + divergence, "task_loss": task, "consistency_loss": divergence}
    return {name: value.item() for name, value in logs.items()}, gradients_of(model)


@pytest.mark.parametrize(
    ("case", "batch_size"), [*((case, size) for case in ANSWERS for size in (8, 2)), ("ends", 1), ("all", 1)]
)
def test_answers_beyond_the_text_have_no_weight_for_every_split_of_the_batch(
    case: str, batch_size: int, tmp_path: Any
) -> None:
    expected_logs, expected = answer_step(ANSWERS[case])
    trainer, gradients = run(
        OURS,
        question_answering(),
        answer_rows(ANSWERS[case]),
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6)
    logs = trainer.state.log_history[0]
    assert {name: logs[name] for name in expected_logs} == pytest.approx(expected_logs, abs=2e-6)


def test_logits_that_do_not_fit_the_text_raise(tmp_path: Any) -> None:
    class Longer(BertForQuestionAnswering):
        def forward(self, input_ids: Tensor, start_positions: Tensor, end_positions: Tensor, **kwargs: Any) -> Any:
            outputs = super().forward(
                input_ids, start_positions=start_positions, end_positions=end_positions, **kwargs
            )
            outputs.start_logits = torch.nn.functional.pad(outputs.start_logits, (0, 2))
            return outputs

    model = Longer(build("bert").config)
    with pytest.raises(ValueError, match=r"answers among 6 positions.*got logits of shape .4, 8."):
        run(OURS, model, answer_rows(ANSWERS["within"]), tmp_path, per_device_train_batch_size=2)


# --- shifted labels


def test_a_causal_decoder_without_label_shift_compares_the_positions_of_its_loss(tmp_path: Any) -> None:
    config = BartConfig(
        vocab_size=VOCAB_SIZE, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, dropout=0.0
    )
    rows = examples([True] * 4)
    for row in rows:
        row["labels"] = [row["labels"][0], *[-100] * 5]

    def scale_second_half(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * torch.tensor([0.0, 10.0]).repeat_interleave(len(output) // 2).view(-1, 1, 1)

    def model() -> PreTrainedModel:
        torch.manual_seed(0)
        model = BartForCausalLM(config)
        model.get_input_embeddings().register_forward_hook(scale_second_half)
        return model

    captured = []
    whole = model()
    whole.register_forward_hook(lambda module, args, output: captured.append(output.logits.detach()))
    steps = [run(OURS, whole, rows, tmp_path, per_device_train_batch_size=4)]
    steps.append(run(OURS, model(), rows, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    expected = consistency_loss(captured[0][:, :1]).item()
    for trainer, gradients in steps:
        assert trainer.state.log_history[0]["consistency_loss"] == pytest.approx(expected, rel=1e-5) and expected > 0
        for name, gradient in steps[0][1].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6)
