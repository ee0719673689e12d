"""Measurements of the trained model in addition to the Trainer's evaluation."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_attentiondrop.evaluation.calibration import calibration_metrics
from hf_attentiondrop.evaluation.classifier import ATTENTION_SAMPLES, ClassifierEvaluation, evaluate_classifier
from hf_attentiondrop.evaluation.diagnostics import AttentionStatistics, attention_statistics
from hf_attentiondrop.evaluation.perturbation_space import Normalization
from hf_attentiondrop.evaluation.running import first_samples

from .arguments import check_at_least_one


@dataclass
class EvaluationArguments:
    """Optional measurements at the end, in addition to accuracy, calibration and attention."""

    _argument_group_name = "evaluation"
    _needing: ClassVar = {"evaluate_robustness": ("robustness_samples", "robustness_epsilon")}

    evaluate_robustness: bool = field(
        default=False, metadata={"help": "Attack the trained model with FGSM and PGD and report its robust accuracy."}
    )
    robustness_samples: int = field(
        default=200, metadata={"help": "Number of held-out samples to attack; each takes about 100 passes."}
    )
    robustness_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Bound of the strongest attack: for images a share of the pixel range, by default 8/255; for "
            "texts in standard deviations of the embeddings, by default 0.1. Half and a quarter of it are tried too."
        },
    )

    def __post_init__(self) -> None:
        check_at_least_one(self, "robustness_samples")
        epsilon = self.robustness_epsilon
        if epsilon is not None and not 0 < epsilon < math.inf:
            raise ValueError(f"--robustness_epsilon: expected a number above 0, got {epsilon}.")


class LastEvaluation(TrainerCallback):
    """Keeps the metrics and the step of the Trainer's last evaluation during training."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.step: int | None = None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.metrics, self.step = dict(kwargs["metrics"]), state.global_step


def final_evaluation(trainer: Trainer, last: LastEvaluation) -> dict[str, float]:
    """The metrics of the trained model. The last evaluation during training is reused if it measured these weights.

    Args:
        trainer ([`~transformers.Trainer`]): after training, or without any.
        last ([`LastEvaluation`]): its callback.
    """
    state = trainer.state
    kept = state.best_global_step if trainer.args.load_best_model_at_end else None
    if last.step is not None and last.step == state.global_step and kept in (None, last.step):
        return last.metrics
    return trainer.evaluate()


def measure_classifier(
    trainer: Trainer, arguments: EvaluationArguments, normalization: Normalization | None = None
) -> ClassifierEvaluation:
    """Measures the trained classifier on the held-out data.

    Every process measures all of it, because a sharded model runs only if all processes run it.
    """
    return evaluate_classifier(
        trainer.model,
        held_out_batches(trainer),
        attacked_samples=arguments.robustness_samples if arguments.evaluate_robustness else 0,
        epsilon=arguments.robustness_epsilon,
        normalization=normalization,
        seed=trainer.args.seed,
    )


def evaluate_on_test(trainer: Trainer, dataset: Dataset) -> dict[str, float]:
    """The metrics of the trained model on the test data, with the prefix `test_`."""
    return trainer.predict(dataset, metric_key_prefix="test").metrics


def evaluate_classifier_on_test(
    trainer: Trainer, dataset: Dataset, evaluation: ClassifierEvaluation | None
) -> dict[str, float]:
    """The metrics of the trained classifier on the test data, with the prefix `test_`, and its calibration.

    Args:
        trainer ([`~transformers.Trainer`]): of the classifier.
        dataset ([`~datasets.Dataset`]): the test data.
        evaluation ([`ClassifierEvaluation`], *optional*):
            Of the validation data. The calibration at its temperature is measured too, as metrics that end in
            `_after_temperature`. If no temperature is optimal there, because all predictions are right or none is
            better than chance, nothing is scaled, and they equal the others.
    """
    output = trainer.predict(dataset, metric_key_prefix="test")
    predictions = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    logits, labels = torch.as_tensor(predictions), torch.as_tensor(output.label_ids)
    metrics = {f"test_{name}": value for name, value in calibration_metrics(logits, labels).items()}
    if evaluation is not None:
        # Also of the best models: a comparison would drop runs that lack a metric.
        scaled = calibration_metrics(logits / evaluation.metrics["calibration"].get("temperature", 1.0), labels)
        metrics |= {f"test_{name}_after_temperature": value for name, value in scaled.items()}
    return {**output.metrics, **metrics}


def measure_attention(trainer: Trainer) -> dict[str, AttentionStatistics]:
    """Measures attention statistics of the trained model on some of the held-out data."""
    return attention_statistics(trainer.model, first_samples(held_out_batches(trainer), ATTENTION_SAMPLES))


def held_out_batches(trainer: Trainer) -> DataLoader[Any]:
    """The whole held-out data on every process, in random order: files are sorted by class, and attacks and attention
    are measured on the first samples."""
    # As in training: a tokenizer may return inputs that the model does not take, such as `token_type_ids`.
    dataset = trainer._remove_unused_columns(trainer.eval_dataset).shuffle(seed=trainer.args.seed)
    return DataLoader(dataset, batch_size=trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
