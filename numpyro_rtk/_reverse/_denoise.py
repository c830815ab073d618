"""Clean data from draws at `t_min`: their mean given the draw, and what the mean leaves open."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from numpyro_rtk._custom_types import Count, Event, RandomKey, ScoreFn
from numpyro_rtk._noising._grid import Level
from numpyro_rtk._score._model import ScoreModel


NUM_PROBES = 8
"""Random directions for each draw, in which the slope of the denoiser is measured."""

NUM_ERROR_DRAWS = 32
"""Draws, of many, over which the error of denoised draws is measured, and how many are denoised at a time."""

RESOLVED = 3.0
"""Slopes below this many errors, as the negative ones show them, are pooled."""

PROBE_STEP = 0.05
"""Half of the difference by which it is measured, in units of the noise: scores vary over lengths of that."""


def denoise_event(score_fn: ScoreFn, data: Level, x: Event) -> Event:
    """`E[x_0 | x_t]` of one event at the level `data`, with `x_0` free of noise (Tweedie's formula).

    One score evaluation.
    """
    return (x + data.sigma**2 * score_fn(x, data.t)) / data.alpha


def measure_denoise_sd(
    key: RandomKey, score_fn: ScoreModel, data: Level, draws: Array, members: Array | None = None
) -> Event:
    r"""Root of `E Var(x_0 | x_t)` by coordinate, at the level `data`.

    The conditional covariance of `x_0` is `(sigma / alpha)^2 (I + sigma^2 ds/dx)`, or `sigma^2 / alpha` times
    the derivative of the denoised point. Its diagonal is the mean of `v_i (D v)_i` over random signs `v`,
    taken here as a difference of two denoised points, so that the score needs no derivative; a derivative
    that is diagonal has no scatter. (By Stein's identity it is `(sigma / alpha)^2 (1 - sigma^2 E score_i^2)`
    too, whose scatter is that of the noise, which most of a picture is.) `2 * NUM_PROBES` evaluations a draw.

    No variance is negative, but slopes of a network are, at many dark pixels of a picture, and how far below
    0 they get says how well they are known. Coordinates that are not above that share their mean; where no
    slope is negative every coordinate keeps its own.

    Args:
        key: Random key; a fixed one makes the result a property of the prior.
        score_fn: The score.
        data: The level of the draws.
        draws: Draws at that level, shape `(draws, *event)`.
        members: Which member of a family each is of, shape `(draws,)`; in turn unless given.

    Returns:
        Shape of an event, between 0 and `sigma / alpha`.
    """

    def at_draw(inputs: tuple[RandomKey, Count, Event]) -> Event:
        key, member, x = inputs
        step = PROBE_STEP * data.sigma

        def slope(key: RandomKey) -> Event:
            signs = jr.rademacher(key, x.shape, x.dtype)
            score = score_fn.member(member)
            ends = jax.vmap(lambda sign: denoise_event(score, data, x + sign * step * signs))
            above, below = ends(jnp.asarray([1.0, -1.0], x.dtype))
            return signs * (above - below) / (2 * step)

        return jnp.mean(jax.vmap(slope)(jr.split(key, NUM_PROBES)), axis=0)

    members = jnp.arange(draws.shape[0]) if members is None else members
    slopes: Any = jax.lax.map(at_draw, (jr.split(key, draws.shape[0]), members, draws))
    variance = data.sigma**2 / data.alpha * _resolved(jnp.nanmean(slopes, axis=0))
    return jnp.sqrt(jnp.clip(variance, 0.0, (data.sigma / data.alpha) ** 2))


def _resolved(slopes: Event) -> Event:
    """Slopes, of which those below `RESOLVED` times the root mean square of the negative ones are their mean.

    Setting negative slopes to 0 would leave half of a dark sky without any error, and the other half with too
    much.
    """
    below = slopes < 0
    error = jnp.sqrt(jnp.sum(jnp.where(below, slopes, 0.0) ** 2) / jnp.maximum(jnp.sum(below), 1))
    unresolved = slopes < RESOLVED * error
    common = jnp.sum(jnp.where(unresolved, slopes, 0.0)) / jnp.maximum(jnp.sum(unresolved), 1)
    return jnp.where(unresolved, common, slopes)


def draw_clean(
    key: RandomKey, score_fn: ScoreModel, data: Level, draws: Array, batch_size: int | None
) -> Array:
    """Denoised draws and what denoising leaves open, measured at some of them noised anew: a network's slope
    at one draw is rough, and draws that resemble each other share it.

    One evaluation a draw, and `4 * NUM_ERROR_DRAWS * NUM_PROBES` more at most.

    Args:
        key: Random key.
        score_fn: The score.
        data: The level of the draws.
        draws: Draws of one law at that level, shape `(draws, *event)`.
        batch_size: How many are denoised at a time; `None` is `NUM_ERROR_DRAWS`.

    Returns:
        Draws of clean data, shape `(draws, *event)`.
    """
    error_key, clean_key, noise_key = jr.split(jr.fold_in(key, 1), 3)

    def normal(key: RandomKey, like: Array) -> Array:
        return jr.normal(key, like.shape, like.dtype)

    mean = jax.lax.map(
        lambda x: denoise_event(score_fn, data, x), draws, batch_size=batch_size or NUM_ERROR_DRAWS
    )
    some = slice(None, None, -(-draws.shape[0] // NUM_ERROR_DRAWS))
    first = measure_denoise_sd(error_key, score_fn, data, draws[some])
    clean = jnp.resize(mean[some], (NUM_ERROR_DRAWS, *draws.shape[1:]))
    clean += first[None] * normal(clean_key, clean)
    again = data.alpha * clean + data.sigma * normal(noise_key, clean)
    return mean + measure_denoise_sd(error_key, score_fn, data, again)[None] * normal(key, mean)
