"""Gaussian transitions: DDPM and stochastic predictors of higher order."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from numpyro_rtk._custom_types import Event, RandomKey, Scalar
from numpyro_rtk._moves._accept import all_finite
from numpyro_rtk._reverse._base import (
    AbstractInnerKernel,
    SegmentEntry,
    SegmentResult,
    SegmentTuning,
)
from numpyro_rtk._reverse._segment import ReverseTransition


MAX_GROWTH = 1.5
"""Segments that are longer than this times the one before extrapolate less, as the last steps of a discrete
schedule with few of them: a parabola far beyond its points is worse than none.
"""


class GaussianTransition(AbstractInnerKernel):
    r"""The reverse transition replaced by a Gaussian: no inner steps.

    `order=1` is DDPM's ancestral step, `N(mean, v sigma_s^2 / sigma_t^2 I)` with the exact conditional
    mean. Higher orders extrapolate the data prediction from the segments before, with the same noise:
    `order=2` is the stochastic predictor SDE-DPM-Solver++(2M), `order=3` integrates the parabola through the
    last three predictions (the predictor of SA-Solver with three steps). They do best on grids that are about
    even in the log signal-to-noise ratio, as `segment_times(schedule, n, rho=inf)`: where a segment is more
    than 1.5 times as long as the one before, `order=3` extrapolates less.

    *Law.* Biased; the error of the law vanishes as segments get shorter, at first order (`order=1`)
    and, in the mean, at second and third.

    *Cost.* 1 score evaluation a segment.

    Args:
        order: 1, 2 or 3.

    Raises:
        ValueError: for another order.

    References:
        Ho, Jain and Abbeel (2020), arXiv 2006.11239, equation 7. Lu et al. (2022), arXiv 2211.01095,
        algorithm SDE-DPM-Solver++(2M). Xue et al. (2023), arXiv 2305.14267, the stochastic Adams predictor
        with `tau = 1`.
    """

    order: int = eqx.field(static=True, default=1)
    adapts_step_size: ClassVar[bool] = False
    needs_energy: ClassVar[bool] = False

    def __check_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"`GaussianTransition(order=...)` must be 1, 2 or 3, got {self.order!r}.")

    @property
    def history(self) -> int:
        return self.order - 1

    @property
    def evaluations_per_segment(self) -> int:
        return 1

    def default_step_size(self, precision: Scalar, dim: int) -> Scalar:
        del dim
        return jnp.ones_like(precision)

    def run_segment(
        self, key: RandomKey, target: ReverseTransition, entry: SegmentEntry, tuning: SegmentTuning
    ) -> SegmentResult:
        del tuning
        x, segment = target.x_t, target.segment
        a, v, sigma_s, alpha_t = segment.a, segment.v, segment.sigma_s, segment.alpha_t
        score = target.score_fn(x, segment.t)
        sigma_t_squared = a**2 * sigma_s**2 + v
        # With D = E[x_0 | x_t] = (x + sigma_t^2 score) / alpha_t, DDPM's mean is
        # (a sigma_s^2 x + v alpha_s D) / sigma_t^2. alpha_t is divided out: prediction = alpha_t D.
        prediction = x + sigma_t_squared * score
        variance = v * sigma_s**2 / sigma_t_squared
        # log(alpha / sigma) at s minus at t.
        length = 0.5 * jnp.log1p(v / (a * sigma_s) ** 2)
        data = prediction / alpha_t
        integral = v / sigma_t_squared * (data + self._correction(data, length, entry))
        mean = a * sigma_s**2 / sigma_t_squared * x + alpha_t / a * integral
        z = mean + jnp.sqrt(variance) * jr.normal(key, x.shape, x.dtype)
        failed = ~all_finite(z, score)
        zeros = jnp.zeros_like(x)
        return SegmentResult(
            x=jnp.where(failed, x, z),
            score=zeros,
            entry=entry.after(jnp.where(failed, zeros, data), length),
            accept_prob=jnp.ones((), x.dtype),
            square_score=zeros,
            diverging=failed,
            failed=failed,
        )

    def _correction(self, data: Event, length: Scalar, entry: SegmentEntry) -> Event:
        """What the mean of the data prediction over the segment differs from the one at its start.

        The mean of `D(u)`, `u` from 0 to the length `h` in `log(alpha / sigma)`, with the weights
        `2 exp(-2 (h - u))` of the exact solution; their sum is `v / sigma_t^2 = 1 - exp(-2 h)`.
        """
        if self.order == 1:
            return jnp.zeros_like(data)
        steps = entry.half_log_snr_steps
        known = steps > 0
        steps = jnp.where(known, steps, 1.0)
        slope = jnp.where(known[0], (data - entry.data_predictions[0]) / steps[0], 0.0)
        if self.order == 2:
            return 0.5 * length * slope
        before = (entry.data_predictions[0] - entry.data_predictions[1]) / steps[1]
        growth = length / steps[0]
        near = known[1] & (growth < MAX_GROWTH) & (steps[0] < MAX_GROWTH * steps[1])
        bend = jnp.where(near, (slope - before) / (steps[0] + steps[1]), 0.0)
        slope *= jnp.minimum(1.0, MAX_GROWTH / growth)
        # Newton's form, D(u) = D + slope u + bend u (u + h_before): moments of u under the weights.
        first = length / -jnp.expm1(-2 * length) - 0.5
        second = length**2 / -jnp.expm1(-2 * length) - first
        return first * slope + (second + steps[0] * first) * bend
