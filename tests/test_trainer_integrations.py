"""The consistency term with PEFT, mixtures of experts, mixed precision, checkpointing and compilation."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertForQuestionAnswering,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.training.losses import consistency_loss
from hf_attentiondrop.training.trainer import AttentionDropTrainer

from .consistency_tasks import (
    arguments,
    assert_same_step,
    build_model,
    first_logs,
    gradients_of,
    mixtral,
    perturb_embeddings,
    plain_step,
    rows_of,
    train,
)
from .models import build, inputs


Dataset = pytest.importorskip("datasets").Dataset
peft = pytest.importorskip("peft")


def train_on(model: nn.Module, batch: dict[str, Tensor], tmp_path: Any, **values: Any) -> Trainer:
    """Trains a model without padding on the rows of a batch."""
    examples = rows_of(batch)
    values = {"per_device_train_batch_size": len(examples), **values}
    trainer = AttentionDropTrainer(model=model, args=arguments(tmp_path, **values), train_dataset=examples)
    trainer.train()
    return trainer


# --- PEFT


def peft_model(task: str, config: Any, **kwargs: Any) -> nn.Module:
    model = build_model(task, **kwargs)
    set_seed(0)
    return peft.get_peft_model(model, config)


def test_lora_takes_the_same_step_for_every_split_of_the_batch(tmp_path: Any) -> None:
    steps = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        config = peft.LoraConfig(
            task_type=peft.TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        trainer, gradients = train(
            "causal_lm", tmp_path, batch_size, accumulation, model=peft_model("causal_lm", config)
        )
        steps.append((first_logs(trainer), gradients))
    assert steps[0][1] and all("lora" in name for name in steps[0][1])
    assert steps[0][0]["consistency_loss"] > 0.05
    assert_same_step(*steps)


def test_dropout_of_a_new_lora_adapter_counts_as_randomness(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, target_modules=["q_proj"], lora_dropout=0.1)
    trainer, _ = train("causal_lm", tmp_path, model=peft_model("causal_lm", config), amplitude=0.0)
    assert first_logs(trainer)["consistency_loss"] == 0
    assert "consistency term has no effect" not in caplog.text


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
@pytest.mark.parametrize("task", ["causal_lm", "seq2seq"])
def test_prompt_learning_takes_the_same_step_for_every_split(task: str, kind: type, tmp_path: Any) -> None:
    types = {"causal_lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
    steps = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        config = kind(task_type=types[task], num_virtual_tokens=3)
        trainer, gradients = train(task, tmp_path, batch_size, accumulation, model=peft_model(task, config))
        steps.append((first_logs(trainer), gradients))
    assert steps[0][0]["consistency_loss"] > 0.01
    assert_same_step(*steps)


def test_prompt_tuning_compares_the_positions_that_predict_a_label(tmp_path: Any) -> None:
    """The last virtual token predicts the first label."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    examples = [{"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": [5, -100, 7, 8]}] * 2
    trainer, _ = train("causal_lm", tmp_path, 2, model=peft_model("causal_lm", config), examples=examples)
    model = peft_model("causal_lm", config).train()
    perturb_embeddings(model)
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8]]).repeat(4, 1)).logits
    picked = logits[:, [2, 4, 5]]
    expected = consistency_loss(picked).item(), cross_entropy(picked.flatten(0, 1), torch.tensor([5, 7, 8] * 4)).item()
    logs = first_logs(trainer)
    assert (logs["consistency_loss"], logs["task_loss"]) == pytest.approx(expected, rel=1e-5)


def test_unsupported_prompts_raise(tmp_path: Any) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="Label smoothing does not work with prompt tuning"):
        train("causal_lm", tmp_path, model=peft_model("causal_lm", config), label_smoothing_factor=0.1)
    config = peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 4])
    with pytest.raises(ValueError, match="does not support PEFT's CPT"):
        train("causal_lm", tmp_path, model=peft_model("causal_lm", config))


# --- other tasks and models


