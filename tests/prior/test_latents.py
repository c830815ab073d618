"""Densities that are not normalised, and latents that they depend on."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import AIES, DiscreteGibbs, DiscreteHMCGibbs, MCMC, NUTS
from numpyro.infer.util import log_density

import numpyro_rtk as rtk


def score(mean, x, t):
    return -(x - jnp.exp(-t) * mean)  # of N(mean, 1)


def prior(mean, density=None, shape=(2,)):
    return rtk.DiffusionPrior(lambda x, t: score(mean, x, t), shape, density=density, segments=4)


def energy_prior(mean, normalized):
    def energy(x, t):
        return 0.5 * jnp.sum((x - jnp.exp(-t) * mean) ** 2) + jnp.log(2 * jnp.pi)

    return rtk.DiffusionPrior(rtk.EnergyScore(energy, normalized=normalized), (2,), segments=4)


def run(kernel, *args, warmup=2, samples=2, **options):
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=samples, progress_bar=False, **options)
    mcmc.run(jr.key(0), *args)
    return mcmc.get_samples()


LINE = rtk.LineIntegral(num_nodes=2)


def labelled(law, y):
    """Given the label, `y ~ N(1.5 label, 2)`."""
    label = numpyro.sample("label", dist.Bernoulli(0.5))
    x = numpyro.sample("x", law(jnp.where(label == 1, 1.5, 0.0)))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def test_densities_say_whether_they_are_normalised():
    mixture = rtk.GaussianMixtureScore([1.0], [[0.0]], [[[1.0]]], rtk.OU())
    plain = rtk.EnergyScore(lambda x, t: 0.5 * jnp.sum(x**2))
    assert rtk.ProbabilityFlow().normalized(score)
    assert not rtk.LineIntegral().normalized(mixture)
    assert rtk.EnergyDensity().normalized(mixture)
    assert not rtk.EnergyDensity().normalized(plain)
    assert rtk.EnergyDensity().normalized(rtk.EnergyScore(plain.energy_fn, normalized=True))


@pytest.mark.parametrize(
    ("law", "words"),
    [
        pytest.param(
            functools.partial(prior, density=LINE), "`density=LineIntegral", id="line", marks=pytest.mark.slow
        ),
        pytest.param(
            functools.partial(energy_prior, normalized=False), "`density=EnergyDensity", id="energy"
        ),
        pytest.param(
            lambda mean: prior(0.0, rtk.LineIntegral(mean * jnp.ones(2))),
            "`density=LineIntegral",
            id="reference",
        ),
    ],
)
@pytest.mark.parametrize("chains", [1, 2])
@pytest.mark.slow
def test_an_unnormalised_density_of_a_label_is_refused_by_kernels_that_take_no_gradient(law, words, chains):
    options = {"num_chains": chains, "chain_method": jax.vmap if chains > 1 else "sequential"}
    model = functools.partial(labelled, law)
    with pytest.raises(ValueError, match=rf"depends on latent site 'label', and its {words}\(\)`"):
        run(DiscreteHMCGibbs(NUTS(model)), jnp.ones(2), **options)


@pytest.mark.slow
def test_ways_to_a_label():
    means = jnp.array([0.0, 1.5])
    ways = {
        "index": lambda label: means[label],
        "jit": jax.jit(lambda label: 1.5 * label),
        "scan": lambda label: jax.lax.scan(lambda c, _: (c + label, None), 0.0, None, length=2)[0],
        "cond": lambda label: jax.lax.cond(label == 1, lambda: 1.5, lambda: 0.0),
    }

    def model(way):
        label = numpyro.sample("label", dist.Bernoulli(0.5))
        numpyro.sample("x", prior(ways[way](label), LINE))

    value = {"x": jnp.ones(2)}
    conditioned = handlers.condition(model, value)
    for way in ways:

        def joint(label, way=way):
            return log_density(model, (way,), {}, value | {"label": label})[0]

        for attempt in (
            lambda way=way: run(DiscreteGibbs(conditioned), way),
            lambda joint=joint: jax.jit(joint)(1),
            lambda joint=joint: jax.vmap(joint)(jnp.arange(2)),
        ):
            with pytest.raises(ValueError, match="depends on latent site 'label'"):
                attempt()


def test_a_continuous_latent_without_a_gradient():
    def model():
        mean = numpyro.sample("mean", dist.Normal())
        numpyro.sample("x", prior(mean, LINE))

    with pytest.raises(ValueError, match="depends on latent site 'mean'"):
        run(AIES(model), num_chains=4, chain_method="vectorized")


@pytest.mark.slow
@pytest.mark.parametrize(
    "law",
    [
        functools.partial(energy_prior, normalized=True),
        functools.partial(prior, density=rtk.ProbabilityFlow()),
    ],
)
def test_a_normalised_density_of_a_label_gives_the_right_posterior(law):
    y = jnp.array([0.9, 1.4])
    draws = run(DiscreteHMCGibbs(NUTS(functools.partial(labelled, law))), y, warmup=200, samples=3000)
    log_odds = (-np.sum((np.asarray(y) - 1.5) ** 2) + np.sum(np.asarray(y) ** 2)) / 4
    np.testing.assert_allclose(draws["label"].mean(), 1 / (1 + np.exp(-log_odds)), atol=0.05)


# Tracers that are no latents.


def with_others(y, mean, law=LINE):
    """Latents before the site, none of which reaches the score; the mean is data, made by operations."""
    shift = numpyro.sample("shift", dist.Normal())
    label = numpyro.sample("label", dist.Bernoulli(0.3))
    mean = jnp.log(jnp.exp(mean)) + 0 * jnp.mean(y)
    x = numpyro.sample("x", prior(mean, law))
    numpyro.sample("y", dist.Normal(x + shift + label, 1.0).to_event(1), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("jit_model_args", [False, True])
def test_a_score_of_data_is_welcome_among_latents(jit_model_args):
    arguments = jnp.ones(2), jnp.asarray(0.4)
    run(DiscreteHMCGibbs(NUTS(with_others)), *arguments, jit_model_args=jit_model_args)
    options = {"num_chains": 2, "chain_method": jax.vmap}
    run(DiscreteHMCGibbs(NUTS(with_others)), *arguments, jit_model_args=jit_model_args, **options)


def test_data_that_are_mapped_over_are_no_latents():
    site = {"x": jnp.ones(2), "shift": 0.0, "label": 1}
    values = jax.jit(jax.vmap(lambda mean: log_density(with_others, (jnp.ones(2), mean), {}, site)[0]))(
        jnp.arange(3.0)
    )
    assert values.shape == (3,)
    # So are tracers outside of a model.
    at = jax.vmap(lambda mean: prior(mean, LINE).log_prob(jnp.ones(2)))(jnp.arange(3.0))
    np.testing.assert_allclose(at, np.exp(-1e-3) * 2 * np.arange(3.0) - 1, rtol=1e-4)


def test_an_observed_site_of_a_latent():
    def model(z):
        x = numpyro.sample("x", dist.Normal())
        numpyro.sample("z", prior(x, LINE), obs=z)

    with pytest.raises(ValueError, match="depends on latent site 'x'"):
        jax.jit(lambda x: log_density(model, (jnp.ones(2),), {}, {"x": x})[0])(0.3)
