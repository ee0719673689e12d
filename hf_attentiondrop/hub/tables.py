"""The figures of a run as the tables of its card. What was not measured has no row, and nothing no table."""

import math
from collections.abc import Mapping
from typing import Any


Table = list[tuple[str, ...]]
"""Rows of cells, the header first; empty if there is nothing to show."""

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
# The metrics that the Hub knows by name, as https://huggingface.co/metrics lists them.
HUB_METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "macro_f1": "f1",
    "matthews_correlation": "matthews_correlation",
    "bleu": "sacrebleu",
    "chrf": "chrf",
    "perplexity": "perplexity",
}
# Trivial predictors that a metric may be held against, by the prefix of their figures.
BASELINES = {"majority": "most frequent class", "copy": "copied source", "unigram": "token frequencies"}
# What an evaluation reports beside its metrics.
NOT_METRICS = ("samples", "tokens", "runtime", "model_preparation_time")


def evaluation_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite metrics of an evaluation, without their prefix and without counts and times.

    Example:

    >>> evaluation_metrics({"eval_accuracy": 0.5, "eval_samples": 8, "eval_samples_per_second": 9.0, "epoch": 1.0})
    {'accuracy': 0.5}
    """
    found = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    return {
        name: value
        for name, value in found.items()
        if is_figure(value) and name not in NOT_METRICS and not name.endswith("_per_second")
    }


def results_table(metrics: Mapping[str, Any]) -> Table:
    """The metrics of the evaluation, each beside the trivial predictor that the run compared it with. Those of the
    calibration have a table of their own."""
    calibration = metrics.get("calibration") or {}
    figures = {name: value for name, value in evaluation_metrics(metrics).items() if name not in calibration}
    baselines = {
        prefix: title
        for prefix, title in BASELINES.items()
        if any(is_figure(metrics.get(f"{prefix}_{name}")) for name in figures)
    }
    rows = [
        (title_of(name), number(value), *(number(metrics.get(f"{prefix}_{name}")) for prefix in baselines))
        for name, value in figures.items()
    ]
    return [("Metric", "This model", *map(str.capitalize, baselines.values())), *rows] if rows else []


def calibration_table(metrics: Mapping[str, Any]) -> Table:
    """The calibration as it is, and after temperature scaling where that was fitted."""
    figures = metrics.get("calibration") or {}
    after = figures.get("after_temperature") or {}
    names = [name for name in METRIC_TITLES if is_figure(figures.get(name)) or is_figure(after.get(name))]
    if not names:
        return []
    if not after:
        return [("Metric", "Value"), *((title_of(name), number(figures.get(name))) for name in names)]
    temperature = figures.get("temperature")
    scaled = "After temperature scaling, cross-fitted"
    scaled += f" (T = {number(temperature)} on all samples)" if is_figure(temperature) else ""
    rows = [(title_of(name), number(figures.get(name)), number(after.get(name))) for name in names]
    return [("Metric", "As it is", scaled), *rows]


def robustness_table(metrics: Mapping[str, Any]) -> Table:
    """The accuracy under each attack, below that without one."""
    figures = metrics.get("robustness") or {}
    rows = [
        (str(attack.get("name", "")), _epsilon(attack.get("epsilon"), figures.get("norm")), number(attack["accuracy"]))
        for attack in figures.get("attacks") or []
        if is_figure(attack.get("accuracy"))
    ]
    return [("Attack", "ε", "Accuracy"), *rows] if rows else []


def attention_table(metrics: Mapping[str, Any]) -> Table:
    """The statistics of the attention weights, one row per stack and kind of attention."""
    stacks = metrics.get("attention") or {}
    names = list(dict.fromkeys(name for means in stacks.values() for name, value in means.items() if is_figure(value)))
    names = [name for name in names if name not in NOT_METRICS]
    rows = [(title_of(stack), *(number(means.get(name)) for name in names)) for stack, means in stacks.items()]
    return [("Attention", *map(title_of, names)), *rows] if names else []


def title_of(name: str) -> str:
    """The metric in words."""
    return METRIC_TITLES.get(name, name.replace("_", " ").capitalize())


def is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """A figure with four significant digits, a dash where there is none.

    Example:

    >>> number(0.123456), number(31.0), number(12345), number(1.5e-05), number(None)
    ('0.1235', '31', '12345', '1.5e-05', '-')
    """
    if not is_figure(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _epsilon(value: Any, norm: Any) -> str:
    """The budget, in steps of an 8-bit image where it is a whole number of them."""
    steps = round(value * 255) if norm == "linf" and is_figure(value) else 0
    return f"{steps}/255" if steps and math.isclose(value * 255, steps, rel_tol=1e-6) else number(value)
