"""Time grids: where segments begin and end, and what a user may write for them."""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_rtk._noising._base import _ordered, _positive, AbstractNoiseSchedule


def _float64(function: Any, *values: Any) -> np.ndarray:
    """Evaluate a schedule method in float64 on the CPU, also under a trace, whatever the precision mode."""
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        return np.asarray(function(*(jnp.asarray(value, jnp.float64) for value in values)))


def once_for_each(function: Callable[..., Any]) -> Callable[..., Any]:
    """Remember results of a function of a schedule and of values: a model is traced many times, and each
    trace makes its priors anew.

    Only for schedules of this package, which depend on their own numbers alone. One of a user's may depend on
    what it closes over: it is evaluated at each call, or a grid would belong to another process.
    """
    remembered = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def wrapper(schedule: AbstractNoiseSchedule, *values: Any) -> Any:
        own = type(schedule).__module__.startswith(f"{__package__}.")
        return (remembered if own else function)(schedule, *values)

    return wrapper


class NoiseRange(NamedTuple):
    """A noising process and its ends, in Python floats, so that nothing of it is traced."""

    schedule: AbstractNoiseSchedule
    """The noising process."""
    t_min: float
    """Time of the data."""
    t_max: float
    """Time of the noise."""

    @property
    def max_segments(self) -> int:
        """The largest number of segments between the ends."""
        if self.schedule.max_segments == sys.maxsize:
            return sys.maxsize
        return round(self.t_max - self.t_min)

    @property
    def data_sd(self) -> float:
        """Standard deviation of the noise of `t_min`, in units of the data."""
        return float(np.exp(-0.5 * _float64(self.schedule.log_snr, self.t_min)))

    @property
    def fingerprint(self) -> str:
        """Tells it from others, in short: by the kind of process, its ends and their log signal-to-noise
        ratios.
        """
        ends = _float64(self.schedule.log_snr, np.array([self.t_max, self.t_min]))
        name = type(self.schedule).__name__
        return f"{name} from {self.t_max} to {self.t_min}, log SNR {ends[0]} to {ends[1]}"

    def times(self, num_segments: int, *, rho: float = 7.0) -> np.ndarray:
        """As `segment_times`, between the ends."""
        return _times_between(*self, num_segments, rho).copy()


@once_for_each
def _times_between(
    schedule: AbstractNoiseSchedule, t_min: float, t_max: float, num_segments: int, rho: float
) -> np.ndarray:
    log_ratio = -0.5 * _float64(schedule.log_snr, np.array([t_max, t_min]))
    if math.isinf(rho):
        levels = np.linspace(log_ratio[0], log_ratio[1], num_segments + 1)
    else:
        roots = np.exp(log_ratio / rho)
        levels = rho * np.log(np.linspace(roots[0], roots[1], num_segments + 1))
    times = np.array(_float64(schedule.inverse_log_snr, -2 * levels), np.float64)
    times[0], times[-1] = t_max, t_min
    times = schedule.snap(times)
    if np.all(np.diff(times) < 0):
        return times
    return _separate(times, num_segments, NoiseRange(schedule, t_min, t_max))


def noise_range(schedule: AbstractNoiseSchedule) -> NoiseRange:
    """That of the whole schedule."""
    return NoiseRange(schedule, schedule.t_min, schedule.t_max)


def segment_times(schedule: AbstractNoiseSchedule, num_segments: int, *, rho: float = 7.0) -> np.ndarray:
    """Decreasing time grid of `num_segments` segments from `t_max` to `t_min`.

    The grid is even in `(sigma / alpha)^(1 / rho)`, the spacing of Karras et al. in noise level, and
    so does not depend on how the schedule runs through its noise levels. `rho=inf` is even in
    the log signal-to-noise ratio. `benchmarks/spacing.py` compares spacings.

    Args:
        schedule: Any schedule.
        num_segments: Number of segments, at least 1.
        rho: Larger puts more segments at low noise.

    Returns:
        Times, shape `(num_segments + 1,)`, strictly decreasing, float64.

    Raises:
        ValueError: if `num_segments < 1`, `rho < 1`, or a discrete schedule has too few steps.

    References:
        Karras et al. (2022), arXiv 2206.00364, equation 5.
    """
    _check_num_segments(num_segments)
    if not rho >= 1:
        raise ValueError(f"`segment_times(rho=...)` must be at least 1, got {rho!r}.")
    return noise_range(schedule).times(int(num_segments), rho=rho)


def _check_num_segments(num_segments: Any) -> None:
    if isinstance(num_segments, bool) or not isinstance(num_segments, int | np.integer) or num_segments < 1:
        raise ValueError(
            f"`num_segments` (or `segments`) must be an integer of at least 1, got {num_segments!r}."
        )


def _separate(times: np.ndarray, num_segments: int, noise: NoiseRange) -> np.ndarray:
    """Push coinciding steps of a discrete schedule apart by whole steps."""
    if num_segments > noise.max_segments:
        raise ValueError(
            f"`segments={num_segments}` is more than the {noise.max_segments} steps between "
            "the noise levels of this discrete schedule. Use fewer segments."
        )
    rising = times[::-1].copy()
    for i in range(1, rising.size):
        rising[i] = max(rising[i], rising[i - 1] + 1)
    rising[-1] = noise.t_max
    for i in range(rising.size - 2, -1, -1):
        rising[i] = min(rising[i], rising[i + 1] - 1)
    return rising[::-1]


