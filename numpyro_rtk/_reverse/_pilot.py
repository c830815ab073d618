"""What prior draws, noised and denoised, teach about a prior: its terminal Gaussian and its noise levels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from numpyro_rtk._custom_types import Count, Event, RandomKey
from numpyro_rtk._noising._grid import Level, mean_prediction, noise_grid, NoiseGrid
from numpyro_rtk._noising._terminal import standard_terminal, Terminal
from numpyro_rtk._noising._times import NoiseRange
from numpyro_rtk._reverse._calibration import calibrate, Calibration
from numpyro_rtk._reverse._gaussian import GaussianTransition
from numpyro_rtk._reverse._pass import default_tuning, reverse_pass
from numpyro_rtk._score._model import ScoreModel


PILOT_SEGMENTS = 40
"""Segments of the passes that draw from the prior, at least."""

TERMINAL_ROUNDS = 3
"""Rounds of the fixed point that finds the terminal Gaussian."""

MIN_TERMINAL_DRAWS = 32
"""Draws a round, at least."""

MIN_CONTRACTION = 0.1
"""Bound on how far a step of that fixed point is lengthened."""

PILOT_PRIOR_DRAWS = 5.0
"""Weight of the mean over coordinates in what is measured by coordinate, in draws."""

MIN_RELATIVE_CURVATURE = 1e-4
"""Least curvature of a coordinate, as a fraction of its bound `1 / sigma^2`."""


class Pilot(NamedTuple):
    """What prior draws, noised and denoised, teach about the levels; every field has an axis of levels."""

    residuals: Array
    """`x_0 - E[x_0 | x_t]` of draws from the prior at `t_min`, shape `(levels, draws, *event)`; 0 at the
    last level."""
    mean_square: Array
    """Shape `(levels, *event)`: their mean square by coordinate, shrunk a little towards its mean."""
    curvature: Array
    """Shape `(levels, *event)`: curvature of `-log p_t` by coordinate, `E score^2`, at most `1 / sigma^2`."""
    calibration: Calibration
    """Shape `(levels, draws)`: how well the score fits the noise that was added."""


def measure_terminal(
    key: RandomKey, score_fn: ScoreModel, grid: NoiseGrid, shape: tuple[int, ...], num_draws: int
) -> Terminal:
    r"""Mean and variance, by coordinate, of the data noised to the top of the grid.

    With `x ~ N(m, T)` and `f = sigma^2 score(x)`, `x + f` is `alpha` times the denoised point, whose mean is
    `alpha` times that of the data. The law of total variance gives theirs: `Var(x + f)` and the mean
    conditional variance `sigma^2 (1 + E df/dx)`, with `E df/dx = Cov(x, f) / T` by Stein's identity. The
    right Gaussian is a fixed point of both; a plain step would shrink errors by the slope `1 + E df/dx` of
    the denoiser, and is lengthened by as much as that, which finds the law of data with independent Gaussian
    coordinates at once. Draws come in pairs `m +- z`, and of `Var(x + f)` the part that is linear in `x` is
    `(1 + E df/dx)^2 T`, so that their scores have no scatter. What is measured is used as it is: on the way
    down, an error of a score at the top is forgotten as any error of the terminal is.
    `TERMINAL_ROUNDS * num_draws` evaluations.

    Args:
        key: Random key; a fixed one makes the result a property of the prior.
        score_fn: The score.
        grid: Its first level is the top.
        shape: Shape of one event.
        num_draws: Draws a round.

    Returns:
        That of standardised data where the score is not finite.
    """
    level, start = grid.level(0), standard_terminal(grid, shape)
    half = jr.normal(key, (max(num_draws // 2, 1), *shape), grid.t.dtype)
    noise = jnp.concatenate([half, -half])
    floor = level.sigma**2

    def one_round(current: Terminal, _: None) -> tuple[Terminal, None]:
        sd = jnp.sqrt(current.variance)
        x = current.mean[None] + sd[None] * noise
        change = floor * jnp.concatenate([score_fn.each(part, level.t) for part in jnp.split(x, 2)])
        shift = jnp.mean(change, axis=0)
        slope = jnp.clip(1 + jnp.sum(noise * change, axis=0) / (sd * jnp.sum(noise**2, axis=0)), 0.0, 1.0)
        rest = change - shift[None] - ((slope - 1) * sd)[None] * noise
        linear, other = slope**2 * current.variance, _shrunk_mean_square(rest)
        own, found = current.variance - floor, linear + other + floor * slope
        # Lengthened as far as the denoiser is linear.
        kept = slope * linear / (linear + other + 1e-12 * floor)
        mean = current.mean + shift / jnp.maximum(1 - kept, MIN_CONTRACTION)
        variance = own + (found - own) / jnp.maximum(1 - slope * kept, MIN_CONTRACTION)
        return Terminal(mean, floor + jnp.maximum(variance, 0.0)), None

    found, _ = jax.lax.scan(one_round, start, None, length=TERMINAL_ROUNDS)
    usable = jnp.all(jnp.isfinite(found.mean)) & jnp.all(jnp.isfinite(found.variance))
    return jax.tree.map(lambda measured, given: jnp.where(usable, measured, given), found, start)


def terminal_of(score_fn: ScoreModel, noise: NoiseRange, shape: tuple[int, ...], dtype: Any) -> Terminal:
    """`measure_terminal` with a fixed key: a property of the score."""
    terminal_key, _ = jr.split(jr.key(0))
    grid = noise_grid(noise.schedule, np.asarray([noise.t_max, noise.t_min]), dtype)
    return measure_terminal(terminal_key, score_fn, grid, shape, MIN_TERMINAL_DRAWS)


def prior_draws(
    key: RandomKey,
    score_fn: ScoreModel,
    noise: NoiseRange,
    shape: tuple[int, ...],
    dtype: Any,
    num_draws: int,
) -> tuple[Array, Terminal]:
    """Approximate prior draws by the second-order predictor, which needs no tuning.

    `PILOT_SEGMENTS + TERMINAL_ROUNDS` evaluations a draw, with at least `MIN_TERMINAL_DRAWS` for the rounds.
    Members of a family take turns; the terminal Gaussian is that of all of them together.

    Returns:
        Draws at `t_min`, shape `(num_draws, *event)`, and the terminal Gaussian that they start from.
    """
    terminal_key, draws_key = jr.split(key)
    times = noise.times(min(PILOT_SEGMENTS, noise.max_segments))
    grid = noise_grid(noise.schedule, times, dtype)
    kernel = GaussianTransition(order=2)
    tuning = default_tuning(kernel, grid, shape)
    terminal = measure_terminal(terminal_key, score_fn, grid, shape, max(num_draws, MIN_TERMINAL_DRAWS))

    def draw(key: RandomKey, index: Count) -> Event:
        return reverse_pass(key, score_fn.member(index), grid, kernel, tuning, terminal).x

    return jax.vmap(draw)(jr.split(draws_key, num_draws), jnp.arange(num_draws)), terminal


def run_pilot(key: RandomKey, score_fn: ScoreModel, grid: NoiseGrid, draws: Array) -> Pilot:
    """Noise prior draws to every level and denoise them: `levels * draws` score evaluations.

    Args:
        key: Random key; a fixed one makes the result a fixed property of the prior.
        score_fn: The score.
        grid: The levels.
        draws: Draws of the prior at `t_min`, shape `(draws, *event)`.
    """

    def at_level(inputs: tuple[RandomKey, Level]) -> Pilot:
        key, level = inputs
        noise = jr.normal(key, draws.shape, draws.dtype)
        x = level.a * draws + jnp.sqrt(level.v) * noise
        scores = score_fn.each(x, level.t)
        residuals = draws - jax.vmap(lambda x, score: mean_prediction(level, x, score))(x, scores)
        bound = 1 / level.sigma**2
        curvature = jnp.clip(_shrunk_mean_square(scores), MIN_RELATIVE_CURVATURE * bound, bound)
        return Pilot(
            residuals, _shrunk_mean_square(residuals), curvature, calibrate(noise, x, scores, level.v)
        )

    return jax.lax.map(at_level, (jr.split(key, grid.num_levels), grid.levels))


def _shrunk_mean_square(values: Array) -> Event:
    return _shrunk(jnp.mean(values**2, axis=0), values.shape[0])


def _shrunk(values: Event, num_draws: int) -> Event:
    """What was measured by coordinate, shrunk towards its mean."""
    weight = PILOT_PRIOR_DRAWS / (PILOT_PRIOR_DRAWS + num_draws)
    return (1 - weight) * values + weight * jnp.mean(values)
