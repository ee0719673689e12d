"""Calibration metrics match hand-computed examples, torchmetrics and scikit-learn, and refuse invalid input."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError
from transformers import EvalPrediction, Trainer, TrainingArguments

import hf_attentiondrop.evaluation.items as items
from hf_attentiondrop.evaluation.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    brier_score,
    calibration_metrics,
    expected_calibration_error,
    fit_temperature,
    maximum_calibration_error,
    negative_log_likelihood,
    reliability,
)
from hf_attentiondrop.evaluation.items import ItemScores, score_items
from hf_attentiondrop.hub import CardContent, build_card
from tests.models import VOCAB_SIZE, build


# Four items by hand: confidences .9, .8, .8 and .6; the second one is wrong, the last one ignored.
PROBABILITIES = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.8, 0.2], [0.6, 0.4]])
LABELS = torch.tensor([0, 0, 0, -100])
BY_HAND = {
    # Fifteenths: .9 is alone in [13/15, 14/15) with a gap of .1, the .8s share [12/15, 13/15) with 1 of 2 right.
    "expected_calibration_error": (0.1 + 2 * 0.3) / 3,
    # Fifteen bins for three items: the .8s are equal and stay together.
    "expected_calibration_error_equal_mass": (0.1 + 2 * 0.3) / 3,
    "maximum_calibration_error": 0.3,
    "maximum_calibration_error_items": 2,
    "negative_log_likelihood": -(math.log(0.9) + math.log(0.2) + math.log(0.8)) / 3,
    "brier_score": (0.1**2 + 0.1**2 + 0.8**2 + 0.8**2 + 0.2**2 + 0.2**2) / 3,
}
METRICS = (
    expected_calibration_error,
    maximum_calibration_error,
    negative_log_likelihood,
    brier_score,
    calibration_metrics,
    reliability,
    fit_temperature,
)


def random_items(count: int = 500, classes: int = 7, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    return scale * torch.randn(count, classes), torch.randint(classes, (count,))


def items_of(confidence: Tensor, is_correct: Tensor) -> ItemScores:
    return ItemScores(confidence, is_correct, torch.zeros_like(confidence), torch.zeros_like(confidence))


def test_every_metric_by_hand() -> None:
    assert calibration_metrics(PROBABILITIES.log(), LABELS) == pytest.approx(BY_HAND, abs=1e-6)


def test_bins_by_hand() -> None:
    bins = reliability(PROBABILITIES.log(), LABELS, num_bins=2)
    assert (bins.lower.tolist(), bins.upper.tolist(), bins.count.tolist()) == ([0.5], [1.0], [3])
    torch.testing.assert_close(bins.confidence, torch.tensor([2.5 / 3], dtype=torch.float64))
    torch.testing.assert_close(bins.accuracy, torch.tensor([2 / 3], dtype=torch.float64))
    assert bins.expected_error == pytest.approx(0.5 / 3, abs=1e-6)


def test_bins_of_equal_mass_by_hand() -> None:
    confidence = torch.tensor([0.95, 0.5, 0.6, 0.99, 0.7, 0.9])
    scores = items_of(confidence, torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0]))
    bins = reliability(scores, num_bins=3, binning="equal_mass")
    assert bins.count.tolist() == [2, 2, 2]
    torch.testing.assert_close(bins.lower, torch.tensor([0.5, 0.7, 0.95]))
    torch.testing.assert_close(bins.upper, torch.tensor([0.6, 0.9, 0.99]))
    assert bins.accuracy.tolist() == [0.5, 0.5, 1.0]
    assert expected_calibration_error(scores, num_bins=3, binning="equal_mass") == pytest.approx(
        (0.05 + 0.3 + 0.03) / 3, abs=1e-6
    )
    assert maximum_calibration_error(scores, num_bins=3, binning="equal_mass") == pytest.approx(0.3, abs=1e-6)


def test_bins_of_equal_mass_do_not_depend_on_the_order_of_items() -> None:
    scores = items_of(torch.randint(5, 10, (200,)) / 10, torch.randint(2, (200,)).float())
    order = torch.randperm(200)
    shuffled = items_of(scores.confidence[order], scores.is_correct[order])
    first, second = (reliability(s, num_bins=7, binning="equal_mass") for s in (scores, shuffled))
    assert torch.equal(first.count, second.count) and torch.equal(first.accuracy, second.accuracy)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 100.0])
@pytest.mark.parametrize(("count", "classes"), [(1, 2), (37, 2), (1000, 10), (200, 300)])
def test_calibration_errors_agree_with_torchmetrics(count: int, classes: int, scale: float) -> None:
    logits, labels = random_items(count, classes, scale)
    labels[::5] = logits[::5].argmax(-1)
    for num_bins in (1, 10, 15):
        for metric, norm in ((expected_calibration_error, "l1"), (maximum_calibration_error, "max")):
            # On probabilities, because torchmetrics takes logits in [0, 1] for probabilities.
            oracle = MulticlassCalibrationError(classes, n_bins=num_bins, norm=norm)(logits.softmax(-1), labels)
            assert metric(logits, labels, num_bins) == pytest.approx(oracle.item(), abs=1e-6)


@pytest.mark.parametrize("num_bins", [2, 10, 15])
def test_confidences_on_the_edges_of_bins_fall_where_torchmetrics_puts_them(num_bins: int) -> None:
    edges = torch.linspace(0, 1, num_bins + 1)
    confidence = torch.cat((edges[edges >= 0.5], torch.tensor([0.5, 1.0, 1.0, 0.999])))
    is_correct = torch.arange(len(confidence)) % 3 != 0
    probabilities, labels = torch.stack((confidence, 1 - confidence), -1), (~is_correct).long()
    for metric, norm in ((expected_calibration_error, "l1"), (maximum_calibration_error, "max")):
        oracle = MulticlassCalibrationError(2, n_bins=num_bins, norm=norm)(probabilities, labels)
        assert metric(items_of(confidence, is_correct.float()), num_bins=num_bins) == pytest.approx(
            oracle.item(), abs=1e-6
        )


@pytest.mark.parametrize("is_right", [True, False])
def test_saturated_probabilities_agree_with_torchmetrics(is_right: bool) -> None:
    labels = torch.arange(12) % 3
    logits = 1000.0 * torch.nn.functional.one_hot(labels if is_right else (labels + 1) % 3, 3)
    oracle = MulticlassCalibrationError(3, n_bins=15)(logits.softmax(-1), labels)
    assert (
        expected_calibration_error(logits, labels) == pytest.approx(oracle.item(), abs=1e-6) == (0 if is_right else 1)
    )
    assert brier_score(logits, labels) == (0 if is_right else 2)


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_proper_scores_agree_with_scikit_learn(classes: int) -> None:
    logits, labels = random_items(400, classes)
    probabilities = logits.double().softmax(-1)
    of_classes = list(range(classes))
    brier = brier_score_loss(labels, probabilities, labels=of_classes, scale_by_half=False)
    assert brier_score(logits, labels) == pytest.approx(brier, abs=1e-6)
    nll = log_loss(labels, probabilities, labels=of_classes)
    assert negative_log_likelihood(logits, labels) == pytest.approx(nll, abs=1e-6)


def test_tokens_without_a_label_are_ignored() -> None:
    logits, labels = random_items(24, 5)
    expected = calibration_metrics(logits, labels)
    padded, of_padded = torch.full((4, 9, 5), math.nan), torch.full((4, 9), -100)
    padded[:, :6], of_padded[:, :6] = logits.view(4, 6, 5), labels.view(4, 6)
    assert calibration_metrics(padded, of_padded) == expected
    classes = torch.randn(300, 200)
    numbers = (torch.arange(300) % 200).to(torch.uint8)  # Among them 156, which -100 would wrap to.
    assert calibration_metrics(classes, numbers) == calibration_metrics(classes, numbers.long())
    own = score_items(padded, of_padded.where(of_padded >= 0, -1), ignore_index=-1)
    assert calibration_metrics(own) == expected


def test_items_are_reduced_in_chunks_with_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = random_items(50, 5)
    whole = score_items(logits, labels)
    monkeypatch.setattr(items, "CHUNK_ELEMENTS", 12)  # two items at a time
    parts = [vars(score_items(logits[rows], labels[rows])) for rows in torch.arange(50).split(7)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name, values in vars(whole).items():
        torch.testing.assert_close(joined[name], values)
    assert calibration_metrics(ItemScores(**joined)) == pytest.approx(calibration_metrics(logits, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_half_precision_is_scored_in_float32(dtype: torch.dtype) -> None:
    logits, labels = random_items()
    logits = logits.to(dtype)
    assert score_items(logits, labels).nll.dtype == torch.promote_types(dtype, torch.float32)
    expected = calibration_metrics(logits.float(), labels)
    assert calibration_metrics(logits, labels) == pytest.approx(expected, abs=1e-6)


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    pad = lambda value: torch.nn.utils.rnn.pad_sequence(  # noqa: E731
        [example["labels"] for example in examples], batch_first=True, padding_value=value
    )
    return {"input_ids": pad(0), "attention_mask": (pad(-100) != -100).long(), "labels": pad(-100)}


def test_a_trainer_gathers_the_items_of_a_language_model(tmp_path) -> None:
    model = build("llama")
    texts = [torch.randint(3, VOCAB_SIZE, (length,)) for length in range(4, 11)]
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, use_cpu=True),
        eval_dataset=[{"labels": text} for text in texts],
        data_collator=collate,
        preprocess_logits_for_metrics=lambda logits, labels: vars(score_items(logits[:, :-1], labels[:, 1:])),
        compute_metrics=lambda prediction: calibration_metrics(ItemScores(**prediction.predictions)),
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        logits = torch.cat([model(text[None]).logits[0, :-1] for text in texts])
    expected = calibration_metrics(logits, torch.cat([text[1:] for text in texts]))
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_numpy_arrays_as_of_a_trainer_work() -> None:
    logits, labels = random_items()
    prediction = EvalPrediction(logits.numpy(), labels.numpy())
    metrics = calibration_metrics(prediction.predictions, prediction.label_ids)
    assert metrics == calibration_metrics(logits, labels)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_of_over_confident_logits_is_found(temperature: float) -> None:
    logits = 3 * torch.randn(4000, 5)
    labels = torch.distributions.Categorical(logits=logits).sample()  # calibrated by construction
    assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.06)


@pytest.mark.parametrize("scale", [1e-1, 1.0, 30.0])
def test_no_temperature_nearby_is_better(scale: float) -> None:
    logits, labels = random_items(300, 4, scale)
    labels[:150] = logits[:150].argmax(-1)
    temperature = fit_temperature(logits, labels)
    nll = [negative_log_likelihood(logits.double() / (temperature * factor), labels) for factor in (0.999, 1, 1.001)]
    assert nll[1] == min(nll) and temperature > 0
    assert nll[1] <= negative_log_likelihood(logits.double(), labels)


def test_the_temperature_by_hand() -> None:
    # p = sigmoid(4 / T) must be the accuracy 3/4, so T = 4 / log 3.
    logits, labels = torch.tensor([[4.0, 0.0]]).repeat(4, 1), torch.tensor([0, 0, 0, 1])
    assert fit_temperature(logits, labels) == pytest.approx(4 / math.log(3), rel=1e-8)


@pytest.mark.parametrize("distance", [1e-3, 1.0, 1e3, 1e30])
def test_items_without_an_optimal_temperature_give_a_bound_and_a_warning(
    distance: float, caplog: pytest.LogCaptureFixture
) -> None:
    logits, labels = distance * (torch.eye(3) - 1), torch.arange(3)
    assert fit_temperature(logits, labels) == MIN_TEMPERATURE
    assert "no minimum" in caplog.text
    assert fit_temperature(-logits, labels) == MAX_TEMPERATURE
    assert fit_temperature(torch.full((3, 3), distance), labels) == 1.0


BAD = {
    "no_class_dimension": (torch.randn(4), torch.zeros(4, dtype=torch.long), "shape"),
    "one_class": (torch.randn(4, 1), torch.zeros(4, dtype=torch.long), "at least two classes"),
    "other_length": (torch.randn(4, 3), torch.zeros(5, dtype=torch.long), r"\(4, 3\) and \(5,\)"),
    "several_labels": (torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.long), "shape"),
    "label_too_high": (torch.randn(2, 3), torch.tensor([0, 3]), r"labels in \[0, 3\).*got 3"),
    "label_too_low": (torch.randn(2, 3), torch.tensor([0, -1]), "got -1"),
    "float_labels": (torch.randn(2, 3), torch.tensor([0.0, 1.0]), "integer `labels`"),
    "predicted_classes": (torch.tensor([[0, 1]]), torch.tensor([0]), "floating-point `logits`"),
    "nan": (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "finite logits"),
    "infinity": (torch.tensor([[0.0, -math.inf]]), torch.tensor([0]), "finite logits"),
    "empty": (torch.randn(0, 3), torch.zeros(0, dtype=torch.long), "at least one item"),
    "all_ignored": (torch.randn(2, 3), torch.tensor([-100, -100]), "at least one item"),
    "probabilities": (torch.randn(9, 3).softmax(-1), torch.zeros(9, dtype=torch.long), "probabilities"),
    "rounded_probabilities": (
        torch.randn(40, 10, generator=torch.Generator().manual_seed(0)).softmax(-1).mul(100).round() / 100,
        torch.zeros(40, dtype=torch.long),
        "probabilities",
    ),
    "half_probabilities": (
        torch.randn(9, 30).softmax(-1).bfloat16(),
        torch.zeros(9, dtype=torch.long),
        "probabilities",
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_bad_input_is_refused(metric, bad: str) -> None:
    logits, labels, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        metric(logits, labels)


def test_non_negative_logits_are_not_taken_for_probabilities() -> None:
    logits, labels = random_items()
    assert negative_log_likelihood(logits.relu(), labels) > 0
    # Their sums are as close to 1 as those of rounded probabilities.
    assert negative_log_likelihood(logits.softmax(-1) + 0.01 / logits.shape[-1], labels) > 0
    assert negative_log_likelihood(torch.zeros(3, 1000), torch.tensor([0, 1, 2])) > 0
    assert negative_log_likelihood(logits.log_softmax(-1), labels) == pytest.approx(
        negative_log_likelihood(logits, labels), abs=1e-6
    )


def test_a_batch_without_labels_among_others_is_allowed() -> None:
    scores = score_items(torch.randn(2, 3, 5), torch.full((2, 3), -100))
    assert all(np.array_equal(values, torch.full((2, 3), -100.0)) for values in vars(scores).values())


def test_bad_options_are_refused() -> None:
    logits, labels = random_items()
    for num_bins in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="at least 1"):
            expected_calibration_error(logits, labels, num_bins)
    with pytest.raises(ValueError, match="equal_width"):
        expected_calibration_error(logits, labels, binning="equal")
    with pytest.raises(ValueError, match="labels"):
        brier_score(logits)


def test_the_maximum_error_comes_with_the_items_of_its_bin() -> None:
    # One unlucky item of confidence .5 among a hundred of .9, of which 90 are right.
    confidence = torch.tensor([0.5] + [0.9] * 100)
    bins = reliability(items_of(confidence, torch.tensor([0.0] + [1.0] * 90 + [0.0] * 10)))
    assert bins.maximum_error == pytest.approx(0.5) and bins.maximum_error_items == 1
    metrics = calibration_metrics(items_of(confidence, torch.tensor([0.0] + [1.0] * 90 + [0.0] * 10)))
    text = build_card(CardContent("n", "BertModel", "not trained", metrics={"calibration": metrics})).text
    assert "| Maximum calibration error | 0.5 |\n| Items in the bin with that error | 1 |" in text
