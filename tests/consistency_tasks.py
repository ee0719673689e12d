"""Tiny real training runs for the tests of the consistency trainers, on one process or on several.

Dropout is off, and a hook adds a perturbation to every token embedding that depends only on the token and on the
pass. So every split of a batch into micro-batches and processes sees the same perturbations.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertForTokenClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

from hf_attentiondrop.training.arguments import AttentionDropTrainingArguments, ConsistencyArguments
from hf_attentiondrop.training.batch import ConsistencyBatch
from hf_attentiondrop.training.trainer import AttentionDropTrainer

from .models import VOCAB_SIZE, build


LABELS = 3


def _token_classifier(**config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForTokenClassification(build("bert", **config).config)


# Large initial weights, so that the perturbation reaches the logits of every task.
MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "classification": lambda **config: build("bert", num_labels=LABELS, initializer_range=0.2, **config),
    "token_classification": lambda **config: _token_classifier(num_labels=LABELS, initializer_range=0.2, **config),
    "causal_lm": lambda **config: build("llama", initializer_range=0.2, **config),
    "seq2seq": lambda **config: build("marian", init_std=0.2, **config),
}
TASKS = tuple(MODELS)
SMOOTHINGS = (0.0, 0.1)
# Tasks and label smoothings of the steps in which half of the rows run twice.
HALF_CASES = (("classification", 0.1), ("token_classification", 0.0), ("causal_lm", 0.0), ("seq2seq", 0.1))


def build_model(task: str, *, dropout: bool = False, **config: Any) -> PreTrainedModel:
    """The model of a task, with the same weights in every call."""
    return MODELS[task](**{"dropout": dropout, "attn_implementation": "sdpa", **config})


def mixtral(**config: Any) -> PreTrainedModel:
    """A mixture of experts with a load balancing loss."""
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            router_aux_loss_coef=0.5,
            **config,
        )
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words `w2 w3 …`."""
    words = {"<pad>": 0, "</s>": 1} | {f"w{index}": index for index in range(2, VOCAB_SIZE)}
    words = Tokenizer(WordLevel(words, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def rows(task: str, number: int = 8) -> list[dict[str, Any]]:
    """Rows of unequal length; some tokens have no label."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()

    examples = []
    for index in range(number):
        input_ids = tokens(3 + 5 * index % 8)
        if task == "classification":
            labels = index % LABELS
        elif task == "token_classification":
            labels = [-100 if token % 4 == 0 else token % LABELS for token in input_ids]
        elif task == "causal_lm":
            labels = [-100 if position < index % 3 else token for position, token in enumerate(input_ids)]
        else:
            labels = [*tokens(2 + 3 * index % 7), 1]
        examples.append({"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels})
    return examples


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The rows of a batch without padding."""
    size = len(next(iter(batch.values())))
    return [{name: value[index].tolist() for name, value in batch.items()} for index in range(size)]


def collator(task: str, model: PreTrainedModel | None = None) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """The collator that pads the rows of a task."""
    if task == "classification":
        return DataCollatorWithPadding(tokenizer())
    return DataCollatorForSeq2Seq(tokenizer(), model=model if task == "seq2seq" else None)


def perturb_embeddings(model: PreTrainedModel, amplitude: float = 0.5, swaps_passes: bool = False) -> None:
    """Adds a wave to each token embedding that depends on the token and on the pass: the second is that of a row that
    occurred before in the batch."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        tokens = args[0]
        is_second = (tokens[:, None] == tokens).all(-1).tril(-1).any(-1).view(-1, 1, 1)
        phase = (1.0 + tokens.unsqueeze(-1)) * (1.0 + torch.arange(output.shape[-1])) + 2.5 * (
            is_second != swaps_passes
        )
        return output + amplitude * torch.sin(phase).to(output.dtype)

    for module in model.modules():
        # PEFT and encoder-decoder models list tied embeddings under several names.
        if type(module) is nn.Embedding and module.num_embeddings == VOCAB_SIZE:
            module.register_forward_hook(hook)


def longer_rows(batch: dict[str, Tensor]) -> Tensor:
    """The longer row of each two neighbors: half of the rows, the same for every split into an even number of rows."""
    lengths = batch["attention_mask"].sum(-1).view(-1, 2)
    return 2 * torch.arange(len(lengths)) + lengths.argmax(-1)


def plain_step(
    task: str, smoothing: float = 0.0, examples: list[dict[str, Any]] | None = None, fraction: float = 1.0
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The expected logs and gradients of one step on all rows, from the formulas. With a fraction of 0.5 the
    `longer_rows` run twice."""
    model = build_model(task).train()
    perturb_embeddings(model)
    batch = collator(task, model)(rows(task) if examples is None else examples)
    labels = torch.as_tensor(batch.pop("labels"))
    again = torch.arange(len(labels)) if fraction == 1 else longer_rows(batch)
    repeated = {name: torch.cat((value, value[again])) for name, value in batch.items()}
    log_probs = model(**repeated).logits.log_softmax(-1)
    if task == "causal_lm":
        log_probs, labels = log_probs[:, :-1], labels[:, 1:]
    items = (labels != -100).sum()
    targets = torch.cat((labels, labels[again])).flatten()
    task_loss = cross_entropy(log_probs.flatten(0, -2), targets, label_smoothing=smoothing, reduction="sum")
    task_loss = task_loss / ((1 + fraction) * items)
    log_p, log_q = log_probs[again], log_probs[len(labels) :]
    divergences = 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    divergence = divergences[labels[again] != -100].sum() / (fraction * items)
    loss = task_loss + divergence
    loss.backward()
    logs = {"loss": loss.item(), "task_loss": task_loss.item(), "consistency_loss": divergence.item()}
    return logs, gradients_of(model)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model, by parameter."""
    return {
        name.removeprefix("module."): parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def first_logs(trainer: Trainer) -> dict[str, float]:
    """The first log entry of a Trainer."""
    return trainer.state.log_history[0]


class RowCounter:
    """Records the number of rows in every forward of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        model.register_forward_hook(lambda module, args, kwargs, output: self.count(kwargs), with_kwargs=True)

    def count(self, kwargs: dict[str, Any]) -> None:
        self.rows.append(len(kwargs["input_ids"]))


class GradientRecorder(TrainerCallback):
    """Records the gradients of the last optimizer step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.gradients = gradients_of(model)


def assert_same_step(
    step: tuple[dict[str, float], dict[str, Tensor]], expected: tuple[dict[str, float], dict[str, Tensor]]
) -> None:
    """Compares logs and gradients of two steps, the gradients to 1e-6."""
    (logs, gradients), (expected_logs, expected_gradients) = step, expected
    assert expected_gradients.keys() == gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6, msg=lambda text, of=name: of + text)
    for name in ("loss", "task_loss", "consistency_loss"):
        assert abs(logs[name] - expected_logs[name]) < 2e-6 * max(1, abs(expected_logs[name])), name


def arguments(output_dir: str, kind: type = AttentionDropTrainingArguments, **values: Any) -> Any:
    """Training arguments for one step on the CPU without progress bar or checkpoints."""
    defaults = {
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if issubclass(kind, ConsistencyArguments):
        defaults["consistency_weight"] = 1.0
    return kind(output_dir=output_dir, **{**defaults, **values})


def train(
    task: str,
    output_dir: str,
    batch_size: int = 8,
    accumulation: int = 1,
    *,
    model: nn.Module | None = None,
    examples: list[dict[str, Any]] | None = None,
    amplitude: float = 0.5,
    trainer_class: type[Trainer] = AttentionDropTrainer,
    arguments_class: type = AttentionDropTrainingArguments,
    trainer_kwargs: dict[str, Any] | None = None,
    resume_from: str | None = None,
    **values: Any,
) -> tuple[Trainer, dict[str, Tensor]]:
    """Trains a task, by default one optimizer step on all rows; returns the trainer and the last gradients."""
    model = build_model(task) if model is None else model
    if amplitude:
        perturb_embeddings(model, amplitude)
    recorder = GradientRecorder()
    values = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        **values,
    }
    settings = {
        "train_dataset": rows(task) if examples is None else examples,
        "data_collator": collator(task, model),
        "callbacks": [recorder],
        **(trainer_kwargs or {}),
    }
    trainer = trainer_class(model=model, args=arguments(output_dir, arguments_class, **values), **settings)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer, recorder.gradients


def _sample_longer_rows(batch: ConsistencyBatch, fraction: float) -> ConsistencyBatch:
    return replace(batch, rows=longer_rows(batch.inputs), fraction=fraction)


@patch.object(ConsistencyBatch, "sample_rows", _sample_longer_rows)
def train_half(*args: Any, run: Callable[..., Any] = train, **values: Any) -> tuple[Trainer, dict[str, Tensor]]:
    """Trains as [`train`] or another function does; the longer row of each two neighbors runs twice."""
    trainer_kwargs = {"consistency_fraction": 0.5, **values.pop("trainer_kwargs", {})}
    return run(*args, train_sampling_strategy="sequential", trainer_kwargs=trainer_kwargs, **values)


def main(output: str, batch_size: str, accumulation: str) -> None:
    """Saves the gradients and logs of every task and label smoothing to a file."""
    cases = [(train, 1.0, task, smoothing) for task in TASKS for smoothing in SMOOTHINGS]
    cases += [(train_half, 0.5, *case) for case in HALF_CASES]
    results = {}
    for run, fraction, task, smoothing in cases:
        trainer, gradients = run(
            task, f"{output}-runs", int(batch_size), int(accumulation), label_smoothing_factor=smoothing
        )
        step = trainer.accelerator.num_processes, trainer.state.log_history[0], gradients
        results[task, smoothing, fraction] = step
    if trainer.is_world_process_zero():
        torch.save(results, output)
