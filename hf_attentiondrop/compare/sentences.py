"""The outcome of a comparison in words and numbers.

The sentence of a method has one clause per metric, the decided ones first:

| verdict of the metric, see [`Comparison`] | clause |
|---|---|
| better, worse | "better calibrated: −0.031 ± 0.012 ECE" |
| perhaps better, perhaps worse | the same after "perhaps", with the adjusted p-value that does not confirm it |
| unclear | "accuracy cannot be told from dropout's", for all such metrics together |
| unknown | why there is no interval, for all metrics with the same reason together |

"Cannot be told from" does not mean equal: the interval says how large the difference can still be.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .comparison import Comparison, Estimate


MINUS = "\N{MINUS SIGN}"
MISSING = "\N{EN DASH}"
DECIDED = ("better", "worse", "perhaps better", "perhaps worse")
SMALLEST_P = 0.001


class Words(NamedTuple):
    """A metric in a sentence: "{noun} cannot be told", "{better}: +0.01 {unit}"."""

    noun: str
    better: str
    worse: str
    unit: str = ""


# Metrics that have a word of their own in a sentence. All others go by the names that the tables show.
SPOKEN = {
    r"(test_|eval_)?accuracy": Words("accuracy", "more accurate", "less accurate"),
    r"(calibration[/.])?(test_|eval_)?(expected_calibration_error|ece)": Words(
        "calibration", "better calibrated", "worse calibrated", " ECE"
    ),
}


def words_of(metric: str, metrics: Sequence[str]) -> Words:
    """How to speak of one of several metrics; those that would sound alike go by their full names.

    >>> words_of("test_accuracy", ["test_accuracy", "robust/accuracy"]).better
    'more accurate'
    >>> words_of("test_accuracy", ["test_accuracy", "eval_accuracy"]).better
    'better test_accuracy'
    """
    spoken = {name: _spoken(name) for name in metrics}
    if sum(words.noun == spoken[metric].noun for words in spoken.values()) > 1:
        return _named(metric)
    return spoken[metric]


def sentence(comparisons: Mapping[str, Comparison], reference: str) -> str:
    """The outcome of one method, without its name.

    Args:
        comparisons (`dict`): metric to the [`Comparison`] of the method with the reference.
        reference (`str`): its name.

    Example:

    >>> better = Comparison(None, difference=Estimate(-0.031, 0.012, 5), adjusted_p=0.01, verdict="better")
    >>> sentence({"test_accuracy": Comparison(None, verdict="unclear"), "test_ece": better}, "dropout")
    "better calibrated: −0.031 ± 0.012 ECE; accuracy cannot be told from dropout's."
    """
    words = {metric: words_of(metric, list(comparisons)) for metric in comparisons}
    clauses = [
        _decided_clause(comparison, words[metric])
        for verdict in DECIDED
        for metric, comparison in comparisons.items()
        if comparison.verdict == verdict
    ]
    unclear = [words[metric].noun for metric, comparison in comparisons.items() if comparison.verdict == "unclear"]
    if unclear:
        clauses.append(f"{enumerated(unclear)} cannot be told from {reference}'s")
    unknown: dict[str, list[str]] = {}
    for metric, comparison in comparisons.items():
        if comparison.verdict == "unknown":
            unknown.setdefault(comparison.note, []).append(words[metric].noun)
    clauses += [f"{enumerated(nouns)}: {note}" for note, nouns in unknown.items()]
    return "; ".join(clauses) + "."


def enumerated(nouns: Sequence[str]) -> str:
    """
    >>> enumerated(["a"]), enumerated(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, (", ".join(nouns[:-1]), nouns[-1])))


def format_estimate(estimate: Estimate | None, signed: bool = False) -> str:
    """A mean and half the width of its interval, which has two significant digits.

    >>> format_estimate(Estimate(0.91234, 0.00456, 5)), format_estimate(Estimate(-0.03, 0.0121, 5), signed=True)
    ('0.9123 ± 0.0046', '−0.030 ± 0.012')
    >>> format_estimate(Estimate(0.91234, None, 2)), format_estimate(None)
    ('0.9123', '–')
    """
    if estimate is None:
        return MISSING
    sign = "+" if signed else ""
    if not estimate.half_width:
        text = f"{estimate.mean:{sign}.4g}" + ("" if estimate.half_width is None else " ± 0")
    else:
        decimals = max(0, 1 - math.floor(math.log10(estimate.half_width)))
        text = f"{estimate.mean:{sign}z.{decimals}f} ± {estimate.half_width:.{decimals}f}"
    return text.replace("-", MINUS)


def format_p(p: float | None) -> str:
    """
    >>> format_p(0.0421), format_p(0.00001), format_p(0.7), format_p(None)
    ('0.042', '< 0.001', '0.70', '–')
    """
    if p is None:
        return MISSING
    if p < SMALLEST_P:
        return f"< {SMALLEST_P}"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def format_ratio(ratio: float | None) -> str:
    """
    >>> format_ratio(1.234), format_ratio(None)
    ('1.23×', '–')
    """
    return MISSING if ratio is None else f"{ratio:.2f}×"


def _spoken(name: str) -> Words:
    return next((words for pattern, words in SPOKEN.items() if re.fullmatch(pattern, name)), _named(name))


def _named(name: str) -> Words:
    return Words(name, f"better {name}", f"worse {name}")


def _decided_clause(comparison: Comparison, words: Words) -> str:
    perhaps = "perhaps " if comparison.verdict.startswith("perhaps") else ""
    comparative = words.better if comparison.verdict.endswith("better") else words.worse
    clause = f"{perhaps}{comparative}: {format_estimate(comparison.difference, signed=True)}{words.unit}"
    remarks = [f"adjusted p = {format_p(comparison.adjusted_p)}"] if perhaps else []
    remarks += [comparison.note] if comparison.note else []
    return f"{clause} ({'; '.join(remarks)})" if remarks else clause
