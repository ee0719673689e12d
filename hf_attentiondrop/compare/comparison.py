"""Methods compared with a reference over seeds: means, paired differences and cost.

Intervals and p-values describe the variation over seeds on the data of the study, not over data sets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from .results import Direction, Question, Run
from .statistics import CONFIDENCE, all_equal, holm, t_interval, t_test


MIN_SEEDS = 3
# A smaller difference, as a share of the values, is rounding.
ROUNDING = 1e-12

Verdict = Literal["better", "worse", "perhaps better", "perhaps worse", "unclear", "unknown"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half the width of its 95 % interval, or `None` below three seeds."""

    mean: float
    half_width: float | None
    count: int


@dataclass(frozen=True)
class Comparison:
    """One method on one metric, compared with the reference.

    Attributes:
        estimate ([`Estimate`] or `None`): mean of the method, over all its seeds; `None` without any.
        differences (`dict`): seed to the value of the method minus that of the reference, over their common seeds.
        difference ([`Estimate`] or `None`): mean of the differences; `None` without any, and for the reference.
        p (`float` or `None`): of the paired t-test; `None` below three common seeds.
        adjusted_p (`float` or `None`): the same after [`holm`] within the metric, see [`compare_methods`].
        num_better (`int`): number of common seeds with a difference in the better direction.
        verdict (`str`): `"better"` or `"worse"` if the adjusted p-value is below 0.05; with `"perhaps"` if only the
            interval of the difference excludes 0; `"unclear"` if it does not; `"unknown"` without an interval.
        note (`str`): why there is no interval, or why it is not to be trusted.
    """

    estimate: Estimate | None
    differences: dict[int, float] = field(default_factory=dict)
    difference: Estimate | None = None
    p: float | None = None
    adjusted_p: float | None = None
    num_better: int = 0
    verdict: Verdict = "unknown"
    note: str = ""


def compare_methods(
    values: Mapping[str, Mapping[int, float]], reference: str, direction: Direction
) -> dict[str, Comparison]:
    """Compares methods with a reference on one metric, paired by seed.

    The family of Holm's correction is the metric: one test for each method that has at least three seeds in common
    with the reference. For each metric, the chance that any method is called better or worse that is neither is at
    most 5 %. Several metrics are several families: decide before the study which metric counts.

    Args:
        values (`dict`): method to a dict from seed to the metric.
        reference (`str`): one of the methods.
        direction (`str`): `"higher"` or `"lower"`, whichever is better.

    Returns:
        `dict`: method to [`Comparison`], in the order of `values`.

    Raises:
        ValueError: for a value that is not finite.

    Example:

    >>> values = {"dropout": {0: 0.90, 1: 0.91, 2: 0.89}, "blur": {0: 0.92, 1: 0.93, 2: 0.92}}
    >>> blur = compare_methods(values, "dropout", "higher")["blur"]
    >>> blur.verdict, f"{blur.difference.mean:.3f}", blur.num_better
    ('better', '0.023', 3)
    """
    for method, seeds in values.items():
        for seed, value in seeds.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"Expected finite values, got {value} of {method!r} with seed {seed}: it would spoil the mean. A "
                    "run that diverged counts as failed, so leave it out."
                )
    found = {
        method: _compare(seeds, values[reference], direction)
        if method != reference
        else Comparison(_estimate(list(seeds.values())))
        for method, seeds in values.items()
    }
    tested = {method: comparison.p for method, comparison in found.items() if comparison.p is not None}
    for method, adjusted in zip(tested, holm(list(tested.values())).tolist(), strict=True):
        found[method] = replace(
            found[method], adjusted_p=adjusted, verdict=_verdict(found[method], adjusted, direction)
        )
    return found


def metric_values(runs: Sequence[Run], question: Question, metric: str) -> dict[str, dict[int, float]]:
    """Collects a metric from the complete test runs: method to seed to value, with all methods of the question.

    Raises:
        ValueError: if a method has two complete test runs with one seed.
    """
    return {
        method: {seed: run.metrics[metric] for seed, run in of_method.items() if metric in run.metrics}
        for method, of_method in complete_tests(runs, question).items()
    }


