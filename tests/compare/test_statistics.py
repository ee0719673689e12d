"""The statistics agree with statsmodels, cover planted effects and bound the family error of planted nulls."""

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from hf_attentiondrop.compare.statistics import holm, t_interval, t_test


@pytest.mark.parametrize("count", [2, 3, 5, 30])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_interval_and_paired_test_agree_with_statsmodels(count: int, scale: float) -> None:
    method, reference = scale * np.random.default_rng(count).normal(0.1, 1, (2, count))
    described = DescrStatsW(method - reference)
    mean, half_width = t_interval(method - reference)
    assert (mean - half_width, mean + half_width) == pytest.approx(described.tconfint_mean(0.05), rel=1e-9)
    assert t_test(method - reference) == pytest.approx(described.ttest_mean(0)[1], rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 6, 20])
def test_holm_agrees_with_statsmodels(count: int) -> None:
    p = np.random.default_rng(count).uniform(0, 1 / count, count) ** 2
    p[: count // 3] = p[0]
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], rel=1e-12)
    batch = np.stack([p, p[::-1]])
    assert np.array_equal(holm(batch), np.stack([holm(p), holm(p)[::-1]]))


def test_equal_values_have_an_interval_of_width_0_and_no_spread_to_test() -> None:
    # The mean of three times 0.1 is not 0.1 in floating point.
    assert [float(x) for x in t_interval([0.1, 0.1, 0.1])] == [pytest.approx(0.1), 0]
    assert t_test([0.1, 0.1, 0.1]) == 0 and t_test([-3.0] * 4) == 0
    assert t_test([0.0, 0.0, 0.0]) == 1
    # The order of magnitude of rounding in 0.9 - 0.8 and 0.3 - 0.2.
    assert t_interval([0.9 - 0.8, 0.3 - 0.2, 0.1])[1] == 0


def studies(effects: list[float], count: int) -> np.ndarray:
    """Differences from the reference in simulated studies of five seeds: `(count, methods, seeds)`.

    All methods of a study are paired with the same runs of the reference, so their tests depend on each other.
    """
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(count, 1, 5))
    return np.array(effects)[:, None] + generator.normal(size=(count, len(effects), 5)) - reference


def test_intervals_cover_a_planted_effect_in_95_percent_of_studies() -> None:
    mean, half_width = t_interval(studies([0.7], 1000))
    assert np.mean(np.abs(mean - 0.7) <= half_width) == pytest.approx(0.95, abs=0.02)


def test_holm_keeps_the_family_error_below_5_percent_and_finds_a_planted_effect() -> None:
    p = t_test(studies([0.0] * 6, 1000))
    adjusted = holm(p)
    assert adjusted.shape == (1000, 6)
    # Three standard errors of a share of 5 % in 1,000 studies.
    assert np.mean((adjusted < 0.05).any(axis=1)) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)
    # Without the correction, the error is well above.
    assert np.mean((p < 0.05).any(axis=1)) > 0.1
    found = holm(t_test(studies([8.0] + [0.0] * 5, 1000))) < 0.05
    assert found[:, 0].mean() > 0.9 and found[:, 1:].any(axis=1).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)
