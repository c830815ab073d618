"""Twists: closed forms, gradients, and how a model's likelihood is split for them."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from scipy import stats

import numpyro_rtk as rtk
from numpyro_rtk._moves._preconditioner import Preconditioner
from numpyro_rtk._numpyro._likelihood import Likelihood
from numpyro_rtk._smc._moves import preconditioner
from numpyro_rtk._smc._posterior import Floor
from numpyro_rtk._smc._twist import (
    evaluate_twist,
    LevelError,
    linearize_twist,
    Terms,
)
from numpyro_rtk._thresholds import MAX_EXACT_OBSERVATIONS
from tests.particles import (
    ExactReverse,
    FLOOR,
    GAUSSIAN_FLOOR,
    linear_terms,
    make_law,
    make_posterior,
    Mixture,
    with_own,
)


DIM = 3
BLOCKS = ((1, DIM),)
OPERATOR = np.array([[0.5, 1.0, -0.3], [0.2, -0.4, 0.8]])
SD, Y, X = np.array([0.4, 0.7]), np.array([0.3, -1.2]), np.array([0.2, -0.5, 1.1])


def no_error(dim=DIM, blocks=BLOCKS):
    return LevelError(tuple(jnp.zeros((4, event)) for _, event in blocks), jnp.zeros(dim))


def error_of(covariance, num_draws=4000, seed=0):
    """Residuals whose sample covariance is the given one."""
    draws = np.random.default_rng(seed).standard_normal((num_draws, len(covariance)))
    draws = (
        draws
        @ np.linalg.inv(np.linalg.cholesky(draws.T @ draws / num_draws)).T
        @ np.linalg.cholesky(covariance).T
    )
    return LevelError((jnp.asarray(draws, jnp.float32),), jnp.asarray(np.diag(covariance), jnp.float32))


COVARIANCE = np.array([[0.5, 0.2, 0.0], [0.2, 0.3, -0.1], [0.0, -0.1, 0.9]])


def test_the_gaussian_twist_adds_the_covariance_of_the_denoising_error():
    terms = linear_terms(OPERATOR, SD, Y)
    point = evaluate_twist(terms, jnp.asarray(X, jnp.float32), error_of(COVARIANCE), jnp.ones(()), BLOCKS)
    # A tenth of the weight is on the diagonal.
    measured = 0.9 * COVARIANCE + 0.1 * np.diag(np.diag(COVARIANCE))
    marginal = np.diag(SD**2) + OPERATOR @ measured @ OPERATOR.T
    np.testing.assert_allclose(
        point.log_value, stats.multivariate_normal.logpdf(Y, OPERATOR @ X, marginal), rtol=1e-4
    )
    gradient = OPERATOR.T @ np.linalg.solve(marginal, Y - OPERATOR @ X)
    np.testing.assert_allclose(point.gradient, gradient, rtol=1e-4)


def test_errors_of_different_events_of_a_batch_are_independent():
    # Two events of one coordinate, the same prior: no correlation between them, whatever the draws.
    residuals = jnp.asarray(np.random.default_rng(0).standard_normal((5000, 1)), jnp.float32)
    residuals *= jnp.sqrt(0.4 / jnp.mean(residuals**2))
    error = LevelError((residuals,), jnp.full(2, 0.4))
    operator = np.array([[1.0, 1.0]])
    point = evaluate_twist(
        linear_terms(operator, 0.5, np.array([0.7])), jnp.zeros(2), error, jnp.ones(()), ((2, 1),)
    )
    np.testing.assert_allclose(point.log_value, stats.norm.logpdf(0.7, 0.0, np.sqrt(0.25 + 0.8)), rtol=1e-4)


def test_the_twist_of_a_gaussian_prior_is_the_expected_likelihood():
    # Given exact measurements (4000 exact draws here) G_t(x) = E[L(x_0) | x_t = x].
    schedule = rtk.OU()
    data = Mixture(np.ones(1), np.array([[0.3, -0.5]]), np.array([[[0.5, 0.0], [0.0, 0.2]]]))
    law = make_law(data.score(schedule), schedule, (2,), segments=5, num_draws=4000)
    operator = np.array([[0.6, 0.9]])
    posterior = make_posterior(
        law, linear_terms(operator, 0.3, np.array([0.4])), ExactReverse(data, schedule)
    )
    prior = data.at(float(schedule.alpha(schedule.t_min)), float(schedule.sigma(schedule.t_min)))
    evaluate = jax.jit(posterior.evaluate)
    for level in (1, 3, 5):
        a, v = float(law.grid.total_a[level]), float(law.grid.total_v[level])
        x = np.array([0.5, 0.1])
        total = a**2 * prior.covariances[0] + v * np.eye(2)
        gain = a * prior.covariances[0] @ np.linalg.inv(total)
        mean = prior.means[0] + gain @ (x - a * prior.means[0])
        covariance = prior.covariances[0] - a * gain @ prior.covariances[0]
        sd = np.sqrt(0.09 + (operator @ covariance @ operator.T)[0, 0])
        exact = stats.norm.logpdf(0.4, (operator @ mean)[0], sd)
        np.testing.assert_allclose(
            evaluate(level, jnp.asarray(x)).log_twist, exact, atol=0.05 if level < 5 else 1e-5
        )


# Likelihoods as models have them; every one is its own log likelihood at the last level, and differentiable.


def _normal(x):
    numpyro.sample("y", dist.Normal(x[:2] ** 2, jnp.array([0.3, 0.5])).to_event(1), obs=jnp.array([0.1, 0.4]))


def _scale_depends(x):
    numpyro.sample("y", dist.Normal(x, jnp.exp(0.3 * x)), obs=jnp.array([0.1, 0.4, 0.2]))


def _multivariate(x):
    tril = jnp.array([[0.5, 0.0], [0.2, 0.3]])
    numpyro.sample(
        "y",
        dist.MultivariateNormal(jnp.stack([x[0] * x[1], x[2]]), scale_tril=tril),
        obs=jnp.array([0.1, 0.4]),
    )


def _multivariate_plate(x):
    with numpyro.plate("n", 4):
        numpyro.sample(
            "y", dist.MultivariateNormal(x, 0.3 * jnp.eye(3)), obs=0.1 * jnp.arange(12.0).reshape(4, 3)
        )


def _masked(x):
    with handlers.mask(mask=jnp.array([True, False, True])):
        numpyro.sample("y", dist.Normal(x, 0.4), obs=jnp.array([0.1, jnp.inf, 0.2]))


def _masked_distribution(x):
    fn = dist.Normal(jnp.stack([x, 2 * x]), 0.4).to_event(1).mask(jnp.array([True, False]))
    numpyro.sample("y", fn, obs=jnp.ones((2, 3)))


def _masked_multivariate(x):
    fn = dist.MultivariateNormal(jnp.stack([x, 2 * x]), 0.3 * jnp.eye(3)).mask(jnp.array([True, False]))
    numpyro.sample("y", fn, obs=jnp.ones((2, 3)))


def _masked_inside(x):
    fn = (
        dist.Normal(jnp.stack([x, 2 * x]), 0.4)
        .mask(jnp.array([[True, False, True], [False, True, True]]))
        .to_event(2)
    )
    numpyro.sample("y", fn, obs=jnp.ones((2, 3)))


def _plates(x):
    with numpyro.plate("rows", 2, dim=-2), numpyro.plate("columns", 3, dim=-1):
        numpyro.sample("y", dist.Normal(x, 0.4), obs=jnp.arange(6.0).reshape(2, 3))


def _expanded(x):
    numpyro.sample("y", dist.Normal(x[0], 0.4).expand([2, 3]).to_event(2), obs=jnp.arange(6.0).reshape(2, 3))


def _broadcast_observation(x):
    numpyro.sample("y", dist.Normal(x, jnp.array([0.4, 0.5, 0.6])), obs=jnp.zeros(()))


def _poisson(x):
    numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=jnp.array([0.0, 2.0, 1.0]))


def _mixed(x):
    numpyro.sample("y", dist.Normal(x[0], 0.4), obs=0.3)
    numpyro.sample("z", dist.StudentT(3.0, x[1:], 0.5), obs=jnp.array([0.2, 1.0]))
    numpyro.factor("f", -0.5 * x[2] ** 4)


def _scaled(x):
    with handlers.scale(scale=0.5):
        numpyro.sample("y", dist.Normal(x, 0.4), obs=jnp.zeros(3))


def _log_normal(x):
    numpyro.sample("y", dist.LogNormal(x, 0.4), obs=jnp.ones(3))


def _truncated(x):
    numpyro.sample("y", dist.TruncatedNormal(x, 0.4, low=0.0), obs=jnp.ones(3))


GAUSSIAN = {  # number of Gaussian observations
    _normal: 2,
    _scale_depends: 3,
    _multivariate: 2,
    _multivariate_plate: 12,
    _masked: 3,
    _masked_distribution: 6,
    _masked_multivariate: 6,
    _masked_inside: 6,
    _plates: 6,
    _expanded: 6,
    _broadcast_observation: 3,
    _poisson: 0,
    _mixed: 1,
    _scaled: 0,
    _log_normal: 0,
    _truncated: 0,
}


def log_likelihood(model, x):
    """By NumPyro itself."""
    return numpyro.infer.util.log_density(model, (x,), {}, {})[0]


def terms_of(model, **options):
    def with_site():
        return model(numpyro.sample("x", dist.Normal(0.0, 1.0).expand([DIM]).to_event(1)))

    likelihood = Likelihood(with_site, (), {}, **options)
    return lambda x: likelihood.terms({"x": x})


@pytest.mark.parametrize("model", GAUSSIAN, ids=lambda model: model.__name__.strip("_"))
def test_at_the_last_level_a_twist_is_the_log_likelihood(model):
    x = jnp.asarray(X, jnp.float32)

    def evaluate(terms):
        return jax.jit(lambda x: evaluate_twist(terms, x, no_error(), jnp.ones(()), BLOCKS))(x)

    assert jax.eval_shape(terms_of(model), x).whitened.shape == (GAUSSIAN[model],)
    points = [evaluate(terms_of(model))]
    with jax.numpy_rank_promotion("allow"):  # NumPyro's own `log_prob` needs it
        reference, gradient = jax.jit(jax.value_and_grad(functools.partial(log_likelihood, model)))(x)
        points.append(evaluate(terms_of(model, gaussian=False)))
    for point in points:
        np.testing.assert_allclose(point.log_value, reference, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(point.gradient, gradient, rtol=1e-4, atol=1e-4)


def test_a_tempered_twist_is_a_power_of_the_likelihood():
    x = jnp.asarray(X, jnp.float32)
    value, gradient = jax.value_and_grad(functools.partial(log_likelihood, _poisson))(x)
    point = evaluate_twist(terms_of(_poisson), x, error_of(COVARIANCE), jnp.asarray(0.3), BLOCKS)
    np.testing.assert_allclose(point.log_value, 0.3 * value, rtol=1e-5)
    np.testing.assert_allclose(point.gradient, 0.3 * gradient, rtol=1e-4)
    np.testing.assert_allclose(point.other, value, rtol=1e-5)


@pytest.mark.parametrize(
    "model",
    [pytest.param(_normal, id="normal"), pytest.param(_mixed, id="mixed", marks=pytest.mark.slow)],
)
def test_the_gradient_is_that_of_the_twist_with_its_covariance_held_fixed(model, x64):
    error = jax.tree.map(lambda leaf: leaf.astype(float), error_of(COVARIANCE))
    terms, beta, here = terms_of(model), jnp.asarray(0.4), jnp.asarray(X)
    point = evaluate_twist(terms, here, error, beta, BLOCKS)
    jacobian = jax.jacobian(lambda x: terms(x).whitened)(here)
    measured = 0.9 * COVARIANCE + 0.1 * np.diag(np.diag(COVARIANCE))
    marginal = jnp.eye(len(jacobian)) + jacobian @ measured @ jacobian.T

    def frozen(x):
        whitened, log_normalizer, other = terms(x)[:3]
        return -0.5 * whitened @ jnp.linalg.solve(marginal, whitened) + log_normalizer + beta * other

    np.testing.assert_allclose(point.gradient, jax.grad(frozen)(here), rtol=1e-4)


NUM_PIXELS = 80


def _pixels(x):
    numpyro.sample(
        "y",
        dist.Normal(jnp.sinh(x), 0.2 + 0.1 * jnp.arange(NUM_PIXELS) / NUM_PIXELS),
        obs=jnp.ones(NUM_PIXELS),
    )


def test_many_observations_of_one_coordinate_each_have_the_exact_diagonal():
    assert NUM_PIXELS > MAX_EXACT_OBSERVATIONS
    rng = np.random.default_rng(0)
    x, mean_square = rng.standard_normal(NUM_PIXELS), rng.uniform(0.1, 1.0, NUM_PIXELS)
    error = LevelError((jnp.zeros((0, NUM_PIXELS)),), jnp.asarray(mean_square, jnp.float32))
    likelihood = Likelihood(
        lambda: _pixels(numpyro.sample("x", dist.Normal(jnp.zeros(NUM_PIXELS), 1.0))), (), {}
    )
    terms = lambda x: likelihood.terms({"x": x})
    point = evaluate_twist(terms, jnp.asarray(x, jnp.float32), error, jnp.ones(()), ((1, NUM_PIXELS),))
    scale = 0.2 + 0.1 * np.arange(NUM_PIXELS) / NUM_PIXELS
    sd = np.sqrt(scale**2 + np.cosh(x) ** 2 * mean_square)
    np.testing.assert_allclose(point.log_value, stats.norm.logpdf(1.0, np.sinh(x), sd).sum(), rtol=1e-4)
    np.testing.assert_allclose(point.gradient, (1 - np.sinh(x)) * np.cosh(x) / sd**2, rtol=1e-3, atol=1e-4)
    linear = linearize_twist(terms, jnp.asarray(x, jnp.float32), error, ((1, NUM_PIXELS),))
    np.testing.assert_allclose(linear.diagonal, np.cosh(x) ** 2 / sd**2, rtol=1e-3)
    at_data = evaluate_twist(
        terms, jnp.asarray(x, jnp.float32), LevelError(error.residuals, jnp.zeros(NUM_PIXELS)), 1.0, ()
    )
    np.testing.assert_allclose(at_data.log_value, stats.norm.logpdf(1.0, np.sinh(x), scale).sum(), rtol=1e-4)


# What gradient moves are made of.


@pytest.mark.parametrize(
    "terms", [linear_terms(OPERATOR, SD, Y), lambda x: Terms(jnp.zeros(0), jnp.zeros(()), jnp.sum(x))]
)
def test_the_preconditioner_is_the_inverse_curvature_of_prior_and_twist(terms):
    schedule = rtk.OU()
    data = Mixture(np.ones(1), np.zeros((1, DIM)), COVARIANCE[None])
    law = make_law(data.score(schedule), schedule, (DIM,), segments=4)
    posterior = make_posterior(law, terms, ExactReverse(data, schedule), center=X)
    for level in (1, 4):
        factor = preconditioner(posterior, level)
        dense = np.asarray(jax.vmap(factor.apply, out_axes=1)(jnp.eye(DIM)), np.float64)
        adjoint = np.asarray(jax.vmap(factor.transpose, out_axes=1)(jnp.eye(DIM)), np.float64)
        np.testing.assert_allclose(adjoint, dense.T, rtol=1e-5, atol=1e-6)
        linear = linearize_twist(terms, jnp.asarray(X, jnp.float32), posterior.error(level), posterior.blocks)
        slope = np.asarray(posterior.denoiser_slope[level], np.float64)
        rows = np.asarray(linear.jacobian, np.float64) * slope
        precision = np.diag(np.asarray(posterior.curvature[level], np.float64)) + rows.T @ rows
        np.testing.assert_allclose(dense @ dense.T, np.linalg.inv(precision), rtol=2e-3, atol=1e-5)


def test_the_preconditioner_at_the_data_is_the_posterior_covariance_of_a_diagonal_gaussian():
    schedule = rtk.OU()
    variance = np.array([0.15, 0.05, 0.1])  # above the floor of measured curvatures
    data = Mixture(np.ones(1), np.zeros((1, DIM)), np.diag(variance)[None])
    law = make_law(data.score(schedule), schedule, (DIM,), segments=4, num_draws=20_000)
    posterior = make_posterior(law, linear_terms(OPERATOR, SD, Y), ExactReverse(data, schedule))
    factor = preconditioner(posterior, 4)
    dense = np.asarray(jax.vmap(factor.apply, out_axes=1)(jnp.eye(DIM)), np.float64)
    prior = data.at(float(schedule.alpha(schedule.t_min)), float(schedule.sigma(schedule.t_min)))
    exact = np.linalg.inv(np.linalg.inv(prior.covariances[0]) + OPERATOR.T @ np.diag(1 / SD**2) @ OPERATOR)
    np.testing.assert_allclose(dense @ dense.T, exact, rtol=0.05, atol=0.01)


def test_a_preconditioner_without_rank_is_its_scale():
    factor = Preconditioner(jnp.array([1.0, 2.0]), jnp.zeros((0, 2)), jnp.zeros(0))
    np.testing.assert_array_equal(factor.apply(jnp.ones(2)), [1.0, 2.0])
    np.testing.assert_array_equal(factor.transpose(jnp.ones(2)), [1.0, 2.0])


def test_events_and_flat_vectors_are_inverse():
    data = Mixture(np.ones(1), np.zeros((1, 2)), np.eye(2)[None])
    law = make_law(data.score(rtk.OU()), rtk.OU(), (2,), segments=2, batch_size=3)
    posterior = make_posterior(
        law, lambda x: Terms(jnp.zeros(0), jnp.zeros(()), jnp.sum(x)), ExactReverse(data, rtk.OU())
    )
    x = jr.normal(jr.key(0), (6,))
    (events,) = posterior.events(x)
    assert events.shape == (3, 2)
    np.testing.assert_array_equal(posterior.flat([events]), x)
    np.testing.assert_array_equal(ravel_pytree(events)[0], x)


def _half_line(x):
    """An observation that only the half plane `x_0 > 0` explains."""
    return Terms(jnp.zeros(0), jnp.zeros(()), jnp.where(x[0] > 0, -0.5 * x[1] ** 2, -jnp.inf))


def test_an_impossible_denoised_point_has_the_floor_above_the_data_and_nothing_at_the_data():
    schedule, log_beta = rtk.OU(), np.array([-2.0, -1.0, 0.0])
    data = Mixture(np.ones(1), np.zeros((1, 2)), np.eye(2)[None])
    law = make_law(data.score(schedule), schedule, (2,), segments=2)
    posterior = make_posterior(law, _half_line, ExactReverse(data, schedule), log_beta)
    evaluate = jax.jit(posterior.evaluate)
    for sign in (1.0, -1.0):
        x = jnp.array([0.8 * sign, 0.6])
        for level in (0, 1):
            point = evaluate(level, x)
            # The denoised point of N(0, I) data has the sign of the point.
            denoised = (x + law.grid.total_v[level] * point.score) / law.grid.total_a[level]
            other = -0.5 * denoised[1] ** 2 if sign > 0 else FLOOR
            np.testing.assert_allclose(point.other, other, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(point.log_twist, np.exp(log_beta[level]) * other, rtol=1e-5, atol=1e-7)
            assert np.all(np.isfinite(point.twist_score))
        expected = -0.5 * 0.6**2 if sign > 0 else -np.inf
        for last in (evaluate(2, x), posterior.at_data(x)):
            np.testing.assert_allclose(last.log_twist, expected, rtol=1e-6)


def test_at_the_data_the_twist_is_the_models_own_likelihood():
    """Not the terms that twists above are made of, whatever they say."""
    schedule = rtk.OU()
    data = Mixture(np.ones(1), np.zeros((1, 2)), np.eye(2)[None])
    law = make_law(data.score(schedule), schedule, (2,), segments=2)
    given = linear_terms(np.eye(2), 0.5, np.zeros(2))
    own = lambda x: jnp.sin(x[0]) - x[1] ** 4
    plain, posterior = (
        make_posterior(law, terms, ExactReverse(data, schedule)) for terms in (given, with_own(given, own))
    )
    x, last = jnp.array([0.8, 0.6]), jnp.asarray(2)
    score, energy = posterior.scores(last, x)
    point = posterior.at_data(x)
    value, gradient = jax.value_and_grad(own)(x)
    np.testing.assert_allclose(point.log_twist, value, rtol=1e-6)
    np.testing.assert_allclose(point.twist_score, gradient, rtol=1e-6)
    np.testing.assert_allclose(point.score, score, rtol=1e-6)
    np.testing.assert_allclose(point.energy, energy, rtol=1e-6)
    assert point.other == 0
    np.testing.assert_allclose(posterior.with_twist(last, x, score, energy).log_twist, value, rtol=1e-6)
    # Above the data it is the twist of the terms.
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5),
        posterior.with_twist(jnp.asarray(1), x, score, energy),
        plain.with_twist(jnp.asarray(1), x, score, energy),
    )


@pytest.mark.parametrize(("level", "log_twist"), [(1, FLOOR), (2, -np.inf)])
def test_a_likelihood_that_is_not_a_number_is_impossible(level, log_twist):
    schedule = rtk.OU()
    data = Mixture(np.ones(1), np.zeros((1, 2)), np.eye(2)[None])
    law = make_law(data.score(schedule), schedule, (2,), segments=2)
    terms = lambda x: Terms(jnp.zeros(0), jnp.zeros(()), jnp.log(-1.0 - x[0] ** 2))
    posterior = make_posterior(law, terms, ExactReverse(data, schedule))
    assert posterior.evaluate(jnp.asarray(level), jnp.array([0.8, 0.6])).log_twist == log_twist


def _half_line_of_a_normal(x):
    """An observation whose mean is a number only where `x_0 > 0`, and something tempered."""
    return Terms(jnp.sqrt(x[:1]) - 0.3, jnp.asarray(-0.4), -0.5 * x[1] ** 2)


def test_a_gaussian_that_is_no_number_has_a_floor_above_the_data_and_nothing_at_the_data():
    schedule, log_beta = rtk.OU(), np.array([-2.0, -1.0, 0.0])
    data = Mixture(np.ones(1), np.zeros((1, 2)), np.eye(2)[None])
    law = make_law(data.score(schedule), schedule, (2,), segments=2)
    posterior = make_posterior(law, _half_line_of_a_normal, ExactReverse(data, schedule), log_beta)
    evaluate = jax.jit(posterior.evaluate)
    for level in (0, 1):
        point = evaluate(level, jnp.array([-0.8, 0.6]))
        denoised = (point.x + law.grid.total_v[level] * point.score) / law.grid.total_a[level]
        expected = GAUSSIAN_FLOOR - 0.5 * np.exp(log_beta[level]) * denoised[1] ** 2
        np.testing.assert_allclose(point.log_twist, expected, rtol=1e-5)
        assert np.all(np.isfinite(point.twist_score))
        assert evaluate(level, jnp.array([0.8, 0.6])).log_twist != pytest.approx(float(expected), abs=0.1)
        # The network's own failure is no impossible likelihood.
        assert evaluate(level, jnp.array([jnp.nan, 0.6])).log_twist == -jnp.inf
    assert posterior.at_data(jnp.array([-0.8, 0.6])).log_twist == -jnp.inf
    assert np.all(np.isfinite(preconditioner(posterior, jnp.asarray(0)).scale))


def test_the_floor_of_a_gaussian_is_its_mean_density_at_draws():
    whitened = jnp.array([[1.0, 0.0], [jnp.nan, 0.0], [2.0, 1.0]])
    terms = Terms(whitened, jnp.array([-0.1, 0.0, -0.2]), jnp.array([-3.0, -jnp.inf, -5.0]))
    floor = Floor.of(terms)
    assert floor.other == -5.0
    np.testing.assert_allclose(floor.gaussian, np.log((np.exp(-0.6) + np.exp(-2.7)) / 3), rtol=1e-6)
