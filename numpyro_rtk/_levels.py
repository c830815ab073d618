r"""Noise levels of posterior moves, and what prior draws teach about them.

A grid of `num_segments` segments has `num_segments + 1` levels, one at each time, kept in the order of the grid: from
noise (`t_max`) to data (`t_min`, where the prior lives). `place_levels` puts them where the reverse transition is hardest.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from numpyro_rtk._custom_types import Event, RandomKey, ScoreFn
from numpyro_rtk._inner import GaussianTransition
from numpyro_rtk._reverse import default_tuning, reverse_pass, segment_grid, SegmentGrid, terminal_sample
from numpyro_rtk._schedule import AbstractNoiseSchedule, segment_times


PILOT_SEGMENTS = 40
"""Segments of the passes that draw from the prior, at least."""

PILOT_PRIOR_DRAWS = 5.0
"""Weight of the mean over coordinates in errors and curvatures by coordinate, in draws."""

MIN_RELATIVE_CURVATURE = 1e-4
"""Least curvature of a coordinate, as a fraction of its bound `1 / sigma^2`."""

NUM_CANDIDATES = 256
"""Candidate segments that levels are chosen from, at least; and at least `CANDIDATES_PER_SEGMENT` per segment."""

CANDIDATES_PER_SEGMENT = 8

NUM_PROBED_LEVELS = 32
"""Candidate levels at which the difficulty of reverse transitions is measured."""

MAX_PROBES = 64
"""Prior draws that measure it, at most."""

PROBE = 0.5
"""Length of the probe in units of the noise scale: as far as a transition goes that removes a fifth of the noise's variance."""

NEGLIGIBLE_DIFFICULTY = 1e-2
"""Added to what was measured, so that rounding of an easy prior's scores, which depends on the machine, places no levels."""

EVEN_SHARE = 0.5
"""Share of the segments that are spread evenly over the log signal-to-noise ratio, whatever was measured: an informative
likelihood needs levels at low noise, too."""


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


class Pilot(NamedTuple):
    """What prior draws, noised and denoised, teach about the levels; every field has a leading axis of levels."""

    residuals: Array
    """Shape `(levels, draws, *event)`: `x_0 - E[x_0 | x_t]` of draws from the prior at `t_min`; 0 at the last level."""
    mean_square: Array
    """Shape `(levels, *event)`: their mean square by coordinate, slightly shrunk towards the mean over coordinates."""
    curvature: Array
    """Shape `(levels, *event)`: curvature of `-log p_t` by coordinate, `E score^2`, at most `1 / sigma^2`."""


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
    """Levels that a grid may be chosen from, from noise to data, about even in the log signal-to-noise ratio."""

    t: Float[Array, " candidates"]
    alpha: Float[Array, " candidates"]
    sigma: Float[Array, " candidates"]


def candidate_levels(schedule: AbstractNoiseSchedule, num_segments: int, dtype: Any) -> Candidates:
    """Candidates for a grid of `num_segments`, evaluated in float64 and cast to `dtype`; a discrete schedule may have few."""
    num_candidates = min(max(NUM_CANDIDATES, CANDIDATES_PER_SEGMENT * num_segments), schedule.max_segments)
    times = np.unique(np.asarray(segment_times(schedule, num_candidates, rho=math.inf), dtype))[::-1]
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        t = jnp.asarray(times.astype(np.float64), jnp.float64)
        values = [np.asarray(value) for value in (t, schedule.alpha(t), schedule.sigma(t))]
    return Candidates(*(jnp.asarray(value, dtype) for value in values))


def transition_difficulty(key: RandomKey, score_fn: ScoreFn, candidates: Candidates, draws: Array) -> Array:
    r"""How far reverse transitions are from the Gaussian that inner kernels propose from, per unit of log signal-to-noise ratio.

    A transition over a short segment is Gaussian where the Hessian `H` of `log p_t` is the same wherever it may end. Its distance
    from the reference `N(m, c)` of `PreconditionedMALA` grows with the square of the segment's length, times
    `E |sigma^2 (H - E diag H)|_F^2`, estimated by differences of scores along random directions. Zero for a Gaussian prior with
    independent coordinates. `2 * NUM_PROBED_LEVELS` score evaluations per draw, of at most `MAX_PROBES` draws.

    Returns:
        One value per candidate, interpolated between the probed ones.
    """
    last = candidates.t.shape[0] - 1
    probed = np.unique(np.linspace(0, last, min(NUM_PROBED_LEVELS, last + 1)).round().astype(int))
    draws = draws[:MAX_PROBES]

    def at_level(inputs: tuple[RandomKey, Array, Array, Array]) -> Array:
        key, t, alpha, sigma = inputs
        noise_key, probe_key = jr.split(key)
        a, v = _transition(candidates.alpha[-1], candidates.sigma[-1], alpha, sigma)
        x = a * draws + jnp.sqrt(v) * jr.normal(noise_key, draws.shape, draws.dtype)
        direction = jr.normal(probe_key, draws.shape, draws.dtype)
        scores = jax.vmap(lambda x: score_fn(x, t))
        change = sigma / PROBE * (scores(x + PROBE * sigma * direction) - scores(x))
        # Least squares, so that the deviation of a Gaussian of independent coordinates is 0 and not the probes' own scatter.
        slope = jnp.sum(direction * change, axis=0) / jnp.sum(direction**2, axis=0)
        deviation = change - slope[None] * direction
        square = jnp.sum(deviation**2, axis=tuple(range(1, draws.ndim)))
        return jnp.mean(jnp.where(jnp.isfinite(square), square, 0.0))

    keys = jr.split(key, probed.size)
    chosen = tuple(leaf[probed] for leaf in candidates)
    difficulty = jax.lax.map(at_level, (keys, *chosen))
    return jnp.interp(jnp.arange(last + 1, dtype=difficulty.dtype), jnp.asarray(probed, difficulty.dtype), difficulty)


