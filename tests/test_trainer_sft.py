"""The consistency term in TRL's SFTTrainer."""

from typing import Any

import pytest
from transformers import TrainingArguments

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.training.trainer import ConsistencyTrainerMixin

from .consistency_tasks import (
    assert_same_step,
    build_model,
    first_logs,
    mixtral,
    plain_step,
    rows,
    tokenizer,
    train,
    train_half,
)
from .models import build


Dataset = pytest.importorskip("datasets").Dataset
trl = pytest.importorskip("trl")
# TRL enables activation checkpointing by default, under the name that the installed Transformers uses.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


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
def test_one_step_matches_the_formula(smoothing: float, tmp_path: Any) -> None:
    expected = plain_step("causal_lm", smoothing)
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer, gradients = train_sft(tmp_path, batch_size, accumulation, label_smoothing_factor=smoothing)
        assert_same_step((first_logs(trainer), gradients), expected)


def test_half_of_the_rows_match_the_formula(tmp_path: Any) -> None:
    expected = plain_step("causal_lm", fraction=0.5)
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer, gradients = train_half(tmp_path, batch_size, accumulation, run=train_sft)
        assert_same_step((first_logs(trainer), gradients), expected)


def test_sft_keeps_its_loss_and_metrics(tmp_path: Any) -> None:
    """Compared with stock SFT without perturbation, where both passes are the same."""
    logs = []
    for trainer_kwargs in ({"consistency_weight": 0.0}, {"consistency_weight": 1.0}):
        trainer, _ = train_sft(tmp_path, amplitude=0.0, loss_type="dft", trainer_kwargs=trainer_kwargs)
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


NEVER_DROPS = AttentionDropConfig(p=1e-9)
WITHOUT_PADDING = {
    "padding_free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True, "max_length": 16},
}


@pytest.mark.parametrize("attn_implementation", ["sdpa", "attentiondrop"])
@pytest.mark.parametrize(
    ("kind", "batch_size"), [("padding_free", 8), ("padding_free", 2), ("padding_free", 1), ("packing", 1)]
)
def test_one_step_without_padding_matches_the_padded_formula(
    kind: str, batch_size: int, attn_implementation: str, tmp_path: Any
) -> None:
    """Each micro-batch is one row of one or more documents, marked by position ids, offsets and `seq_idx`."""
    examples = [row for row in rows("causal_lm") if len(row["labels"]) > 1]
    for row in examples:
        row["labels"][0] = -100
    drop = {"attention_drop": NEVER_DROPS} if attn_implementation == "attentiondrop" else {}
    model = build_model("causal_lm", attn_implementation=attn_implementation, **drop)
    given = [{name: row[name] for name in ("input_ids", "labels")} for row in examples]
    trainer, gradients = train_sft(
        tmp_path, batch_size, 8 // batch_size, model=model, examples=given, **WITHOUT_PADDING[kind], trainer_kwargs={}
    )
    assert_same_step((first_logs(trainer), gradients), plain_step("causal_lm", examples=examples))


@pytest.mark.parametrize("kind", WITHOUT_PADDING)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_sft_packs_with_its_default_settings(kind: str, batch_size: int, tmp_path: Any) -> None:
    """They include bfloat16 autocast and activation checkpointing."""
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
            **WITHOUT_PADDING[kind],
        ),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows("causal_lm")]),
        processing_class=tokenizer(),
        consistency_weight=1.0,
    )
    trainer.train()
    assert all(entry["consistency_loss"] > 0 for entry in trainer.state.log_history[:2])
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_the_load_balancing_loss_reaches_sft(tmp_path: Any) -> None:
    model = mixtral(attention_dropout=0.1)
    trainer, _ = train_sft(tmp_path, model=model, amplitude=0.0)
    logs = first_logs(trainer)
    assert logs["aux_loss"] > 0 and logs["consistency_loss"] > 0
