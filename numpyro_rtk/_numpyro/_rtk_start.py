"""What `RTKKernel` measures, checks and chooses before its first pass."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from numpyro_rtk._custom_types import Event
from numpyro_rtk._diagnosis._round_trip import plan_trip, travel_all, Travellers
from numpyro_rtk._diagnosis._start import check_calibration, check_segments, num_pilot_draws
from numpyro_rtk._noising._grid import candidate_times, chosen_grid, noise_grid, NoiseGrid
from numpyro_rtk._noising._terminal import Terminal
from numpyro_rtk._noising._times import NoiseRange
from numpyro_rtk._numpyro._programs import Programs
from numpyro_rtk._reverse._base import AbstractInnerKernel
from numpyro_rtk._reverse._calibration import Calibration, or_zero
from numpyro_rtk._reverse._denoise import measure_denoise_sd
from numpyro_rtk._reverse._pilot import prior_draws, run_pilot
from numpyro_rtk._reverse._placement import place_by_information, probed_levels
from numpyro_rtk._score._checks import check_first_call, first_call
from numpyro_rtk._score._model import ScoreModel


DENOISE_DRAWS = 16
"""Draws that measure the error of denoised draws."""


class Settings(NamedTuple):
    """What a kernel, its arguments and the shape of its events say of a run."""

    score_fn: Any
    """The callable that the user gave."""
    model: Callable[[Any, tuple[Any, ...], dict[str, Any]], ScoreModel]
    """The score for its arrays and the model's arguments."""
    noise: NoiseRange
    """The noising process and the ends of the grid."""
    times: np.ndarray | None
    """The time grid; `None` where levels are placed by what is measured."""
    num_segments: int
    """Number of segments."""
    inner: AbstractInnerKernel
    """The inner kernel."""
    denoise: bool
    """Whether draws are of clean data."""
    shape: tuple[int, ...]
    """Of one event."""
    dtype: Any
    """Of one event."""

    @property
    def candidate_times(self) -> np.ndarray:
        """Times that levels are placed at, where they are placed by what is measured."""
        return candidate_times(self.noise, self.num_segments, self.dtype)


class Start(NamedTuple):
    """What was measured and chosen."""

    grid: NoiseGrid
    """The segments of a pass."""
    terminal: Terminal
    """The law at the top of the grid."""
    denoise_sd: Event | None
    """Error of a denoised draw by coordinate; `None` unless asked for."""


class _Measured(NamedTuple):
    called: tuple[Array, Array]
    terminal: Terminal
    denoise_sd: Event | None
    draws: Array
    indices: Array | None
    curvature: Array
    calibration: Calibration


def measure_start(settings: Settings, programs: Programs, inputs: tuple[Any, Any, Any]) -> Start:
    """Measure what a run needs, check the score and the segments, and place the levels.

    *Cost.* See `RTKKernel`.

    Args:
        settings: Of the run.
        programs: The kernel's compiled programs.
        inputs: Arrays of the network, and the model's arguments.

    Raises:
        ValueError: for a score that fails where passes start or end, or of the wrong sign.
    """
    score_fn, shape, dtype, noise = settings.score_fn, settings.shape, settings.dtype, settings.noise
    seen = _levels_to_measure(settings)
    name = f"{shape} {dtype}"
    measured = programs(f"measure {name}", score_fn, lambda *inputs: _measure(settings, inputs), *inputs)
    check_first_call(measured.called, seen)
    num_failed = jnp.sum(~jnp.all(jnp.isfinite(measured.draws.reshape(measured.draws.shape[0], -1)), axis=1))
    fits = check_calibration(
        score_fn, noise.schedule, seen, shape, measured.calibration, num_failed=num_failed
    )
    grid = seen
    if measured.indices is not None:
        candidates = noise_grid(noise.schedule, settings.candidate_times, dtype)
        grid = chosen_grid(noise.schedule, candidates, measured.indices)

    def fly(*places: Any) -> Travellers:
        def trips(inputs: Any, grid: NoiseGrid, curvature: Array, places: Any) -> Travellers:
            key, *places = places
            trip = plan_trip(settings.model(*inputs), grid, settings.inner, curvature)
            return travel_all(key, trip, noise, *places)

        return programs(f"trips {name}", score_fn, trips, inputs, grid, measured.curvature, places)

    if fits:
        remedy = "" if settings.times is not None else _more_evaluations(settings)
        check_segments(score_fn, fly, grid, measured.draws, settings.inner, "RTKKernel", remedy)
    return Start(grid, measured.terminal, measured.denoise_sd)


def _more_evaluations(settings: Settings) -> str:
    """What to write where segments are too long."""
    if settings.num_segments == settings.noise.max_segments:
        return "The schedule has no more segments: give an `inner` with steps, as `PreconditionedMALA()`."
    number = settings.num_segments + settings.denoise
    return f"Give more evaluations (`evaluations={2 * number}`, now {number})."


def _levels_to_measure(settings: Settings) -> NoiseGrid:
    """Those of the time grid, or the ones that tell where levels belong."""
    if settings.times is not None:
        return noise_grid(settings.noise.schedule, settings.times, settings.dtype)
    times, precision = settings.candidate_times, np.dtype(settings.dtype).name
    if times.size <= settings.num_segments:
        raise ValueError(
            f"`evaluations` asks for {settings.num_segments} segments, and only {times.size} times differ in "
            f"{precision}. Use fewer evaluations, or more precision."
        )
    return noise_grid(settings.noise.schedule, times[probed_levels(times.size)], settings.dtype)


def _measure(settings: Settings, inputs: Any) -> _Measured:
    """All that is measured at fixed keys: a pure function of the score."""
    model, shape, dtype, noise = settings.model(*inputs), settings.shape, settings.dtype, settings.noise
    draw_key, pilot_key = jr.split(jr.key(0))
    draws, terminal = prior_draws(draw_key, model, noise, shape, dtype, num_pilot_draws(math.prod(shape)))
    levels = _levels_to_measure(settings)
    pilot = run_pilot(pilot_key, model, levels, or_zero(draws))
    sd = None
    if settings.denoise:
        sd = measure_denoise_sd(jr.key(1), model, levels.level(-1), or_zero(draws[:DENOISE_DRAWS]))
    indices, curvature = None, pilot.curvature[1:]
    if settings.times is None:
        candidates = noise_grid(noise.schedule, settings.candidate_times, dtype)
        probed = probed_levels(candidates.num_levels)
        error = jnp.mean(pilot.mean_square.reshape(probed.size, -1), axis=1)
        indices = place_by_information(error, probed, candidates, settings.num_segments)
        # Of the next probed level towards data.
        curvature = pilot.curvature[jnp.searchsorted(jnp.asarray(probed), indices[1:])]
    called = first_call(model, levels, shape)
    return _Measured(called, terminal, sd, draws, indices, curvature, pilot.calibration)
