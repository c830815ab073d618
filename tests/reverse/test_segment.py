import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_rtk import EnergyScore, GaussianMixtureScore, OU
from tests.helpers import make_target, SCHEDULES


pytestmark = pytest.mark.usefixtures("strict_dtypes")

all_schedules = pytest.mark.parametrize("schedule", [pytest.param(v, id=k) for k, v in SCHEDULES.items()])

WEIGHTS = np.array([0.2, 0.5, 0.3])
MEANS = np.array([[1.0, -2.0], [0.5, 3.0], [-1.5, 0.0]])
COVARIANCES = np.array([[[0.5, 0.2], [0.2, 0.3]], [[1.0, -0.6], [-0.6, 0.8]], [[0.05, 0.0], [0.0, 0.4]]])


def inner_times(schedule):
    """A short and a long segment, away from the ends."""
    low, high = schedule.t_min, schedule.t_max
    if high > 100:  # integer steps
        return [(60.0, 75.0), (20.0, 400.0)]
    grid = [low + x * (high - low) for x in (0.1, 0.12, 0.5)]
    return [(grid[0], grid[1]), (grid[0], grid[2])]


def test_gaussian_score_is_the_gradient_of_the_gaussian_part(x64):
    x_t = jnp.asarray([[0.3, -1.0, 2.0], [0.1, 0.7, -0.2]])
    target = make_target(lambda x, t: -x, OU(), 0.2, 0.9, x_t)
    log_density = lambda z: -jnp.sum((target.x_t - target.segment.a * z) ** 2) / (2 * target.segment.v)
    z = jnp.asarray([[1.3, 0.4, -0.5], [2.0, -1.0, 0.3]])
    np.testing.assert_allclose(target.gaussian_score(z), jax.grad(log_density)(z), rtol=1e-13)
    np.testing.assert_allclose(
        target.score(z, -z), jax.grad(lambda z: log_density(z) - jnp.sum(z**2) / 2)(z), rtol=1e-13
    )
    np.testing.assert_allclose(
        target.precision * np.eye(6), -jax.hessian(log_density)(z).reshape(6, 6), rtol=1e-13
    )
    y = z[::-1] + 0.1
    np.testing.assert_allclose(target.gaussian_difference(z, y), log_density(y) - log_density(z), rtol=1e-13)


def test_gaussian_difference_is_antisymmetric_to_the_last_bit():
    rng = np.random.default_rng(0)
    x, y, x_t = jnp.asarray(rng.normal(size=(3, 200, 7)), jnp.float32)
    target = make_target(lambda x, t: -x, OU(), 0.01, 0.02, x_t[0])
    function = jax.jit(lambda x, y: target.gaussian_difference(x, y))
    forward = np.array([function(a, b) for a, b in zip(x, y, strict=True)])
    backward = np.array([function(b, a) for a, b in zip(x, y, strict=True)])
    assert np.all(np.abs(forward) > 0)
    np.testing.assert_array_equal(forward, -backward)
    vectorized = jax.jit(jax.vmap(target.gaussian_difference))
    np.testing.assert_array_equal(vectorized(x, y), -vectorized(y, x))


def test_gaussian_difference_does_not_cancel_in_float32():
    # Two close points far down a steep Gaussian: of the difference of two squares nothing would be left.
    x = np.float32([30.0, -20.0])
    y = np.nextafter(x, np.float32(0))
    target = make_target(lambda x, t: -x, OU(), 1e-3, 2e-3, jnp.zeros(2))
    a, v = float(target.segment.a), float(target.segment.v)
    exact = -0.5 * a**2 / v * np.sum((y.astype(float) - x) * (y.astype(float) + x))
    np.testing.assert_allclose(target.gaussian_difference(jnp.asarray(x), jnp.asarray(y)), exact, rtol=1e-6)


