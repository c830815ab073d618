"""Clean data: the mean of `x_0` given a draw at `t_min`, and the error that it leaves."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, Predictive

import numpyro_rtk as rtk


SCHEDULE = rtk.OU(t_min=0.15)
MEAN, SD = np.array([1.0, -2.0, 0.5]), np.array([0.1, 0.6, 2.0])
ALPHA = np.exp(-0.15)
SIGMA = np.sqrt(1 - ALPHA**2)
GAIN = ALPHA * SD**2 / (ALPHA**2 * SD**2 + SIGMA**2)
"""Slope of the denoiser."""
LEFT = np.sqrt(SD**2 - GAIN * ALPHA * SD**2)
"""Its error."""


def gaussian(x, t):
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    mean, variance = jnp.asarray(MEAN, x.dtype), jnp.asarray(SD**2, x.dtype)
    return -(x - alpha * mean) / (alpha**2 * variance + sigma**2)


def make_prior(score_fn=gaussian, shape=(3,), **options):
    return rtk.DiffusionPrior(score_fn, shape, SCHEDULE, density=rtk.LineIntegral(), **options)


def exact(x):
    return MEAN + GAIN * (x - ALPHA * MEAN)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_the_mean_of_a_gaussian(batch):
    x = np.random.default_rng(0).normal(size=(*batch, 3)).astype(np.float32)
    prior = make_prior()
    np.testing.assert_allclose(prior.denoise(x), exact(x), rtol=2e-5, atol=1e-5)
    assert not np.allclose(prior.denoise(x), x / ALPHA, atol=0.05)


def test_it_is_differentiable_and_maps():
    prior, x = make_prior(), jnp.asarray([0.3, -1.0, 2.0])
    np.testing.assert_allclose(jax.jacrev(prior.denoise)(x), np.diag(GAIN), atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(prior.denoise))(x), np.diag(GAIN), atol=1e-5)
    many = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(jax.vmap(prior.denoise)(many), prior.denoise(many), rtol=1e-6)


def test_the_error_of_a_gaussian():
    sd = make_prior().denoise_sd
    np.testing.assert_allclose(sd, LEFT, rtol=1e-3)
    # Also where the prior is first met inside a program, and when asked for again.
    np.testing.assert_allclose(jax.jit(lambda: make_prior().denoise_sd)(), sd, rtol=1e-6)


@pytest.mark.slow
def test_the_error_of_given_draws():
    # A mode for each of two widths: the error is that of the mode where the draws are.
    covariances = np.stack([0.01 * np.eye(1), 4.0 * np.eye(1)])
    score = rtk.GaussianMixtureScore([0.5, 0.5], [[-9.0], [9.0]], covariances, SCHEDULE)
    prior = make_prior(score, (1,))
    error = lambda variance: np.sqrt(variance * SIGMA**2 / (ALPHA**2 * variance + SIGMA**2))
    for mean, variance in ((-9.0, 0.01), (9.0, 4.0)):
        draws = jnp.asarray(ALPHA * mean + 0.1 * np.linspace(-1, 1, 6).reshape(2, 3, 1), jnp.float32)
        np.testing.assert_allclose(prior.denoise_sd_of(draws), error(variance), rtol=5e-3)
    np.testing.assert_array_less(error(0.01), np.asarray(prior.denoise_sd))


def test_the_error_in_a_program_whose_score_is_an_argument():
    scaled = jax.jit(lambda one: make_prior(lambda x, t: one * gaussian(x, t)).denoise_sd)
    np.testing.assert_allclose(scaled(1.0), LEFT, rtol=1e-3)


def test_draws_of_clean_data():
    prior = make_prior()
    key, noise_key = jr.split(jr.key(0))
    x = np.asarray(prior.sample(key, (4000,)), np.float64)
    noise = np.asarray(jr.normal(noise_key, x.shape), np.float64)
    mean = np.asarray(prior.denoise(x), np.float64)
    clean = mean + np.asarray(prior.denoise_sd) * noise
    # Five standard errors of the ratio of variances.
    right = lambda draws: np.all(np.abs(draws.var(0) / SD**2 - 1) < 0.115)
    assert right(clean)
    np.testing.assert_allclose(clean.mean(0), MEAN, atol=0.08 * SD.max())
    assert not right(x)  # has the noise of t_min
    assert not right(mean)  # lacks the error
    assert not right(mean + SIGMA * noise)


@pytest.mark.parametrize(("mean", "sd"), [(-9.0, 0.2), pytest.param(9.0, 2.0, marks=pytest.mark.slow)])
def test_draws_of_clean_data_given_a_posterior(mean, sd):
    # What data tell of x / alpha, they tell of x_0 with the noise of t_min on top of their own.
    covariances = np.stack([0.04 * np.eye(1), 4.0 * np.eye(1)])
    score = rtk.GaussianMixtureScore([0.5, 0.5], [[-9.0], [9.0]], covariances, SCHEDULE)
    prior, noise_sd, y = make_prior(score, (1,)), 0.4, mean + 0.7 * sd
    normal = np.random.default_rng(2).normal(size=(2, 4000, 1))
    variance = 1 / (1 / (sd**2 + (SIGMA / ALPHA) ** 2) + 1 / noise_sd**2)
    scaled = mean + variance / noise_sd**2 * (y - mean) + np.sqrt(variance) * normal[0]
    x = jnp.asarray(ALPHA * scaled, jnp.float32).reshape(4, 1000, 1)
    clean = np.asarray(prior.clean_draws(jr.key(1), x), np.float64)
    assert clean.shape == x.shape
    data_variance = noise_sd**2 + (SIGMA / ALPHA) ** 2
    variance = 1 / (1 / sd**2 + 1 / data_variance)
    # Five standard errors of a mean and of a standard deviation.
    exact_mean, exact_sd = mean + variance / data_variance * (y - mean), np.sqrt(variance)
    right = lambda draws: abs(draws.std() / exact_sd - 1) < 0.056
    assert abs(clean.mean() - exact_mean) < 0.08 * exact_sd
    assert right(clean)
    denoised = np.asarray(prior.denoise(x)).reshape(-1, 1)
    assert not right(scaled)
    assert not right(denoised)
    assert not right(denoised + np.asarray(prior.denoise_sd) * normal[1])  # that of both modes


def test_what_denoising_leaves_open_at_draws_that_resemble_each_other():
    """A network is rough: at one draw its slope has either sign, and what is cut at zero is lost."""
    length = 0.2 * SIGMA

    def rough(x, t):
        return -x + 1.5 * length / SIGMA**2 * jnp.sin(x / length)

    prior, x = make_prior(rough, (200,)), jr.normal(jr.key(0), (200,))
    alike = jnp.broadcast_to(x, (400, 200))
    left = np.asarray(prior.clean_draws(jr.key(1), alike) - prior.denoise(alike))
    deviation = lambda sd: np.sqrt(np.mean((sd / SIGMA - 1) ** 2))
    assert deviation(left.std(0)) < 0.2


def test_slopes_below_zero_are_pooled_with_those_that_are_no_larger_than_their_error():
    """The slopes of a network are off by as much as they are wide of 0 where they cannot be negative."""
    variance = np.where(np.arange(400) < 380, 0.0005, 4.0)
    off = 0.02 * np.clip(np.random.default_rng(0).normal(size=400), -2.5, 2.5)

    def score(x, t):
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        return -x / (alpha**2 * variance + sigma**2) + off * x / sigma**2

    sd = np.asarray(make_prior(score, (400,)).denoise_sd_of(jr.normal(jr.key(0), (8, 400))))
    slope = ALPHA * variance / (ALPHA**2 * variance + SIGMA**2) + off / ALPHA
    common = slope[:380].mean()
    assert common > 0
    exact = np.sqrt(SIGMA**2 / ALPHA * np.where(np.arange(400) < 380, common, slope))
    np.testing.assert_allclose(sd, exact, rtol=0.02)
    # Each for itself, with negative ones cut at 0, would be too large together.
    assert np.clip(slope[:380], 0, None).mean() > 2 * common


def test_draws_are_noised_anew_where_they_came_from():
    """The error is that of the narrow law below 18.6 and not of the wide one above, where clean data are."""
    narrow, wide = 0.1, 2.0

    def score(x, t):
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        variance = jnp.where(x < 18.6, narrow, wide) ** 2
        return -(x - alpha * 20.0) / (alpha**2 * variance + sigma**2)

    prior = make_prior(score, (200,))
    x = 20.0 * ALPHA + 0.5 * jr.normal(jr.key(0), (50, 200))
    left = np.asarray(prior.clean_draws(jr.key(1), x) - prior.denoise(x))
    exact = np.sqrt(1 / (1 / narrow**2 + ALPHA**2 / SIGMA**2))
    np.testing.assert_allclose(np.median(left.std(0)), exact, rtol=0.1)


def test_draws_are_noised_anew_as_clean_draws_and_not_as_their_means():
    """A denoiser `c x^3 / 3`, whose slope `c x^2` tells the variance of the draws at which it is measured."""
    c = 0.5

    def score(x, t):
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        return (alpha * c * x**3 / 3 - x) / sigma**2

    x = jnp.broadcast_to(jnp.asarray([[1.0], [-1.0]]), (2, 400)).repeat(32, 0)
    left = np.asarray(make_prior(score, (400,)).clean_draws(jr.key(1), x) - c * x**3 / 3)
    first = SIGMA**2 / ALPHA * c
    variance = first * (ALPHA**2 * ((c / 3) ** 2 + first) + SIGMA**2)
    np.testing.assert_allclose(np.mean(left**2), variance, rtol=0.1)


def test_draws_of_clean_data_in_batches():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 2, 3)), jnp.float32)
    whole, batches = (make_prior(batch_size=size).clean_draws(jr.key(0), x) for size in (None, 3))
    assert whole.shape == x.shape
    np.testing.assert_allclose(batches, whole, rtol=1e-5, atol=1e-5)
    one = make_prior().clean_draws(jr.key(0), x[0, 0])
    expected = exact(np.asarray(x[0, 0])) + LEFT * np.asarray(jr.normal(jr.key(0), (1, 3)))[0]
    np.testing.assert_allclose(one, expected, rtol=1e-3, atol=1e-3)


def mixture():
    means = np.array([[-1.0, 0.5], [1.2, 0.0]])
    covariances = np.stack([np.diag([0.3, 0.05]), np.diag([0.1, 0.6])])
    return rtk.GaussianMixtureScore([0.4, 0.6], means, covariances, SCHEDULE)


@pytest.mark.slow
def test_the_error_of_a_mixture():
    score, rng = mixture(), np.random.default_rng(1)
    clean = np.asarray(score.sample(jr.key(0), 40_000), np.float64)
    x = (ALPHA * clean + SIGMA * rng.normal(size=clean.shape)).astype(np.float32)
    prior = make_prior(score, (2,))
    error = np.sqrt(np.mean((clean - np.asarray(prior.denoise(x))) ** 2, axis=0))
    # Measured from 16 draws: their scatter is what is left.
    np.testing.assert_allclose(prior.denoise_sd, error, rtol=0.15)
    assert np.all(error < 0.95 * SIGMA / ALPHA)


def test_inside_a_model():
    prior = make_prior()

    def model():
        x = numpyro.sample("x", prior)
        numpyro.deterministic("clean", prior.denoise(x))

    draws = Predictive(model, num_samples=5)(jr.key(0))
    np.testing.assert_allclose(draws["clean"], exact(np.asarray(draws["x"])), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_likelihood_of_clean_data():
    prior, y, noise_sd = make_prior(), np.array([1.1, -1.0, 1.5]), 0.3

    def model(y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(prior.denoise(x), noise_sd).to_event(1), obs=y)

    mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=2000, progress_bar=False)
    mcmc.run(jr.key(0), jnp.asarray(y, jnp.float32))
    variance = ALPHA**2 * SD**2 + SIGMA**2
    precision = 1 / variance + GAIN**2 / noise_sd**2
    mean = ALPHA * MEAN + GAIN * (y - MEAN) / noise_sd**2 / precision
    draws = np.asarray(mcmc.get_samples()["x"])
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.08)
    np.testing.assert_allclose(draws.std(0), 1 / np.sqrt(precision), rtol=0.15)


def kernel_draws(**options):
    kernel = rtk.RTKKernel(gaussian, event_shape=(3,), schedule=SCHEDULE, segments=12, **options)
    mcmc = MCMC(
        kernel, num_warmup=20, num_samples=40, num_chains=100, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(jr.key(1), extra_fields=("num_score_evals",))
    return kernel, np.asarray(mcmc.get_samples()["x"], np.float64), mcmc.get_extra_fields()["num_score_evals"]


@pytest.mark.slow
def test_the_kernel_draws_clean_data():
    kernel, draws, evaluations = kernel_draws(denoise=True)
    assert np.all(np.abs(draws.var(0) / SD**2 - 1) < 0.13)
    np.testing.assert_allclose(draws.mean(0), MEAN, atol=0.08 * SD.max())
    assert kernel.num_score_evals == 12 * 3 + 1
    assert np.all(evaluations == 37)


@pytest.mark.slow
def test_the_kernel_draws_noised_data_unless_asked():
    kernel, draws, _ = kernel_draws()
    assert kernel.num_score_evals == 12 * 3
    np.testing.assert_allclose(draws.var(0), ALPHA**2 * SD**2 + SIGMA**2, rtol=0.13)


def test_bad_input():
    with pytest.raises(ValueError, match=r"`DiffusionPrior.denoise` got a value of shape \(2,\)"):
        make_prior().denoise(jnp.zeros(2))
    with pytest.raises(ValueError, match=r"`DiffusionPrior.clean_draws` got a value of shape \(4, 2\)"):
        make_prior().clean_draws(jr.key(0), jnp.zeros((4, 2)))
    with pytest.raises(TypeError, match="`denoise` must be True or False, got 1"):
        rtk.RTKKernel(gaussian, event_shape=(3,), schedule=SCHEDULE, denoise=1)
