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
from typing import Any

import equinox as eqx
import numpy as np

from numpyro_rtk._custom_types import Times


def _positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{owner}({name}=...)` must be positive and finite, got {value!r}.")


def _ordered(owner: str, low: str, low_value: float, high: str, high_value: float) -> None:
    if not low_value < high_value:
        raise ValueError(
            f"`{owner}` needs `{low}` < `{high}`, got {low}={low_value!r} and {high}={high_value!r}."
        )


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
