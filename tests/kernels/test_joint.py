"""`RTKGibbs(ScoreHMC(model))`: sweeps between modes, and joint trajectories along ridges, against
quadrature.
"""

import functools
import pickle

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from scipy import stats

import numpyro_rtk as rtk
from numpyro_rtk import DiffusionPrior, RTKGibbs, ScoreHMC
from tests.helpers import Counter, run_mcmc


P_MIN = 2.5e-5
Z_MAX = stats.norm.isf(P_MIN / 2)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Some donated buffers were not usable:UserWarning"),
    # Few particles and levels are quick; weights may collapse.
    pytest.mark.filterwarnings("ignore:Particle weights collapsed:UserWarning"),
]

SCHEDULE = rtk.OU()
WEIGHTS, MEANS, VARIANCE = np.array([0.3, 0.7]), np.array([-2.0, 2.0]), 0.15
mixture = rtk.GaussianMixtureScore(WEIGHTS, MEANS[:, None], [[[VARIANCE]]] * 2, SCHEDULE)


def score_fn(x, t):
    return mixture(x, t)


prior_of = functools.partial(DiffusionPrior, segments=2, reverse=rtk.GaussianTransition())
PRIOR = prior_of(score_fn, (1,), SCHEDULE)


def standard_normal(x, t):
    del t
    return -x


PAIR = prior_of(standard_normal, (2,))
OPTIONS = {
    "segments": 6,
    "num_particles": 4,
    "reverse": rtk.PreconditionedMALA(1),
    "num_pilot_draws": 16,
    "num_restarts": 1,
}
OBSERVED = 2.0


def model(y):
    """Only the square of the product is seen: two modes by the sign of `x`, each a ridge between `x` and
    `a`.
    """
    a = numpyro.sample("a", dist.LogNormal(0.0, 0.5))
    x = numpyro.sample("x", PRIOR)
    numpyro.deterministic("product", a * x[0])
    numpyro.sample("y", dist.Normal((a * x[0]) ** 2, 0.1), obs=y)


def alone():
    """No other latents, and a plate of events."""
    with numpyro.plate("events", 2):
        x = numpyro.sample("x", PAIR)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(2), obs=jnp.ones((2, 2)))


run = functools.partial(run_mcmc, num_warmup=5, num_samples=5)


@pytest.mark.slow
def test_modes_and_ridges_against_quadrature():
    alpha, sigma = float(SCHEDULE.alpha(SCHEDULE.t_min)), float(SCHEDULE.sigma(SCHEDULE.t_min))
    x, u = np.meshgrid(np.linspace(-5, 5, 1601), np.linspace(-2.5, 2.5, 1601), indexing="ij")
    sd = np.sqrt(alpha**2 * VARIANCE + sigma**2)
    prior = sum(w * stats.norm.pdf(x, alpha * m, sd) for w, m in zip(WEIGHTS, MEANS, strict=True))
    weights = prior * stats.norm.pdf(u, 0, 0.5) * stats.norm.pdf(OBSERVED, (np.exp(u) * x) ** 2, 0.1)
    weights /= weights.sum()

    options = {"segments": 12, "num_particles": 8, "num_pilot_draws": 64}
    fields = ("num_score_evals", "diverging")
    # More than the default, for a smaller error of the line integral.
    kernel = RTKGibbs(ScoreHMC(model, target_accept_prob=0.95), **options)
    mcmc = run(kernel, OBSERVED, num_warmup=200, num_samples=1000, num_chains=4, extra_fields=fields)
    draws = mcmc.get_samples(group_by_chain=True)
    assert set(draws) == {"a", "x", "product"}
    got_x, got_u = (np.asarray(values, np.float64) for values in (draws["x"][..., 0], np.log(draws["a"])))
    statistics = {
        "mode": ((got_x > 0) * 1.0, x > 0),
        "log a": (got_u, u),
        "|x|": (np.abs(got_x), np.abs(x)),
        "ridge": (np.abs(got_x) * got_u, np.abs(x) * u),
    }
    for name, (values, grid) in statistics.items():
        size = effective_sample_size(values)
        assert size > 200, (name, size)
        assert split_gelman_rubin(values) < 1.03, name
        mean = (weights * grid).sum()
        assert abs(values.mean() - mean) < Z_MAX * values.std() / np.sqrt(min(size, values.size)), (
            name,
            values.mean(),
            mean,
        )
    assert np.mean(mcmc.get_extra_fields()["diverging"]) < 0.01


