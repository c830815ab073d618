import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

from numpyro_rtk import (
    BatchedNetwork,
    DataPrediction,
    DiscreteVP,
    EDM,
    EnergyScore,
    FlowMatching,
    FlowVelocity,
    GaussianMixtureScore,
    NoisePrediction,
    OU,
    VelocityPrediction,
)
from tests.helpers import SCHEDULES


pytestmark = pytest.mark.usefixtures("strict_dtypes")

EPS64 = float(np.finfo(np.float64).eps)

all_schedules = pytest.mark.parametrize("schedule", [pytest.param(v, id=k) for k, v in SCHEDULES.items()])
ADAPTERS = [NoisePrediction, DataPrediction, VelocityPrediction, FlowVelocity]
all_adapters = pytest.mark.parametrize("adapter", ADAPTERS)

MEAN, SCALE = 0.7, 1.3
"""Data `N(MEAN, SCALE^2 I)`, whose best predictions are linear."""


def best_prediction(adapter, schedule):
    """What a perfect network of that kind returns, from the joint Gaussian law of `x_0`, `eps` and `x_t`."""

    def network(x, t):
        if isinstance(schedule, DiscreteVP):
            assert t.dtype == jnp.int32
            t = t.astype(x.dtype)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        residual = (x - alpha * MEAN) / (alpha**2 * SCALE**2 + sigma**2)
        data, noise = MEAN + alpha * SCALE**2 * residual, sigma * residual
        if adapter is NoisePrediction:
            return noise
        if adapter is DataPrediction:
            return data
        if adapter is VelocityPrediction:
            return alpha * noise - sigma * data
        return jax.grad(schedule.alpha)(t) * data + jax.grad(schedule.sigma)(t) * noise

    return network


def times_inside(schedule):
    if isinstance(schedule, DiscreteVP):
        return [0.0, 17.0, 500.0, 999.0]
    return [schedule.t_min + x * (schedule.t_max - schedule.t_min) for x in (0.0, 0.01, 0.5, 1.0)]


@pytest.mark.parametrize(
    ("adapter", "schedule"),
    [
        pytest.param(adapter, schedule, id=f"{adapter.__name__}-{name}")
        for adapter in ADAPTERS
        for name, schedule in SCHEDULES.items()
        if not (adapter is FlowVelocity and name == "DiscreteVP")  # refused, see below
    ],
)
def test_adapters_recover_the_score_of_a_gaussian(adapter, schedule, x64):
    score_fn = adapter(best_prediction(adapter, schedule), schedule)
    x = jnp.asarray([[1.3, -0.4, 2.0], [0.0, 5.0, -3.0]])
    t = jnp.asarray(times_inside(schedule))
    score = jax.jit(jax.vmap(score_fn, in_axes=(None, 0)))(x, t)
    alpha, sigma = (np.reshape(value, (-1, 1, 1)) for value in (schedule.alpha(t), schedule.sigma(t)))
    expected = -(x[None] - alpha * MEAN) / (alpha**2 * SCALE**2 + sigma**2)
    # A predicted datum or velocity holds the score as the small rest of a difference of size x: division by
    # sigma^2 then magnifies its rounding.
    size = np.abs(expected) + (np.abs(x) + 1)[None] / np.minimum(sigma, 1) ** 2
    assert np.all(np.abs(score - expected) < 64 * EPS64 * size)


def test_rectified_flow_velocity_is_noise_minus_data(x64):
    # One datum m: x_t = (1 - t) m + t eps, so u = eps - m = (x - m) / t.
    m = jnp.asarray([2.0, -1.0])
    score_fn = FlowVelocity(lambda x, t: (x - m) / t, FlowMatching())
    x, t = jnp.asarray([0.3, 0.4]), jnp.asarray(0.25)
    np.testing.assert_allclose(score_fn(x, t), -(x - 0.75 * m) / 0.25**2, rtol=1e-13)


def test_flow_velocity_takes_weakly_typed_times():
    score_fn = FlowVelocity(lambda x, t: x, FlowMatching())
    np.testing.assert_allclose(
        jax.jit(score_fn)(jnp.ones(2), 0.5), score_fn(jnp.ones(2), jnp.float32(0.5)), rtol=1e-6
    )


@all_adapters
def test_network_arguments_are_forwarded(adapter):
    def network(x, t, scale, *, shift):
        return scale * x + shift + t

    schedule = FlowMatching()
    x, t = jnp.asarray([0.3, -0.2]), jnp.float32(0.5)
    conditioned = adapter(network, schedule)(x, t, jnp.float32(3.0), shift=jnp.float32(0.25))
    plain = adapter(lambda x, t: 3 * x + 0.25 + t, schedule)(x, t)
    np.testing.assert_array_equal(conditioned, plain)


