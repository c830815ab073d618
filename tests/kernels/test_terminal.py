"""Where passes start: data that are neither centred nor standardised, and tops that are not all noise."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from numpyro.infer import MCMC

import numpyro_rtk as rtk
from numpyro_rtk._noising._terminal import standard_terminal
from numpyro_rtk._prior._learnt import LEARNT
from numpyro_rtk._reverse import _pilot


NUM_DRAWS = 2000
ROTATION = np.array([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
LAWS = {
    "VE, far below zero": (rtk.VE(), np.full(2, -7.0), 0.3**2 * np.eye(2)),
    "OU, narrow": (rtk.OU(t_max=2.0), np.full(2, 3.0), 0.2**2 * np.eye(2)),
    "OU, early, a coordinate for each size": (
        rtk.OU(t_max=1.0),
        np.array([0.0, 1.0, -4.0]),
        np.diag([0.01, 1.0, 9.0]),
    ),
    "OU, early, correlated": (
        rtk.OU(t_max=1.0),
        np.array([1.0, -2.0, 0.0]),
        ROTATION @ np.diag([4.0, 1.0, 0.25]) @ ROTATION.T,
    ),
    "EDM, in counts": (rtk.EDM(), np.array([50.0, 300.0]), np.diag([4.0, 400.0])),
}


@pytest.fixture
def standard(monkeypatch):
    """The control: passes start from the Gaussian of standardised data, whatever the data."""

    def assume(key, score_fn, grid, shape, num_draws):
        del key, score_fn, num_draws
        return standard_terminal(grid, shape)

    monkeypatch.setattr(_pilot, "measure_terminal", assume)
    LEARNT.clear()


def gaussian(name):
    schedule, mean, covariance = LAWS[name]
    return rtk.GaussianMixtureScore(np.ones(1), mean[None], covariance[None], schedule)


def kernel_draws(score, dim, num_draws=NUM_DRAWS):
    kernel = rtk.RTKKernel(score, event_shape=(dim,), segments=16)
    mcmc = MCMC(
        kernel,
        num_warmup=30,
        num_samples=num_draws // 100,
        num_chains=100,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jr.key(0))
    return np.asarray(mcmc.get_samples()["x"], np.float64)


def prior_draws(score, dim, num_draws=NUM_DRAWS):
    prior = rtk.DiffusionPrior(score, (dim,), segments=16, density=rtk.LineIntegral())
    return np.asarray(prior.sample(jr.key(0), (num_draws,)), np.float64)


def errors(draws, name):
    """Of the mean in standard deviations, and of the variance relative to itself, by coordinate."""
    schedule, mean, covariance = LAWS[name]
    t = jnp.asarray(schedule.t_min)
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    variance = alpha**2 * np.diag(covariance) + sigma**2
    return (draws.mean(0) - alpha * mean) / np.sqrt(variance), draws.var(0) / variance - 1


# Five standard errors of 2000 independent draws, and a little for the kernel.
MEAN_ERROR, VARIANCE_ERROR = 0.12, 0.2


def right(draws, name):
    of_mean, of_variance = errors(draws, name)
    return bool(np.all(np.abs(of_mean) < MEAN_ERROR) and np.all(np.abs(of_variance) < VARIANCE_ERROR))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (i > 1)) for i, name in enumerate(LAWS)]
)
def test_draws_of_data_that_are_not_standardised(name):
    dim = LAWS[name][1].size
    for draw in (kernel_draws, prior_draws):
        draws = draw(gaussian(name), dim)
        assert right(draws, name), (draw.__name__, errors(draws, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAWS if "narrow" not in name and "VE" not in name])
def test_the_standard_terminal_fails_there(standard, name):
    dim = LAWS[name][1].size
    assert not right(kernel_draws(gaussian(name), dim), name)
    assert not right(prior_draws(gaussian(name), dim), name)


SHARE = 0.2


def two_modes(schedule):
    means = np.array([[-2.0, 0.5], [1.5, 0.5]])
    return rtk.GaussianMixtureScore([SHARE, 1 - SHARE], means, [0.2 * np.eye(2)] * 2, schedule)


@pytest.mark.slow
def test_mode_weights_below_an_early_top():
    draws = kernel_draws(two_modes(rtk.OU(t_max=1.0)), 2, 4000)
    assert abs(np.mean(draws[:, 0] < -0.25) - SHARE) < 0.04


@pytest.mark.slow
def test_the_standard_terminal_gets_mode_weights_wrong(standard):
    draws = kernel_draws(two_modes(rtk.OU(t_max=1.0)), 2, 4000)
    assert abs(np.mean(draws[:, 0] < -0.25) - SHARE) > 0.04
