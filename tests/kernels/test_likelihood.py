"""What counts as an observation of the diffusion sites, and what as a Gaussian one."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC
from numpyro.infer.gibbs import conditioned, with_conditioning
from numpyro.infer.util import log_density

import numpyro_rtk as rtk
from numpyro_rtk._numpyro._likelihood import Likelihood
from numpyro_rtk._numpyro._sites import inspect_model


X, OTHER = jnp.array([0.3, -0.7]), jnp.array([1.1, 0.2])
PRIOR = dist.Normal(0.0, 1.0).expand([2]).to_event(1)


def terms_of(model, *, kwargs=None, **options):
    likelihood = Likelihood(model, (), kwargs or {}, **options)
    return lambda x: likelihood.terms({"x": x})


def by_numpyro(model, x, others=None):
    """Log density of all but the prior, by NumPyro itself."""
    total = log_density(model, (), {}, {"x": x} | (others or {}))[0]
    return total - PRIOR.log_prob(x)


# Gaussian laws, and laws that only look like them.


class Heavy(dist.MultivariateNormal):
    """Student's t with 4 degrees of freedom, up to a constant, in the clothes of a Gaussian."""

    def log_prob(self, value):
        size = value.shape[-1]
        squared = jnp.sum(((value - self.loc) / jnp.diagonal(self.scale_tril)) ** 2, axis=-1)
        return -0.5 * (4 + size) * jnp.log1p(squared / 4)


class Doubled(dist.Normal):
    def log_prob(self, value):
        return 2.0 * super().log_prob(value)


class Floored(dist.Independent):
    def log_prob(self, value):
        return jnp.maximum(super().log_prob(value), -3.0)


class Renamed(dist.Normal):
    pass


TRIL = jnp.diag(jnp.array([0.4, 0.6]))
Y = jnp.array([2.0, 0.1])
LAWS = {  # number of Gaussian observations
    "normal": (lambda x: dist.Normal(x**2, 0.3).to_event(1), 2),
    "multivariate": (lambda x: dist.MultivariateNormal(x**3, scale_tril=TRIL), 2),
    "masked": (lambda x: dist.Normal(x, 0.3).mask(jnp.array([True, False])).to_event(1), 2),
    "expanded": (lambda x: dist.Normal(x[0], 0.3).expand([2]).to_event(1), 2),
    "multivariate subclass": (lambda x: Heavy(x, scale_tril=TRIL), 0),
    "subclass": (lambda x: Doubled(x, 0.3).to_event(1), 0),
    "subclass of a wrapper": (lambda x: Floored(dist.Normal(x, 0.3), 1), 0),
    "wrapped subclass": (lambda x: Doubled(x[0], 0.3).expand([2]).mask(True).to_event(1), 0),
    "subclass that changes nothing": (lambda x: Renamed(x, 0.3).to_event(1), 0),
    "student": (lambda x: dist.StudentT(3.0, x, 0.3).to_event(1), 0),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("gaussian", [True, False])
def test_only_gaussian_laws_themselves_are_gaussian(name, gaussian):
    law, size = LAWS[name]

    def model():
        numpyro.sample("y", law(numpyro.sample("x", PRIOR)), obs=Y)

    terms = terms_of(model, gaussian=gaussian)(X)
    assert terms.whitened.shape == (size if gaussian else 0,)
    right = by_numpyro(model, X)
    np.testing.assert_allclose(terms.log_likelihood, right, rtol=1e-5)
    # The split says the same.
    whole = terms._replace(log_prob=None).log_likelihood
    np.testing.assert_allclose(whole, right, rtol=1e-5, atol=1e-5)


# Observations of something else.


def with_bystanders():
    numpyro.sample("before", dist.Normal(0.0, 1.0).expand([70]).to_event(1), obs=jnp.ones(70))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    shift = numpyro.sample("shift", dist.Normal(0.0, 2.0))
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x + shift, scale).to_event(1), obs=Y)
    numpyro.sample("counts", dist.Poisson(jnp.exp(shift)), obs=3)
    numpyro.sample("last", dist.Poisson(jnp.exp(x[0])), obs=2)
    numpyro.sample("shape", dist.Normal(1.0 * jnp.size(x), 1.0), obs=0.0)
    numpyro.factor("factor", -(shift**2))


