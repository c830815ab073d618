"""The cosine schedule."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp

from numpyro_rtk._custom_types import Times
from numpyro_rtk._noising._base import _ordered, _positive, AbstractNoiseSchedule


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
