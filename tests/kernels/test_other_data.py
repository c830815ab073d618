"""A `ScoreHMC` run that goes on with other data: the posterior of those, and what it costs."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

import numpyro_rtk as rtk
from numpyro_rtk._numpyro import _score_hmc
from numpyro_rtk._numpyro._data_mark import checksum
from tests.helpers import Counter


def standard_normal(x, t):
    del t
    return -x


def model_of(score_fn):
    prior = rtk.DiffusionPrior(score_fn, (), rtk.OU(), segments=2, reverse=rtk.GaussianTransition())

    def model(y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    return model


MODEL = model_of(standard_normal)
START = {"init_params": {"x": np.full(4, 3.0, np.float32)}}


def resumed(jit_model_args):
    """Draws of four chains that learnt from 6, go on with -6, and with 6 again."""
    kernel = rtk.ScoreHMC(MODEL, inverse_mass_matrix=np.ones(1))
    mcmc = MCMC(
        kernel,
        num_warmup=100,
        num_samples=400,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
        jit_model_args=jit_model_args,
    )
    mcmc.run(jr.key(0), jnp.asarray(6.0), **START)
    for seed, y in enumerate((-6.0, 6.0), 1):
        mcmc.post_warmup_state = mcmc.last_state
        mcmc.run(jr.key(seed), jnp.asarray(y), extra_fields=("num_score_evals", "num_steps"))
        yield y, mcmc


@pytest.mark.parametrize("jit_model_args", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_posterior_of_the_other_data(jit_model_args):
    for y, mcmc in resumed(jit_model_args):
        x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"], np.float64)
        # Mean y / 2 and sd 0.71 in every chain, but for the way there; 400 draws each.
        np.testing.assert_allclose(x[:, 10:].mean(1), y / 2, atol=0.25)
        np.testing.assert_allclose(x[:, 10:].std(1), np.sqrt(0.5), rtol=0.25)
        extra = mcmc.get_extra_fields(group_by_chain=True)
        more = np.asarray(extra["num_score_evals"] - extra["num_steps"])
        np.testing.assert_array_equal(more, np.eye(1, 400, dtype=int).repeat(4, 0))  # one, at the beginning


def test_a_chain_that_keeps_the_potential_of_the_old_data_is_caught(monkeypatch):
    monkeypatch.setattr(_score_hmc, "checksum", lambda args, kwargs: jnp.zeros((), jnp.uint32))
    _, mcmc = next(resumed(False))
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    assert np.any(np.abs(x[:, 10:].mean(1) + 3.0) > 1.0)


def test_the_same_data_cost_no_evaluation():
    counter = Counter(standard_normal)
    counter.schedule = rtk.OU()
    kernel = rtk.ScoreHMC(model_of(counter), inverse_mass_matrix=np.ones(1))
    state = kernel.init(jr.key(0), 0, {"x": jnp.zeros(())}, (jnp.asarray(1.0),), {})
    for y, more in ((1.0, 0), (2.0, 1), (2.0, 0), (1.0, 1)):
        before = counter.count
        state = kernel.sample(state, (jnp.asarray(y),), {})
        assert counter.count - before == state.num_score_evals == state.num_steps + more


def test_arguments_are_told_apart():
    one = {"y": np.arange(6.0, dtype=np.float32), "n": 3, "name": "a", "mask": np.array([True, False])}
    others = [
        one | {"y": one["y"][::-1].copy()},
        one | {"y": one["y"] + np.float32(1e-6) * (np.arange(6) == 3)},
        one | {"n": 4},
        one | {"mask": ~one["mask"]},
        one | {"y": np.arange(6)},
    ]
    sums = [int(checksum((), kwargs)) for kwargs in (one, *others)]
    assert len(set(sums)) == 6
    assert int(checksum((), one | {"name": "b"})) == sums[0]
    # A run traces arguments that its start had as they are.
    arrays = {name: value for name, value in one.items() if name != "name"}
    assert int(jax.jit(lambda kwargs: checksum((), kwargs))(arrays)) == sums[0]


def test_the_state_is_that_of_a_start_with_the_other_data():
    """Score, potential and gradient, and a score that depends on the arguments, too."""

    def model(y, scale):
        prior = rtk.DiffusionPrior(
            lambda x, t: -scale * x, (), rtk.OU(), segments=2, reverse=rtk.GaussianTransition()
        )
        numpyro.sample("y", dist.Normal(numpyro.sample("x", prior), 1.0), obs=y)

    kernel = rtk.ScoreHMC(model, inverse_mass_matrix=np.ones(1))
    start = jax.jit(lambda *args: kernel.init(jr.key(0), 0, {"x": jnp.asarray(1.5)}, args, {}))
    one, other = (jnp.asarray(1.0), jnp.asarray(1.0)), (jnp.asarray(-2.0), jnp.asarray(3.0))
    sample = jax.jit(lambda state, *args: kernel.sample(state, args, {}))
    went_on, began = sample(start(*one), *other), sample(start(*other), *other)
    assert went_on.num_score_evals == began.num_score_evals + 1
    for name in ("z", "energy", "accept_prob", "score", "potential", "gradient"):
        leaves = (jax.tree.leaves(getattr(state, name)) for state in (went_on, began))
        np.testing.assert_allclose(*leaves, rtol=1e-5)
