"""Simulation-based calibration of particle Gibbs, alone and beside NUTS, and weights of modes.

Parameters are drawn from the prior exactly, data from the model, and posterior draws by the kernel, which
finds its own start. If all is right, the rank of the true parameter among posterior draws is uniform,
whatever the prior. All replicates run in one program.
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS
from scipy import stats

import numpyro_rtk as rtk
from numpyro_rtk import DiffusionPrior, RTKGibbs, RTKParticleGibbs
from tests.particles import Mixture


# Each problem has a handful of p-values, one chi-square test of the ranks of each quantity.
FALSE_ALARM_RATE = 1e-4
NUM_P_VALUES = 20
P_MIN = FALSE_ALARM_RATE / NUM_P_VALUES
NUM_REPLICATES, NUM_DRAWS, THINNING, NUM_WARMUP = 256, 15, 3, 20

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Particle weights collapsed:UserWarning")]

SCHEDULE = rtk.OU()
DATA = Mixture(
    np.array([0.3, 0.7]),
    np.array([[-1.0, 0.6], [1.0, -0.4]]),
    np.array([[[0.20, 0.05], [0.05, 0.08]], [[0.08, -0.04], [-0.04, 0.15]]]),
)
PRIOR = DATA.at(float(SCHEDULE.alpha(SCHEDULE.t_min)), float(SCHEDULE.sigma(SCHEDULE.t_min)))
SITE = DiffusionPrior(DATA.score(SCHEDULE), (2,), segments=2, reverse=rtk.GaussianTransition())
OPERATOR = np.array([[0.7, 0.9]])


def linear_gaussian(y, sd):
    x = numpyro.sample("x", SITE)
    numpyro.sample("y", dist.Normal(jnp.asarray(OPERATOR) @ x, sd).to_event(1), obs=y)


def poisson(y, factor):
    x = numpyro.sample("x", SITE)
    numpyro.sample("y", dist.Poisson(factor * 3.0 * jnp.exp(0.8 * x)).to_event(1), obs=y)


def unknown_scale(y, factor):
    log_scale = numpyro.sample("log_scale", dist.Normal(-0.7, 0.5))
    x = numpyro.sample("x", SITE)
    numpyro.sample("y", dist.Normal(x[None], factor * jnp.exp(log_scale)).to_event(2), obs=y)


@functools.cache
def sampler(kernel):
    """Thinned draws of one chain for every data set, as one compiled program."""

    def one(key, *args):
        state = kernel.init(key, NUM_WARMUP, None, args, {})

        def step(state, _):
            return kernel.sample(state, args, {}), None

        def thinned(state, _):
            state, _ = jax.lax.scan(step, state, length=THINNING)
            return state, state.z

        state, _ = jax.lax.scan(step, state, length=NUM_WARMUP)
        return jax.lax.scan(thinned, state, length=NUM_DRAWS)[1]

    return jax.jit(jax.vmap(one, in_axes=(0, 0, None)))


def rank_p_values(truth, draws, rng):
    """Chi-square p-values of the ranks, ties broken at random, for `{name: (replicates,)}` and
    `{name: (replicates, draws)}`.
    """
    result = {}
    for name, value in truth.items():
        sample = np.asarray(draws[name], np.float64)
        below = (sample < value[:, None]).sum(1)
        ties = (sample == value[:, None]).sum(1)
        ranks = below + rng.integers(0, ties + 1)
        counts = np.bincount(ranks, minlength=sample.shape[1] + 1)
        uniform = stats.chisquare(counts).pvalue
        # Under- and overdispersion, and shifts, in one degree of freedom each.
        u = (ranks + 0.5) / (sample.shape[1] + 1)
        m = sample.shape[1] + 1
        shift = abs(u.mean() - 0.5) / np.sqrt((1 - 1 / m**2) / 12 / len(u))
        square = (u - 0.5) ** 2
        grid = ((np.arange(m) + 0.5) / m - 0.5) ** 2
        spread = abs(square.mean() - grid.mean()) / (grid.std() / np.sqrt(len(u)))
        result[name] = min(1.0, 3 * min(uniform, 2 * stats.norm.sf(shift), 2 * stats.norm.sf(spread)))
    return result


def quantities(x, log_likelihood, **others):
    """What is ranked: both coordinates, the side of the gap, and the log likelihood."""
    side = (x[..., 0] > 0).astype(float)
    return {"x0": x[..., 0], "x1": x[..., 1], "side": side, "log likelihood": log_likelihood, **others}


def _linear(rng):
    x = PRIOR.draw(rng, NUM_REPLICATES)
    y = x @ OPERATOR.T + 0.4 * rng.standard_normal((NUM_REPLICATES, 1))
    return x, {}, y


def _counts(rng):
    x = PRIOR.draw(rng, NUM_REPLICATES)
    return x, {}, rng.poisson(3.0 * np.exp(0.8 * x)).astype(float)


def _scale(rng):
    x = PRIOR.draw(rng, NUM_REPLICATES)
    log_scale = -0.7 + 0.5 * rng.standard_normal(NUM_REPLICATES)
    y = x[:, None] + np.exp(log_scale)[:, None, None] * rng.standard_normal((NUM_REPLICATES, 3, 2))
    return x, {"log_scale": log_scale}, y


def _linear_likelihood(x, y, others):
    return stats.norm.logpdf(y[..., 0], x @ OPERATOR[0], 0.4)


def _counts_likelihood(x, y, others):
    return stats.poisson.logpmf(y, 3.0 * np.exp(0.8 * x)).sum(-1)


def _scale_likelihood(x, y, others):
    return stats.norm.logpdf(y, x[..., None, :], np.exp(others["log_scale"])[..., None, None]).sum((-1, -2))


OPTIONS = {"num_particles": 8, "segments": 16}
PROBLEMS = {  # simulate, log likelihood, the right last argument of the model, that of the control
    "linear-Gaussian": (RTKParticleGibbs(linear_gaussian, **OPTIONS), _linear, _linear_likelihood, 0.4, 0.6),
    "Poisson": (RTKParticleGibbs(poisson, **OPTIONS), _counts, _counts_likelihood, 1.0, 1.5),
    "unknown scale": (
        RTKGibbs(NUTS(unknown_scale), num_restarts=0, **OPTIONS),
        _scale,
        _scale_likelihood,
        1.0,
        1.5,
    ),
}


def calibrate(name, *, right, seed=0):
    kernel, simulate, log_likelihood, right_value, wrong_value = PROBLEMS[name]
    rng = np.random.default_rng(seed)
    x, others, y = simulate(rng)
    keys = jr.split(jr.key(seed), NUM_REPLICATES)
    argument = jnp.asarray(right_value if right else wrong_value)
    z = sampler(kernel)(keys, jnp.asarray(y, jnp.float32), argument)
    z = {key: np.asarray(value, np.float64) for key, value in z.items()}
    assert np.all(np.isfinite(z["x"]))
    drawn = {key: z[key] for key in others}
    truth = quantities(x, log_likelihood(x, y, others), **others)
    draws = quantities(z["x"], log_likelihood(z["x"], y[:, None], drawn), **drawn)
    return rank_p_values(truth, draws, rng)


@pytest.mark.parametrize("name", PROBLEMS)
def test_ranks_are_uniform(name):
    p = calibrate(name, right=True)
    assert min(p.values()) > P_MIN, p


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_likelihood_of_another_scale_is_seen(name):
    p = calibrate(name, right=False)
    assert min(p.values()) < 1e-2 * P_MIN, p


@pytest.mark.parametrize(
    ("sd", "seed"), [(50.0, 0), (1.0, 1)], ids=["uninformative", "moderately informative"]
)
def test_chains_from_one_mode_reach_the_right_weights(sd, seed):
    y = jnp.array([0.3])
    exact, _ = PRIOR.given(OPERATOR, sd, np.asarray(y))
    share = 1 - float(exact.cdf(np.array([1.0, 0.0]), np.zeros(1))[0])
    mcmc = MCMC(
        RTKParticleGibbs(linear_gaussian),
        num_warmup=100,
        num_samples=1000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    start = {"x": jnp.tile(jnp.array([[-1.0, 0.6]]), (4, 1))}
    mcmc.run(jr.key(seed), y, jnp.asarray(sd), init_params=start)
    indicator = (np.asarray(mcmc.get_samples(group_by_chain=True)["x"])[..., 0] > 0).astype(float)
    assert split_gelman_rubin(indicator) < 1.01
    error = np.sqrt(share * (1 - share) / min(effective_sample_size(indicator), indicator.size))
    # Half a percent for the inner kernel's own error at the defaults.
    assert abs(indicator.mean() - share) < 0.005 + stats.norm.isf(P_MIN / 2) * error
