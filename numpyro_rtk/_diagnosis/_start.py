"""What every kernel asks about a score, and of its segments, when it starts: one call each."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from numpyro_rtk._diagnosis._line_integral import check_line_integral
from numpyro_rtk._diagnosis._pilot import check_pilot, Subject
from numpyro_rtk._diagnosis._report import say
from numpyro_rtk._diagnosis._round_trip import check_round_trip, Travellers
from numpyro_rtk._noising._base import AbstractNoiseSchedule
from numpyro_rtk._noising._grid import NoiseGrid
from numpyro_rtk._reverse._base import AbstractInnerKernel
from numpyro_rtk._reverse._calibration import Calibration
from numpyro_rtk._score._checks import is_assumed
from numpyro_rtk._thresholds import MANY_DIMENSIONS


def num_pilot_draws(dim: int) -> int:
    """Prior draws that tell whether a score fits their noise: 128, or 16 above 256 dimensions."""
    return 128 if dim <= MANY_DIMENSIONS else 16


def check_calibration(
    score_fn: Any,
    schedule: AbstractNoiseSchedule,
    grid: NoiseGrid,
    shape: tuple[int, ...],
    calibration: Calibration,
    site: str | None = None,
    num_failed: Array | int = 0,
) -> bool:
    """Raise for a score of the wrong sign, warn of one that contradicts its own draws; silent under a trace.

    Returns whether nothing was found: of a wrong score nothing else is worth asking.

    Args:
        score_fn: The callable that the user gave: what was said of it is said once.
        schedule: The noising process.
        grid: The levels of the pilot.
        shape: Of one event.
        calibration: Of the pilot.
        site: Name of the sample site in a model.
        num_failed: Number of prior draws that met NaN or infinity, where it is known.

    Raises:
        ValueError: for a score of the wrong sign.
    """
    if isinstance(grid.t, Tracer) or isinstance(num_failed, Tracer):
        return True
    name = "`score_fn`" if site is None else f"`score_fn` of site {site!r}"
    subject = Subject(name, _short(schedule), is_assumed(schedule))
    times = np.asarray(grid.t, np.float64)
    findings = check_pilot(calibration, times, math.prod(shape), subject, int(num_failed))
    say(findings, score_fn)
    return not findings


def _short(schedule: AbstractNoiseSchedule) -> str:
    """The schedule as it is printed, without long tables."""
    printed = " ".join(str(schedule).split())
    return printed if len(printed) < 100 else f"{type(schedule).__name__}(...)"


CHECK_SEGMENTS = True
"""Whether starts check segments; the test suite compiles enough without."""


def check_segments(
    score_fn: Any,
    fly: Callable[[Any, Array | None, Array, Array], Travellers],
    grid: NoiseGrid,
    draws: Array,
    kernel: AbstractInnerKernel,
    owner: str,
    remedy: str = "",
) -> None:
    """Warn of a segment that is too long for its inner steps; silent under a trace.

    *Cost.* See `check_round_trip`.

    Args:
        score_fn: The callable that the user gave.
        fly: `travel_all` of draws through segments, compiled: `fly(key, draws, taken, index)`.
        grid: Segments.
        draws: Of the prior at `t_min`, those of a pilot.
        kernel: The reverse kernel.
        owner: What the user sets `segments` of.
        remedy: What to write, where that is not more of them.
    """
    if CHECK_SEGMENTS and not isinstance(draws, Tracer):
        times = np.asarray(grid.t, np.float64)
        say(check_round_trip(jr.key(2), fly, times, draws, kernel, owner, remedy), score_fn)


def check_nodes(score_fn: Any, reference: Any, num_nodes: int, draws: Array, t_min: float) -> None:
    """Warn of nodes of a line integral that do not resolve the score between draws; silent under a trace.

    *Cost.* See `check_line_integral`.

    Args:
        score_fn: The callable that the user gave.
        reference: Where lines begin; `None` is the origin.
        num_nodes: Of the density.
        draws: Of the prior at `t_min`.
        t_min: Time of the data.
    """
    if isinstance(draws, Tracer):
        return
    start = jnp.zeros_like(draws[0]) if reference is None else reference
    t = jnp.asarray(t_min, draws.dtype)
    say(check_line_integral(lambda x: score_fn(x, t), start, draws, num_nodes, "`score_fn`"), score_fn)