@pytest.mark.parametrize("adapter", [NoisePrediction, DataPrediction, VelocityPrediction])
def test_discrete_networks_get_integer_steps(adapter):
    seen = []

    def network(x, step):
        seen.append((step.dtype, step.shape))
        return x + step.astype(x.dtype)

    schedule = SCHEDULES["DiscreteVP"]
    x = jnp.ones(3)
    # 41.0 as float32 arithmetic might give it.
    score = jax.jit(adapter(network, schedule))(x, jnp.float32(40.99999))
    assert seen == [(jnp.dtype(jnp.int32), ())]
    expected = adapter(lambda x, t: x + 41.0, schedule)(x, jnp.float32(40.99999))
    np.testing.assert_allclose(score, expected, rtol=1e-6)


def test_flow_velocity_refuses_discrete_steps():
    with pytest.raises(
        ValueError, match=r"`FlowVelocity\(schedule=...\)` needs a schedule with continuous time"
    ):
        FlowVelocity(lambda x, t: x, SCHEDULES["DiscreteVP"])


@all_adapters
def test_adapters_refuse(adapter):
    name = adapter.__name__
    with pytest.raises(
        TypeError, match=rf"`{name}\(network=...\)` must be callable as network\(x, t\), got float"
    ):
        adapter(3.0, OU())
    with pytest.raises(
        TypeError, match=rf"`{name}\(schedule=...\)` must be a noise schedule such as `OU\(\)`, got "
    ):
        adapter(lambda x, t: x, OU)


# Batched networks.


def batched_network(x, t, *args, **kwargs):
    assert x.ndim == 3
    assert t.shape == x.shape[:1]
    t = t.reshape(-1, 1, 1)
    extra = sum(
        (value.reshape(-1, 1, 1) for value in (*args, *kwargs.values())), jnp.zeros((1, 1, 1), x.dtype)
    )
    return jnp.tanh(x) * t + extra


def test_batched_network_takes_one_event():
    network = BatchedNetwork(batched_network)
    x, t = jnp.arange(6.0).reshape(2, 3), jnp.float32(0.3)
    np.testing.assert_allclose(network(x, t), jnp.tanh(x) * 0.3, rtol=1e-6)
    np.testing.assert_allclose(network(x, 0.3), jnp.tanh(x) * 0.3, rtol=1e-6)
    np.testing.assert_allclose(network(x, t, 2.0, shift=np.float32(1.0)), jnp.tanh(x) * 0.3 + 3.0, rtol=1e-6)


def test_batched_network_under_vmap_is_one_evaluation_per_event():
    network = BatchedNetwork(batched_network)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 3)), jnp.float32)
    t = jnp.linspace(0.1, 0.5, 5)
    batched = jax.jit(jax.vmap(network))(x, t)
    np.testing.assert_allclose(
        batched, np.stack([network(a, b) for a, b in zip(x, t, strict=True)]), rtol=1e-6
    )
    np.testing.assert_allclose(batched, batched_network(x, t), rtol=1e-6)


def test_batched_network_in_an_adapter_with_arguments():
    schedule = OU()
    x, t = jnp.arange(6.0).reshape(2, 3), jnp.float32(0.3)
    score = NoisePrediction(BatchedNetwork(batched_network), schedule)(
        x, t, jnp.float32(2.0), label=jnp.float32(0.5)
    )
    np.testing.assert_allclose(score, -(jnp.tanh(x) * t + 2.5) / schedule.sigma(t), rtol=1e-6)


def test_batched_network_hands_on_integer_steps():
    def network(x, t):
        assert t.dtype == jnp.int32
        assert t.shape == (1,)
        return x

    assert NoisePrediction(BatchedNetwork(network), SCHEDULES["DiscreteVP"])(
        jnp.ones(2), jnp.float32(3.0)
    ).shape == (2,)


def test_batched_network_refuses():
    with pytest.raises(TypeError, match=r"`BatchedNetwork\(network=...\)` must be callable, got NoneType"):
        BatchedNetwork(None)


# Energies.


