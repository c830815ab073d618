"""Noise levels and what prior draws teach about them."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import numpyro_rtk as rtk
from numpyro_rtk._levels import mean_prediction, MIN_RELATIVE_CURVATURE, noise_levels, PILOT_PRIOR_DRAWS, prior_draws, run_pilot
from numpyro_rtk._schedule import segment_times
from tests.helpers import Counter, SCHEDULES


NUM_SEGMENTS = 8
MEAN, VARIANCE = np.array([0.4, -1.0, 0.2]), np.array([0.5, 1.0, 0.01])


def gaussian(schedule):
    """A Gaussian law with independent coordinates, and its moments at `t_min`."""
    score = rtk.GaussianMixtureScore(np.ones(1), MEAN[None], np.diag(VARIANCE)[None], schedule)
    alpha, sigma = float(schedule.alpha(schedule.t_min)), float(schedule.sigma(schedule.t_min))
    return score, alpha * MEAN, alpha**2 * VARIANCE + sigma**2


@pytest.mark.parametrize("name", ["OU", "VE", "FlowMatching", "DiscreteVP"])
def test_levels_are_the_noising_from_t_min(name):
    schedule = SCHEDULES[name]
    times = segment_times(schedule, NUM_SEGMENTS)
    levels = noise_levels(schedule, times, jnp.float32)
    with jax.enable_x64(True):
        alpha = np.asarray(schedule.alpha(jnp.asarray(times)))
        sigma = np.asarray(schedule.sigma(jnp.asarray(times)))
    np.testing.assert_allclose(levels.a, alpha / alpha[-1], rtol=1e-3)
    np.testing.assert_allclose(levels.sigma, sigma, rtol=1e-3)
    np.testing.assert_allclose(levels.v, sigma**2 - (alpha / alpha[-1]) ** 2 * sigma[-1] ** 2, rtol=2e-3, atol=1e-6)
    assert levels.a[-1] == 1
    assert levels.v[-1] == 0


@pytest.mark.parametrize("name", ["OU", "VE"])
def test_the_mean_prediction_of_a_gaussian_is_exact(name):
    schedule = SCHEDULES[name]
    score, mean, variance = gaussian(schedule)
    levels = noise_levels(schedule, segment_times(schedule, NUM_SEGMENTS), jnp.float32)
    score = jax.jit(score.__call__)
    for i in range(0, NUM_SEGMENTS + 1, 2):
        level = jax.tree.map(lambda leaf, i=i: leaf[i], levels)
        a, v = np.float64(level.a), np.float64(level.v)
        x = np.asarray(a * mean + np.sqrt(a**2 * variance + v) * jr.normal(jr.key(i), (3,)))
        predicted = mean_prediction(level, jnp.asarray(x, jnp.float32), score(jnp.asarray(x, jnp.float32), level.t))
        exact = mean + a * variance / (a**2 * variance + v) * (x - a * mean)
        np.testing.assert_allclose(predicted, exact, rtol=2e-3, atol=2e-3)


def test_at_t_min_the_mean_prediction_is_the_point_itself():
    levels = noise_levels(rtk.OU(), segment_times(rtk.OU(), 4), jnp.float32)
    x = jnp.array([0.3, 1e8])
    last = jax.tree.map(lambda leaf: leaf[-1], levels)
    np.testing.assert_array_equal(mean_prediction(last, x, jnp.array([1e9, 1e9])), x)


@functools.cache
def pilot(name, num_draws=4000):
    schedule = SCHEDULES[name]
    score, mean, variance = gaussian(schedule)
    levels = noise_levels(schedule, segment_times(schedule, NUM_SEGMENTS), jnp.float32)
    draws = jnp.asarray(mean + np.sqrt(variance) * np.random.default_rng(0).standard_normal((num_draws, 3)), jnp.float32)
    return levels, variance, draws, jax.jit(lambda draws: run_pilot(jr.key(0), score, levels, draws))(draws)


@pytest.mark.parametrize("name", ["OU", "VE"])
def test_the_measured_error_and_curvature_are_those_of_the_closed_form(name):
    levels, variance, draws, result = pilot(name)
    a, v = np.asarray(levels.a, np.float64)[:, None], np.asarray(levels.v, np.float64)[:, None]
    error = variance - a**2 * variance**2 / (a**2 * variance + v)
    weight = PILOT_PRIOR_DRAWS / (PILOT_PRIOR_DRAWS + len(draws))
    error = (1 - weight) * error + weight * error.mean(1, keepdims=True)
    # A mean square over 4000 draws: 6 standard errors.
    np.testing.assert_allclose(result.mean_square, error, rtol=6 * np.sqrt(2 / len(draws)), atol=1e-6)
    assert np.all(np.asarray(result.mean_square[-1]) == 0)
    assert np.all(np.asarray(result.residuals[-1]) == 0)
    assert result.residuals.shape == (NUM_SEGMENTS + 1, len(draws), 3)
    curvature = 1 / (a**2 * variance + v)
    curvature = (1 - weight) * curvature + weight * curvature.mean(1, keepdims=True)
    bound = 1 / np.asarray(levels.sigma, np.float64)[:, None] ** 2
    expected = np.clip(curvature, MIN_RELATIVE_CURVATURE * bound, bound)
    np.testing.assert_allclose(result.curvature, expected, rtol=6 * np.sqrt(2 / len(draws)))
    assert np.all(np.asarray(result.curvature) <= bound * (1 + 1e-5))


def test_the_pilot_costs_one_evaluation_per_draw_and_level():
    schedule = rtk.OU()
    score = Counter(gaussian(schedule)[0])
    levels = noise_levels(schedule, segment_times(schedule, NUM_SEGMENTS), jnp.float32)
    jax.block_until_ready(jax.jit(lambda draws: run_pilot(jr.key(0), score, levels, draws))(jnp.ones((5, 3))))
    assert score.count == 5 * (NUM_SEGMENTS + 1)


def test_prior_draws_cost_forty_evaluations_each():
    score = Counter(gaussian(rtk.OU())[0])
    draws = prior_draws(jr.key(0), score, rtk.OU(), (3,), jnp.float32, 2)
    assert draws.shape == (2, 3)
    assert score.count == 2 * 40
