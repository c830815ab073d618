"""What a prior learns from draws of its own, once for a score object."""

import contextlib
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.core import Tracer
from jaxtyping import Array

from numpyro_rtk._custom_types import Event
from numpyro_rtk._diagnosis._start import check_calibration
from numpyro_rtk._noising._grid import noise_grid, NoiseGrid
from numpyro_rtk._noising._terminal import Terminal
from numpyro_rtk._noising._times import NoiseRange
from numpyro_rtk._prior._conditions import one_condition
from numpyro_rtk._reverse._calibration import Calibration, or_zero
from numpyro_rtk._reverse._pilot import prior_draws, run_pilot
from numpyro_rtk._score._checks import check_first_call, first_call
from numpyro_rtk._score._hoist import fingerprint_of
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

    def __init__(self, score_fn: Any, learnt: Learnt, program: str) -> None:
        self.learnt, self.program = learnt, program
        self.nodes: set[Any] = set()
        self.denoise_sd: Event | None = None
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
    model = model.thinned(PILOT_DRAWS)
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


def key_of(prior: Any, dtype: Any) -> Any:
    """What is learnt of a `DiffusionPrior` in this dtype is known by."""
    times = tuple(prior.segment_times.tolist())
    conditions = () if prior.condition is None else fingerprint_of(prior.condition)
    return (
        id(prior.score_fn),
        conditions,
        str(prior.schedule),
        times,
        prior.event_shape,
        str(jnp.dtype(dtype)),
    )


def learnt_of(prior: Any, grid: NoiseGrid) -> Learnt:
    """What the pilot learns of a `DiffusionPrior`, with its checks, once for a score object.

    NumPyro traces a model, and builds its distributions anew, many times. The terminal Gaussian is part of
    the law, so that a score object is traced each time: one that was changed in place is another score.
    """
    score_fn, shape, dtype = prior.score_fn, prior.event_shape, grid.t.dtype
    # A function of its own each time: JAX keeps traces by the identity of the callable.
    given = one_condition(prior.condition, len(prior.batch_shape))
    x, t = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((), dtype)
    closed = jax.make_jaxpr(lambda x, t, *given: score_fn(x, t, *given))(x, t, *given)
    if any(isinstance(array, Tracer) for array in (*closed.consts, prior.condition)):
        return learn(prior.model(), prior.noise, grid, shape)[0]
    program = f"{closed.jaxpr} {fingerprint_of(closed.consts)}"
    known = LEARNT.get(key_of(prior, dtype))
    if known is not None and known.program == program:
        return known.learnt

    def first(grid: NoiseGrid) -> Any:
        model = prior.model()
        return first_call(model, grid, shape), *learn(model, prior.noise, grid, shape)

    with jax.ensure_compile_time_eval():
        # Inside, so that nothing here belongs to a trace that is under way.
        grid = noise_grid(prior.schedule, prior.segment_times, dtype)
        called, learnt, calibration = jax.jit(first)(grid)
        check_first_call(called, grid)
        check_calibration(score_fn, prior.schedule, grid, shape, calibration)
    if not isinstance(learnt.curvature, Tracer):
        # A callable that cannot be referred to weakly is learnt from at each call.
        with contextlib.suppress(TypeError):
            LEARNT[key_of(prior, dtype)] = Kept(score_fn, learnt, program)
    return learnt