@all_schedules
def test_mean_is_the_conditional_mean_of_a_gaussian(schedule, x64):
    mean, covariance = MEANS[1], COVARIANCES[1]
    x_t = jnp.asarray([0.7, -1.1])
    score_fn = GaussianMixtureScore([1.0], [mean], [covariance], schedule)
    for s, t in inner_times(schedule):
        target = make_target(score_fn, schedule, s, t, x_t)
        prior = schedule.alpha(s) ** 2 * covariance + schedule.sigma(s) ** 2 * np.eye(2)
        a, v, prior_mean = target.segment.a, target.segment.v, schedule.alpha(s) * mean
        expected = prior_mean + a * prior @ np.linalg.solve(
            a**2 * prior + v * np.eye(2), x_t - a * prior_mean
        )
        np.testing.assert_allclose(target.mean, expected, rtol=1e-9)


@all_schedules
def test_mean_is_the_conditional_mean_of_a_mixture(schedule, x64):
    x_t = np.array([0.7, -1.1])
    score_fn = GaussianMixtureScore(WEIGHTS, MEANS, COVARIANCES, schedule)
    for s, t in inner_times(schedule):
        target = make_target(score_fn, schedule, s, t, jnp.asarray(x_t))
        a, v = float(target.segment.a), float(target.segment.v)
        terms, means = [], []
        for weight, mean, covariance in zip(WEIGHTS, MEANS, COVARIANCES, strict=True):
            prior = schedule.alpha(s) ** 2 * covariance + schedule.sigma(s) ** 2 * np.eye(2)
            prior_mean = schedule.alpha(s) * mean
            marginal = a**2 * prior + v * np.eye(2)
            residual = np.linalg.solve(marginal, x_t - a * prior_mean)
            terms.append(
                np.log(weight)
                - 0.5 * (x_t - a * prior_mean) @ residual
                - 0.5 * np.linalg.slogdet(marginal)[1]
            )
            means.append(prior_mean + a * prior @ residual)
        weights = np.exp(np.array(terms) - max(terms))
        np.testing.assert_allclose(target.mean, weights / weights.sum() @ np.array(means), rtol=1e-9)


def test_the_target_is_the_reverse_transition(x64):
    # Bayes: log p_s(z) + log N(x_t; a z, v) - log p_t(x_t) is a density of z, whose mean is `mean`. In one
    # dimension a grid integrates it to rounding.
    schedule = OU()
    score_fn = GaussianMixtureScore([0.3, 0.7], [[-1.0], [0.8]], [[[0.1]], [[0.2]]], schedule)
    target = make_target(score_fn, schedule, 0.3, 0.6, jnp.asarray([0.2]))
    z = jnp.linspace(-6, 6, 4001)[:, None]
    log_gaussian = -0.5 * (
        target.x_t[0] - target.segment.a * z[:, 0]
    ) ** 2 / target.segment.v - 0.5 * jnp.log(2 * jnp.pi * target.segment.v)
    log_prior = jax.vmap(lambda z: score_fn.log_density(z, target.segment.s))(z)
    density = jnp.exp(log_prior + log_gaussian - score_fn.log_density(target.x_t, target.segment.t)) * (
        z[1, 0] - z[0, 0]
    )
    np.testing.assert_allclose(jnp.sum(density), 1.0, rtol=1e-12)
    np.testing.assert_allclose(density @ z, target.mean, rtol=1e-11)


def test_evaluate():
    z = jnp.asarray([0.3, 0.2])
    score_fn = lambda x, t: -x / (1 + t)
    evaluation = make_target(score_fn, OU(), 0.5, 1.0, z).evaluate(z)
    np.testing.assert_allclose(evaluation.score, -z / 1.5, rtol=1e-6)
    assert evaluation.energy == 0
    energy_fn = lambda x, t: jnp.sum(x**2) / (2 * (1 + t))
    evaluation = make_target(EnergyScore(energy_fn), OU(), 0.5, 1.0, z).evaluate(z, with_energy=True)
    np.testing.assert_allclose(evaluation.score, -z / 1.5, rtol=1e-6)
    np.testing.assert_allclose(evaluation.energy, jnp.sum(z**2) / 3, rtol=1e-6)

    class OnlyEnergy:
        def __call__(self, x, t):
            return -x

        def energy(self, x, t):
            return jnp.sum(x**2) / 2

    evaluation = make_target(OnlyEnergy(), OU(), 0.5, 1.0, z).evaluate(z, with_energy=True)
    np.testing.assert_allclose(evaluation.score, -z)
    np.testing.assert_allclose(evaluation.energy, jnp.sum(z**2) / 2)
