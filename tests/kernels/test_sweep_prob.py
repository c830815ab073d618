"""How often particle Gibbs sweeps: as often as it pays, learnt in warmup."""

import warnings

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

import numpyro_rtk as rtk
from numpyro_rtk._numpyro._particle_gibbs_chain import Chain


NUM_WARMUP, NUM_SAMPLES, NUM_CHAINS = 60, 100, 2
# 4 segments of 3 particles, and 10 evaluations of local moves.
OPTIONS = {"num_particles": 3, "segments": 4, "num_pilot_draws": 32, "local": rtk.LocalHMC(5, 2)}
FIELDS = ("depth", "changed", "num_score_evals", "adapt_state.sweep_prob", "local_accept_prob")


def law(dim):
    score = rtk.GaussianMixtureScore([1.0], np.zeros((1, dim)), np.eye(dim)[None], rtk.OU())
    return rtk.DiffusionPrior(score, (dim,))


PRIORS = {dim: law(dim) for dim in (1, 60)}


def model(y, sd):
    x = numpyro.sample("x", PRIORS[y.shape[-1]])
    numpyro.sample("y", dist.Normal(x, sd).to_event(1), obs=y)


def run(dim, sd, **options):
    mcmc = MCMC(
        rtk.RTKParticleGibbs(model, **OPTIONS | options),
        num_warmup=NUM_WARMUP,
        num_samples=NUM_SAMPLES,
        num_chains=NUM_CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc.run(jr.key(0), jnp.linspace(-1.0, 1.0, dim) if dim > 1 else jnp.ones(1), sd, extra_fields=FIELDS)
    return mcmc


@pytest.mark.slow
def test_sweeps_that_change_the_draw_are_made_in_every_iteration():
    mcmc = run(1, 0.5)
    extra = mcmc.get_extra_fields()
    assert extra["changed"].mean() > 0.2
    assert np.all(extra["depth"] > 0)
    assert np.all(extra["adapt_state.sweep_prob"] == 1)
    # The least that others come down to: full sweeps of half the evaluations of the local moves, which are 10
    # (and 1 for the point that an iteration starts from).
    state = jax.tree.map(lambda leaf: leaf[0], mcmc.last_state._replace(shared=None))
    problem = mcmc.sampler._problem(None, (jnp.ones(1), 0.5), {}, jnp.float32)
    chain = Chain(problem.options, problem, mcmc.last_state.shared)
    tuner = chain.tuner(chain.posterior(state.adapt_state.log_beta, state.adapt_state.floor))
    full = int(np.max(extra["num_score_evals"])) - 11
    np.testing.assert_allclose(tuner.least_sweep_prob, 0.5 * 10 / full)


@pytest.mark.slow
def test_sweeps_that_never_change_the_draw_cost_no_more_than_local_moves():
    # Data sharper than the prior in 60 directions: no particle follows.
    mcmc = run(60, 0.01)
    extra, kernel = mcmc.get_extra_fields(group_by_chain=True), mcmc.sampler
    prob = np.asarray(extra["adapt_state.sweep_prob"])
    assert np.all(prob == prob[:, :1])  # nothing changes after warmup
    swept = np.asarray(extra["depth"]) > 0
    # The coin is the iteration's: vectorized chains sweep together.
    often, seldom = np.argmax(prob[:, 0]), np.argmin(prob[:, 0])
    assert np.all(swept[often] >= swept[seldom])
    assert np.all(prob < 0.5)
    assert np.all(np.abs(swept.mean(1) - prob[:, 0]) < 4 * np.sqrt(0.25 / NUM_SAMPLES))
    assert "sweeps 0." in kernel.get_diagnostics_str(mcmc.last_state)
    assert "sweep_prob=adapted" in repr(kernel)
    # The posterior is nearly the likelihood.
    draws = np.asarray(mcmc.get_samples()["x"])
    np.testing.assert_allclose(draws.mean(0), np.linspace(-1, 1, 60) / (1 + 0.01**2), atol=0.006)
    # The control: a sweep in each iteration, if that is asked for.
    given = run(60, 0.01, sweep_prob=1.0)
    assert np.all(given.get_extra_fields()["depth"] > 0)
    assert not np.any(given.get_extra_fields()["changed"][given.get_extra_fields()["depth"] == 5])


@pytest.mark.slow
def test_without_local_moves_all_iterations_sweep():
    extra = run(60, 0.01, local=None).get_extra_fields()
    assert np.all(extra["depth"] > 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Particle weights collapsed")
def test_a_kernel_keeps_its_own_probability_with_a_state_of_another():
    y = jnp.ones(1)

    def depths(state, **options):
        kernel = rtk.RTKParticleGibbs(model, **OPTIONS | options)
        step = jax.jit(lambda state: kernel.sample(state, (y, 0.5), {}))
        found = []
        for _ in range(3):
            state = step(state)
            found.append(int(state.depth))
        return np.asarray(found)

    still = rtk.RTKParticleGibbs(model, **OPTIONS | {"sweep_prob": 0.0})
    state = still.init(jr.key(0), 0, None, (y, 0.5), {})
    assert np.all(depths(state, sweep_prob=0.0) == 0)
    assert np.all(depths(state, sweep_prob=1.0) > 0)
    assert np.all(depths(state, local=None) > 0)


@pytest.mark.parametrize("value", [-0.1, 1.5, "often", float("nan")])
def test_a_probability_is_one(value):
    with pytest.raises(ValueError, match="`sweep_prob` must be between 0 and 1"):
        rtk.RTKParticleGibbs(model, sweep_prob=value)
