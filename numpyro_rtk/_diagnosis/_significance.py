"""When a number is far enough from what it should be to be said: rates of false alarms."""

import math
from statistics import NormalDist

import numpy as np


FALSE_ALARM_RATE = 1e-4
"""Probability that one check, with all its levels or segments, says something about a right score."""


def normal_score(values: np.ndarray, least_error: np.ndarray | float = 0.0) -> np.ndarray:
    """Mean over the last axis in standard errors, as the normal score of Student's t.

    Args:
        values: Independent draws in the last axis.
        least_error: The standard error is taken to be no less; a few draws of a skewed law may show too small
            a one.

    References:
        Wallace (1959), *Bounds on normal approximations to Student's and the chi-square distributions*.
    """
    num = values.shape[-1]
    error = np.maximum(np.std(values, axis=-1, ddof=1) / math.sqrt(num), least_error)
    t = np.mean(values, axis=-1) / np.maximum(error, np.finfo(float).tiny)
    dof = num - 1
    size = (8 * dof + 1) / (8 * dof + 3) * np.sqrt(dof * np.log1p(t**2 / dof))
    return np.sign(t) * size


def normal_limit(num_tests: int) -> float:
    """Normal score that none of `num_tests` two-sided tests exceeds, but at the rate of false alarms."""
    return NormalDist().inv_cdf(1 - FALSE_ALARM_RATE / (2 * num_tests))


def symmetric_limit(num_tests: int) -> float:
    """The same for sums of differences symmetric about 0 over the root of their sum of squares; for any law.

    References:
        Hoeffding (1963), *Probability inequalities for sums of bounded random variables*, theorem 2.
    """
    return math.sqrt(2 * math.log(2 * num_tests / FALSE_ALARM_RATE))
