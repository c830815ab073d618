"""Gaussian transitions: DDPM and a second-order stochastic predictor."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from numpyro_rtk._custom_types import RandomKey, Scalar
from numpyro_rtk._moves._accept import all_finite
from numpyro_rtk._reverse._base import (
    AbstractInnerKernel,
    SegmentEntry,
    SegmentResult,
    SegmentTuning,
)
from numpyro_rtk._reverse._segment import ReverseTransition


class GaussianTransition(AbstractInnerKernel):
    r"""The reverse transition replaced by a Gaussian: no inner steps.

    `order=1` is DDPM's ancestral step, `N(mean, v sigma_s^2 / sigma_t^2 I)` with the exact conditional
    mean. `order=2` is the second-order stochastic predictor SDE-DPM-Solver++(2M): the data
    prediction is extrapolated from the segment before, with the same noise.

    *Law.* Biased; the error of the law vanishes as segments get shorter, at first order (`order=1`)
    and, in the mean, at second (`order=2`).

    *Cost.* 1 score evaluation a segment.

    Args:
        order: 1 or 2.

    Raises:
        ValueError: for another order.

    References:
        Ho, Jain and Abbeel (2020), arXiv 2006.11239, equation 7. Lu et al. (2022), arXiv 2211.01095,
        algorithm SDE-DPM-Solver++(2M).
    """

    order: int = eqx.field(static=True, default=1)
    adapts_step_size: ClassVar[bool] = False
    needs_energy: ClassVar[bool] = False

    def __check_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"`GaussianTransition(order=...)` must be 1 or 2, got {self.order!r}.")

    @property
    def uses_history(self) -> bool:
        return self.order == 2

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
        extrapolated = data
        if self.order == 2:
            is_first = entry.half_log_snr_step <= 0
            ratio = jnp.where(is_first, 0.0, length / jnp.where(is_first, 1.0, entry.half_log_snr_step))
            extrapolated = data + 0.5 * ratio * (data - entry.data_prediction)
        alpha_s = alpha_t / a
        mean = (a * sigma_s**2 * x + v * alpha_s * extrapolated) / sigma_t_squared
        z = mean + jnp.sqrt(variance) * jr.normal(key, x.shape, x.dtype)
        failed = ~all_finite(z, score)
        zeros = jnp.zeros_like(x)
        return SegmentResult(
            x=jnp.where(failed, x, z),
            score=zeros,
            entry=SegmentEntry(jnp.where(failed, zeros, data), length),
            accept_prob=jnp.ones((), x.dtype),
            square_score=zeros,
            diverging=failed,
            failed=failed,
        )
