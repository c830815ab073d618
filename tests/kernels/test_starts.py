"""Starts: what is given is kept, what is not is found in the bulk, and what cannot be is refused."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.extend.core import jaxprs_in_params
from numpyro import handlers
from numpyro.infer import init_to_median, init_to_sample, init_to_value
from numpyro.infer.initialization import init_to_uniform

import numpyro_rtk as rtk
from numpyro_rtk._numpyro._arguments import read_init_params, read_start
from numpyro_rtk._numpyro._start import is_sample


OU = rtk.OU()


def gaussian(mean, sd):
    """Score of N(mean, sd^2) at every noise level, without an energy."""
    return lambda x, t: -(x - OU.alpha(t) * mean) / (OU.alpha(t) ** 2 * sd**2 + OU.sigma(t) ** 2)


PRIOR = rtk.DiffusionPrior(gaussian(0.5, 2.0), (3,), segments=2, reverse=rtk.GaussianTransition())


def latents():
    numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("share", dist.Uniform(0.0, 1.0).expand([3]).to_event(1))
    numpyro.sample("label", dist.Bernoulli(0.5))
    numpyro.sample("place", dist.Normal(0.0, 1.0).expand([2]))
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=0.3)


def trace():
    return handlers.trace(handlers.seed(latents, 0)).get_trace()


def test_one_reader_of_starts():
    given = {"scale": 2, "share": np.full(3, 0.25), "label": 1}
    values = read_init_params(given, trace(), None)
    assert {name: value.dtype for name, value in values.items()} == {
        "scale": jnp.float32,
        "share": jnp.float32,
        "label": jnp.int32,
    }
    assert read_init_params(None, trace(), None) == {}
    by_chain = read_init_params({"place": np.ones((4, 2))}, trace(), 4)
    assert by_chain["place"].shape == (4, 2)


@pytest.mark.parametrize(
    ("init_params", "num_chains", "error", "match"),
    [
        (np.zeros(2), None, TypeError, "must be a dict of constrained values"),
        ({"other": 1.0}, None, ValueError, r"has \['other'\], but the latents are"),
        ({"y": 1.0}, None, ValueError, r"has \['y'\], but the latents are"),
        ({"place": np.ones((2, 2))}, None, ValueError, r"has shape \(2, 2\); site 'place' has shape \(2,\)"),
        ({"place": np.ones(2)}, 3, ValueError, r"so that 3 chains take \(3, 2\)"),
        ({"place": np.array([1.0, np.inf])}, None, ValueError, r"\['place'\]` contains NaN or infinity"),
        ({"scale": -0.1}, None, ValueError, r"\['scale'\]` is outside the support"),
        ({"share": np.array([0.5, 0.5, 1.5])}, None, ValueError, r"\['share'\]` is outside the support"),
        ({"label": 0.5}, None, TypeError, r"\['label'\]` must be of dtype int32"),
    ],
)
def test_starts_that_cannot_be(init_params, num_chains, error, match):
    with pytest.raises(error, match=match):
        read_init_params(init_params, trace(), num_chains)


def test_init_to_value_is_a_start_that_was_given():
    strategy = init_to_value(values={"place": np.array([1.0, -1.0]), "scale": 0.5, "no such site": 3.0})
    values = read_start({"scale": np.array([2.0, 3.0])}, strategy, trace(), 2)
    assert set(values) == {"place", "scale"}
    np.testing.assert_array_equal(values["place"], [[1.0, -1.0]] * 2)
    np.testing.assert_array_equal(values["scale"], [2.0, 3.0])
    assert read_start(None, init_to_uniform, trace(), None) == {}
    with pytest.raises(ValueError, match=r"`values\['scale'\]` is outside the support"):
        read_start(None, init_to_value(values={"scale": -1.0}), trace(), None)


def test_init_to_sample_is_known():
    assert is_sample(init_to_sample)
    assert is_sample(init_to_sample())
    assert not is_sample(init_to_median(num_samples=5))
    assert not is_sample(init_to_uniform)


def folded(y, prior=PRIOR):
    """Both signs of every coordinate of `x` are possible."""
    x = numpyro.sample("x", prior)
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    numpyro.sample("y", dist.Normal(jnp.abs(x)[None], scale + 0.1).to_event(2), obs=y)


Y = 1.5 * jnp.ones((15, 3))
MASS = {"inverse_mass_matrix": np.ones(4)}


def test_score_hmc_keeps_what_is_given():
    x = jnp.array([1.5, -1.5, -1.4])
    strategy = init_to_value(values={"x": x, "scale": 0.3})
    state = rtk.ScoreHMC(folded, init_strategy=strategy, **MASS).init(jr.key(0), 5, None, (Y,), {})
    np.testing.assert_array_equal(state.z["x"], x)
    np.testing.assert_allclose(state.z["scale"], np.log(0.3), rtol=1e-5)


def test_the_others_are_found_given_what_is_given():
    x = jnp.stack([jnp.array([1.5, -1.5, 1.5]), jnp.array([3.5, -3.5, 3.5])])
    kernel = rtk.ScoreHMC(folded, **MASS)
    state = kernel.init(jr.split(jr.key(0)), 5, {"x": x}, (Y,), {})
    np.testing.assert_array_equal(state.z["x"], x)
    # Exact fit, and residuals of 2 everywhere: 0.1 is the least sd, 2 the likely one.
    scale = np.exp(state.z["scale"]) + 0.1
    assert scale[0] < 0.2
    assert 1.5 < scale[1] < 2.6


@pytest.mark.slow
def test_init_to_sample_starts_at_prior_draws():
    kernel = rtk.ScoreHMC(folded, init_strategy=init_to_sample, **MASS)
    prior = rtk.DiffusionPrior(gaussian(0.5, 2.0), (3,))  # with segments enough for its own draws to be right
    z = kernel.init(jr.split(jr.key(1), 400), 5, None, (Y,), {"prior": prior}).z
    x, scale = np.asarray(z["x"], np.float64), np.exp(np.asarray(z["scale"], np.float64))
    # Five standard errors. The posterior has `|x|` near 1.5 and a scale near 0.
    assert np.all(np.abs(x.mean(0) - 0.5) < 5 * 2.0 / 20)
    assert np.all(np.abs(x.std(0) / 2.0 - 1) < 5 / np.sqrt(800))
    assert abs(scale.mean() / (2 * np.sqrt(2 / np.pi)) - 1) < 5 * np.sqrt(np.pi / 2 - 1) / 20


def hierarchy(y):
    x = numpyro.sample("x", rtk.DiffusionPrior(gaussian(0.0, 1.0), (2,)))
    mean, scale = numpyro.sample("mean", dist.Normal(0, 1)), numpyro.sample("scale", dist.HalfNormal(2.0))
    with numpyro.plate("groups", 20):
        group = numpyro.sample("group", dist.Normal(mean, scale))
        numpyro.sample("y", dist.Normal(group + x[1], 0.8), obs=y)


@pytest.mark.slow
def test_a_centred_hierarchy_starts_in_the_bulk():
    y = jnp.asarray(np.random.default_rng(1).normal(0, 1.0, 20))
    start = rtk.ScoreHMC(hierarchy).init(jr.split(jr.key(2), 6), 50, None, (y,), {})
    assert np.all(np.asarray(start.z["scale"]) > -4)
    # Group means are as far from each other as their scale says, not at one place.
    groups, scale = np.asarray(start.z["group"]).std(1), np.exp(np.asarray(start.z["scale"]))
    assert np.all((groups / scale > 0.4) & (groups / scale < 2.0))


def test_the_start_is_linear_in_memory():
    """No array of the compiled start has more than a few times as many elements as there are latents."""
    n = 4000

    def many(y):
        x = numpyro.sample("x", PRIOR)
        with numpyro.plate("n", n):
            b = numpyro.sample("b", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(b + x[0], 1.0), obs=y)

    kernel = rtk.ScoreHMC(many, inverse_mass_matrix=np.ones(n + 3, np.float32))
    jaxpr = jax.make_jaxpr(lambda y: kernel.init(jr.key(0), 5, {"x": jnp.zeros(3)}, (y,), {}).z)(jnp.zeros(n))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    assert n <= max(sizes(jaxpr.jaxpr)) < 200 * n


def impossible_for_negative(y):
    x = numpyro.sample("x", PRIOR)
    numpyro.factor("positive", jnp.where(x[0] > 0, 0.0, -jnp.inf))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("chains", [None, 3])
def test_an_impossible_start_is_an_error(chains):
    kernel = rtk.ScoreHMC(impossible_for_negative, inverse_mass_matrix=np.ones(3))
    x = -np.ones(3) if chains is None else np.array([[1.0] * 3, [-1.0] * 3, [-2.0] * 3])
    key = jr.key(0) if chains is None else jr.split(jr.key(0), chains)
    where = "" if chains is None else " of chains 1, 2"
    with pytest.raises(
        ValueError, match="`ScoreHMC` cannot start: the log likelihood is -inf at the start" + where
    ):
        kernel.init(key, 0, {"x": x}, (jnp.zeros(3),), {})


def test_an_impossible_place_is_a_rejection():
    kernel = rtk.ScoreHMC(
        impossible_for_negative,
        inverse_mass_matrix=np.ones(3),
        adapt_mass_matrix=False,
        adapt_step_size=False,
        step_size=0.5,
    )
    start = {"x": 0.05 * np.ones((200, 3))}
    state = kernel.init(jr.split(jr.key(0), 200), 0, start, (jnp.zeros(3),), {})
    new = jax.jit(lambda state: kernel.sample(state, (jnp.zeros(3),), {}))(state)
    assert np.mean(np.asarray(new.accept_prob) == 0) > 0.2
    assert not np.any(new.diverging)
    assert np.all(np.asarray(new.z["x"][:, 0]) > 0)


def test_nan_of_the_network_diverges():
    prior = rtk.DiffusionPrior(
        lambda x, t: jnp.where((x[0] > 0.0) | (t > 0.01), -x, jnp.nan), (3,), segments=2
    )

    def model(y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    kernel = rtk.ScoreHMC(model, inverse_mass_matrix=np.ones(3), step_size=0.5, adapt_step_size=False)
    starts = {"x": 0.05 * np.ones((100, 3))}
    state = kernel.init(jr.split(jr.key(0), 100), 0, starts, (jnp.zeros(3),), {})
    new = jax.jit(lambda state: kernel.sample(state, (jnp.zeros(3),), {}))(state)
    rejected = np.asarray(new.accept_prob) == 0
    assert 0.2 < np.mean(rejected)
    np.testing.assert_array_equal(new.diverging, rejected)
    assert np.all(np.isfinite(new.z["x"]))


def test_an_unknown_field_is_told_which_there_are():
    kernel = rtk.ScoreHMC(impossible_for_negative, inverse_mass_matrix=np.ones(3))
    state = kernel.init(jr.key(0), 0, {"x": np.ones(3)}, (jnp.zeros(3),), {})
    with pytest.raises(ValueError, match=r"no field 'acceptance'.*accept_prob"):
        state["acceptance"]
    assert state[0] is state.z
    assert "None" not in repr(kernel)
