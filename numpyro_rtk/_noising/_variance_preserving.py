"""Variance-preserving processes with a closed-form rate: the Ornstein-Uhlenbeck process and linear rates."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp

from numpyro_rtk._custom_types import Times
from numpyro_rtk._noising._base import _ordered, _positive, AbstractNoiseSchedule


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
                f"`VP` needs `beta_min` <= `beta_max`, got beta_min={self.beta_min!r} and "
                f"beta_max={self.beta_max!r}."
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
