"""Noise levels and what prior draws teach about them."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import numpyro_rtk as rtk
from numpyro_rtk._noising._grid import (
    candidate_grid,
    chosen_grid,
    mean_prediction,
    noise_grid,
    NUM_CANDIDATES,
)
from numpyro_rtk._noising._terminal import Terminal
from numpyro_rtk._noising._times import noise_range, segment_times
from numpyro_rtk._reverse._pilot import (
    MIN_RELATIVE_CURVATURE,
    MIN_TERMINAL_DRAWS,
    PILOT_PRIOR_DRAWS,
    PILOT_SEGMENTS,
    prior_draws,
    run_pilot,
    TERMINAL_ROUNDS,
)
from numpyro_rtk._score._model import resolve_score
from numpyro_rtk._smc._placement import (
    EVEN_SHARE,
    MAX_PROBES,
    NUM_PROBED_LEVELS,
    place_levels,
    transition_difficulty,
)
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
    grid = noise_grid(schedule, times, jnp.float32)
    levels = grid.levels
    with jax.enable_x64(True):
        alpha = np.asarray(schedule.alpha(jnp.asarray(times)))
        sigma = np.asarray(schedule.sigma(jnp.asarray(times)))
    np.testing.assert_allclose(levels.a, alpha / alpha[-1], rtol=1e-3)
    np.testing.assert_allclose(levels.sigma, sigma, rtol=1e-3)
    np.testing.assert_allclose(
        levels.v, sigma**2 - (alpha / alpha[-1]) ** 2 * sigma[-1] ** 2, rtol=2e-3, atol=1e-6
    )
    assert levels.a[-1] == 1
    assert levels.v[-1] == 0
    assert (grid.num_levels, grid.num_segments) == (NUM_SEGMENTS + 1, NUM_SEGMENTS)
    for i in (0, 3, NUM_SEGMENTS):
        jax.tree.map(lambda one, all, i=i: np.testing.assert_array_equal(one, all[i]), grid.level(i), levels)


@pytest.mark.parametrize("name", ["OU", "VE", "FlowMatching", "DiscreteVP"])
def test_segments_are_the_noising_between_neighbouring_levels(name):
    schedule = SCHEDULES[name]
    times = segment_times(schedule, NUM_SEGMENTS)
    grid = noise_grid(schedule, times, jnp.float32)
    segments, levels = grid.segments, grid.levels
    for got, expected in [
        (segments.t, levels.t[:-1]),
        (segments.s, levels.t[1:]),
        (segments.alpha_t, levels.alpha[:-1]),
        (segments.sigma_s, levels.sigma[1:]),
    ]:
        np.testing.assert_array_equal(got, expected)
    with jax.enable_x64(True):
        # At the times that the network sees.
        t = jnp.asarray(np.asarray(grid.t), jnp.float64)
        alpha, sigma = np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))
        a = alpha[:-1] / alpha[1:]
        v = sigma[:-1] ** 2 - a**2 * sigma[1:] ** 2
    np.testing.assert_allclose(segments.a, a, rtol=1e-6)
    np.testing.assert_allclose(segments.v, v, rtol=1e-5)
    for k in (0, NUM_SEGMENTS - 1):
        jax.tree.map(
            lambda one, all, k=k: np.testing.assert_array_equal(one, all[k]), grid.segment(k), segments
        )


def test_times_that_coincide_in_the_precision_are_refused():
    with pytest.raises(ValueError, match="`segments` has times that coincide in float32"):
        noise_grid(rtk.OU(), np.array([1.0, 0.5, 0.5 - 1e-9]), jnp.float32)


@pytest.mark.parametrize("name", ["OU", "VE"])
def test_the_mean_prediction_of_a_gaussian_is_exact(name):
    schedule = SCHEDULES[name]
    score, mean, variance = gaussian(schedule)
    grid = noise_grid(schedule, segment_times(schedule, NUM_SEGMENTS), jnp.float32)
    score = jax.jit(score.__call__)
    for i in range(0, NUM_SEGMENTS + 1, 2):
        level = grid.level(i)
        a, v = np.float64(level.a), np.float64(level.v)
        x = np.asarray(a * mean + np.sqrt(a**2 * variance + v) * jr.normal(jr.key(i), (3,)))
        predicted = mean_prediction(
            level, jnp.asarray(x, jnp.float32), score(jnp.asarray(x, jnp.float32), level.t)
        )
        exact = mean + a * variance / (a**2 * variance + v) * (x - a * mean)
        np.testing.assert_allclose(predicted, exact, rtol=2e-3, atol=2e-3)


def test_at_t_min_the_mean_prediction_is_the_point_itself():
    grid = noise_grid(rtk.OU(), segment_times(rtk.OU(), 4), jnp.float32)
    x = jnp.array([0.3, 1e8])
    np.testing.assert_array_equal(mean_prediction(grid.level(-1), x, jnp.array([1e9, 1e9])), x)


@functools.cache
def pilot(name, num_draws=4000):
    schedule = SCHEDULES[name]
    score, mean, variance = gaussian(schedule)
    grid = noise_grid(schedule, segment_times(schedule, NUM_SEGMENTS), jnp.float32)
    draws = jnp.asarray(
        mean + np.sqrt(variance) * np.random.default_rng(0).standard_normal((num_draws, 3)), jnp.float32
    )
    measure = jax.jit(lambda draws: run_pilot(jr.key(0), resolve_score(score), grid, draws))
    return grid.levels, variance, draws, measure(draws)


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
    grid = noise_grid(schedule, segment_times(schedule, NUM_SEGMENTS), jnp.float32)
    jax.block_until_ready(
        jax.jit(lambda draws: run_pilot(jr.key(0), resolve_score(score), grid, draws))(jnp.ones((5, 3)))
    )
    assert score.count == 5 * (NUM_SEGMENTS + 1)


def test_prior_draws_cost_forty_evaluations_each_and_those_of_the_terminal():
    score = Counter(gaussian(rtk.OU())[0])
    draws, terminal = prior_draws(
        jr.key(0), resolve_score(score), noise_range(rtk.OU()), (3,), jnp.float32, 2
    )
    assert draws.shape == (2, 3)
    assert isinstance(terminal, Terminal)
    assert terminal.mean.shape == terminal.variance.shape == (3,)
    assert (PILOT_SEGMENTS, TERMINAL_ROUNDS) == (40, 3)
    assert score.count == 2 * 40 + 3 * MIN_TERMINAL_DRAWS
    assert MIN_TERMINAL_DRAWS == 32


# Where levels are placed.


@pytest.mark.parametrize("name", ["OU", "VE", "FlowMatching", "DiscreteVP"])
def test_a_chosen_grid_is_the_grid_of_its_times(name):
    schedule = SCHEDULES[name]
    candidates = candidate_grid(noise_range(schedule), NUM_SEGMENTS, jnp.float32)
    difficulty = jnp.exp(-((jnp.arange(candidates.t.size) - 90.0) ** 2) / 400)
    indices = place_levels(difficulty, candidates.log_snr_steps, NUM_SEGMENTS)
    grid = chosen_grid(schedule, candidates, indices)
    # Where the choice is traced, the schedule is not evaluated again, and differences are rounded.
    traced = jax.jit(lambda indices: chosen_grid(schedule, candidates, indices))(indices)
    times = np.asarray(grid.t)
    assert times[0] == np.float32(schedule.t_max)
    assert times[-1] == np.float32(schedule.t_min)
    exact = noise_grid(schedule, times, jnp.float32)
    for field, one, rounded, other in zip(grid._fields, grid, traced, exact, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=field)
        np.testing.assert_allclose(rounded, other, rtol=1e-4, atol=1e-7, err_msg=field)


def test_levels_are_dense_as_the_root_of_the_difficulty():
    # Four times the difficulty in the first half: twice the levels there, and the even share.
    difficulty = jnp.where(jnp.arange(4001) < 2000, 4.0, 1.0)
    indices = np.asarray(place_levels(difficulty, jnp.ones(4000), 240))
    share = np.mean(indices < 2000)
    assert abs(share - ((1 - EVEN_SHARE) * 2 / 3 + EVEN_SHARE / 2)) < 0.01
    assert np.all(np.diff(indices) > 0)
    assert (indices[0], indices[-1]) == (0, 4000)


@pytest.mark.parametrize("difficulty", [np.zeros(41), np.ones(41), np.eye(41)[20], np.eye(41)[40] * 1e30])
@pytest.mark.parametrize("num_segments", [1, 7, 39, 40])
def test_levels_are_distinct_and_reach_both_ends(difficulty, num_segments):
    indices = np.asarray(place_levels(jnp.asarray(difficulty, jnp.float32), jnp.ones(40), num_segments))
    assert indices.shape == (num_segments + 1,)
    assert (indices[0], indices[-1]) == (0, 40)
    assert np.all(np.diff(indices) > 0)
    if np.ptp(difficulty) == 0:
        np.testing.assert_array_equal(indices, np.round(np.linspace(0, 40, num_segments + 1)))


def difficulty_of(score, schedule, dim, num_draws=MAX_PROBES):
    candidates = candidate_grid(noise_range(schedule), NUM_SEGMENTS, jnp.float32)
    draws = score.sample(jr.key(0), num_draws, schedule.t_min)
    assert draws.shape == (num_draws, dim)
    difficulty = jax.jit(
        lambda draws: transition_difficulty(jr.key(1), resolve_score(score), candidates, draws)
    )(draws)
    return candidates, np.asarray(difficulty)


@pytest.mark.parametrize("name", ["OU", "VE"])
def test_transitions_of_an_independent_gaussian_are_not_difficult(name):
    _, difficulty = difficulty_of(gaussian(SCHEDULES[name])[0], SCHEDULES[name], 3)
    assert np.all(difficulty < 1e-4)


@pytest.mark.parametrize("half_distance", [4.0, 40.0])
def test_transitions_are_difficult_where_modes_part(half_distance):
    schedule = rtk.OU(t_max=9.0)
    means = half_distance * np.array([[-1.0, 0.0], [1.0, 0.0]])
    score = rtk.GaussianMixtureScore(np.array([0.3, 0.7]), means, np.stack([np.eye(2)] * 2), schedule)
    candidates, difficulty = difficulty_of(score, schedule, 2)
    ratio = np.asarray(candidates.sigma / candidates.alpha)
    # Modes part at a noise of about their distance from the middle; no closer, and no further, is anything
    # difficult.
    assert 0.3 < ratio[np.argmax(difficulty)] / half_distance < 1.5
    assert np.all(difficulty[ratio < 0.1 * half_distance] < 0.02 * difficulty.max())
    assert np.all(difficulty[ratio > 10 * half_distance] < 0.02 * difficulty.max())


@pytest.mark.slow
def test_levels_placed_where_modes_part_give_them_their_weights():
    schedule = rtk.OU(t_max=7.0)
    score = rtk.GaussianMixtureScore(
        np.array([0.2, 0.8]), np.array([[-8.0], [8.0]]), np.ones((2, 1, 1)), schedule
    )
    candidates, difficulty = difficulty_of(score, schedule, 1)
    lengths = candidates.log_snr_steps
    even = place_levels(jnp.ones(candidates.t.size), lengths, 10)
    errors = []
    for indices in (place_levels(jnp.asarray(difficulty), lengths, 10), even):
        times = np.asarray(candidates.t[indices])
        prior = rtk.DiffusionPrior(
            score, (1,), segments=times, reverse=rtk.PreconditionedMALA(energy_difference=rtk.ExactEnergy())
        )
        errors.append(abs(float(np.mean(np.asarray(prior.sample(jr.key(2), (20_000,))) < 0)) - 0.2))
    # Five standard errors of the draws, and a control: evenly placed levels miss by far.
    assert errors[0] < 0.015, errors
    assert errors[1] > 0.018, errors


@pytest.mark.slow
def test_difficulty_costs_two_evaluations_per_draw_and_probed_level():
    score = Counter(gaussian(rtk.OU())[0])
    candidates = candidate_grid(noise_range(rtk.OU()), NUM_SEGMENTS, jnp.float32)
    assert candidates.t.size == NUM_CANDIDATES + 1
    probe = jax.jit(lambda draws: transition_difficulty(jr.key(0), resolve_score(score), candidates, draws))
    jax.block_until_ready(probe(jnp.ones((5, 3))))
    assert score.count == 2 * 5 * NUM_PROBED_LEVELS
    jax.block_until_ready(probe(jnp.ones((MAX_PROBES + 10, 3))))
    assert score.count == 2 * (5 + MAX_PROBES) * NUM_PROBED_LEVELS


def test_a_failing_network_does_not_spoil_the_difficulty():
    schedule = rtk.OU()
    candidates = candidate_grid(noise_range(schedule), NUM_SEGMENTS, jnp.float32)
    failing = resolve_score(lambda x, t: jnp.where(t < 0.5, jnp.nan, -(x**3)))
    difficulty = transition_difficulty(jr.key(0), failing, candidates, jnp.ones((4, 2)))
    assert np.all(np.isfinite(difficulty))
    assert np.any(np.asarray(difficulty) > 0)
