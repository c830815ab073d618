"""The terminal Gaussian: the law of the data noised to the top of the grid, where reverse passes start."""

from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr

from numpyro_rtk._custom_types import Event, RandomKey
from numpyro_rtk._noising._grid import NoiseGrid


class Terminal(NamedTuple):
    """A Gaussian with independent coordinates, in the shape of an event."""

    mean: Event
    """`alpha(t_max)` times the mean of the data."""
    variance: Event
    """`alpha(t_max)^2` times the variance of the data, plus `sigma(t_max)^2`."""

    def sample(self, key: RandomKey) -> Event:
        """One draw."""
        return self.mean + jnp.sqrt(self.variance) * jr.normal(key, self.mean.shape, self.mean.dtype)

    def score(self, x: Event) -> Event:
        """Gradient of the log density at `x`."""
        return (self.mean - x) / self.variance


def terminal(grid: NoiseGrid, mean: Event, variance: Event) -> Terminal:
    """The law at the top of the grid of data with this mean and variance by coordinate."""
    alpha, sigma = grid.alpha[0], grid.sigma[0]
    return Terminal(alpha * mean, alpha**2 * variance + sigma**2)


def standard_terminal(grid: NoiseGrid, shape: tuple[int, ...]) -> Terminal:
    """That of standardised data, the assumption where nothing was measured."""
    zeros = jnp.zeros(shape, grid.t.dtype)
    return terminal(grid, zeros, zeros + 1)
