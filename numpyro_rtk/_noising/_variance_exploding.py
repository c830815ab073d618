"""Variance-exploding processes: `alpha = 1`."""

import math

import equinox as eqx
import jax.numpy as jnp

from numpyro_rtk._custom_types import Times
from numpyro_rtk._noising._base import _ordered, _positive, AbstractNoiseSchedule


class VE(AbstractNoiseSchedule):
    """Variance-exploding process: `alpha = 1`, `sigma(t) = sigma_min (sigma_max / sigma_min)^t`, `t` in [0,
    1].

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
