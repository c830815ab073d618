"""A Gaussian observation whose mean is no number for half of the prior: the posterior against quadrature."""

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
from numpyro_rtk._smc._posterior import Floor


pytestmark = pytest.mark.slow

Z_MAX = stats.norm.isf(2.5e-5 / 2)
PRIOR = rtk.DiffusionPrior(lambda x, t: -x, (1,), rtk.VP())


def log_link(y):
    x = numpyro.sample("x", PRIOR)[0]
    numpyro.sample("y", dist.Normal(jnp.log(x), 1.0), obs=y)


def z_scores(y=-0.5):
    """Of mean and variance, and the share of iterations that diverged."""
    x = np.linspace(1e-4, 7, 20_001)
    log_p = -0.5 * x**2 - 0.5 * (y - np.log(x)) ** 2
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = p @ x
    mcmc = MCMC(
        rtk.RTKParticleGibbs(log_link, local=None),
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


def test_the_posterior_is_right():
    found, diverging = z_scores()
    assert max(found) < Z_MAX
    assert diverging < 0.01


def test_a_twist_of_zero_is_caught(monkeypatch):
    of = Floor.of
    monkeypatch.setattr(Floor, "of", lambda terms: of(terms)._replace(gaussian=jnp.asarray(-jnp.inf)))
    assert max(z_scores()[0]) > Z_MAX
