"""Likelihoods and networks without derivatives: right where none is needed, else refused by name."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import NUTS
from scipy import stats

import numpyro_rtk as rtk
from numpyro_rtk._numpyro._derivatives import why_no_derivative
from tests.helpers import run_mcmc


P_MIN = 1e-4
Z_MAX = stats.norm.isf(P_MIN / 2)
WITHOUT = {"twist": rtk.TemperedTwist(), "num_guided_steps": 0, "num_start_steps": 0, "local": None}
FEW = {"segments": 8, "num_particles": 16, "num_pilot_draws": 32}
OU = rtk.OU()
pytestmark = pytest.mark.filterwarnings("ignore:Particle weights collapsed:UserWarning")
VARIANCE = float(OU.alpha(OU.t_min) ** 2 + OU.sigma(OU.t_min) ** 2)


def prior_of(score_fn, shape):
    return rtk.DiffusionPrior(score_fn, shape, OU)


def standard_normal(x, t):
    return -x


def behind_a_callback(x):
    """The square, by a program that JAX does not see."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda x: np.asarray(x) ** 2, shape, x, vmap_method="expand_dims")


def in_a_loop(x):
    """The square, by a loop that does not say how long it is."""
    return jax.lax.while_loop(lambda state: state[0] < 1, lambda state: (state[0] + 1, state[1] * x), (0, x))[
        1
    ]


def square(function):
    def model(y):
        x = numpyro.sample("x", prior_of(standard_normal, (1,)))
        numpyro.sample("y", dist.Normal(function(x), 0.3).to_event(1), obs=y)

    return model


@pytest.mark.slow
@pytest.mark.parametrize("function", [behind_a_callback, in_a_loop])
def test_the_posterior_of_a_likelihood_without_a_derivative(function):
    """Two modes, at the roots of the square."""
    mcmc = run_mcmc(
        rtk.RTKParticleGibbs(square(function), **FEW | WITHOUT),
        jnp.ones(1),
        num_warmup=100,
        num_samples=2000,
        num_chains=2,
    )
    grid = np.linspace(-5, 5, 20_001)
    weights = stats.norm.pdf(grid, 0, np.sqrt(VARIANCE)) * stats.norm.pdf(1.0, grid**2, 0.3)
    weights /= weights.sum()
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"], np.float64)[..., 0]
    for values, right in ((x, grid), (np.abs(x), np.abs(grid)), (x**4, grid**4)):
        mean = weights @ right
        error = np.sqrt(weights @ (right - mean) ** 2 / min(effective_sample_size(values), values.size))
        assert abs(values.mean() - mean) < Z_MAX * error


@pytest.mark.parametrize("function", [behind_a_callback, in_a_loop])
@pytest.mark.parametrize(
    "make", [lambda m: rtk.RTKParticleGibbs(m, **FEW), rtk.ScoreHMC], ids=["sweeps", "hmc"]
)
def test_a_likelihood_without_a_derivative_is_refused_by_name(function, make, monkeypatch):
    def compiles(*args):
        raise AssertionError("a program was compiled")

    monkeypatch.setattr("numpyro_rtk._numpyro._programs.Programs.__call__", compiles)
    message = r"takes the derivative of the likelihood in \['x'\], and it has none(.|\n)*TemperedTwist"
    with pytest.raises(ValueError, match=message):
        make(square(function)).init(jr.key(0), 0, None, (jnp.ones(1),), {})


def test_an_inner_kernel_that_needs_a_derivative_is_named():
    def model(y):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        x = numpyro.sample("x", prior_of(standard_normal, (1,)))
        numpyro.sample("y", dist.Normal(behind_a_callback(x + a), 0.3).to_event(1), obs=y)

    kernel = rtk.RTKGibbs(NUTS(model), **FEW | WITHOUT)
    with pytest.raises(ValueError, match=r"(?s)`RTKGibbs\(NUTS\(model\)\)`.*in \['a'\].*`CustomGibbs`"):
        kernel.init(jr.key(0), 0, None, (jnp.ones(1),), {})


def test_what_fails_by_itself_is_not_about_derivatives():
    def fails(x):
        raise RuntimeError("of its own")

    assert why_no_derivative(fails, jnp.ones(2)) is None
    assert why_no_derivative(jnp.sin, jnp.ones(2)) is None
    assert isinstance(why_no_derivative(behind_a_callback, jnp.ones(2)), ValueError)


def network(x, t):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda x: -np.asarray(x), shape, x, vmap_method="expand_dims")


def image(y):
    x = numpyro.sample("x", prior_of(network, (12, 12)))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(2), obs=y)


def test_the_derivative_of_a_network_is_found_by_tracing():
    kernel = rtk.RTKParticleGibbs(image, guidance="jacobian", **FEW)
    with pytest.raises(ValueError, match=r"'x', which has none: .*`guidance=\"mean\"`"):
        kernel.init(jr.key(0), 0, None, (jnp.ones((12, 12)),), {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweeps", "joint"])
def test_a_network_without_a_derivative_needs_no_option(name):
    """In many dimensions, where guided moves go through the network where they can."""
    y = jnp.ones((12, 12))
    if name == "sweeps":
        kernel = rtk.RTKParticleGibbs(image, num_particles=2, sweep_prob=0.1, num_pilot_draws=32)
    else:
        kernel = rtk.ScoreHMC(image)
    mcmc = run_mcmc(kernel, y, num_warmup=100, num_samples=200)
    x = np.asarray(mcmc.get_samples()["x"], np.float64)
    precision = 1 / VARIANCE + 1
    np.testing.assert_allclose(x.mean(), 1 / precision, atol=0.02)
    np.testing.assert_allclose(x.std(0).mean(), precision**-0.5, rtol=0.05)


@pytest.mark.slow
def test_other_latents_of_such_a_likelihood():
    """The inner kernel follows gradients in what is not behind the callback."""

    def model(y):
        scale = numpyro.sample("scale", dist.LogNormal(-1.0, 0.5))
        x = numpyro.sample("x", prior_of(standard_normal, (1,)))
        numpyro.sample("y", dist.Normal(behind_a_callback(x), scale).to_event(1), obs=y)

    kernel = rtk.RTKGibbs(NUTS(model), **FEW | WITHOUT)
    draws = run_mcmc(kernel, jnp.ones(1), num_warmup=200, num_samples=2000, num_chains=2).get_samples(True)
    u, x = np.meshgrid(np.linspace(-4, 2, 601), np.linspace(-5, 5, 2001), indexing="ij")
    weights = stats.norm.pdf(u, -1, 0.5) * stats.norm.pdf(x, 0, np.sqrt(VARIANCE))
    weights = weights * stats.norm.pdf(1.0, x**2, np.exp(u))
    weights /= weights.sum()
    for values, right in (
        (np.log(np.asarray(draws["scale"], np.float64)), u),
        (np.asarray(draws["x"])[..., 0] ** 2, x**2),
    ):
        mean = (weights * right).sum()
        error = np.sqrt(
            (weights * (right - mean) ** 2).sum() / min(effective_sample_size(values), values.size)
        )
        assert abs(values.mean() - mean) < Z_MAX * error
