"""The terminal Gaussian that is measured at the top of the grid."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import numpyro_rtk as rtk
from numpyro_rtk._noising._grid import noise_grid
from numpyro_rtk._noising._terminal import standard_terminal
from numpyro_rtk._reverse._pilot import measure_terminal, TERMINAL_ROUNDS
from numpyro_rtk._score._model import resolve_score
from tests.helpers import Counter


MEAN, VARIANCE = np.array([3.0, -1.5, 0.2]), np.array([4.0, 1.5, 0.3])
SCHEDULES = {
    "OU": rtk.OU(),
    "VE": rtk.VE(sigma_min=0.02, sigma_max=40.0),
    "EDM": rtk.EDM(),
    "early": rtk.OU(t_max=1.5),  # a fifth of the data is left
}
NUM_DRAWS = 256


def grid_of(schedule):
    return noise_grid(schedule, rtk.segment_times(schedule, 4), jnp.float32)


def ends(schedule):
    return float(schedule.alpha(schedule.t_max)), float(schedule.sigma(schedule.t_max))


def gaussian(schedule):
    return rtk.GaussianMixtureScore(np.ones(1), MEAN[None], np.diag(VARIANCE)[None], schedule)


def measure(score_fn, schedule, shape=(3,), num_draws=NUM_DRAWS):
    grid = grid_of(schedule)
    return jax.jit(lambda key: measure_terminal(key, resolve_score(score_fn), grid, shape, num_draws))(
        jr.key(0)
    )


def distance(terminal, schedule, mean, variance):
    """Largest error of the mean in standard deviations, and of the variance relative to itself."""
    alpha, sigma = ends(schedule)
    exact = alpha**2 * variance + sigma**2
    mean_error = np.abs(np.asarray(terminal.mean, np.float64) - alpha * mean) / np.sqrt(exact)
    return mean_error.max(), np.abs(np.asarray(terminal.variance, np.float64) / exact - 1).max()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_terminal_of_a_gaussian_is_found(name):
    schedule = SCHEDULES[name]
    errors = distance(measure(gaussian(schedule), schedule), schedule, MEAN, VARIANCE)
    assert max(errors) < (5e-3 if name == "early" else 1e-3), errors


def test_the_standard_terminal_is_seen_to_be_wrong():
    # The control, where the top is not all noise.
    schedule = SCHEDULES["early"]
    errors = distance(standard_terminal(grid_of(schedule), (3,)), schedule, MEAN, VARIANCE)
    assert min(errors) > 0.1, errors


MODES = np.array([[-2.0, 0.5, 0.0], [3.0, -1.0, 1.0]])
WEIGHTS = np.array([0.3, 0.7])


@functools.cache
def mixture(name):
    covariances = np.stack([np.diag([0.5, 0.2, 1.0]), np.diag([0.3, 1.0, 0.1])])
    mean = WEIGHTS @ MODES
    variance = WEIGHTS @ (np.einsum("kii->ki", covariances) + MODES**2) - mean**2
    return rtk.GaussianMixtureScore(WEIGHTS, MODES, covariances, SCHEDULES[name]), mean, variance


@pytest.mark.parametrize(("name", "tolerance"), [("OU", 1e-3), ("VE", 1e-3), ("EDM", 1e-3), ("early", 0.02)])
def test_the_terminal_of_a_mixture_is_close(name, tolerance):
    score, mean, variance = mixture(name)
    errors = distance(measure(score, SCHEDULES[name]), SCHEDULES[name], mean, variance)
    assert max(errors) < tolerance, errors


@pytest.mark.parametrize("sign", ["of the score", "of the point"])
def test_a_broken_sign_is_seen(sign):
    schedule = SCHEDULES["early"]
    score = gaussian(schedule)
    broken = {"of the score": lambda x, t: -score(x, t), "of the point": lambda x, t: score(-x, t)}[sign]
    errors = distance(measure(broken, schedule), schedule, MEAN, VARIANCE)
    assert not max(errors) < 5e-2, errors


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_without_sense_falls_back_to_the_standard_terminal(bad):
    schedule = SCHEDULES["OU"]
    for score_fn in (lambda x, t: x * bad, lambda x, t: jnp.where(x > 1, bad, -x)):
        found, given = measure(score_fn, schedule), standard_terminal(grid_of(schedule), (3,))
        jax.tree.map(np.testing.assert_array_equal, found, given)


@pytest.mark.parametrize("num_draws", [2, 8])
def test_it_costs_its_draws_each_round(num_draws):
    counter = Counter(lambda x, t: -x)
    jax.block_until_ready(measure(counter, SCHEDULES["OU"], (2, 2), num_draws))
    assert TERMINAL_ROUNDS == 3
    assert counter.count == TERMINAL_ROUNDS * num_draws


def test_it_has_the_shape_of_the_event_and_the_variance_of_the_noise_at_least():
    found = measure(lambda x, t: 50 * jnp.sin(9 * x), SCHEDULES["early"], (2, 3), 16)
    assert found.mean.shape == found.variance.shape == (2, 3)
    assert np.all(np.asarray(found.variance) >= ends(SCHEDULES["early"])[1] ** 2 * (1 - 1e-5))