@pytest.mark.parametrize("gaussian", [True, False])
def test_sites_that_do_not_depend_on_x_are_no_observations_of_it(gaussian):
    others = {"scale": jnp.array(0.7), "shift": jnp.array(-0.4)}
    kwargs = with_conditioning({}, others)
    terms = terms_of(conditioned(with_bystanders), kwargs=kwargs, gaussian=gaussian)
    here, there = terms(X), terms(OTHER)
    assert here.whitened.shape == (2 if gaussian else 0,)
    right = [by_numpyro(with_bystanders, x, others) for x in (X, OTHER)]
    np.testing.assert_allclose(here.log_likelihood, right[0], rtol=1e-6)
    np.testing.assert_allclose(there.log_likelihood - here.log_likelihood, right[1] - right[0], rtol=1e-4)
    # What is tempered is what depends on `x`.
    tempered = dist.Poisson(jnp.exp(X[0])).log_prob(2)
    if not gaussian:
        tempered += dist.Normal(X - 0.4, 0.7).log_prob(Y).sum()
    np.testing.assert_allclose(here.other, tempered, rtol=1e-5)


def test_the_walk_is_made_once_and_under_transformations():
    likelihood = Likelihood(
        conditioned(with_bystanders), (), with_conditioning({}, {"scale": 0.7, "shift": 0.0})
    )
    terms = jax.jit(jax.vmap(lambda x: likelihood.terms({"x": x})))(jnp.stack([X, OTHER]))
    assert terms.whitened.shape == (2, 2)
    dependent = likelihood._dependent
    assert dependent == {"y", "last"}
    likelihood.terms({"x": X})
    assert likelihood._dependent is dependent


# Priors in other clothes.


@pytest.mark.slow
def test_a_diffusion_prior_with_a_law_of_its_own_is_refused():
    class Tilted(rtk.DiffusionPrior):
        def log_prob(self, value):
            return super().log_prob(value) + jnp.sum(value)

    class Halved(dist.Independent):
        def log_prob(self, value):
            return 0.5 * super().log_prob(value)

    score = lambda x, t: -x
    for law, message in (
        (Tilted(score, (2,)), r"'x' has a `log_prob` of its own \(Tilted\)"),
        (Halved(rtk.DiffusionPrior(score, (2,)).expand([3]), 1), "'x' transforms a diffusion prior"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect_model("Kernel", lambda law=law: numpyro.sample("x", law), jr.key(0), (), {})


# The posterior.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Particle weights collapsed:UserWarning")
def test_the_posterior_of_a_heavy_tailed_law_in_the_clothes_of_a_gaussian():
    y = jnp.array([[0.4, -0.3], [0.6, -0.1], [3.0, 2.5]])

    def model(law):
        x = numpyro.sample("x", rtk.DiffusionPrior(lambda x, t: -x, (2,)))
        with numpyro.plate("n", len(y)):
            numpyro.sample("y", law(x, scale_tril=0.3 * jnp.eye(2)), obs=y)

    def posterior_mean(law):
        grid = np.linspace(-3.0, 7.0, 401)
        points = jnp.asarray(np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2), jnp.float32)
        with jax.numpy_rank_promotion("allow"):
            log_prob = jax.vmap(lambda x: law(x, scale_tril=0.3 * jnp.eye(2)).log_prob(y).sum())(points)
        weights = jax.nn.softmax(log_prob - 0.5 * jnp.sum(points**2, 1))
        return np.asarray(weights @ points)

    def drawn_mean(law):
        kernel = rtk.RTKParticleGibbs(functools.partial(model, law), segments=12, num_pilot_draws=32)
        mcmc = MCMC(
            kernel,
            num_warmup=100,
            num_samples=500,
            num_chains=2,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(jr.key(0))
        return np.asarray(mcmc.get_samples()["x"]).mean(0)

    right = posterior_mean(Heavy)
    np.testing.assert_allclose(drawn_mean(Heavy), right, atol=0.05)
    # The check sees the difference.
    assert np.abs(drawn_mean(dist.MultivariateNormal) - right).max() > 0.4
