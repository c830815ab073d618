"""Where the levels of Gaussian transitions are placed: where noise gives way to data."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_rtk._noising._grid import NoiseGrid
from numpyro_rtk._noising._placement import levels_by_density


NUM_PROBED_LEVELS = 49
"""Candidate levels at which the denoising error is measured."""
SMOOTHING = 5
"""Probed levels that a rate is averaged over."""
POWER = 0.25
"""Power of the rate that the density of levels goes with."""
EVEN_SHARE = 0.3
"""Share of the segments that are spread evenly over the log signal-to-noise ratio."""


def probed_levels(num_candidates: int) -> np.ndarray:
    """Indices of the candidates at which to measure."""
    last = num_candidates - 1
    return np.unique(np.linspace(0, last, min(NUM_PROBED_LEVELS, last + 1)).round().astype(int))


def place_by_information(
    mean_square: Array, probed: np.ndarray, candidates: NoiseGrid, num_segments: int
) -> Array:
    r"""Indices of the candidates that make a grid, with more of them where a pass learns most about the draw.

    Over a segment of length `h` in `l`, the log signal-to-noise ratio, a transition that takes the data
    prediction to be constant is off by `SNR |d mmse / d l| h^2 / 4` nats, with `mmse` the denoising error:
    the path's drift is the data prediction, whose mean square change is the decrease of its error. An
    extrapolated prediction is off where this rate is high, too, but by a higher power of `h`, for which a
    lower power of the rate is right; `benchmarks/evaluations.py` compares the fourth root with even levels.

    Args:
        mean_square: Denoising error at the probed levels, mean square over draws and coordinates, shape
            `(probed,)`.
        probed: Indices of the candidates that were probed, increasing, first and last among them.
        candidates: Levels to choose from, about even in the log signal-to-noise ratio.
        num_segments: Number of segments.

    Returns:
        Shape `(num_segments + 1,)`, strictly increasing, from the first candidate to the last; even where
        nothing finite was measured.
    """
    last = candidates.num_segments
    log_snr = 2 * jnp.log(candidates.alpha[probed] / candidates.sigma[probed])
    # Errors of what is measured never make it grow on the way down.
    fallen = jnp.maximum(mean_square[:-1] - mean_square[1:], 0.0)
    rate = fallen * jnp.exp(0.5 * (log_snr[1:] + log_snr[:-1])) / jnp.diff(log_snr)
    rate = jnp.where(jnp.isfinite(rate), rate, 0.0)
    half = SMOOTHING // 2
    rate = jnp.convolve(jnp.pad(rate, half, mode="edge"), jnp.full(SMOOTHING, 1 / SMOOTHING), mode="valid")
    # Half a thousandth of the largest rate is nothing, so that rounding places no levels.
    density = (rate + 5e-4 * jnp.max(rate) + jnp.finfo(rate.dtype).tiny) ** POWER
    middle = jnp.asarray(0.5 * (probed[1:] + probed[:-1]), rate.dtype)
    weights = jnp.interp(jnp.arange(last, dtype=rate.dtype) + 0.5, middle, density)
    return levels_by_density(weights, candidates.log_snr_steps, num_segments, EVEN_SHARE)
