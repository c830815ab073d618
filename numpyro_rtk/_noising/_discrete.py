"""Processes of networks that were trained at integer steps."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from numpyro_rtk._custom_types import Times
from numpyro_rtk._noising._base import AbstractNoiseSchedule


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
                "`DiscreteVP(alphas_cumprod=...)` ends at 0 (zero terminal signal-to-noise ratio), where a "
                "score tells "
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