@pytest.mark.slow
def test_evaluations_and_state():
    """One evaluation per event, leapfrog step and particle move, and one where the trajectory starts."""
    counter = Counter(score_fn)
    prior = prior_of(lambda x, t: counter(x, t), (1,), SCHEDULE)

    def counted():
        a = numpyro.sample("a", dist.LogNormal(0.0, 0.5))
        numpyro.sample("y", dist.Normal(a * numpyro.sample("x", prior)[0], 0.3), obs=OBSERVED)

    kernel = RTKGibbs(ScoreHMC(counted), **OPTIONS)
    # Two iterations of the warmup: the first draws the site anew.
    state = kernel.init(jr.key(0), 2, None, (), {})
    step = jax.jit(lambda state: kernel.sample(state, (), {}))
    for i in range(4):
        before = counter.count
        state = jax.block_until_ready(step(state))
        particle_gibbs, hmc = state.block_states
        assert counter.count - before == int(state.num_score_evals), i
        assert int(state.num_score_evals) == int(particle_gibbs.num_score_evals) + int(hmc.num_steps) + 1
        # What the next trajectory starts from is what holds at the point.
        np.testing.assert_allclose(
            hmc.score["x"], score_fn(state.z["x"], PRIOR.segment_times[-1]), rtol=1e-4, atol=1e-5
        )
        a, x = jnp.exp(state.z["a"]), state.z["x"][0]
        potential = -dist.Normal(0.0, 0.5).log_prob(state.z["a"]) - dist.Normal(a * x, 0.3).log_prob(OBSERVED)
        np.testing.assert_allclose(hmc.potential, potential, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_sweep_is_given_where_hmc_went(monkeypatch):
    """The two kernels act on one point: neither starts where it was itself last."""
    kernel = RTKGibbs(ScoreHMC(model), **OPTIONS)
    particle_gibbs, hmc = (block for block, _ in kernel.blocks)
    seen = []
    sweep, trajectory = particle_gibbs.sample, hmc.trajectory
    monkeypatch.setattr(
        particle_gibbs,
        "sample",
        lambda s, *a: seen.append(("sweep", s.z, a[1])) or sweep(s, *a),
        raising=False,
    )
    monkeypatch.setattr(
        hmc, "trajectory", lambda s, *a: seen.append(("hmc", s.z, a[1])) or trajectory(s, *a), raising=False
    )
    state = kernel.init(jr.key(0), 0, None, (OBSERVED,), {})
    before = state.z
    state = kernel.sample(state, (OBSERVED,), {})
    (_, swept, given), (_, started, plain) = seen
    np.testing.assert_array_equal(swept["x"], before["x"])
    np.testing.assert_allclose(given["_gibbs_sites"]["a"], jnp.exp(before["a"]), rtol=1e-6)
    assert set(given["_gibbs_sites"]) == {"a"}
    assert not plain
    np.testing.assert_array_equal(started["x"], state.block_states[0].z["x"])
    np.testing.assert_array_equal(started["a"], before["a"])


@pytest.mark.slow
def test_mapped_chains_deterministic_sites_and_going_on():
    # Vectorized chains are in the other tests, single ones are what is mapped here.
    mcmc = run(RTKGibbs(ScoreHMC(model), **OPTIONS), OBSERVED, chain_method=jax.vmap)
    draws = mcmc.get_samples(group_by_chain=True)
    assert draws["x"].shape == (2, 5, 1)
    np.testing.assert_allclose(draws["product"], draws["a"] * draws["x"][..., 0], rtol=1e-5)
    assert np.all(np.ptp(np.asarray(draws["a"]), axis=1) > 0)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.post_warmup_state.rng_key, OBSERVED)
    assert np.all(np.isfinite(mcmc.get_samples()["x"]))


@pytest.mark.slow
def test_no_other_latents():
    kernel = pickle.loads(pickle.dumps(RTKGibbs(ScoreHMC(alone), **OPTIONS)))
    mcmc = run(kernel, num_warmup=50, num_samples=500, extra_fields=("num_score_evals",))
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["x"], np.float64)
    assert draws.shape == (2, 500, 2, 2)
    error = np.sqrt(0.5 / np.minimum(effective_sample_size(draws), 1000))
    assert np.all(np.abs(draws.mean((0, 1)) - 0.5) < Z_MAX * error)


@pytest.mark.slow
def test_init_params_are_the_start():
    params = {"x": jnp.array([[1.5], [-1.5]]), "a": jnp.array([1.1, 0.8])}
    state = RTKGibbs(ScoreHMC(model), **OPTIONS).init(jr.split(jr.key(0)), 10, params, (OBSERVED,), {})
    np.testing.assert_array_equal(state.z["x"], params["x"])
    np.testing.assert_array_equal(state.block_states[0].z["x"], params["x"])
    np.testing.assert_allclose(state.z["a"], np.log(params["a"]), rtol=1e-6)


def test_defaults():
    kernel = RTKGibbs(ScoreHMC(model), num_particles=8)
    (particle_gibbs, _), (inner, _) = kernel.blocks
    assert "local=none" in repr(particle_gibbs)
    assert isinstance(inner, ScoreHMC)
    assert kernel.model is model
    given = RTKGibbs(ScoreHMC(model), local=rtk.LocalMALA())
    assert "LocalMALA" in repr(given)
