"""Where noise levels are placed: where the reverse transition is hardest."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from numpyro_rtk._custom_types import RandomKey
from numpyro_rtk._noising._grid import Level, NoiseGrid
from numpyro_rtk._noising._placement import levels_by_density
from numpyro_rtk._score._model import ScoreModel


NUM_PROBED_LEVELS = 32
"""Candidate levels at which the difficulty of reverse transitions is measured."""
MAX_PROBES = 64
"""Prior draws that measure it, at most."""
PROBE = 0.5
"""Length of the probe in units of the noise scale: as far as a transition goes that removes a fifth of the
noise's variance.
"""
NEGLIGIBLE_DIFFICULTY = 1e-2
"""Added to what was measured, so that rounding of an easy prior's scores, which depends on the machine,
places no levels.
"""
EVEN_SHARE = 0.5
"""Share of the segments that are spread evenly over the log signal-to-noise ratio, whatever was measured: an
informative likelihood needs levels at low noise, too."""


def transition_difficulty(key: RandomKey, score_fn: ScoreModel, candidates: NoiseGrid, draws: Array) -> Array:
    r"""How far reverse transitions are from the Gaussian that inner kernels propose from, per unit of log
    signal-to-noise ratio.

    A transition over a short segment is Gaussian where the Hessian `H` of `log p_t` is the same wherever it
    may end. Its distance from the reference `N(m, c)` of `PreconditionedMALA` grows with the square of the
    segment's length, times `E |sigma^2 (H - E diag H)|_F^2`, estimated by differences of scores along random
    directions. Zero for a Gaussian prior with independent coordinates. `2 * NUM_PROBED_LEVELS` score
    evaluations per draw, of at most `MAX_PROBES` draws.

    Returns:
        One value per candidate, interpolated between the probed ones.
    """
    last = candidates.t.shape[0] - 1
    probed = np.unique(np.linspace(0, last, min(NUM_PROBED_LEVELS, last + 1)).round().astype(int))
    draws = draws[:MAX_PROBES]

    def at_level(inputs: tuple[RandomKey, Level]) -> Array:
        key, level = inputs
        t, sigma = level.t, level.sigma
        noise_key, probe_key = jr.split(key)
        x = level.a * draws + jnp.sqrt(level.v) * jr.normal(noise_key, draws.shape, draws.dtype)
        direction = jr.normal(probe_key, draws.shape, draws.dtype)
        moved = x + PROBE * sigma * direction
        change = sigma / PROBE * (score_fn.each(moved, t) - score_fn.each(x, t))
        # Least squares, so that the deviation of a Gaussian of independent coordinates is 0 and not the
        # probes' own scatter.
        slope = jnp.sum(direction * change, axis=0) / jnp.sum(direction**2, axis=0)
        deviation = change - slope[None] * direction
        square = jnp.sum(deviation**2, axis=tuple(range(1, draws.ndim)))
        return jnp.mean(jnp.where(jnp.isfinite(square), square, 0.0))

    keys = jr.split(key, probed.size)
    difficulty = jax.lax.map(at_level, (keys, candidates.level(probed)))
    return jnp.interp(
        jnp.arange(last + 1, dtype=difficulty.dtype), jnp.asarray(probed, difficulty.dtype), difficulty
    )


def place_levels(difficulty: Array, lengths: Array, num_segments: int) -> Array:
    """Indices of the candidates that make a grid, with more of them where transitions are difficult.

    The error of a segment of length `l` is `difficulty * l^2`; the sum is least where the density of levels
    goes with the root of the difficulty. `EVEN_SHARE` of the density is even.

    Args:
        difficulty: Of each candidate.
        lengths: Of the segments between candidates, in the log signal-to-noise ratio.
        num_segments: Number of segments.

    Returns:
        Shape `(num_segments + 1,)`, strictly increasing, from the first candidate to the last.
    """
    root = jnp.sqrt(difficulty + NEGLIGIBLE_DIFFICULTY)
    return levels_by_density(0.5 * (root[1:] + root[:-1]), lengths, num_segments, EVEN_SHARE)
