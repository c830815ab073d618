r"""Whether the score fits the noise: what each draw of a pilot tells at each noise level, at no evaluation.

The pilot noises `x_0` to `x = a x_0 + sqrt(v) eps` and evaluates the score there. If that is the score of
the law of `x`, then `E[eps | x] = -sqrt(v) score`: the noise that was added, regressed on the noise that the
score predicts, has a slope of 1. And `E<x - E x, score> = -dim`, Stein's identity. The first is sharp at high
noise, where draws differ less than their noise; the second at low noise.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from numpyro_rtk._custom_types import Scalar


HUGE = 1e12
"""Draws larger than this have exploded; their squares are still finite."""


def or_zero(draws: Array) -> Array:
    """Draws, with 0 for what exploded: noised, they still tell the sign of a score at the top, where all is
    noise.
    """
    return jnp.where(jnp.abs(draws) < HUGE, draws, 0.0)


class Calibration(NamedTuple):
    """One number for each draw, shape `(draws,)`, or `(levels, draws)`; all are means over coordinates."""

    stein: Array
    """`-(x - E x) score`, which has mean 1; unbiased for the mean over the draws in place of `E x`."""
    product: Array
    """Product of the noise that was added and the noise that the score predicts."""
    square: Array
    """Square of the noise that the score predicts; its mean is that of `product`."""


def calibrate(noise: Array, x: Array, scores: Array, v: Scalar) -> Calibration:
    """The statistics of one level.

    Args:
        noise: `eps`, standard normal, shape `(draws, *event)`.
        x: Noised draws, the same shape.
        scores: Their scores.
        v: Variance of the noise that was added.
    """
    num_draws, dim = x.shape[0], math.prod(x.shape[1:])
    centred = (x - jnp.mean(x, axis=0, keepdims=True)) * (num_draws / max(num_draws - 1, 1))
    predicted = -jnp.sqrt(v) * scores

    def mean(values: Array) -> Array:
        return jnp.sum(values.reshape(num_draws, -1), axis=1) / dim

    return Calibration(-mean(centred * scores), mean(noise * predicted), mean(predicted**2))
