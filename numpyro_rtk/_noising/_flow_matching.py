"""Linear interpolation between data and noise."""

import equinox as eqx
import jax
import jax.numpy as jnp

from numpyro_rtk._custom_types import Times
from numpyro_rtk._noising._base import _ordered, _positive, AbstractNoiseSchedule


class FlowMatching(AbstractNoiseSchedule):
    """Linear interpolation (rectified flow): `alpha = 1 - t`, `sigma = t`.

    Args:
        t_max: Where noise starts, below 1 (at 1 no signal is left). At 0.99 noise is 99 times the signal,
            about as much as `OU()` ends with; closer to 1 segments are spent on nothing but noise.
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
            raise ValueError(
                f"`FlowMatching(t_max=...)` must be below 1, where alpha is 0, got {self.t_max!r}."
            )

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
