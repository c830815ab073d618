r"""Forward noising: what `alpha`, `sigma` and a segment of the schedule are.

Data are noised as `x_t = alpha(t) x_0 + sigma(t) eps` with `eps ~ N(0, I)`; time runs from data
(`t_min`) to noise (`t_max`) and `s < t` always. Between two times the noising is
`x_t | x_s ~ N(a x_s, v I)` with `a = alpha(t) / alpha(s)` and
`v = sigma(t)^2 - a^2 sigma(s)^2`. The signal-to-noise ratio is `alpha^2 / sigma^2`.

Every schedule writes `sigma`, `v` and the inverse of `log_snr` in a form free of cancellation,
so that float32 is enough close to `t_min`.
"""

import abc
import math
import sys
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from numpyro_rtk._custom_types import Times


def _positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{owner}({name}=...)` must be positive and finite, got {value!r}.")


def _ordered(owner: str, low: str, low_value: float, high: str, high_value: float) -> None:
    if not low_value < high_value:
        raise ValueError(f"`{owner}` needs `{low}` < `{high}`, got {low}={low_value!r} and {high}={high_value!r}.")


class AbstractNoiseSchedule(eqx.Module):
    """A forward noising process; `t_min` and `t_max` are Python floats, in the schedule's own unit of time.

    Methods take scalar or array times of any shape, return that shape, and are differentiable in
    `t`. Times outside `[t_min, t_max]` are not checked here (they may be traced); time grids are.
    """

    t_min: eqx.AbstractVar[float]
    t_max: eqx.AbstractVar[float]

    @abc.abstractmethod
    def alpha(self, t: Times) -> Times:
        """Signal scale `alpha(t)`, in (0, 1], non-increasing."""

    @abc.abstractmethod
    def sigma(self, t: Times) -> Times:
        """Noise scale `sigma(t) > 0`, in units of the data, relative error of a few ulp in float32."""

    @abc.abstractmethod
    def log_snr(self, t: Times) -> Times:
        """`log(alpha(t)^2 / sigma(t)^2)`, decreasing."""

    @abc.abstractmethod
    def inverse_log_snr(self, log_snr: Times) -> Times:
        """The time at which `log_snr(t)` has the given value."""

    @abc.abstractmethod
    def transition(self, s: Times, t: Times) -> tuple[Times, Times]:
        """`(a, v)` of the noising step `x_t | x_s ~ N(a x_s, v I)` for `s <= t`."""

    @property
    def max_segments(self) -> int:
        """The largest number of segments a grid can have."""
        return sys.maxsize

    def snap(self, times: np.ndarray) -> np.ndarray:
        """Nearest times at which the score may be evaluated (all, unless the network's time is discrete)."""
        return times

    def network_time(self, t: Times) -> Any:
        """The time as the network wants it: `t` itself, or an integer step for discrete networks."""
        return t


class AbstractVariancePreserving(AbstractNoiseSchedule):
    """`alpha^2 + sigma^2 = 1`; subclasses give `integrated_rate`, the integral of `beta` from 0 to `t`."""

    @abc.abstractmethod
    def integrated_rate(self, t: Times) -> Times:
        """Integral of the rate from 0 to `t`; `alpha(t) = exp(-integrated_rate(t) / 2)`."""

    @abc.abstractmethod
    def integrated_rate_between(self, s: Times, t: Times) -> Times:
        """`integrated_rate(t) - integrated_rate(s)` without cancellation."""

    def alpha(self, t: Times) -> Times:
        return jnp.exp(-0.5 * self.integrated_rate(t))

    def sigma(self, t: Times) -> Times:
        return jnp.sqrt(-jnp.expm1(-self.integrated_rate(t)))

    def log_snr(self, t: Times) -> Times:
        # exp(-B) / (1 - exp(-B)) = 1 / expm1(B); written to survive large B in float32.
        rate = self.integrated_rate(t)
        return -rate - jnp.log(-jnp.expm1(-rate))

    def transition(self, s: Times, t: Times) -> tuple[Times, Times]:
        rate = self.integrated_rate_between(s, t)
        return jnp.exp(-0.5 * rate), -jnp.expm1(-rate)


def _rate_of_log_snr(log_snr: Times) -> Times:
    return jax.nn.softplus(-log_snr)  # B = log(1 + 1 / snr)


class OU(AbstractVariancePreserving):
    """Ornstein-Uhlenbeck process of the RTK paper: `alpha = exp(-t)`, `sigma^2 = 1 - exp(-2 t)`.

    Args:
        t_max: Where noise starts, dimensionless; at 5, `alpha` is 0.0067.
        t_min: Where sampling stops; at 1e-3 the draws still carry noise of sd 0.045.

    Raises:
        ValueError: unless `0 < t_min < t_max`, both finite.

    References:
        Huang et al. (2024), arXiv 2405.16387, section 2.
    """

    t_max: float = eqx.field(static=True, converter=float, default=5.0)
    t_min: float = eqx.field(static=True, converter=float, default=1e-3)

    def __check_init__(self) -> None:
        _positive("OU", t_min=self.t_min, t_max=self.t_max)
        _ordered("OU", "t_min", self.t_min, "t_max", self.t_max)

    def integrated_rate(self, t: Times) -> Times:
        return 2 * jnp.asarray(t)

    def integrated_rate_between(self, s: Times, t: Times) -> Times:
        return 2 * (jnp.asarray(t) - s)

    def inverse_log_snr(self, log_snr: Times) -> Times:
        return 0.5 * _rate_of_log_snr(log_snr)


class VP(AbstractVariancePreserving):
    """Variance-preserving process with a rate linear in time.

    The rate is `beta(t) = beta_min + (beta_max - beta_min) t / t_max` and
    `alpha(t) = exp(-integral of beta / 2)`. Equal `beta_min` and `beta_max` give the constant-rate
    process; `VP(2, 2, t_max=5)` is `OU()`.

    Args:
        beta_min: Rate at time 0, per unit time, positive.
        beta_max: Rate at `t_max`, at least `beta_min`.
        t_max: Where noise starts.
        t_min: Where sampling stops.

    Raises:
        ValueError: if a rate is not positive, `beta_max < beta_min`, or not `0 < t_min < t_max`.

    References:
        Song et al. (2021), arXiv 2011.13456, equation 33.
    """

    beta_min: float = eqx.field(static=True, converter=float, default=0.1)
    beta_max: float = eqx.field(static=True, converter=float, default=20.0)
    t_max: float = eqx.field(static=True, converter=float, default=1.0)
    t_min: float = eqx.field(static=True, converter=float, default=1e-3)

    def __check_init__(self) -> None:
        _positive("VP", beta_min=self.beta_min, beta_max=self.beta_max, t_min=self.t_min, t_max=self.t_max)
        _ordered("VP", "t_min", self.t_min, "t_max", self.t_max)
        if self.beta_max < self.beta_min:
            raise ValueError(
                f"`VP` needs `beta_min` <= `beta_max`, got beta_min={self.beta_min!r} and beta_max={self.beta_max!r}."
            )

    @property
    def _slope(self) -> float:
        return (self.beta_max - self.beta_min) / self.t_max

    def integrated_rate(self, t: Times) -> Times:
        t = jnp.asarray(t)
        return t * (self.beta_min + 0.5 * self._slope * t)

    def integrated_rate_between(self, s: Times, t: Times) -> Times:
        t = jnp.asarray(t)
        return (t - s) * (self.beta_min + 0.5 * self._slope * (t + s))

    def inverse_log_snr(self, log_snr: Times) -> Times:
        # Positive root of slope/2 t^2 + beta_min t = B, in the form that stays exact as slope -> 0.
        rate = _rate_of_log_snr(log_snr)
        return 2 * rate / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * self._slope * rate))


class Cosine(AbstractNoiseSchedule):
    """Cosine schedule: `alpha(t) = cos(phi(t)) / cos(phi(0))`, `phi(t) = (t + offset) / (1 + offset) pi/2`.

    Variance preserving. `offset=0` gives `alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)`.

    Args:
        offset: Keeps the noise from growing too slowly at the start, dimensionless, `>= 0`.
        t_max: Where noise starts, below 1 (at 1 no signal is left).
        t_min: Where sampling stops.

    Raises:
        ValueError: if `offset < 0` or not `0 < t_min < t_max < 1`.

    References:
        Nichol and Dhariwal (2021), arXiv 2102.09672, equation 17.
    """

    offset: float = eqx.field(static=True, converter=float, default=0.008)
    t_max: float = eqx.field(static=True, converter=float, default=0.995)
    t_min: float = eqx.field(static=True, converter=float, default=1e-3)

    def __check_init__(self) -> None:
        _positive("Cosine", t_min=self.t_min, t_max=self.t_max)
        _ordered("Cosine", "t_min", self.t_min, "t_max", self.t_max)
        if not self.t_max < 1:
            raise ValueError(f"`Cosine(t_max=...)` must be below 1, where alpha is 0, got {self.t_max!r}.")
        if not (math.isfinite(self.offset) and self.offset >= 0):
            raise ValueError(f"`Cosine(offset=...)` must be non-negative, got {self.offset!r}.")

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1 + self.offset)

    @property
    def _phase_0(self) -> float:
        return self.offset * self._rate

    def _cos(self, t: Times) -> Times:
        # cos(phi) = sin(pi/2 - phi), and pi/2 - phi = rate (1 - t) has no rounding left near t = 1.
        return jnp.sin(self._rate * (1 - jnp.asarray(t)))

    def alpha(self, t: Times) -> Times:
        return self._cos(t) / math.cos(self._phase_0)

    def _variance(self, s: Times, t: Times, cos_s: Times | float) -> Times:
        # 1 - cos(phi_t)^2 / cos(phi_s)^2 = sin(phi_t - phi_s) sin(phi_t + phi_s) / cos(phi_s)^2
        t = jnp.asarray(t)
        # sin(phi_t + phi_s), from whichever end of the half turn is nearer, so that neither end cancels.
        sum_from_0 = jnp.sin(self._rate * (t + s + 2 * self.offset))
        sum_from_pi = jnp.sin(self._rate * ((1 - t) + (1 - s)))
        return jnp.sin(self._rate * (t - s)) * jnp.where(t + s > 1, sum_from_pi, sum_from_0) / cos_s**2

    def sigma(self, t: Times) -> Times:
        return jnp.sqrt(self._variance(jnp.zeros_like(jnp.asarray(t)), t, math.cos(self._phase_0)))

    def log_snr(self, t: Times) -> Times:
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def inverse_log_snr(self, log_snr: Times) -> Times:
        cos_0, sin_0 = math.cos(self._phase_0), math.sin(self._phase_0)
        alpha_cos = jnp.sqrt(jax.nn.sigmoid(log_snr)) * cos_0
        noise = jax.nn.sigmoid(-log_snr) * cos_0**2  # = sin(phi - phi_0) sin(phi + phi_0)
        phase = jnp.arctan2(jnp.sqrt(sin_0**2 + noise), alpha_cos)
        # phi - phi_0 from the product keeps its relative accuracy where phi is close to phi_0, but is
        # the wrong branch beyond a quarter turn, where the plain difference is accurate.
        small = jnp.arcsin(jnp.clip(noise / jnp.sin(phase + self._phase_0), 0.0, 0.99))
        difference = jnp.where(phase - self._phase_0 < 0.7, small, phase - self._phase_0)
        return difference / self._rate

    def transition(self, s: Times, t: Times) -> tuple[Times, Times]:
        cos_s = self._cos(s)
        return self._cos(t) / cos_s, self._variance(s, t, cos_s)


class VE(AbstractNoiseSchedule):
    """Variance-exploding process: `alpha = 1`, `sigma(t) = sigma_min (sigma_max / sigma_min)^t`, `t` in [0, 1].

    Args:
        sigma_min: Noise scale at `t_min = 0`, in units of the data.
        sigma_max: Noise scale at `t_max = 1`; make it much larger than the data.

    Raises:
        ValueError: unless `0 < sigma_min < sigma_max`.

    References:
        Song et al. (2021), arXiv 2011.13456, equation 31.
    """

    sigma_min: float = eqx.field(static=True, converter=float, default=0.01)
    sigma_max: float = eqx.field(static=True, converter=float, default=50.0)

    def __check_init__(self) -> None:
        _positive("VE", sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        _ordered("VE", "sigma_min", self.sigma_min, "sigma_max", self.sigma_max)

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Times) -> Times:
        return jnp.ones_like(jnp.asarray(t, jnp.result_type(float, t)))

    def sigma(self, t: Times) -> Times:
        return self.sigma_min * jnp.exp(self._log_ratio * jnp.asarray(t))

    def log_snr(self, t: Times) -> Times:
        return -2 * (math.log(self.sigma_min) + self._log_ratio * jnp.asarray(t))

    def inverse_log_snr(self, log_snr: Times) -> Times:
        return (-0.5 * jnp.asarray(log_snr) - math.log(self.sigma_min)) / self._log_ratio

    def transition(self, s: Times, t: Times) -> tuple[Times, Times]:
        t = jnp.asarray(t)
        return self.alpha(t), self.sigma(s) ** 2 * jnp.expm1(2 * self._log_ratio * (t - s))


class EDM(AbstractNoiseSchedule):
    """Karras et al.'s process: `alpha = 1`, `sigma(t) = t`, so time is the noise scale itself.

    Args:
        sigma_min: Noise scale (and time) where sampling stops, in units of the data.
        sigma_max: Noise scale (and time) where noise starts.

    Raises:
        ValueError: unless `0 < sigma_min < sigma_max`.

    References:
        Karras et al. (2022), arXiv 2206.00364.
    """

    sigma_min: float = eqx.field(static=True, converter=float, default=0.002)
    sigma_max: float = eqx.field(static=True, converter=float, default=80.0)

    def __check_init__(self) -> None:
        _positive("EDM", sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        _ordered("EDM", "sigma_min", self.sigma_min, "sigma_max", self.sigma_max)

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t: Times) -> Times:
        return jnp.ones_like(jnp.asarray(t, jnp.result_type(float, t)))

    def sigma(self, t: Times) -> Times:
        return jnp.asarray(t, jnp.result_type(float, t))

    def log_snr(self, t: Times) -> Times:
        return -2 * jnp.log(t)

    def inverse_log_snr(self, log_snr: Times) -> Times:
        return jnp.exp(-0.5 * jnp.asarray(log_snr))

    def transition(self, s: Times, t: Times) -> tuple[Times, Times]:
        t = jnp.asarray(t)
        return self.alpha(t), (t - s) * (t + s)


class FlowMatching(AbstractNoiseSchedule):
    """Linear interpolation (rectified flow): `alpha = 1 - t`, `sigma = t`.

    Args:
        t_max: Where noise starts, below 1 (at 1 no signal is left). At 0.99 noise is 99 times the signal, about as much
            as `OU()` ends with; closer to 1 segments are spent on nothing but noise.
        t_min: Where sampling stops.

    Raises:
        ValueError: unless `0 < t_min < t_max < 1`.

    References:
        Lipman et al. (2023), arXiv 2210.02747; Liu et al. (2023), arXiv 2209.03003.
    """

    t_max: float = eqx.field(static=True, converter=float, default=0.99)
    t_min: float = eqx.field(static=True, converter=float, default=1e-3)

    def __check_init__(self) -> None:
        _positive("FlowMatching", t_min=self.t_min, t_max=self.t_max)
        _ordered("FlowMatching", "t_min", self.t_min, "t_max", self.t_max)
        if not self.t_max < 1:
            raise ValueError(f"`FlowMatching(t_max=...)` must be below 1, where alpha is 0, got {self.t_max!r}.")

    def alpha(self, t: Times) -> Times:
        return 1 - jnp.asarray(t)

    def sigma(self, t: Times) -> Times:
        return jnp.asarray(t, jnp.result_type(float, t))

    def log_snr(self, t: Times) -> Times:
        return 2 * (jnp.log1p(-jnp.asarray(t)) - jnp.log(t))

    def inverse_log_snr(self, log_snr: Times) -> Times:
        return jax.nn.sigmoid(-0.5 * jnp.asarray(log_snr))

    def transition(self, s: Times, t: Times) -> tuple[Times, Times]:
        # v = (t - a s)(t + a s), and t - a s = (t - s) / (1 - s).
        t = jnp.asarray(t)
        a = (1 - t) / (1 - s)
        return a, (t - s) / (1 - s) * (t + a * s)


class DiscreteVP(AbstractNoiseSchedule):
    """Schedule of a network trained at integer steps, given by its `alphas_cumprod`.

    Time is the step number, from `t_min = 0` (least noise) to `t_max = len(alphas_cumprod) - 1`;
    `alpha(t)^2` is `alphas_cumprod[t]` and between two steps the log signal-to-noise ratio is
    interpolated linearly. Grids from `segment_times` fall on integer steps, the score adapters
    hand the network the step as an `int32` scalar, and time grids off the steps are refused, so
    the network only ever sees noise levels it was trained on.

    Args:
        alphas_cumprod: Cumulative products of `1 - beta`, shape `(num_steps,)`, strictly
            decreasing, inside (0, 1), as in DDPM-style checkpoints. Give it in float64 if you can:
            `1 - alphas_cumprod[0]` is small.

    Raises:
        ValueError: if it is not one-dimensional with at least two decreasing values in (0, 1).

    References:
        Ho, Jain and Abbeel (2020), arXiv 2006.11239, equation 4.
    """

    alphas_cumprod: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, alphas_cumprod: ArrayLike | Sequence[float]) -> None:
        values = np.asarray(alphas_cumprod, np.float64)
        if values.ndim != 1 or values.size < 2:
            raise ValueError(
                "`DiscreteVP(alphas_cumprod=...)` must have shape (num_steps,) with at least two steps, "
                f"got shape {values.shape}."
            )
        if values[-1] == 0 and np.all(np.diff(values) < 0):
            raise ValueError(
                "`DiscreteVP(alphas_cumprod=...)` ends at 0 (zero terminal signal-to-noise ratio), where a score tells "
                "nothing about the data. Leave that step out: `alphas_cumprod[:-1]`."
            )
        if not (np.all(np.diff(values) < 0) and 0 < values[-1] and values[0] < 1):
            raise ValueError(
                "`DiscreteVP(alphas_cumprod=...)` must decrease strictly inside (0, 1); got values from "
                f"{values[0]} to {values[-1]}. (Pass `cumprod(1 - betas)`, not `betas`.)"
            )
        self.alphas_cumprod = tuple(values.tolist())

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return float(len(self.alphas_cumprod) - 1)

    @property
    def max_segments(self) -> int:
        return len(self.alphas_cumprod) - 1

    def _table(self) -> np.ndarray:
        squared = np.asarray(self.alphas_cumprod)
        return np.log(squared) - np.log1p(-squared)

    def log_snr(self, t: Times) -> Times:
        t = jnp.asarray(t, jnp.result_type(float, t))
        table = jnp.asarray(self._table(), t.dtype)
        return jnp.interp(t, jnp.arange(table.size, dtype=t.dtype), table)

    def inverse_log_snr(self, log_snr: Times) -> Times:
        log_snr = jnp.asarray(log_snr)
        table = jnp.asarray(self._table()[::-1].copy(), log_snr.dtype)
        return jnp.interp(log_snr, table, jnp.arange(table.size - 1, -1, -1, dtype=log_snr.dtype))

    def alpha(self, t: Times) -> Times:
        return jnp.sqrt(jax.nn.sigmoid(self.log_snr(t)))

    def sigma(self, t: Times) -> Times:
        return jnp.sqrt(jax.nn.sigmoid(-self.log_snr(t)))

    def transition(self, s: Times, t: Times) -> tuple[Times, Times]:
        # log alpha^2 = -softplus(-log_snr) is accurate where alpha is close to 1.
        rate = jax.nn.softplus(-self.log_snr(t)) - jax.nn.softplus(-self.log_snr(s))
        return jnp.exp(-0.5 * rate), -jnp.expm1(-rate)

    def snap(self, times: np.ndarray) -> np.ndarray:
        return np.round(times)

    def network_time(self, t: Times) -> Any:
        return jnp.round(t).astype(jnp.int32)


def _float64(function: Any, *values: Any) -> np.ndarray:
    """Evaluate a schedule method in float64 on the CPU, also under a trace, whatever the precision mode."""
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        return np.asarray(function(*(jnp.asarray(value, jnp.float64) for value in values)))


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
    if isinstance(num_segments, bool) or not isinstance(num_segments, int | np.integer) or num_segments < 1:
        raise ValueError(f"`num_segments` (or `segments`) must be an integer of at least 1, got {num_segments!r}.")
    if not rho >= 1:
        raise ValueError(f"`segment_times(rho=...)` must be at least 1, got {rho!r}.")
    log_ratio = -0.5 * _float64(schedule.log_snr, np.array([schedule.t_max, schedule.t_min]))
    if math.isinf(rho):
        levels = np.linspace(log_ratio[0], log_ratio[1], num_segments + 1)
    else:
        roots = np.exp(log_ratio / rho)
        levels = rho * np.log(np.linspace(roots[0], roots[1], num_segments + 1))
    times = _float64(schedule.inverse_log_snr, -2 * levels)
    times = np.array(times, np.float64)
    times[0], times[-1] = schedule.t_max, schedule.t_min
    times = schedule.snap(times)
    if not np.all(np.diff(times) < 0):
        times = _separate(times, num_segments, schedule)
    return times


def _separate(times: np.ndarray, num_segments: int, schedule: AbstractNoiseSchedule) -> np.ndarray:
    """Push coinciding steps of a discrete schedule apart by whole steps."""
    if num_segments > schedule.max_segments:
        raise ValueError(
            f"`segments={num_segments}` is more than the {schedule.max_segments} steps between "
            "the noise levels of this discrete schedule. Use fewer segments."
        )
    rising = times[::-1].copy()
    for i in range(1, rising.size):
        rising[i] = max(rising[i], rising[i - 1] + 1)
    rising[-1] = schedule.t_max
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
            f"`segments` as a time grid must have shape (num_segments + 1,) with at least two times, got {grid.shape}."
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
            f"[{schedule.t_min:g}, {schedule.t_max:g}]. Stay inside, or give the schedule other t_min and t_max."
        )
    if not np.array_equal(schedule.snap(grid), grid):
        raise ValueError(
            "`segments` must be integer steps: this schedule is discrete (its network was trained at integer times only)."
        )
    return grid