def complete_tests(runs: Sequence[Run], question: Question) -> dict[str, dict[int, Run]]:
    """The complete test runs: method to seed to run, with all methods of the question and no others.

    Raises:
        ValueError: if a method has two of them with one seed.
    """
    found: dict[str, dict[int, Run]] = {method: {} for method in question.methods}
    for run in runs:
        if run.phase == "test" and run.state == "complete" and run.method in found:
            if run.seed in found[run.method]:
                raise ValueError(
                    f"Expected one complete test run per method and seed, got two of {run.method!r} with seed "
                    f"{run.seed}: the seed would count twice. Remove one of them from the results."
                )
            found[run.method][run.seed] = run
    return found


@dataclass(frozen=True)
class Cost:
    """Cost of a method relative to the reference: medians of paired ratios, `None` without pairs on equal hardware."""

    seconds: float | None
    peak_memory_mb: float | None
    count: int


def compare_costs(runs: Sequence[Run], question: Question) -> dict[str, Cost]:
    """Compares time and peak memory with the reference, over pairs of test runs with equal seed and equal hardware.

    Returns:
        `dict`: each method but the reference to its [`Cost`].
    """
    tests = complete_tests(runs, question)
    costs = {}
    for method in question.others:
        pairs = [(run, tests[question.reference].get(seed)) for seed, run in tests[method].items()]
        same = [(run, other) for run, other in pairs if other is not None and run.hardware == other.hardware]
        costs[method] = Cost(_median_ratio(same, "seconds"), _median_ratio(same, "peak_memory_mb"), len(same))
    return costs


def _estimate(values: Sequence[float]) -> Estimate | None:
    if not values:
        return None
    if len(values) < MIN_SEEDS:
        return Estimate(float(np.mean(values)), None, len(values))
    mean, half_width = t_interval(values)
    return Estimate(float(mean), float(half_width), len(values))


def _compare(values: Mapping[int, float], reference: Mapping[int, float], direction: Direction) -> Comparison:
    """The comparison before Holm's correction."""
    common = [seed for seed in sorted(values) if seed in reference]
    differences = {seed: _difference(values[seed], reference[seed]) for seed in common}
    if not common:
        return Comparison(_estimate(list(values.values())), note="no seed in common with the reference")
    spread = list(differences.values())
    sign = 1 if direction == "higher" else -1
    p, note = None, ""
    if len(common) < MIN_SEEDS:
        seeds = f"{len(common)} seed" + ("s" if len(common) > 1 else "")
        note = f"no interval from {seeds} in common with the reference, at least {MIN_SEEDS} are needed"
    else:
        p = float(t_test(spread))
        if len(common) < (most := len(values.keys() | reference.keys())):
            note = f"compared on {len(common)} of {most} seeds, as the other runs have no result"
        if all_equal(np.array(spread)):
            note = f"all {len(common)} differences are equal, so neither interval nor p-value has a spread to rely on"
    return Comparison(
        _estimate(list(values.values())),
        differences,
        _estimate(spread),
        p,
        num_better=sum(sign * difference > 0 for difference in spread),
        note=note,
    )


def _difference(value: float, reference: float) -> float:
    difference = value - reference
    return 0.0 if abs(difference) <= ROUNDING * max(abs(value), abs(reference)) else difference


def _verdict(comparison: Comparison, adjusted_p: float, direction: Direction) -> Verdict:
    assert comparison.p is not None and comparison.difference is not None
    if comparison.p >= 1 - CONFIDENCE:
        return "unclear"
    is_better = (comparison.difference.mean > 0) == (direction == "higher")
    if adjusted_p < 1 - CONFIDENCE:
        return "better" if is_better else "worse"
    return "perhaps better" if is_better else "perhaps worse"


def _median_ratio(pairs: Sequence[tuple[Run, Run]], name: str) -> float | None:
    values = [(getattr(run, name), getattr(other, name)) for run, other in pairs]
    ratios = [value / other for value, other in values if value is not None and other is not None]
    return float(np.median(ratios)) if ratios else None
