"""Langevin proposals `y = x + h f(x) + sqrt(2 h) xi`, in coordinates in which their noise is white."""

from collections.abc import Callable

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from numpyro_rtk._custom_types import Event, RandomKey, Scalar
from numpyro_rtk._moves._line_integral import dot


def langevin_move(key: RandomKey, force: Event, step_size: Scalar) -> Event:
    """The step `y - x`, for the gradient `force` of the log target at `x`."""
    noise = jr.normal(key, force.shape, force.dtype)
    return step_size * force + jnp.sqrt(2 * step_size) * noise


def log_langevin_ratio(
    move: Event,
    force: Event,
    new_force: Event,
    step_size: Scalar,
    inner: Callable[[Event, Event], Array] = dot,
) -> Array:
    """`log q(x | y) - log q(y | x)`, the squares `|y - x|^2` cancelled by hand; antisymmetric.

    Args:
        move: `y - x`.
        force: Gradient of the log target at `x`.
        new_force: The same at `y`.
        step_size: `h`.
        inner: Inner product; one by element gives a ratio by element.
    """
    total = force + new_force
    return 0.25 * step_size * inner(force - new_force, total) - 0.5 * inner(move, total)