def classifier(problem_type: str, labels: int) -> PreTrainedModel:
    return build("bert", num_labels=labels, problem_type=problem_type, attention_drop=AttentionDropConfig(p=0.3))


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [("multi_label_classification", torch.rand(4, 3).round()), ("regression", torch.randn(4, 1))],
)
def test_labels_without_classes(problem_type: str, labels: Tensor, tmp_path: Any) -> None:
    model = classifier(problem_type, labels.shape[1])
    captured = []
    model.register_forward_hook(lambda module, args, output: captured.append(output.logits.detach()))
    trainer = train_on(model, {**inputs("bert"), "labels": labels}, tmp_path)
    expected = consistency_loss(captured[0], problem_type=problem_type).item()
    assert first_logs(trainer)["consistency_loss"] == pytest.approx(expected, rel=1e-5) and expected > 0


def test_question_answering(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(build("bert").config)
    batch = inputs("bert")
    positions = batch.pop("labels")
    examples = rows_of({**batch, "start_positions": positions, "end_positions": positions + 2})
    trainer = AttentionDropTrainer(
        model=model,
        args=arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        train_dataset=Dataset.from_list(examples),
    )
    trainer.train()
    logs = first_logs(trainer)
    assert logs["consistency_loss"] > 0 and logs["loss"] == pytest.approx(logs["task_loss"] + logs["consistency_loss"])


def test_images(tmp_path: Any) -> None:
    model = build("vit", attention_drop=AttentionDropConfig(variant="blur"))
    assert first_logs(train_on(model, inputs("vit"), tmp_path))["consistency_loss"] > 0


def test_the_load_balancing_loss_of_experts_stays_in_the_task_loss(tmp_path: Any) -> None:
    logs = {}
    for router_logits in (False, True):
        model = mixtral(attention_dropout=0.1, output_router_logits=router_logits)
        captured = []
        model.register_forward_hook(lambda module, args, output, into=captured: into.append(output))
        logs[router_logits] = first_logs(train_on(model, inputs("llama"), tmp_path))
    assert captured[0].aux_loss > 0
    expected = logs[False]["task_loss"] + 0.5 * captured[0].aux_loss.item()
    assert logs[True]["task_loss"] == pytest.approx(expected, rel=1e-5)


# --- precision, memory, compilation


def test_bfloat16_autocast_stays_close_to_full_precision(tmp_path: Any) -> None:
    trainer, gradients = train("causal_lm", tmp_path, bf16=True)
    logs, expected = plain_step("causal_lm")
    assert first_logs(trainer)["consistency_loss"] == pytest.approx(logs["consistency_loss"], rel=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_bfloat16_model_trains(tmp_path: Any) -> None:
    trainer, gradients = train("causal_lm", tmp_path, model=build_model("causal_lm").bfloat16())
    logs, _ = plain_step("causal_lm")
    assert first_logs(trainer)["consistency_loss"] == pytest.approx(logs["consistency_loss"], rel=0.05)
    assert all(gradient.dtype == torch.bfloat16 and gradient.isfinite().all() for gradient in gradients.values())


def hard_drop_model(task: str) -> PreTrainedModel:
    drop = AttentionDropConfig(p=0.3)
    return build_model(task, dropout=True, attn_implementation="attentiondrop", attention_drop=drop)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("task", ["token_classification", "causal_lm"])
def test_gradient_checkpointing_changes_nothing(task: str, use_reentrant: bool, tmp_path: Any) -> None:
    steps = []
    for checkpointing in ({}, {"gradient_checkpointing": True}):
        values = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}} if checkpointing else {}
        trainer, gradients = train(
            task, tmp_path, model=hard_drop_model(task), amplitude=0.0, **checkpointing, **values
        )
        steps.append((first_logs(trainer), gradients))
    assert steps[0][0]["consistency_loss"] > 0
    assert_same_step(*steps)


def test_a_compiled_model_takes_the_same_step(tmp_path: Any) -> None:
    trainer, gradients = train("causal_lm", tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert_same_step((first_logs(trainer), gradients), plain_step("causal_lm"))


def test_a_model_compiled_in_place_takes_the_same_step(tmp_path: Any) -> None:
    model = build_model("classification")
    model.compile(backend="eager")
    trainer, gradients = train("classification", tmp_path, model=model, max_steps=2, learning_rate=0.0)
    for logs in trainer.state.log_history[:2]:
        assert_same_step((logs, gradients), plain_step("classification"))
    assert not gradients_of(trainer.model)
