"""Trajectories from scores alone in one dimension, where steps of a given acceptance are longest."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import pytest
from numpyro.infer import MCMC
from scipy import stats

import numpyro_rtk as rtk


pytestmark = [
    pytest.mark.slow,
    # The score is that of its law at `t_min` only, and means nothing above.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CHAINS = 400
TIMES = np.array([1.1e-3, 1.0e-3])
BIAS_OF_MEAN, BIAS_OF_VARIANCE = 0.02, 0.02
"""What the docs promise, in sds and relative."""
Z_MAX = stats.norm.isf(2.5e-5 / 2)


def skewed():
    """The log of an exponential variable."""
    x = numpyro.sample("x", rtk.DiffusionPrior(lambda x, t: 1 - jnp.exp(x), (1,), rtk.OU(), segments=TIMES))
    numpyro.factor("nothing", 0.0 * jnp.sum(x))


def particle_gibbs(local):
    return rtk.RTKParticleGibbs(skewed, sweep_prob=0.0, segments=2, num_pilot_draws=8, local=local)


def excess(kernel):
    """By how much errors of mean and variance are above what is promised, in standard errors."""
    start = np.log(np.random.default_rng(0).exponential(size=(CHAINS, 1)))
    mcmc = MCMC(
        kernel,
        num_warmup=150,
        num_samples=400,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jr.key(0), init_params={"x": jnp.asarray(start, jnp.float32)})
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["x"], np.float64)[..., 0]
    law = stats.gumbel_l()
    means = ((draws - law.mean()) / law.std()).mean(1)
    squares = ((draws - law.mean()) ** 2 / law.var()).mean(1) - 1
    return [
        (abs(values.mean()) - promised) / (values.std() / np.sqrt(CHAINS))
        for values, promised in ((means, BIAS_OF_MEAN), (squares, BIAS_OF_VARIANCE))
    ]


@pytest.mark.parametrize(
    "kernel",
    [rtk.ScoreHMC(skewed), particle_gibbs(rtk.LocalHMC()), particle_gibbs(rtk.LocalMALA())],
    ids=["ScoreHMC", "LocalHMC", "LocalMALA"],
)
def test_the_bias_is_as_small_as_promised(kernel):
    assert max(excess(kernel)) < Z_MAX


def test_the_acceptance_that_is_enough_in_ten_dimensions_is_caught():
    assert min(excess(rtk.ScoreHMC(skewed, target_accept_prob=0.9))) > Z_MAX
