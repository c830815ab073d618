r"""The law of a condition given an event, from the event's noising path and scores alone.

The noising path `x_1:K | x_0` does not depend on the condition `c`, so that `p(c | x_0, x_1:K) = p(c | x_0)`,
and the law of event and path is a product of reverse transitions, `p(x_K) prod_k p(x_(k-1) | x_k, c)`. Each
is nearly Gaussian where segments are short, with the mean `(x_k + v s(x_k, t_k, c)) / a`, which is exact. Its
covariance is taken from the measured denoising error: as segments shrink it no longer matters, and all of the
information is in the drift (Girsanov's theorem).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from numpyro_rtk._custom_types import Event, RandomKey, Scalar
from numpyro_rtk._noising._grid import NoiseGrid
from numpyro_rtk._score._model import ScoreModel


class PathGrid(NamedTuple):
    """Segments of a noising path, and what its reverse transitions leave open."""

    grid: NoiseGrid
    """Levels, from noise to data."""
    variance: Array
    """Of each reverse transition, by coordinate: shape `(segments, *event)`."""


def path_grid(grid: NoiseGrid, measured: NoiseGrid, mean_square: Array) -> PathGrid:
    """The variance of reverse transitions on a grid, from denoising errors that were measured on another one.

    With `x_0` of variance `r^2` given `x_t`, that of `x_s` given `x_t` is
    `v_s v / v_t + (a_s v / v_t)^2 r^2`: of the bridge from `x_0` to `x_t`, and of where it begins.

    Args:
        grid: Levels of the path.
        measured: Levels at which errors are known, with the same ends.
        mean_square: Errors there, shape `(levels, *event)`.
    """
    # Relative to the noise, in units of the data, errors vary slowly; at the last level there is no noise.
    known = measured.total_v[:-1] / measured.total_a[:-1] ** 2
    relative = mean_square[:-1].reshape(known.size, -1) / known[:, None]
    asked = grid.total_v[:-1] / grid.total_a[:-1] ** 2
    at = jax.vmap(lambda column: jnp.interp(-jnp.log(asked), -jnp.log(known), column), 1, 1)(relative)
    error = (at * asked[:, None]).reshape(-1, *mean_square.shape[1:])
    shape = (-1,) + (1,) * (mean_square.ndim - 1)
    v_t, v_s = grid.total_v[:-1], grid.total_v[1:]
    bridge, weight = v_s * grid.v / v_t, grid.total_a[1:] * grid.v / v_t
    return PathGrid(grid, bridge.reshape(shape) + weight.reshape(shape) ** 2 * error)


def noise_path(key: RandomKey, grid: NoiseGrid, x: Event) -> Array:
    """An event noised up through all levels; from noise to data, shape `(levels, *event)`."""

    def up(x: Event, inputs: tuple[RandomKey, Scalar, Scalar]) -> tuple[Event, Event]:
        key, a, v = inputs
        x = a * x + jnp.sqrt(v) * jr.normal(key, x.shape, x.dtype)
        return x, x

    inputs = (jr.split(key, grid.num_segments), grid.a, grid.v)
    _, above = jax.lax.scan(up, x, inputs, reverse=True)
    return jnp.concatenate([above, x[None]])


def path_log_density(model: ScoreModel, path_grid: PathGrid, path: Array) -> Scalar:
    """Log density of a path in the condition that the score is given, up to a constant.

    One score evaluation a segment, all in one batch.

    Args:
        model: The score of one event.
        path_grid: Its segments.
        path: From noise to data, shape `(levels, *event)`.
    """
    grid, variance = path_grid
    scores = jax.vmap(lambda x, t: model(x, t))(path[:-1], grid.t[:-1])
    shape = (-1,) + (1,) * (path.ndim - 1)
    mean = (path[:-1] + grid.v.reshape(shape) * scores) / grid.a.reshape(shape)
    return -0.5 * jnp.sum((path[1:] - mean) ** 2 / variance)
