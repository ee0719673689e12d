"""Methods are paired with the reference by seed, and verdicts follow their tests."""

import math

import numpy as np
import pytest

from hf_attentiondrop.compare.comparison import compare_costs, compare_methods, complete_tests, metric_values
from hf_attentiondrop.compare.statistics import holm, t_interval, t_test

from . import question, run, study


REFERENCE = {0: 0.90, 1: 0.94, 2: 0.86, 3: 0.90}


def shifted(*differences: float) -> dict[int, float]:
    return {seed: REFERENCE[seed] + difference for seed, difference in enumerate(differences)}


def test_differences_are_paired_by_seed_whatever_the_order_of_the_runs() -> None:
    runs = study(5)
    values = metric_values(
        [runs[i] for i in np.random.default_rng(1).permutation(len(runs))], question(), "test_accuracy"
    )
    compared = compare_methods(values, "dropout", "higher")
    matrix = np.array([[values[method][seed] for seed in range(5)] for method in question().methods])
    differences = matrix[1:] - matrix[0]
    mean, half_width = t_interval(differences)
    p = t_test(differences)
    others = [compared[method] for method in question().others]
    assert [one.difference.mean for one in others] == pytest.approx(mean)
    assert [one.difference.half_width for one in others] == pytest.approx(half_width)
    assert [one.p for one in others] == pytest.approx(p)
    assert [one.adjusted_p for one in others] == pytest.approx(holm(p))
    assert [list(one.differences) for one in others] == [[0, 1, 2, 3, 4]] * 3
    assert compared["dropout"].estimate.mean == pytest.approx(matrix[0].mean())
    assert compared["dropout"].difference is None and compared["dropout"].adjusted_p is None


def test_only_common_seeds_enter_the_difference_and_all_seeds_the_mean() -> None:
    values = {"dropout": REFERENCE, "blur": {9: 0.5, 2: 0.89, 1: 0.95, 0: 0.92}}
    blur = compare_methods(values, "dropout", "higher")["blur"]
    assert blur.differences == pytest.approx({0: 0.02, 1: 0.01, 2: 0.03}) and blur.num_better == 3
    assert blur.difference.count == 3 and blur.difference.mean == pytest.approx(0.02)
    assert blur.estimate.count == 4 and blur.estimate.mean == pytest.approx(0.815)
    assert blur.note == "compared on 3 of 5 seeds, as the other runs have no result"


@pytest.mark.parametrize("direction, sign", [("higher", 1), ("lower", -1)])
def test_verdicts_follow_the_intervals_and_the_corrected_tests(direction: str, sign: int) -> None:
    changes = {
        "good": (0.030, 0.031, 0.030, 0.029),
        "perhaps good": (0.01, 0.02, 0.03, 0.018),
        "alike": (0.01, -0.02, 0.03, -0.01),
        "perhaps bad": (-0.01, -0.02, -0.03, -0.018),
        "bad": (-0.030, -0.031, -0.030, -0.029),
        "few": (0.03, 0.03),
        "none": (),
    }
    values = {"dropout": REFERENCE, **{name: shifted(*(sign * d for d in ds)) for name, ds in changes.items()}}
    compared = compare_methods(values, "dropout", direction)
    verdicts = {name: one.verdict for name, one in compared.items() if name != "dropout"}
    assert list(verdicts.values()) == [
        "better", "perhaps better", "unclear", "perhaps worse", "worse", "unknown", "unknown",
    ]  # fmt: skip
    assert [compared[name].num_better for name in changes] == [4, 4, 2, 0, 0, 2, 0]
    for one in compared.values():
        if one.p is not None:
            excludes_0 = abs(one.difference.mean) > one.difference.half_width
            assert excludes_0 == (one.p < 0.05) == (one.verdict != "unclear")


def test_fewer_than_three_common_seeds_have_no_interval_and_are_not_in_the_family() -> None:
    good = (0.030, 0.031, 0.030, 0.029)
    values = {"dropout": REFERENCE, "few": shifted(0.02, 0.03), "one": shifted(0.02), "good": shifted(*good)}
    compared = compare_methods(values, "dropout", "higher")
    few = compared["few"]
    assert few.difference.half_width is few.estimate.half_width is few.p is few.adjusted_p is None
    assert few.difference.mean == pytest.approx(0.025)
    assert few.note == "no interval from 2 seeds in common with the reference, at least 3 are needed"
    assert "from 1 seed in" in compared["one"].note
    assert compared["good"].adjusted_p == compared["good"].p
    assert compare_methods({"dropout": REFERENCE, "none": {7: 0.9}}, "dropout", "higher")["none"].difference is None


def test_equal_differences_are_noted() -> None:
    values = {
        "dropout": REFERENCE,
        "same": dict(REFERENCE),
        "shifted": {seed: v - 0.1 for seed, v in REFERENCE.items()},
    }
    # Differences of rounding are none.
    values["rounded"] = {seed: value * (1 + 2e-16) for seed, value in REFERENCE.items()}
    compared = compare_methods(values, "dropout", "higher")
    assert (compared["same"].p, compared["same"].verdict, compared["same"].difference.half_width) == (1, "unclear", 0)
    assert compared["rounded"].differences == compared["same"].differences and compared["rounded"].p == 1
    assert (compared["shifted"].p, compared["shifted"].verdict) == (0, "worse")
    assert all("all 4 differences are equal" in compared[name].note for name in ("same", "shifted", "rounded"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"Expected finite values, got {value} of 'blur' with seed 1: .* failed"):
        compare_methods({"dropout": REFERENCE, "blur": {0: 0.9, 1: value}}, "dropout", "higher")


def test_only_complete_test_runs_of_the_methods_count() -> None:
    runs = [run("blur", 0, 0.7), run("blur", 1, phase="tune"), run("blur", 2, state="failed"), run("old", 0)]
    runs.append(run("blur", 3, metrics={"loss": 1.0}))
    assert metric_values(runs, question(), "test_accuracy")["blur"] == {0: 0.7}
    assert list(complete_tests(runs, question())["blur"]) == [0, 3]
    with pytest.raises(ValueError, match="two of 'blur' with seed 0"):
        complete_tests([*runs, run("blur", 0, trial=1)], question())


def test_costs_are_medians_of_pairs_on_equal_hardware() -> None:
    runs = [run("dropout", seed, seconds=10.0 + seed, peak_memory_mb=100.0) for seed in range(4)]
    factors = (1.0, 3.0, 1.5, 9.0)
    runs += [run("blur", seed, seconds=factors[seed] * (10 + seed), peak_memory_mb=None) for seed in range(3)]
    runs += [run("blur", 3, seconds=9.0 * 13, hardware="a faster one", peak_memory_mb=None)]
    cost = compare_costs(runs, question())["blur"]
    assert cost.seconds == pytest.approx(1.5) and cost.peak_memory_mb is None and cost.count == 3
    assert compare_costs(runs, question())["hard"].seconds is None