def paper_segment_times(smoothness: float, t_max: float, *, t_min: float = 1e-3) -> np.ndarray:
    r"""Time grid of the RTK paper: constant segment length `eta = log(1 + 1 / (2 L)) / 2` of the OU process.

    With `-log p_s` `L`-smooth this makes every segment target `L`-strongly log-concave and
    `3 L`-smooth. The last segment is shorter, so that the grid ends at `t_min`.

    Args:
        smoothness: `L`, in units of `1 / x^2`, positive.
        t_max: Where noise starts, in OU time.
        t_min: Where sampling stops.

    Returns:
        Times from `t_max` to `t_min`, strictly decreasing, float64.

    Raises:
        ValueError: if `smoothness <= 0` or not `0 < t_min < t_max`.

    References:
        Huang et al. (2024), arXiv 2405.16387, section 3.
    """
    _positive("paper_segment_times", smoothness=float(smoothness), t_max=float(t_max), t_min=float(t_min))
    _ordered("paper_segment_times", "t_min", float(t_min), "t_max", float(t_max))
    eta = 0.5 * math.log1p(0.5 / smoothness)
    # A remainder below a thousandth of a segment is rounding, not a segment.
    num_full = max(0, math.floor((t_max - t_min) / eta * (1 + 1e-12) - 1e-3))
    times = t_max - eta * np.arange(num_full + 1)
    return np.append(times, t_min)


def check_times(schedule: AbstractNoiseSchedule, times: Any) -> np.ndarray:
    """Validate a time grid given by a user; returns it as float64, shape `(num_segments + 1,)`."""
    grid = np.asarray(times, np.float64)
    if grid.ndim != 1 or grid.size < 2:
        raise ValueError(
            f"`segments` as a time grid must have shape (num_segments + 1,) with at least two times, got "
            f"{grid.shape}."
        )
    if not np.all(np.isfinite(grid)):
        raise ValueError("`segments` as a time grid must be finite; it contains NaN or infinity.")
    if not np.all(np.diff(grid) < 0):
        raise ValueError(
            "`segments` as a time grid must decrease strictly, from noise (t_max) to data (t_min); got "
            f"{np.array2string(grid, threshold=6)}. Reverse it if it increases."
        )
    # A grid rounded to float32 may stick out by one rounding.
    slack = 1e-6 * max(1.0, abs(schedule.t_max))
    if grid[0] > schedule.t_max + slack or grid[-1] < schedule.t_min - min(slack, 1e-3 * schedule.t_min):
        raise ValueError(
            f"`segments` runs from {grid[0]:g} to {grid[-1]:g}, outside the schedule's times "
            f"[{schedule.t_min:g}, {schedule.t_max:g}]. Stay inside, or give the schedule other t_min and "
            f"t_max."
        )
    if not np.array_equal(schedule.snap(grid), grid):
        raise ValueError(
            "`segments` must be integer steps: this schedule is discrete (its network was trained at integer "
            "times only)."
        )
    return grid


DEFAULT_SEGMENTS = 32
"""Number of segments where the user names none."""


def resolve_segments(schedule: AbstractNoiseSchedule, segments: Any, default: int) -> np.ndarray:
    """A checked time grid from a number of segments, a grid, or `None` for the default number.

    Its ends are the noise range of whoever was given `segments`: a prior, or a kernel that draws from one.
    """
    return _resolve(noise_range(schedule), segments, default)


def resolve_levels(noise: NoiseRange, segments: Any, default: int) -> np.ndarray:
    """The same for a kernel that samples a prior: the noise range is the prior's.

    Raises:
        ValueError: for a time grid with other ends, naming both.
    """
    times = _resolve(noise, segments, default)
    for name, end, own in (("starts", times[0], noise.t_max), ("ends", times[-1], noise.t_min)):
        if not math.isclose(end, own, rel_tol=1e-5, abs_tol=1e-9):
            raise ValueError(
                f"`segments` {name} at t={end:g}, and the noise range of the prior at t={own:g}: the draws "
                f"would follow another law. Give `segments` a number or a grid from {noise.t_max:g} to "
                f"{noise.t_min:g}, or give the range to the prior, `DiffusionPrior(..., segments=grid)`."
            )
    return times


def _resolve(noise: NoiseRange, segments: Any, default: int) -> np.ndarray:
    if segments is None:
        # A discrete schedule may have fewer steps.
        return noise.times(min(default, noise.max_segments))
    if isinstance(segments, bool) or (np.ndim(segments) == 0 and not isinstance(segments, int | np.integer)):
        raise TypeError(
            f"`segments` must be a number of segments or a decreasing time grid, got {segments!r}."
        )
    if np.ndim(segments) == 0:
        if segments < 1:
            raise ValueError(f"`segments` must be at least 1, got {segments}.")
        return noise.times(int(segments))
    return check_times(noise.schedule, segments)
