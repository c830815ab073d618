"""Likelihoods that are zero, or no number, for half of the prior: posteriors against quadrature."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC
from scipy import stats

import numpyro_rtk as rtk
from numpyro_rtk._moves._leapfrog import Trajectory
from numpyro_rtk._smc._posterior import Floor


pytestmark = pytest.mark.slow

Z_MAX = stats.norm.isf(2.5e-5 / 2)
PRIOR = rtk.DiffusionPrior(lambda x, t: -x, (1,), rtk.VP())


def log_link(y):
    x = numpyro.sample("x", PRIOR)[0]
    numpyro.sample("y", dist.Normal(jnp.log(x), 1.0), obs=y)


def wall(y):
    """What is observed is below `exp(x)`."""
    x = numpyro.sample("x", PRIOR)[0]
    numpyro.sample("y", dist.Uniform(0.0, jnp.exp(x)), obs=y)


def z_scores(kernel, y, x, log_p):
    """Of mean and variance, and the share of iterations that diverged."""
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = p @ x
    mcmc = MCMC(
        kernel,
        num_warmup=300,
        num_samples=1500,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jr.key(0), y)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["x"], np.float64)[..., 0]
    found = []
    for values, exact in ((draws, mean), ((draws - mean) ** 2, p @ (x - mean) ** 2)):
        error = values.std() / np.sqrt(effective_sample_size(values))
        found.append(abs(values.mean() - exact) / error)
    return found, np.mean(mcmc.get_extra_fields()["diverging"])


def log_link_scores():
    y, x = -0.5, np.linspace(1e-4, 7, 20_001)
    log_p = -0.5 * x**2 - 0.5 * (y - np.log(x)) ** 2
    return z_scores(rtk.RTKParticleGibbs(log_link, local=None), y, x, log_p)


def test_a_mean_that_is_no_number():
    found, diverging = log_link_scores()
    assert max(found) < Z_MAX
    assert diverging < 0.01


def test_a_twist_of_zero_is_caught(monkeypatch):
    of = Floor.of
    monkeypatch.setattr(Floor, "of", lambda *terms: of(*terms)._replace(gaussian=jnp.asarray(-jnp.inf)))
    assert max(log_link_scores()[0]) > Z_MAX


def local_moves(model):
    return rtk.RTKParticleGibbs(model, sweep_prob=0.0, segments=4, num_pilot_draws=32, local=rtk.LocalHMC())


def wall_scores(make):
    x = np.linspace(np.log(1.2), 7, 20_001)
    return z_scores(make(wall), jnp.array([1.2, 0.4]), x, -0.5 * x**2 - 2 * x)


@pytest.mark.parametrize("make", [rtk.ScoreHMC, local_moves])
def test_a_wall(make):
    found, diverging = wall_scores(make)
    assert max(found) < Z_MAX
    assert diverging == 0


@pytest.mark.parametrize("make", [rtk.ScoreHMC, local_moves])
def test_an_adaptation_that_counts_rejections_at_the_wall_is_caught(make, monkeypatch):
    """Steps become shorter without end, so that chains stay where they are."""
    monkeypatch.setattr(Trajectory, "tuning_prob", lambda self, accept_prob, impossible: accept_prob)
    assert not max(wall_scores(make)[0]) < Z_MAX
