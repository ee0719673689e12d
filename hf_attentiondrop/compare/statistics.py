"""The t-interval, the paired t-test and Holm's correction, over the last axis of an array.

Intervals and tests assume that the values, such as differences between two methods over seeds, are about normal.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


CONFIDENCE = 0.95
# Values that differ by less than this share of the largest are equal up to rounding.
EQUAL = 1e-9


def t_interval(values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % t-interval of a mean.

    Args:
        values (`array` of shape `(..., n)`): independent values, `n` at least 2.

    Returns:
        `tuple`: the mean and half the width of the interval, both of shape `(...)`. The width of equal values is 0.

    Raises:
        ImportError: if SciPy is missing.

    Source: Student 1908, "The Probable Error of a Mean".

    Example:

    >>> mean, half_width = t_interval([0.90, 0.92, 0.94])
    >>> round(float(mean), 3), round(float(half_width), 3)
    (0.92, 0.05)
    """
    mean, error, freedom = _mean_and_error(values)
    return mean, error * _scipy_stats().t.ppf((1 + CONFIDENCE) / 2, freedom)


def t_test(differences: ArrayLike) -> np.ndarray:
    """The two-sided p-value of the paired t-test, from the paired differences.

    Args:
        differences (`array` of shape `(..., n)`): one value per pair, `n` at least 2.

    Returns:
        `array` of shape `(...)`. Of equal differences, which have no spread to test against, it is 1 if they are 0 and
        otherwise 0, the limit as the spread vanishes.

    Example:

    >>> round(float(t_test([0.01, 0.02, 0.03])), 4)
    0.0742
    """
    mean, error, freedom = _mean_and_error(differences)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * _scipy_stats().t.sf(np.abs(mean / error), freedom)
    return np.where(error > 0, p, np.where(mean == 0, 1.0, 0.0))


def holm(p: ArrayLike) -> np.ndarray:
    """The p-values adjusted by Holm's step-down procedure, which bounds the chance of any false rejection.

    Args:
        p (`array` of shape `(..., m)`): the p-values of a family of `m` tests, in any order and with any dependence.

    Returns:
        `array` of shape `(..., m)`, in the same order.

    Source: Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".

    Example:

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, axis=-1)
    factors = np.arange(p.shape[-1], 0, -1)
    adjusted = np.maximum.accumulate(np.take_along_axis(p, order, -1) * factors, axis=-1)
    return np.take_along_axis(np.minimum(adjusted, 1), np.argsort(order, axis=-1), -1)


def all_equal(values: np.ndarray) -> np.ndarray:
    """Whether the values along the last axis are equal up to rounding."""
    return np.ptp(values, axis=-1) <= EQUAL * np.abs(values).max(axis=-1)


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("Comparing methods needs SciPy: `pip install scipy`.") from error
    return stats


def _mean_and_error(values: ArrayLike) -> tuple[np.ndarray, np.ndarray, int]:
    """The mean over the last axis, its standard error and the degrees of freedom."""
    values = np.asarray(values, dtype=float)
    count = values.shape[-1]
    mean = values.mean(axis=-1)
    # The standard deviation of equal numbers need not be 0, because their mean is rounded.
    error = np.where(all_equal(values), 0.0, values.std(axis=-1, ddof=1) / math.sqrt(count))
    return mean, error, count - 1
