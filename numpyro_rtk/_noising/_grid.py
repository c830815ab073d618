"""The noise grid: everything that levels and segments need of a schedule, evaluated once in float64."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from numpyro_rtk._custom_types import Event, PerSegment
from numpyro_rtk._noising._base import AbstractNoiseSchedule
from numpyro_rtk._noising._times import NoiseRange, once_for_each


NUM_CANDIDATES = 256
"""Candidate segments that levels are chosen from, at least; and at least `CANDIDATES_PER_SEGMENT` each."""

CANDIDATES_PER_SEGMENT = 8


class Level(NamedTuple):
    """A noise level, or a stack of them: `x_t | x_0 ~ N(a x_0, v I)` for data `x_0` at the last level."""

    t: Array
    """Time."""
    alpha: Array
    """Signal scale."""
    sigma: Array
    """Noise scale."""
    a: Array
    """`alpha(t) / alpha(t_min)`; 1 at the last level."""
    v: Array
    """Variance of noising from `t_min` to `t`; 0 at the last level."""


class Segment(NamedTuple):
    """The step between two neighbouring levels, or a stack of them: `x_t | x_s ~ N(a x_s, v I)`."""

    t: Array
    """Time where the reverse transition starts (more noise)."""
    s: Array
    """Time where it ends (less noise)."""
    a: Array
    """`alpha(t) / alpha(s)`."""
    v: Array
    """Variance of noising from `s` to `t`."""
    alpha_t: Array
    """Signal scale at `t`."""
    sigma_s: Array
    """Noise scale at `s`."""


class NoiseGrid(NamedTuple):
    """Noise levels from noise (`t_max`) to data (`t_min`), and the segments between them.

    Segment `k` leads from level `k` down to level `k + 1`.
    """

    t: Float[Array, " levels"]
    """Times."""
    alpha: Float[Array, " levels"]
    """Signal scales."""
    sigma: Float[Array, " levels"]
    """Noise scales."""
    a: PerSegment
    """`alpha(t) / alpha(s)` of each segment."""
    v: PerSegment
    """Variance of noising over each segment."""
    total_a: Float[Array, " levels"]
    """`alpha(t) / alpha(t_min)` of each level."""
    total_v: Float[Array, " levels"]
    """Variance of noising from `t_min` to each level."""

    @property
    def num_levels(self) -> int:
        """Number of levels: one more than segments."""
        return self.t.shape[0]

    @property
    def num_segments(self) -> int:
        """Number of segments."""
        return self.t.shape[0] - 1

    @property
    def log_snr_steps(self) -> PerSegment:
        """Length of each segment in the log signal-to-noise ratio."""
        return 2 * jnp.diff(jnp.log(self.alpha / self.sigma))

    @property
    def levels(self) -> Level:
        """All levels, stacked."""
        return Level(self.t, self.alpha, self.sigma, self.total_a, self.total_v)

    @property
    def segments(self) -> Segment:
        """All segments, stacked."""
        return Segment(self.t[:-1], self.t[1:], self.a, self.v, self.alpha[:-1], self.sigma[1:])

    def level(self, index: Any) -> Level:
        """One level."""
        return jax.tree.map(lambda leaf: leaf[index], self.levels)

    def segment(self, index: Any) -> Segment:
        """One segment."""
        return jax.tree.map(lambda leaf: leaf[index], self.segments)


def noise_grid(schedule: AbstractNoiseSchedule, times: np.ndarray, dtype: Any) -> NoiseGrid:
    """The grid of checked times, evaluated in float64 outside any trace and cast to `dtype`.

    Args:
        schedule: The noising process.
        times: Decreasing, shape `(num_segments + 1,)`.
        dtype: Of the draws.

    Raises:
        ValueError: if times coincide in `dtype`.
    """
    # The network must see the same rounded time as the coefficients.
    times = np.asarray(times, dtype).astype(np.float64)
    if not np.all(np.diff(times) < 0):
        raise ValueError(
            f"`segments` has times that coincide in {np.dtype(dtype).name}. Use fewer segments, or more "
            f"precision."
        )
    return NoiseGrid(*(jnp.asarray(value, dtype) for value in _coefficients(schedule, tuple(times.tolist()))))


@once_for_each
def _coefficients(schedule: AbstractNoiseSchedule, times: tuple[float, ...]) -> tuple[np.ndarray, ...]:
    """The fields of a `NoiseGrid`, in float64."""
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        t = jnp.asarray(times, jnp.float64)
        a, v = schedule.transition(t[1:], t[:-1])
        total_a, total_v = schedule.transition(t[-1:], t[:-1])
        values = [
            np.asarray(value) for value in (t, schedule.alpha(t), schedule.sigma(t), a, v, total_a, total_v)
        ]
    # The step from t_min to itself is the identity.
    values[5], values[6] = np.append(values[5], 1.0), np.append(values[6], 0.0)
    return tuple(values)


def candidate_times(noise: NoiseRange, num_segments: int, dtype: Any) -> np.ndarray:
    """Times that a grid of `num_segments` may be chosen from, about even in the log signal-to-noise ratio.

    A discrete schedule, or a coarse precision, may have few.
    """
    wanted = max(NUM_CANDIDATES, CANDIDATES_PER_SEGMENT * num_segments)
    times = noise.times(min(wanted, noise.max_segments), rho=math.inf)
    return np.unique(np.asarray(times, dtype))[::-1]


def candidate_grid(noise: NoiseRange, num_segments: int, dtype: Any) -> NoiseGrid:
    """The grid of `candidate_times`."""
    return noise_grid(noise.schedule, candidate_times(noise, num_segments, dtype), dtype)


def chosen_grid(schedule: AbstractNoiseSchedule, candidates: NoiseGrid, indices: Array) -> NoiseGrid:
    """The grid of some of the candidates, first and last among them: exact, unless the choice is traced."""
    if not isinstance(indices, Tracer):
        return noise_grid(schedule, np.asarray(candidates.t)[np.asarray(indices)], candidates.t.dtype)
    t, alpha, sigma, total_a, total_v = (leaf[indices] for leaf in candidates.levels)
    a = alpha[:-1] / alpha[1:]
    v = jnp.maximum(sigma[:-1] ** 2 - (a * sigma[1:]) ** 2, 0.0)
    return NoiseGrid(t, alpha, sigma, a, v, total_a, total_v)


def mean_prediction(level: Level, x: Event, score: Event) -> Event:
    """`E[x_0 | x_t = x]` with `x_0` at `t_min`, exact given the score (Tweedie's formula); `x` at `t_min`."""
    return (x + level.v * score) / level.a
