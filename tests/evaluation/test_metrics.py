"""The metric modules load without network access, combine, and match scikit-learn and calibration.py."""

import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_attentiondrop.evaluation import calibration
from hf_attentiondrop.evaluation.metrics import METRICS, load_metric, metric_path
from tests.models import build, inputs


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary cache, so that predictions do not stay in the user's cache."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))


def random_items(count: int = 90, classes: int = 4) -> tuple[Tensor, Tensor]:
    logits, labels = 2 * torch.randn(count, classes), torch.randint(classes, (count,))
    labels[::2] = logits[::2].argmax(-1)
    return logits, labels


def expected(logits: Tensor, labels: Tensor, average: str = "macro", num_bins: int = 15) -> dict[str, float]:
    predicted = logits.argmax(-1)
    return {
        "accuracy": accuracy_score(labels, predicted),
        "f1": f1_score(labels, predicted, average=average),
        "matthews_correlation": matthews_corrcoef(labels, predicted),
        "expected_calibration_error": calibration.expected_calibration_error(logits, labels, num_bins),
        "negative_log_likelihood": calibration.negative_log_likelihood(logits, labels),
        "brier_score": calibration.brier_score(logits, labels),
    }


def combined() -> evaluate.CombinedEvaluations:
    return evaluate.combine([metric_path(name) for name in METRICS])


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_alone(name: str) -> None:
    logits, labels = random_items()
    metric = load_metric(name)
    assert isinstance(metric, evaluate.Metric) and metric.name == name and metric.description and metric.citation == ""
    assert metric.compute(predictions=logits, references=labels) == {
        name: pytest.approx(expected(logits, labels)[name], abs=1e-6)
    }


def test_metrics_by_hand() -> None:
    # Right, right, wrong; -100 does not count. Confidence is 0.8 each time.
    logits = torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.8, 0.2], [0.5, 0.5]]).log()
    metrics = combined().compute(predictions=logits, references=[0, 1, 1, -100])
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["f1"] == pytest.approx(2 / 3)
    assert metrics["matthews_correlation"] == pytest.approx(0.5)
    assert metrics["expected_calibration_error"] == pytest.approx(0.8 - 2 / 3, abs=1e-6)
    assert metrics["brier_score"] == pytest.approx((2 * 0.08 + 1.28) / 3, abs=1e-6)


def test_all_combine_over_batches_of_arrays_tensors_and_lists() -> None:
    logits, labels = random_items()
    metrics = combined()
    metrics.add_batch(predictions=logits[:30], references=labels[:30])
    metrics.add_batch(predictions=logits[30:50].numpy(), references=labels[30:50].numpy())
    metrics.add_batch(predictions=logits[50:].tolist(), references=labels[50:].tolist())
    assert metrics.compute() == pytest.approx(expected(logits, labels), abs=1e-6)


def test_options_reach_their_metric_when_combined() -> None:
    logits, labels = random_items()
    metrics = combined().compute(predictions=logits, references=labels, average="weighted", num_bins=3)
    assert metrics == pytest.approx(expected(logits, labels, "weighted", 3), abs=1e-6)
    assert metrics["f1"] != pytest.approx(expected(logits, labels)["f1"], abs=1e-6)


def test_a_trainer_computes_them(tmp_path: Path) -> None:
    model, metrics = build("bert"), combined()

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metrics.compute(predictions=prediction.predictions, references=prediction.label_ids)

    batch = inputs("bert", batch_size=10)
    data = [{name: values[i] for name, values in batch.items()} for i in range(10)]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=3, use_cpu=True)
    found = Trainer(model, arguments, eval_dataset=data, compute_metrics=compute_metrics).evaluate()
    with torch.no_grad():
        wanted = expected(model(**batch).logits, batch["labels"])
    assert {name: found[f"eval_{name}"] for name in wanted} == pytest.approx(wanted, abs=1e-5)


NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError(f"network: {args}")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import evaluate
from hf_attentiondrop.evaluation.metrics import METRICS, metric_path
metrics = evaluate.combine([metric_path(name) for name in METRICS])
print(sorted(metrics.compute(predictions=[[2.0, 0.0], [0.0, 1.0]], references=[0, 1])))
"""


@pytest.mark.slow
def test_they_load_with_an_empty_cache_and_no_network(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", NO_NETWORK]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(sorted(METRICS))


BAD = {
    "probabilities": ([[0.5, 0.5], [0.2, 0.8]], [0, 1], {}, "probabilities"),
    "classes": ([0, 1], [0, 1], {}, "expected format"),
    "label_outside": ([[1.0, -1.0]], [2], {}, r"\[0, 2\)"),
    "nan": ([[float("nan"), -1.0]], [0], {}, "finite"),
    "all_ignored": ([[1.0, -1.0]], [-100], {}, "at least one item"),
    "ragged": ([[1.0, -1.0], [1.0, 2.0, -1.0]], [0, 1], {}, "length"),
    "average": ([[1.0, -1.0]], [0], {"average": "mean"}, "`average` must be one of"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["f1", "brier_score"])
def test_bad_input_is_refused(name: str, bad: str) -> None:
    predictions, references, options, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        load_metric(name).compute(predictions=predictions, references=references, **options)


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="expected_calibration_error.*'ece'"):
        load_metric("ece")
    with pytest.raises(TypeError, match="bins"):
        load_metric("accuracy").compute(predictions=[[1.0, -1.0]], references=[0], bins=3)


def test_every_module_is_listed() -> None:
    modules = {path.stem for path in Path(metric_path("f1")).parent.glob("*.py")}
    assert modules - {"__init__", "base"} == set(METRICS)
