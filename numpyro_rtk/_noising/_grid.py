"""The noise grid: everything that segments and levels need of a schedule, evaluated once in float64."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from numpyro_rtk._custom_types import Event, PerSegment, RandomKey
from numpyro_rtk._noising._base import AbstractNoiseSchedule
from numpyro_rtk._noising._times import segment_times


class SegmentGrid(NamedTuple):
    """The segments of a pass, from noise to data; every field has one entry per segment."""

    t: PerSegment
    """Time at the start of the segment (more noise)."""
    s: PerSegment
    """Time at its end (less noise)."""
    a: PerSegment
    """`alpha(t) / alpha(s)`."""
    v: PerSegment
    """Variance of noising from `s` to `t`."""
    alpha_t: PerSegment
    """Signal scale at `t`."""
    sigma_s: PerSegment
    """Noise scale at `s`."""
    alpha_s: PerSegment
    """Signal scale at `s`."""


def segment_grid(schedule: AbstractNoiseSchedule, times: np.ndarray, dtype: Any) -> SegmentGrid:
    """Everything the segments need from the schedule, evaluated in float64 and cast to `dtype`.

    Args:
        schedule: The noising process.
        times: A checked time grid, shape `(num_segments + 1,)`, decreasing.
        dtype: Of the draws.
    """
    # The network must see the same rounded time as the coefficients.
    times = np.asarray(times, dtype).astype(np.float64)
    if not np.all(np.diff(times) < 0):
        raise ValueError(
            f"`segments` has times that coincide in {np.dtype(dtype).name}. Use fewer segments, or more "
            f"precision."
        )
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        t, s = jnp.asarray(times[:-1], jnp.float64), jnp.asarray(times[1:], jnp.float64)
        a, v = schedule.transition(s, t)
        values = (t, s, a, v, schedule.alpha(t), schedule.sigma(s), schedule.alpha(s))
        values = [np.asarray(value) for value in values]
    return SegmentGrid(*(jnp.asarray(value, dtype) for value in values))


def terminal_sample(key: RandomKey, grid: SegmentGrid, shape: tuple[int, ...], dtype: Any) -> Event:
    """`x_T ~ N(0, (alpha^2 + sigma^2) I)` at the top of the grid: the law of noised data of unit variance."""
    return jnp.sqrt(terminal_variance(grid)) * jr.normal(key, shape, dtype)


def terminal_variance(grid: SegmentGrid) -> Array:
    """`alpha^2 + sigma^2` at the top of the grid; 1 for variance-preserving schedules."""
    sigma_squared = grid.a[0] ** 2 * grid.sigma_s[0] ** 2 + grid.v[0]
    return grid.alpha_t[0] ** 2 + sigma_squared


class Levels(NamedTuple):
    """The noise levels from noise to data; every field has one entry per level."""

    t: Float[Array, " levels"]
    """Time."""
    sigma: Float[Array, " levels"]
    """Noise scale."""
    a: Float[Array, " levels"]
    """`alpha(t) / alpha(t_min)`."""
    v: Float[Array, " levels"]
    """Variance of noising from `t_min` to `t`; 0 at the last level."""


def noise_levels(schedule: AbstractNoiseSchedule, times: np.ndarray, dtype: Any) -> Levels:
    """The levels of a checked time grid, evaluated in float64 and cast to `dtype`."""
    times = np.asarray(times, dtype).astype(np.float64)
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        t = jnp.asarray(times, jnp.float64)
        a, v = schedule.transition(t[-1:], t[:-1])
        sigma = np.asarray(schedule.sigma(t))
        # The step from t_min to itself is the identity.
        a, v = np.append(np.asarray(a), 1.0), np.append(np.asarray(v), 0.0)
    return Levels(*(jnp.asarray(value, dtype) for value in (times, sigma, a, v)))


class Candidates(NamedTuple):
    """Levels that a grid may be chosen from, from noise to data, about even in the log signal-to-noise
    ratio.
    """

    t: Float[Array, " candidates"]
    alpha: Float[Array, " candidates"]
    sigma: Float[Array, " candidates"]


NUM_CANDIDATES = 256
"""Candidate segments that levels are chosen from, at least; and at least `CANDIDATES_PER_SEGMENT` per
segment.
"""
CANDIDATES_PER_SEGMENT = 8


def candidate_levels(schedule: AbstractNoiseSchedule, num_segments: int, dtype: Any) -> Candidates:
    """Candidates for a grid of `num_segments`, evaluated in float64 and cast to `dtype`; a discrete schedule
    may have few.
    """
    num_candidates = min(max(NUM_CANDIDATES, CANDIDATES_PER_SEGMENT * num_segments), schedule.max_segments)
    times = np.unique(np.asarray(segment_times(schedule, num_candidates, rho=math.inf), dtype))[::-1]
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        t = jnp.asarray(times.astype(np.float64), jnp.float64)
        values = [np.asarray(value) for value in (t, schedule.alpha(t), schedule.sigma(t))]
    return Candidates(*(jnp.asarray(value, dtype) for value in values))


def chosen_grid(candidates: Candidates, indices: Array) -> tuple[SegmentGrid, Levels]:
    """The segments and levels of a grid of candidates."""
    t, alpha, sigma = (leaf[indices] for leaf in candidates)
    a, v = _transition(alpha[1:], sigma[1:], alpha[:-1], sigma[:-1])
    grid = SegmentGrid(t=t[:-1], s=t[1:], a=a, v=v, alpha_t=alpha[:-1], sigma_s=sigma[1:], alpha_s=alpha[1:])
    total_a, total_v = _transition(alpha[-1], sigma[-1], alpha, sigma)
    # The step from t_min to itself is the identity.
    return grid, Levels(t, sigma, total_a.at[-1].set(1.0), total_v.at[-1].set(0.0))


def _transition(alpha_s: Array, sigma_s: Array, alpha_t: Array, sigma_t: Array) -> tuple[Array, Array]:
    """Scale and variance of noising from `s` to `t`."""
    a = alpha_t / alpha_s
    return a, jnp.maximum(sigma_t**2 - (a * sigma_s) ** 2, 0.0)


def mean_prediction(level: Levels, x: Event, score: Event) -> Event:
    """`E[x_0 | x_t = x]` with `x_0` at `t_min`, exact given the score (Tweedie's formula); `x` itself at
    `t_min`.
    """
    return (x + level.v * score) / level.a