def place_levels(difficulty: Array, num_segments: int) -> Array:
    """Indices of the candidates that make a grid, with more of them where transitions are difficult.

    The error of a segment of length `l` is `difficulty * l^2`; the sum is least where the density of levels goes with the root of
    the difficulty. `EVEN_SHARE` of the density is even.

    Returns:
        Shape `(num_segments + 1,)`, strictly increasing, from the first candidate to the last.
    """
    last = difficulty.shape[0] - 1
    root = jnp.sqrt(difficulty + NEGLIGIBLE_DIFFICULTY)
    weights = 0.5 * (root[1:] + root[:-1])
    density = (1 - EVEN_SHARE) * weights / jnp.sum(weights) + EVEN_SHARE / last
    reached = jnp.concatenate([jnp.zeros(1, density.dtype), jnp.cumsum(density)])
    order = jnp.arange(num_segments + 1)
    wanted = jnp.interp(order / num_segments, reached / reached[-1], jnp.arange(last + 1, dtype=density.dtype))
    indices = jnp.round(wanted).astype(order.dtype)
    # Distinct, and none beyond the ends.
    indices = jax.lax.cummax(indices - order) + order
    return jnp.minimum(indices, last - num_segments + order)


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
    """`E[x_0 | x_t = x]` with `x_0` at `t_min`, exact given the score (Tweedie's formula); `x` itself at `t_min`."""
    return (x + level.v * score) / level.a


def prior_draws(
    key: RandomKey,
    score_fn: ScoreFn,
    schedule: AbstractNoiseSchedule,
    shape: tuple[int, ...],
    dtype: Any,
    num_draws: int,
    num_segments: int = PILOT_SEGMENTS,
) -> Array:
    """Approximate prior draws by the second-order predictor: no tuning needed, `num_segments` evaluations each.

    Returns:
        Draws at `t_min`, shape `(num_draws, *event)`.
    """
    num_segments = min(num_segments, schedule.max_segments)
    grid = segment_grid(schedule, segment_times(schedule, num_segments), dtype)
    inner = GaussianTransition(order=2)
    tuning = default_tuning(inner, grid, shape)

    def draw(key: RandomKey) -> Event:
        noise_key, pass_key = jr.split(key)
        return reverse_pass(pass_key, score_fn, grid, inner, tuning, terminal_sample(noise_key, grid, shape, dtype)).x

    return jax.vmap(draw)(jr.split(key, num_draws))


def run_pilot(key: RandomKey, score_fn: ScoreFn, levels: Levels, draws: Array) -> Pilot:
    """Noise prior draws to every level and denoise them: `levels * draws` score evaluations.

    Args:
        key: Random key; a fixed one makes the result a fixed property of the prior.
        score_fn: `score_fn(x, t)` of one event.
        levels: From `noise_levels`.
        draws: Draws of the prior at `t_min`, shape `(draws, *event)`.
    """

    def at_level(inputs: tuple[RandomKey, Levels]) -> tuple[Array, Array, Array]:
        key, level = inputs
        x = level.a * draws + jnp.sqrt(level.v) * jr.normal(key, draws.shape, draws.dtype)
        scores = jax.vmap(lambda x: score_fn(x, level.t))(x)
        residuals = draws - jax.vmap(lambda x, score: mean_prediction(level, x, score))(x, scores)
        bound = 1 / level.sigma**2
        curvature = jnp.clip(_shrunk_mean_square(scores), MIN_RELATIVE_CURVATURE * bound, bound)
        return residuals, _shrunk_mean_square(residuals), curvature

    keys = jr.split(key, levels.t.shape[0])
    return Pilot(*jax.lax.map(at_level, (keys, levels)))


def _shrunk_mean_square(values: Array) -> Event:
    mean_square = jnp.mean(values**2, axis=0)
    weight = PILOT_PRIOR_DRAWS / (PILOT_PRIOR_DRAWS + values.shape[0])
    return (1 - weight) * mean_square + weight * jnp.mean(mean_square)
