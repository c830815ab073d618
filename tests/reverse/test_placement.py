"""Where the levels of Gaussian transitions are placed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_rtk as rtk
from numpyro_rtk._noising._grid import candidate_grid
from numpyro_rtk._noising._placement import levels_by_density
from numpyro_rtk._noising._times import noise_range
from numpyro_rtk._reverse._placement import (
    EVEN_SHARE,
    NUM_PROBED_LEVELS,
    place_by_information,
    POWER,
    probed_levels,
)


SCHEDULE, NUM_SEGMENTS, SD = rtk.EDM(), 40, 0.5


def candidates_and_error():
    """Candidates, the probed ones, and the denoising error of `N(0, SD^2)` at those."""
    candidates = candidate_grid(noise_range(SCHEDULE), NUM_SEGMENTS, jnp.float32)
    probed = probed_levels(candidates.num_levels)
    sigma = np.asarray(candidates.sigma)[probed]
    return candidates, probed, jnp.asarray(SD**2 * sigma**2 / (SD**2 + sigma**2))


def test_density_of_levels_follows_the_rate_of_information():
    # Of N(0, s^2) under variance `sigma^2 = e^-l`: mmse = s^2 / (1 + s^2 e^l), so that the rate
    # -e^l d mmse / d l is (s^2 e^l / (1 + s^2 e^l))^2: up from 0 where the noise hides all, to 1.
    candidates, probed, error = candidates_and_error()
    indices = np.asarray(place_by_information(error, probed, candidates, NUM_SEGMENTS))
    log_snr = -2 * np.log(np.asarray(candidates.sigma, np.float64))
    share = SD**2 * np.exp(log_snr) / (1 + SD**2 * np.exp(log_snr))
    density = (share**2 + 5e-4) ** POWER
    reached = np.cumsum((1 - EVEN_SHARE) * density / density.sum() + EVEN_SHARE / density.size)
    expected = np.searchsorted(reached, np.arange(NUM_SEGMENTS + 1) / NUM_SEGMENTS)
    # Smoothing, and rounding to a candidate.
    np.testing.assert_allclose(indices, expected, atol=3)
    # The control: even levels are elsewhere.
    even = np.linspace(0, candidates.num_segments, NUM_SEGMENTS + 1)
    assert np.max(np.abs(indices - even)) > 30


def test_levels_count_the_distance_of_candidates():
    # Steps of a discrete schedule: the last quarter of the candidates has half of the length.
    lengths = jnp.asarray([1.0] * 300 + [3.0] * 100)
    even = np.asarray(levels_by_density(jnp.ones(400), lengths, 60, 0.5))
    reached = np.append(0.0, np.cumsum(lengths))
    np.testing.assert_allclose(reached[even], np.linspace(0, 600, 61), atol=2)
    # Weights are densities, with nothing even; and what is even goes by length, whatever the weights.
    weights = jnp.asarray([3.0] * 300 + [1.0] * 100)
    by_weight = np.asarray(levels_by_density(weights, lengths, 60, 0.0))
    assert abs(np.mean(by_weight <= 300) - 0.75) < 0.02
    half = np.asarray(levels_by_density(weights, lengths, 60, 0.5))
    assert abs(np.mean(half <= 300) - 0.5 * (0.75 + 0.5)) < 0.02


@pytest.mark.parametrize("error", [np.nan, np.inf, 0.0])
def test_levels_are_even_where_nothing_is_measured(error):
    candidates, probed, _ = candidates_and_error()
    indices = place_by_information(jnp.full(probed.size, error), probed, candidates, NUM_SEGMENTS)
    even = np.round(np.linspace(0, candidates.num_segments, NUM_SEGMENTS + 1))
    np.testing.assert_allclose(indices, even, atol=1)


def test_errors_of_what_is_measured_do_not_move_levels_far():
    candidates, probed, error = candidates_and_error()
    exact = place_by_information(error, probed, candidates, NUM_SEGMENTS)
    for seed in range(5):
        scatter = np.exp(0.05 * np.random.default_rng(seed).standard_normal(probed.size))
        indices = place_by_information(error * scatter, probed, candidates, NUM_SEGMENTS)
        assert np.all(np.diff(indices) > 0)
        assert np.max(np.abs(indices - exact)) < 0.05 * candidates.num_segments


def test_few_candidates():
    schedule = rtk.DiscreteVP(np.linspace(0.999, 0.01, 30))
    candidates = candidate_grid(noise_range(schedule), 12, jnp.float32)
    probed = probed_levels(candidates.num_levels)
    assert probed.size == candidates.num_levels < NUM_PROBED_LEVELS
    error = 1 / (1 + (candidates.alpha / candidates.sigma)[probed] ** 2)
    indices = jax.jit(lambda error: place_by_information(error, probed, candidates, 12))(error)
    assert (indices[0], indices[-1], indices.size) == (0, candidates.num_segments, 13)
    assert np.all(np.diff(indices) > 0)
