"""Each verdict has its clause, and the decided ones come first."""

import pytest

from hf_attentiondrop.compare.comparison import Comparison, Estimate
from hf_attentiondrop.compare.sentences import format_estimate, sentence


def comparison(verdict: str, mean: float = 0.031, note: str = "", adjusted_p: float = 0.2) -> Comparison:
    return Comparison(
        None, difference=Estimate(mean, 0.012, 5), verdict=verdict, note=note, adjusted_p=adjusted_p
    )  # fmt: skip


CASES = {
    "decided": (
        {"test_accuracy": comparison("unclear"), "test_expected_calibration_error": comparison("better", -0.031)},
        "better calibrated: −0.031 ± 0.012 ECE; accuracy cannot be told from dropout's.",
    ),
    "order": (
        {"loss": comparison("perhaps worse"), "macro_f1": comparison("worse"), "accuracy": comparison("better")},
        "more accurate: +0.031 ± 0.012; worse macro_f1: +0.031 ± 0.012; "
        "perhaps worse loss: +0.031 ± 0.012 (adjusted p = 0.20).",
    ),
    "unclear": (
        {name: comparison("unclear") for name in ("accuracy", "ece", "robust_accuracy")},
        "accuracy, calibration and robust_accuracy cannot be told from dropout's.",
    ),
    "unknown": (
        {"accuracy": comparison("unknown", note="no seed"), "loss": comparison("unknown", note="no seed")},
        "accuracy and loss: no seed.",
    ),
    "prefix": (
        {
            "test_acc": comparison("better"),
            "acc": comparison("unclear"),
            "robust/test_accuracy": comparison("unclear"),
        },
        "better test_acc: +0.031 ± 0.012; acc and robust/test_accuracy cannot be told from dropout's.",
    ),
    "nested": (
        {"a/b_c": comparison("better"), "a_b/c": comparison("worse"), "calibration/ece": comparison("unclear")},
        "better a/b_c: +0.031 ± 0.012; worse a_b/c: +0.031 ± 0.012; calibration cannot be told from dropout's.",
    ),
    "validation and test": (
        {"test_accuracy": comparison("better"), "eval_accuracy": comparison("unclear")},
        "better test_accuracy: +0.031 ± 0.012; eval_accuracy cannot be told from dropout's.",
    ),
    "alike": (
        {"clean.accuracy": comparison("better"), "noisy.accuracy": comparison("worse", -0.031)},
        "better clean.accuracy: +0.031 ± 0.012; worse noisy.accuracy: −0.031 ± 0.012.",
    ),
    "noted": (
        {"accuracy": comparison("better", note="all equal")},
        "more accurate: +0.031 ± 0.012 (all equal).",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sentence_of_a_method(case: str) -> None:
    comparisons, expected = CASES[case]
    assert sentence(comparisons, "dropout") == expected


@pytest.mark.parametrize(
    "estimate, text",
    [
        (Estimate(0.5, 0.0996, 3), "+0.500 ± 0.100"),
        (Estimate(1234.5, 120.0, 3), "+1234 ± 120"),
        (Estimate(-0.1, 0.0, 3), "−0.1 ± 0"),
        (Estimate(0.0, 0.0, 3), "+0 ± 0"),
        (Estimate(-0.0001, 0.02, 3), "+0.000 ± 0.020"),
    ],
)
def test_numbers_have_the_precision_of_their_interval(estimate: Estimate, text: str) -> None:
    assert format_estimate(estimate, signed=True) == text