def test_energy_score():
    energy_fn = lambda x, t, scale=1.0: scale * jnp.sum(jnp.cosh(x)) * (1 + t)
    score_fn = EnergyScore(energy_fn)
    x, t = jnp.asarray([[0.3, -1.0]]), jnp.float32(0.5)
    np.testing.assert_allclose(score_fn(x, t), -1.5 * jnp.sinh(x), rtol=1e-6)
    np.testing.assert_allclose(score_fn(x, t, scale=2.0), -3.0 * jnp.sinh(x), rtol=1e-6)
    assert score_fn.energy(x, t) == energy_fn(x, t)
    energy, score = score_fn.energy_and_score(x, t, 2.0)
    np.testing.assert_allclose(energy, energy_fn(x, t, 2.0), rtol=1e-6)
    np.testing.assert_allclose(score, -3.0 * jnp.sinh(x), rtol=1e-6)


def test_energy_score_refuses():
    with pytest.raises(
        TypeError, match=r"`EnergyScore\(energy_fn=...\)` must be callable as energy_fn\(x, t\), got int"
    ):
        EnergyScore(3)


# Gaussian mixtures.

WEIGHTS = np.array([2.0, 5.0, 3.0])  # need not sum to one
MEANS = np.array([[1.0, -2.0, 0.0], [0.5, 3.0, -1.0], [-1.5, 0.0, 2.0]])
FACTORS = np.random.default_rng(3).normal(size=(3, 3, 3))
COVARIANCES = FACTORS @ FACTORS.transpose(0, 2, 1) / 3
SINGULAR = np.array([np.zeros((3, 3)), np.ones((3, 3)), np.diag([1.0, 0.0, 2.0])])
POINTS = np.random.default_rng(4).normal(size=(20, 3)) * 2


def log_mixture(x, t, schedule, covariances, weights=WEIGHTS, means=MEANS):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    terms = [
        np.log(weight / weights.sum())
        + multivariate_normal.logpdf(x, alpha * mean, alpha**2 * covariance + sigma**2 * jnp.eye(mean.size))
        for weight, mean, covariance in zip(weights, means, covariances, strict=True)
        if weight > 0
    ]
    return jax.nn.logsumexp(jnp.stack(terms))


