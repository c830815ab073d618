"""What a prior learns from draws of its own, once for a score object."""

import weakref
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from numpyro_rtk._custom_types import Event
from numpyro_rtk._noising._grid import NoiseGrid
from numpyro_rtk._noising._terminal import Terminal
from numpyro_rtk._noising._times import NoiseRange
from numpyro_rtk._reverse._calibration import Calibration, or_zero
from numpyro_rtk._reverse._pilot import prior_draws, run_pilot
from numpyro_rtk._score._model import ScoreModel


PILOT_DRAWS = 16
"""Prior draws from which `sample` learns the curvatures of the segments."""


class Learnt(NamedTuple):
    """What the pilot learnt of a score."""

    curvature: Array
    """Of each segment."""
    profile: Event
    """Over coordinates."""
    terminal: Terminal
    """The law at the top of the grid."""
    draws: Array
    """The draws of the pilot at `t_min`, shape `(PILOT_DRAWS, *event)`."""


class Kept:
    """What was learnt, kept alive by the score callable."""

    def __init__(self, score_fn: Any, learnt: Learnt) -> None:
        self.learnt = learnt
        self.nodes: set[Any] = set()
        weakref.finalize(score_fn, _nothing, self)


LEARNT: weakref.WeakValueDictionary[Any, Kept] = weakref.WeakValueDictionary()


def _nothing(*args: Any) -> None:
    del args


def learn(
    model: ScoreModel, noise: NoiseRange, grid: NoiseGrid, shape: tuple[int, ...]
) -> tuple[Learnt, Calibration]:
    """What draws of the second-order predictor teach, and how the score fits their noise.

    `PILOT_DRAWS * (43 + levels)` evaluations, with a fixed key.
    """
    draw_key, noise_key = jr.split(jr.key(0))
    draws, terminal = prior_draws(draw_key, model, noise, shape, grid.t.dtype, PILOT_DRAWS)
    # One failed pass of the pilot must not spoil every draw.
    finite = jnp.all(jnp.isfinite(draws.reshape(PILOT_DRAWS, -1)), axis=1)
    good = draws[jnp.argmax(finite)]
    draws = jnp.where(finite.reshape(-1, *[1] * good.ndim), draws, good[None])
    draws = or_zero(draws)
    pilot = run_pilot(noise_key, model, grid, draws)
    curvature = pilot.curvature[1:]
    # Where the network failed nothing is known but the bound.
    sigma_s = grid.sigma[1:]
    bound = (1 / sigma_s**2).reshape(-1, *[1] * good.ndim)
    curvature = jnp.where(jnp.isfinite(curvature), curvature, bound)
    mean = jnp.mean(curvature, axis=tuple(range(1, curvature.ndim)))
    # Segments whose curvature is below its bound tell coordinates apart, as in the warmup of `RTKKernel`.
    weights = 1 - mean * sigma_s**2 + 1e-2
    profile = jnp.tensordot(weights / jnp.sum(weights) * sigma_s**2, curvature, axes=1)
    return Learnt(mean, profile, terminal, draws), pilot.calibration
