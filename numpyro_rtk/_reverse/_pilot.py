"""What prior draws, noised and denoised, teach about the noise levels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from numpyro_rtk._custom_types import Event, RandomKey, ScoreFn
from numpyro_rtk._noising._base import AbstractNoiseSchedule
from numpyro_rtk._noising._grid import Levels, mean_prediction, segment_grid, terminal_sample
from numpyro_rtk._noising._times import segment_times
from numpyro_rtk._reverse._calibration import calibrate, Calibration
from numpyro_rtk._reverse._gaussian import GaussianTransition
from numpyro_rtk._reverse._pass import default_tuning, reverse_pass


PILOT_SEGMENTS = 40
"""Segments of the passes that draw from the prior, at least."""
PILOT_PRIOR_DRAWS = 5.0
"""Weight of the mean over coordinates in errors and curvatures by coordinate, in draws."""
MIN_RELATIVE_CURVATURE = 1e-4
"""Least curvature of a coordinate, as a fraction of its bound `1 / sigma^2`."""


class Pilot(NamedTuple):
    """What prior draws, noised and denoised, teach about the levels; every field has a leading axis of
    levels.
    """

    residuals: Array
    """Shape `(levels, draws, *event)`: `x_0 - E[x_0 | x_t]` of draws from the prior at `t_min`; 0 at the last
    level.
    """
    mean_square: Array
    """Shape `(levels, *event)`: their mean square by coordinate, slightly shrunk towards the mean over
    coordinates.
    """
    curvature: Array
    """Shape `(levels, *event)`: curvature of `-log p_t` by coordinate, `E score^2`, at most `1 / sigma^2`."""
    calibration: Calibration
    """Shape `(levels, draws)`: how well the score fits the noise that was added."""


def prior_draws(
    key: RandomKey,
    score_fn: ScoreFn,
    schedule: AbstractNoiseSchedule,
    shape: tuple[int, ...],
    dtype: Any,
    num_draws: int,
    num_segments: int = PILOT_SEGMENTS,
) -> Array:
    """Approximate prior draws by the second-order predictor: no tuning needed, `num_segments` evaluations
    each.

    Returns:
        Draws at `t_min`, shape `(num_draws, *event)`.
    """
    num_segments = min(num_segments, schedule.max_segments)
    grid = segment_grid(schedule, segment_times(schedule, num_segments), dtype)
    inner = GaussianTransition(order=2)
    tuning = default_tuning(inner, grid, shape)

    def draw(key: RandomKey) -> Event:
        noise_key, pass_key = jr.split(key)
        return reverse_pass(
            pass_key, score_fn, grid, inner, tuning, terminal_sample(noise_key, grid, shape, dtype)
        ).x

    return jax.vmap(draw)(jr.split(key, num_draws))


def run_pilot(key: RandomKey, score_fn: ScoreFn, levels: Levels, draws: Array) -> Pilot:
    """Noise prior draws to every level and denoise them: `levels * draws` score evaluations.

    Args:
        key: Random key; a fixed one makes the result a fixed property of the prior.
        score_fn: `score_fn(x, t)` of one event.
        levels: From `noise_levels`.
        draws: Draws of the prior at `t_min`, shape `(draws, *event)`.
    """

    def at_level(inputs: tuple[RandomKey, Levels]) -> Pilot:
        key, level = inputs
        noise = jr.normal(key, draws.shape, draws.dtype)
        x = level.a * draws + jnp.sqrt(level.v) * noise
        scores = jax.vmap(lambda x: score_fn(x, level.t))(x)
        residuals = draws - jax.vmap(lambda x, score: mean_prediction(level, x, score))(x, scores)
        bound = 1 / level.sigma**2
        curvature = jnp.clip(_shrunk_mean_square(scores), MIN_RELATIVE_CURVATURE * bound, bound)
        return Pilot(
            residuals, _shrunk_mean_square(residuals), curvature, calibrate(noise, x, scores, level.v)
        )

    keys = jr.split(key, levels.t.shape[0])
    return jax.lax.map(at_level, (keys, levels))


def _shrunk_mean_square(values: Array) -> Event:
    mean_square = jnp.mean(values**2, axis=0)
    weight = PILOT_PRIOR_DRAWS / (PILOT_PRIOR_DRAWS + values.shape[0])
    return (1 - weight) * mean_square + weight * jnp.mean(mean_square)
