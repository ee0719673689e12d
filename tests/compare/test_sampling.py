"""The first tuning trials cover the space of every argument evenly, whatever its kind and their number."""

import math

import pytest

from hf_attentiondrop.compare.sampling import FIRST, sample
from hf_attentiondrop.compare.search import Search, Space


ONE_TO_TWELVE = range(1, FIRST + 1)


def tried(space: Space, trials: int, name: str = "x") -> list:
    return [sample(trial, trials, {name: space}, "score", "higher", [])[name] for trial in range(min(trials, FIRST))]


@pytest.mark.parametrize("trials", ONE_TO_TWELVE)
def test_ranges_are_covered_evenly(trials: int) -> None:
    middles = [(part + 0.5) / trials for part in range(trials)]
    assert sorted(tried(Space(-1.0, 3.0), trials)) == pytest.approx([4 * middle - 1 for middle in middles])
    logarithms = [math.log10(value) for value in tried(Space(1e-4, 1.0, log=True), trials)]
    assert sorted(logarithms) == pytest.approx([4 * middle - 4 for middle in middles])


@pytest.mark.parametrize("trials", ONE_TO_TWELVE)
@pytest.mark.parametrize(
    "space, shares",
    [
        (Space(1, 5), dict.fromkeys(range(1, 6), 1 / 5)),
        (Space(-2, 1), dict.fromkeys(range(-2, 2), 1 / 4)),
        (Space(1, 7, log=True), {value: math.log2(1 + 1 / value) / 3 for value in range(1, 8)}),
        (Space(choices=("mask", "zero", 3)), dict.fromkeys(("mask", "zero", 3), 1 / 3)),
    ],
)
def test_integers_and_choices_are_covered_evenly(space: Space, shares: dict, trials: int) -> None:
    values = tried(space, trials)
    assert set(values) <= set(shares)
    for value, share in shares.items():
        assert abs(values.count(value) - share * trials) < 1


def test_a_longer_search_starts_with_twelve_even_trials() -> None:
    assert tried(Space(0.0, 1.0), 40) == tried(Space(0.0, 1.0), FIRST)


def test_methods_try_the_same_values_of_a_common_argument_and_pair_arguments_at_random() -> None:
    lr, p = [1e-5, 1e-3, "log"], [0.0, 0.5]
    search = Search(12, "loss", {"a": {"lr": lr}, "b": {"p": p, "lr": lr}, "c": {"lr": lr, "k": [1, 9]}})
    trials = {
        method: [sample(trial, 12, search.space(method), "loss", "lower", []) for trial in range(12)]
        for method in search.spaces
    }
    rates = {method: [values["lr"] for values in of] for method, of in trials.items()}
    assert rates["a"] == rates["b"] == rates["c"]
    # Neither sorted nor in the order of the other argument.
    assert rates["b"] != sorted(rates["b"])
    by_p = sorted(trials["b"], key=lambda values: values["p"])
    assert [values["lr"] for values in by_p] not in (sorted(rates["b"]), sorted(rates["b"], reverse=True))
