"""The consistency term with PEFT, TRL, mixtures of experts, mixed precision, checkpointing and compilation."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertForQuestionAnswering,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.training.losses import consistency_loss
from hf_attentiondrop.training.trainer import AttentionDropTrainer, ConsistencyTrainerMixin

from .consistency_tasks import (
    arguments,
    assert_same_step,
    build_model,
    gradients_of,
    perturb_embeddings,
    plain_step,
    rows,
    tokenizer,
    train,
)
from .models import build, inputs


Dataset = pytest.importorskip("datasets").Dataset
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
# What TRL switches on by default, under the name that the installed Transformers has for it.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


def first_logs(trainer: Trainer) -> dict[str, float]:
    return trainer.state.log_history[0]


def train_on(model: nn.Module, batch: dict[str, Tensor], tmp_path: Any, **values: Any) -> Trainer:
    """Trains a model without padding on the rows of a batch."""
    examples = [
        {name: value[index].tolist() for name, value in batch.items()} for index in range(len(batch["labels"]))
    ]
    values = {"per_device_train_batch_size": len(examples), **values}
    trainer = AttentionDropTrainer(model=model, args=arguments(tmp_path, **values), train_dataset=examples)
    trainer.train()
    return trainer


# --- TRL


class ConsistencySFTTrainer(ConsistencyTrainerMixin, trl.SFTTrainer):
    pass


def train_sft(tmp_path: Any, batch_size: int = 8, accumulation: int = 1, **values: Any) -> tuple[Any, dict]:
    trainer_kwargs = {"processing_class": tokenizer(), "data_collator": None, "consistency_weight": 1.0}
    trainer_kwargs["train_dataset"] = Dataset.from_list(values.pop("examples", rows("causal_lm")))
    trainer_kwargs |= values.pop("trainer_kwargs", {})
    return train(
        "causal_lm",
        tmp_path,
        batch_size,
        accumulation,
        trainer_class=ConsistencySFTTrainer,
        arguments_class=trl.SFTConfig,
        trainer_kwargs=trainer_kwargs,
        **{"bf16": False, CHECKPOINTING: False, **values},
    )


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sft_takes_the_step_of_the_formula(smoothing: float, tmp_path: Any) -> None:
    expected = plain_step("causal_lm", smoothing)
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer, gradients = train_sft(tmp_path, batch_size, accumulation, label_smoothing_factor=smoothing)
        assert_same_step((first_logs(trainer), gradients), expected)


def test_sft_keeps_its_own_loss_and_metrics(tmp_path: Any) -> None:
    """The metrics against stock SFT with the same passes, that is without perturbation."""
    logs = []
    for trainer_kwargs in ({"consistency_weight": 0.0}, {"consistency_weight": 1.0}):
        trainer, _ = train_sft(tmp_path, strength=0.0, loss_type="dft", trainer_kwargs=trainer_kwargs)
        logs.append(first_logs(trainer))
    stock, ours = logs
    assert "consistency_loss" not in stock
    for name in ("entropy", "mean_token_accuracy", "loss"):
        assert ours[name] == pytest.approx(stock[name], abs=1e-6), name
    assert ours["task_loss"] == pytest.approx(stock["loss"], abs=1e-6)


def test_sft_evaluates_with_its_fused_head(tmp_path: Any) -> None:
    losses = []
    for weight in (0.0, 1.0):
        trainer, _ = train_sft(
            tmp_path,
            learning_rate=0.0,
            trainer_kwargs={"eval_dataset": Dataset.from_list(rows("causal_lm")), "consistency_weight": weight},
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


IDLE = AttentionDropConfig(p=1e-9)
SPARE = {"padding_free": {"padding_free": True, "max_length": None}, "packing": {"packing": True, "max_length": 16}}


@pytest.mark.parametrize("attn_implementation", ["sdpa", "attentiondrop"])
@pytest.mark.parametrize(
    ("kind", "batch_size"), [("padding_free", 8), ("padding_free", 2), ("padding_free", 1), ("packing", 1)]
)
def test_sft_without_padding_takes_the_step_of_the_padded_formula(
    kind: str, batch_size: int, attn_implementation: str, tmp_path: Any
) -> None:
    """Each micro-batch is one row of documents, or of one, which position ids, offsets and `seq_idx` tell apart."""
    examples = [row for row in rows("causal_lm") if len(row["labels"]) > 1]
    for row in examples:
        row["labels"][0] = -100
    drop = {"attention_drop": IDLE} if attn_implementation == "attentiondrop" else {}
    model = build_model("causal_lm", attn_implementation=attn_implementation, **drop)
    given = [{name: row[name] for name in ("input_ids", "labels")} for row in examples]
    trainer, gradients = train_sft(
        tmp_path, batch_size, 8 // batch_size, model=model, examples=given, **SPARE[kind], trainer_kwargs={}
    )
    assert_same_step((first_logs(trainer), gradients), plain_step("causal_lm", examples=examples))


@pytest.mark.parametrize("kind", SPARE)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_sft_packs_with_its_own_defaults(kind: str, batch_size: int, tmp_path: Any) -> None:
    """bfloat16 autocast and activation checkpointing are among them."""
    model = build("llama", attention_drop=AttentionDropConfig(p=0.3), initializer_range=0.2)
    trainer = ConsistencySFTTrainer(
        model=model,
        args=trl.SFTConfig(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=batch_size,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            **SPARE[kind],
        ),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows("causal_lm")]),
        processing_class=tokenizer(),
        consistency_weight=1.0,
    )
    trainer.train()
    assert all(entry["consistency_loss"] > 0 for entry in trainer.state.log_history[:2])
    assert all(weight.isfinite().all() for weight in model.parameters())


# --- PEFT


def peft_model(task: str, config: Any, **kwargs: Any) -> nn.Module:
    model = build_model(task, **kwargs)
    set_seed(0)
    return peft.get_peft_model(model, config)


def test_lora_takes_the_same_step_however_the_batch_is_cut(tmp_path: Any) -> None:
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


def test_lora_dropout_counts_as_randomness_before_it_has_an_effect(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, target_modules=["q_proj"], lora_dropout=0.1)
    trainer, _ = train("causal_lm", tmp_path, model=peft_model("causal_lm", config), strength=0.0)
    assert first_logs(trainer)["consistency_loss"] == 0
    assert "consistency term has no effect" not in caplog.text


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
@pytest.mark.parametrize("task", ["causal_lm", "seq2seq"])
def test_prompt_learning_takes_the_same_step_however_the_batch_is_cut(task: str, kind: type, tmp_path: Any) -> None:
    types = {"causal_lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
    steps = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        config = kind(task_type=types[task], num_virtual_tokens=3)
        trainer, gradients = train(task, tmp_path, batch_size, accumulation, model=peft_model(task, config))
        steps.append((first_logs(trainer), gradients))
    assert steps[0][0]["consistency_loss"] > 0.01
    assert_same_step(*steps)


def test_prompt_tuning_compares_the_positions_that_predict_a_label(tmp_path: Any) -> None:
    """The first label is predicted too, by the last virtual token."""
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


def test_prompts_that_would_be_mistaken_are_refused(tmp_path: Any) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="Label smoothing does not work with prompt tuning"):
        train("causal_lm", tmp_path, model=peft_model("causal_lm", config), label_smoothing_factor=0.1)
    config = peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 4])
    with pytest.raises(ValueError, match="does not know PEFT's CPT"):
        train("causal_lm", tmp_path, model=peft_model("causal_lm", config))


# --- other tasks and models


def classifier(problem_type: str, labels: int) -> PreTrainedModel:
    return build("bert", num_labels=labels, problem_type=problem_type, attention_drop=AttentionDropConfig(p=0.3))


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [("multi_label_classification", torch.rand(4, 3).round()), ("regression", torch.randn(4, 1))],
)
def test_labels_that_are_no_classes(problem_type: str, labels: Tensor, tmp_path: Any) -> None:
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
    batch |= {"start_positions": batch["labels"], "end_positions": batch["labels"] + 2}
    examples = [
        {name: value[index].tolist() for name, value in batch.items() if name != "labels"} for index in range(4)
    ]
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


def mixture_of_experts(**kwargs: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        router_aux_loss_coef=0.5,
        attention_dropout=0.1,
        **kwargs,
    )
    return MixtralForCausalLM(config)


def test_the_load_balancing_loss_of_experts_stays_in_the_task_loss(tmp_path: Any) -> None:
    logs = {}
    for router_logits in (False, True):
        model = mixture_of_experts(output_router_logits=router_logits)
        captured = []
        model.register_forward_hook(lambda module, args, output, into=captured: into.append(output))
        logs[router_logits] = first_logs(train_on(model, inputs("llama"), tmp_path))
    assert captured[0].aux_loss > 0
    expected = logs[False]["task_loss"] + 0.5 * captured[0].aux_loss.item()
    assert logs[True]["task_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_load_balancing_loss_reaches_sft(tmp_path: Any) -> None:
    model = mixture_of_experts()
    trainer, _ = train_sft(tmp_path, model=model, strength=0.0)
    logs = first_logs(trainer)
    assert logs["aux_loss"] > 0 and logs["consistency_loss"] > 0


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
            task, tmp_path, model=hard_drop_model(task), strength=0.0, **checkpointing, **values
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
