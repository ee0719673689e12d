"""The metrics of a run as tables of its card. Unmeasured metrics have no row; an empty table is omitted."""

import math
from collections.abc import Mapping
from typing import Any

from ..validation import plain


Table = list[tuple[str, ...]]
"""Rows of cells, the header first; empty if there are no rows."""

METRIC_TITLES = {
    "accuracy": "Accuracy",
    "f1": "F1",
    "macro_f1": "F1 (macro)",
    "matthews_correlation": "Matthews correlation",
    "bleu": "BLEU",
    "chrf": "chrF",
    "perplexity": "Perplexity",
    "loss": "Loss",
    "expected_calibration_error": "Expected calibration error",
    "expected_calibration_error_equal_mass": "Expected calibration error, bins of equal mass",
    "maximum_calibration_error": "Maximum calibration error",
    "maximum_calibration_error_items": "Items in the bin with that error",
    "negative_log_likelihood": "Negative log-likelihood (nats)",
    "brier_score": "Brier score",
    "entropy": "Entropy (nats)",
    "first_token_mass": "Share of the first key",
    "top_k_mass": "Share of the five strongest keys",
    "total_mass": "Sum of the weights",
    "attentions": "Self-attention",
    "encoder_attentions": "Encoder",
    "decoder_attentions": "Decoder",
    "cross_attentions": "Cross-attention",
}
# Names on the Hub, see https://huggingface.co/metrics.
HUB_METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "macro_f1": "f1",
    "matthews_correlation": "matthews_correlation",
    "bleu": "sacrebleu",
    "chrf": "chrf",
    "perplexity": "perplexity",
}
# Prefix of the metrics of a trivial predictor -> its name.
BASELINES = {"majority": "most frequent class", "copy": "copied source", "unigram": "token frequencies"}
# Ending of the calibration metrics of a test at the temperature that was fitted on the evaluation data.
AFTER_TEMPERATURE = "_after_temperature"
# Counts and times that an evaluation reports with its metrics.
NOT_METRICS = ("samples", "tokens", "runtime", "model_preparation_time")


def evaluation_metrics(metrics: Mapping[str, Any], prefix: str = "eval") -> dict[str, float]:
    """The finite metrics of an evaluation, without prefix, counts and times.

    Args:
        metrics (`Mapping[str, Any]`): those of a run.
        prefix (`str`, defaults to `"eval"`): of the evaluation; `"test"` for that on test data.

    Example:

    >>> evaluation_metrics({"eval_accuracy": 0.5, "eval_samples": 8, "eval_samples_per_second": 9.0, "epoch": 1.0})
    {'accuracy': 0.5}
    """
    prefix = f"{prefix}_"
    found = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return {
        name: value
        for name, value in found.items()
        if is_number(value) and name not in NOT_METRICS and not name.endswith(("_per_second", "_runtime"))
    }


def results_table(metrics: Mapping[str, Any]) -> Table:
    """The metrics of the evaluation, with columns for the trivial predictors that the run measured; without those of
    [`calibration_table`]."""
    calibration = metrics.get("calibration") or {}
    results = {name: value for name, value in evaluation_metrics(metrics).items() if name not in calibration}
    baselines = {
        prefix: title
        for prefix, title in BASELINES.items()
        if any(is_number(metrics.get(f"{prefix}_{name}")) for name in results)
    }
    rows = [
        (title_of(name), number(value), *(number(metrics.get(f"{prefix}_{name}")) for prefix in baselines))
        for name, value in results.items()
    ]
    return [("Metric", "This model", *map(str.capitalize, baselines.values())), *rows] if rows else []


def final_test_table(metrics: Mapping[str, Any]) -> Table:
    """The metrics of the final test, calibration included, with a column at the temperature that was fitted on the
    evaluation data, if there are such metrics.

    Example:

    >>> metrics = {"test_accuracy": 0.5, "test_brier_score": 0.8, "test_brier_score_after_temperature": 0.7}
    >>> for row in final_test_table(metrics):
    ...     print(row)
    ('Metric', 'This model', 'After temperature scaling, fitted on the evaluation data')
    ('Accuracy', '0.5', '-')
    ('Brier score', '0.8', '0.7')
    >>> final_test_table({**metrics, "calibration": {"brier_score": 0.6}})[0]  # which had no temperature to fit
    ('Metric', 'This model')
    """
    found = evaluation_metrics(metrics, "test")
    columns = {"This model": {name: value for name, value in found.items() if not name.endswith(AFTER_TEMPERATURE)}}
    calibration = metrics.get("calibration")
    after = {name.removesuffix(AFTER_TEMPERATURE): found[name] for name in found.keys() - columns["This model"]}
    # Without an optimal temperature the recipes scale nothing.
    if after and (not calibration or "temperature" in calibration):
        columns["After temperature scaling, fitted on the evaluation data"] = after
    names = columns["This model"]
    rows = [(title_of(name), *(number(values.get(name)) for values in columns.values())) for name in names]
    return [("Metric", *columns), *rows] if rows else []


def calibration_table(metrics: Mapping[str, Any]) -> Table:
    """The calibration metrics, before and after temperature scaling if it was fitted."""
    before = metrics.get("calibration") or {}
    after = before.get("after_temperature") or {}
    names = [name for name in METRIC_TITLES if is_number(before.get(name)) or is_number(after.get(name))]
    if not names:
        return []
    if not after:
        return [("Metric", "Value"), *((title_of(name), number(before.get(name))) for name in names)]
    temperature = before.get("temperature")
    scaled = "After temperature scaling, cross-fitted"
    scaled += f" (T = {number(temperature)} on all samples)" if is_number(temperature) else ""
    rows = [(title_of(name), number(before.get(name)), number(after.get(name))) for name in names]
    return [("Metric", "Before", scaled), *rows]


def robustness_table(metrics: Mapping[str, Any]) -> Table:
    """The clean accuracy, and below it the accuracy under each attack."""
    robustness = metrics.get("robustness") or {}
    rows = [
        (
            str(attack.get("name", "")),
            _epsilon(attack.get("epsilon"), robustness.get("norm")),
            number(attack["accuracy"]),
        )
        for attack in robustness.get("attacks") or []
        if is_number(attack.get("accuracy"))
    ]
    return [("Attack", "ε", "Accuracy"), *rows] if rows else []


def attention_table(metrics: Mapping[str, Any]) -> Table:
    """The attention statistics, one row per stack."""
    stacks = metrics.get("attention") or {}
    names = list(dict.fromkeys(name for means in stacks.values() for name, value in means.items() if is_number(value)))
    names = [name for name in names if name not in NOT_METRICS]
    rows = [(title_of(stack), *(number(means.get(name)) for name in names)) for stack, means in stacks.items()]
    return [("Attention", *map(title_of, names)), *rows] if names else []


def title_of(name: str) -> str:
    """The title of a metric."""
    return METRIC_TITLES.get(name, name.replace("_", " ").capitalize())


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, also of NumPy or torch."""
    value = plain(value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """A number with four significant digits; a dash for anything else.

    Example:

    >>> number(0.123456), number(31.0), number(12345), number(1.5e-05), number(None)
    ('0.1235', '31', '12345', '1.5e-05', '-')
    """
    if not is_number(value):
        return "-"
    value = plain(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _epsilon(value: Any, norm: Any) -> str:
    """The bound, in gray levels of an 8-bit image if it is a whole number of them."""
    steps = round(value * 255) if norm == "linf" and is_number(value) else 0
    return f"{steps}/255" if steps and math.isclose(value * 255, steps, rel_tol=1e-6) else number(value)