@pytest.mark.parametrize("covariances", [COVARIANCES, SINGULAR], ids=["full", "singular"])
@all_schedules
def test_mixture_is_the_noised_mixture(schedule, covariances, x64):
    score_fn = GaussianMixtureScore(WEIGHTS, MEANS, covariances, schedule)
    t = jnp.asarray(times_inside(schedule)[1:])  # at t_min the reference factorises a matrix of condition 1e5
    over_all = lambda f: jax.jit(jax.vmap(jax.vmap(f, in_axes=(0, None)), in_axes=(None, 0)))(
        jnp.asarray(POINTS), t
    )
    reference = lambda x, t: log_mixture(x, t, schedule, covariances)
    energy, score = over_all(score_fn.energy_and_score)
    np.testing.assert_allclose(-energy, over_all(reference), rtol=1e-8)
    np.testing.assert_allclose(score, over_all(jax.grad(reference)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("covariances", [COVARIANCES, SINGULAR], ids=["full", "singular"])
def test_mixture_methods_agree(covariances, x64):
    score_fn = GaussianMixtureScore(WEIGHTS, MEANS, covariances, OU())
    t = jnp.asarray(1e-3)
    for x in POINTS[:3]:
        energy, score = score_fn.energy_and_score(jnp.asarray(x), t)
        assert energy == score_fn.energy(x, t) == -score_fn.log_density(x, t)
        np.testing.assert_array_equal(score_fn(x, t), score)
        np.testing.assert_allclose(
            score, jax.grad(score_fn.log_density)(jnp.asarray(x), t), rtol=1e-11, atol=1e-9
        )


def test_mixture_is_normalised(x64):
    score_fn = GaussianMixtureScore([0.3, 0.7], [[-1.0], [2.0]], [[[0.1]], [[0.0]]], EDM())
    x = jnp.linspace(-8, 8, 8001)[:, None]
    density = jnp.exp(jax.vmap(score_fn.log_density, in_axes=(0, None))(x, jnp.asarray(0.3)))
    np.testing.assert_allclose(density.sum() * (x[1, 0] - x[0, 0]), 1.0, rtol=1e-12)


@pytest.mark.parametrize("t", [1e-3, 0.1, 3.0])
def test_component_of_weight_zero_is_never_there(t):
    # At small noise the point on top of the absent component is more than 1e6 in energy from the others.
    x = jnp.asarray([50.0, 50.0, 50.0])
    weights, means = np.array([1.0, 0.0, 2.0]), np.concatenate([MEANS[:1], [[50.0, 50.0, 50.0]], MEANS[2:]])
    score_fn = GaussianMixtureScore(weights, means, SINGULAR, OU())
    without = GaussianMixtureScore(weights[[0, 2]], means[[0, 2]], SINGULAR[[0, 2]], OU())
    np.testing.assert_array_equal(score_fn(x, t), without(x, t))
    np.testing.assert_array_equal(score_fn.log_density(x, t), without.log_density(x, t))
    for function in (score_fn.log_density, lambda x, t: jnp.sum(score_fn(x, t))):
        for gradient in jax.grad(function, argnums=(0, 1))(x, jnp.float32(t)):
            assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("schedule", [OU(), EDM()], ids=["OU", "EDM"])
def test_mixture_float32_close_to_its_data(schedule):
    # Point masses at the smallest noise: the steepest score there is.
    score_fn = GaussianMixtureScore([0.5, 0.5], [[1.0, 0.0], [-1.0, 0.0]], np.zeros((2, 2, 2)), schedule)
    t = jnp.float32(schedule.t_min)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    mean = alpha * jnp.asarray([1.0, 0.0])
    x = mean + sigma * jnp.asarray([0.5, -2.0])
    # x - mean rounds to an ulp of the mean; the score is that over sigma^2.
    np.testing.assert_allclose(
        score_fn(x, t), -(x - mean) / sigma**2, rtol=1e-5, atol=2.5e-7 / float(sigma) ** 2
    )
    assert score_fn(x, t).dtype == jnp.float32


def test_mixture_draws_have_the_right_moments():
    # Loosely: 20,000 draws, six standard errors.
    score_fn = GaussianMixtureScore(WEIGHTS, MEANS, COVARIANCES, OU())
    weights = WEIGHTS / WEIGHTS.sum()
    for t, key in ((None, 0), (jnp.float32(0.4), 1)):
        alpha, sigma = (1.0, 0.0) if t is None else (float(OU().alpha(t)), float(OU().sigma(t)))
        draws = np.asarray(score_fn.sample(jax.random.key(key), 20_000, t), np.float64)
        assert draws.shape == (20_000, 3)
        mean = alpha * weights @ MEANS
        covariance = alpha**2 * (
            np.einsum("k,kij->ij", weights, COVARIANCES) + np.einsum("k,ki,kj->ij", weights, MEANS, MEANS)
        ) - np.outer(mean, mean)
        covariance += sigma**2 * np.eye(3)
        assert np.all(np.abs(draws.mean(0) - mean) < 6 * np.sqrt(np.diag(covariance) / 20_000))
        centred = draws - mean
        products = np.einsum("ni,nj->nij", centred, centred)
        assert np.all(np.abs(products.mean(0) - covariance) < 6 * products.std(0) / np.sqrt(20_000))


def test_mixture_dtype_follows_the_precision_mode():
    make = lambda: GaussianMixtureScore(WEIGHTS, MEANS, COVARIANCES, OU())
    assert make()(jnp.zeros(3), jnp.float32(0.5)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert make()(jnp.zeros(3), jnp.asarray(0.5)).dtype == jnp.float64


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "message"),
    [
        (
            0.5,
            MEANS,
            COVARIANCES,
            r"needs `weights` of shape \(components,\) and `means` of shape \(components, dim\)",
        ),
        (WEIGHTS, MEANS[0], COVARIANCES, r"got \(3,\) and \(3,\)"),
        (WEIGHTS[:2], MEANS, COVARIANCES, r"got \(2,\) and \(3, 3\)"),
        (
            WEIGHTS,
            MEANS,
            COVARIANCES[0],
            r"`GaussianMixtureScore\(covariances=...\)` must have shape \(3, 3, 3\), got \(3, 3\)",
        ),
        (
            -WEIGHTS,
            MEANS,
            COVARIANCES,
            r"`GaussianMixtureScore\(weights=...\)` must be non-negative with a positive sum",
        ),
        (0 * WEIGHTS, MEANS, COVARIANCES, "must be non-negative with a positive sum"),
        (WEIGHTS * np.nan, MEANS, COVARIANCES, "must be non-negative with a positive sum"),
        (WEIGHTS, MEANS, FACTORS, r"`GaussianMixtureScore\(covariances=...\)` must be symmetric"),
        (WEIGHTS, MEANS, -COVARIANCES, "must be positive semi-definite; smallest eigenvalue -"),
    ],
)
def test_mixture_refuses(weights, means, covariances, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixtureScore(weights, means, covariances, OU())


def test_mixture_refuses_what_is_no_schedule():
    with pytest.raises(
        TypeError, match=r"`GaussianMixtureScore\(schedule=...\)` must be a noise schedule such as `OU\(\)`"
    ):
        GaussianMixtureScore(WEIGHTS, MEANS, COVARIANCES, 5.0)
