"""A condition that is a latent: its posterior through the public API, against closed forms and quadrature."""

import functools
import warnings

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import DiscreteGibbs, Gibbs, NUTS
from scipy import stats

import numpyro_rtk as rtk
from numpyro_rtk import DiffusionPrior, RTKGibbs, RTKParticleGibbs, ScoreHMC
from numpyro_rtk._numpyro._latent_conditions import draw_conditions
from numpyro_rtk._numpyro._sites import inspect_model
from tests.helpers import Counter, run_mcmc


OU = rtk.OU()
ALPHA, SIGMA = float(OU.alpha(jnp.float32(OU.t_min))), float(OU.sigma(jnp.float32(OU.t_min)))
P_MIN = 2.5e-5
Z_MAX = stats.norm.isf(P_MIN / 2)
OPTIONS = {"segments": 8, "num_particles": 8, "reverse": rtk.PreconditionedMALA(1), "num_pilot_draws": 32}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Some donated buffers were not usable:UserWarning"),
    pytest.mark.filterwarnings("ignore:Particle weights collapsed:UserWarning"),
]


def located(x, t, c):
    """Score of `N(c, 1)` in every coordinate."""
    return -(x - OU.alpha(t) * c) / (OU.alpha(t) ** 2 + OU.sigma(t) ** 2)


def located_and_scaled(x, t, c):
    """Score of `N(c_1, exp(2 c_2))` in every coordinate."""
    return -(x - OU.alpha(t) * c[0]) / (OU.alpha(t) ** 2 * jnp.exp(2 * c[1]) + OU.sigma(t) ** 2)


def two_modes(x, t, c):
    """Score of modes of sd 0.3 at `c - 2` and `c + 2` of the first coordinate, and at 0 of the others."""
    alpha, variance = OU.alpha(t), OU.alpha(t) ** 2 * 0.09 + OU.sigma(t) ** 2
    first = jnp.zeros_like(x).at[0].set(1.0)
    places = alpha * jnp.stack([(c - 2) * first, (c + 2) * first])
    weights = jax.nn.softmax(-0.5 * jnp.sum((x[None] - places) ** 2, axis=1) / variance)
    return (weights @ places - x) / variance


MEANS = jnp.array([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.5]])


def labelled(x, t, label):
    """Score of `N(MEANS[label], 0.5^2)`."""
    return -(x - OU.alpha(t) * MEANS[label]) / (0.25 * OU.alpha(t) ** 2 + OU.sigma(t) ** 2)


def one_place(y):
    c = numpyro.sample("c", dist.Normal(0.0, 2.0))
    x = numpyro.sample("x", DiffusionPrior(located, (64,), OU, condition=c))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def place_and_scale(y):
    c = [numpyro.sample("place", dist.Normal(0.0, 1.0)), numpyro.sample("scale", dist.Normal(0.0, 0.5))]
    prior = DiffusionPrior(located_and_scaled, (32,), OU, condition=jnp.stack(c), condition_ndims=1)
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def place_of_two(y):
    c = numpyro.sample("c", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", DiffusionPrior(two_modes, (16,), OU, condition=c))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def label_of(y):
    label = numpyro.sample("label", dist.Categorical(jnp.array([0.3, 0.4, 0.3])))
    x = numpyro.sample("x", DiffusionPrior(labelled, (2,), OU, condition=label))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def population(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("objects", y.shape[0]):
        c = numpyro.sample("c", dist.Normal(mu, 1.0))
        x = numpyro.sample("x", DiffusionPrior(located, (4,), OU, condition=c))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


run = functools.partial(run_mcmc, num_warmup=200, num_samples=1000, num_chains=4)


def check(draws, mean, sd, mean_within=0.1, sd_within=0.08):
    """Mean and sd, within what the docs say of `path_segments=100` and the error of the run itself."""
    draws = np.asarray(draws, np.float64)
    size = min(effective_sample_size(draws), draws.size)
    assert abs(draws.mean() - mean) < mean_within + Z_MAX * sd / np.sqrt(size)
    assert abs(draws.std() / sd - 1) < sd_within + Z_MAX / np.sqrt(2 * size)
    return size


def grid_moments(log_density, *grids):
    """Means and sds of the coordinates of a density on a grid."""
    mesh = np.meshgrid(*grids, indexing="ij")
    values = log_density(*mesh)
    weights = np.exp(values - values.max())
    weights /= weights.sum()
    means = [(weights * one).sum() for one in mesh]
    return [
        (mean, np.sqrt((weights * (one - mean) ** 2).sum())) for mean, one in zip(means, mesh, strict=True)
    ]


Y64 = 1.0 + np.sqrt(2.0) * np.asarray(jr.normal(jr.key(9), (64,)), np.float64)


def posterior_of_place(y, sd, variance=1.0):
    """Mean and sd of `c ~ N(0, sd^2)`, with `x | c ~ N(c, variance)` at `t_min` and noise of variance 1."""
    noise = ALPHA**2 * variance + SIGMA**2 + 1
    precision = 1 / sd**2 + ALPHA**2 * y.size / noise
    return ALPHA * y.sum() / noise / precision, precision**-0.5


@pytest.mark.slow
def test_a_place_in_64_dimensions():
    kernel = RTKGibbs(NUTS(one_place), **OPTIONS)
    draws = run(kernel, jnp.asarray(Y64, jnp.float32), num_samples=400).get_samples(True)["c"]
    assert check(draws, *posterior_of_place(Y64, 2.0), mean_within=0.02, sd_within=0.03) > 50


@pytest.mark.slow
def test_without_what_paths_tell_it_is_caught(monkeypatch):
    """The control: conditions that follow their prior, as they would without noising paths."""
    monkeypatch.setattr("numpyro_rtk._numpyro._tracing.path_log_density", lambda *args: jnp.zeros(()))
    kernel = RTKGibbs(NUTS(one_place), **OPTIONS)
    draws = run(kernel, jnp.asarray(Y64, jnp.float32), num_samples=50).get_samples(True)["c"]
    with pytest.raises(AssertionError):
        check(draws, *posterior_of_place(Y64, 2.0))


@pytest.mark.slow
def test_a_place_and_a_scale():
    y = 0.5 + 1.1 * np.asarray(jr.normal(jr.key(2), (32,)), np.float64)

    def log_density(c, u):
        noise = ALPHA**2 * np.exp(2 * u) + SIGMA**2 + 0.25
        likelihood = sum(stats.norm.logpdf(one, ALPHA * c, np.sqrt(noise)) for one in y)
        return likelihood + stats.norm.logpdf(c) + stats.norm.logpdf(u, 0, 0.5)

    right = grid_moments(log_density, np.linspace(-2, 3, 401), np.linspace(-1.5, 1.5, 401))
    kernel = RTKGibbs(NUTS(place_and_scale), **OPTIONS)
    draws = run(kernel, jnp.asarray(y, jnp.float32), num_samples=400).get_samples(True)
    for name, moments in zip(("place", "scale"), right, strict=True):
        assert check(draws[name], *moments) > 100


@pytest.mark.slow
def test_the_place_of_two_modes():
    y = np.asarray(jr.normal(jr.key(3), (16,)), np.float64)
    y[0] = 1.5
    sd = np.sqrt(ALPHA**2 * 0.09 + SIGMA**2 + 1)

    def log_density(c):
        both = np.stack([stats.norm.logpdf(y[0], ALPHA * (c + place), sd) for place in (-2, 2)])
        return np.logaddexp(*both) + stats.norm.logpdf(c)

    (right,) = grid_moments(log_density, np.linspace(-5, 5, 4001))
    kernel = RTKGibbs(NUTS(place_of_two), **OPTIONS)
    draws = run(kernel, jnp.asarray(y, jnp.float32), num_samples=3000).get_samples(True)["c"]
    assert check(draws, *right) > 200


@pytest.mark.slow
def test_a_label():
    y = np.array([0.4, 0.6])
    noise = np.sqrt(0.25 * ALPHA**2 + SIGMA**2 + 1)
    right = np.array([0.3, 0.4, 0.3]) * stats.norm.pdf(y, ALPHA * np.asarray(MEANS), noise).prod(axis=1)
    right /= right.sum()
    kernel = RTKGibbs(DiscreteGibbs(label_of), **OPTIONS)
    draws = run(kernel, jnp.asarray(y, jnp.float32), num_samples=4000).get_samples(True)["label"]
    for label in range(3):
        hits = np.asarray(draws == label, np.float64)
        error = np.sqrt(right[label] * (1 - right[label]) / min(effective_sample_size(hits), hits.size))
        assert abs(hits.mean() - right[label]) < 0.02 + Z_MAX * error


@pytest.mark.slow
def test_a_condition_of_each_object_and_a_population():
    y = np.asarray(1.0 + 1.7 * jr.normal(jr.key(4), (5, 1)) + jr.normal(jr.key(5), (5, 4)), np.float64)
    # Jointly Gaussian: mu, c, then the mean of each object's data.
    noise = (ALPHA**2 + SIGMA**2 + 1) / 4
    precision = np.zeros((6, 6))
    precision[0, 0] = 1 / 4 + 5
    precision[0, 1:] = precision[1:, 0] = -1
    precision[1:, 1:] = np.eye(5) * (1 + ALPHA**2 / noise)
    covariance = np.linalg.inv(precision)
    mean = covariance @ np.concatenate([[0.0], ALPHA * y.mean(axis=1) / noise])
    draws = run(RTKGibbs(NUTS(population), **OPTIONS), jnp.asarray(y, jnp.float32)).get_samples(True)
    everything = [draws["mu"], *np.moveaxis(np.asarray(draws["c"]), -1, 0)]
    for values, *right in zip(everything, mean, np.sqrt(np.diag(covariance)), strict=True):
        assert check(values, *right) > 100


def tiny(y):
    c = numpyro.sample("c", dist.Normal(0.0, 2.0))
    x = numpyro.sample("x", DiffusionPrior(located, (2,), OU, condition=c))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


Y2 = jnp.array([1.0, -0.5])


@pytest.mark.slow
def test_a_leapfrog_step_costs_a_path():
    """`K` evaluations for each evaluation of the inner potential; counted, and made."""
    counter = Counter(lambda x, t: -x)
    score = lambda x, t, c: counter(x, t) + OU.alpha(t) * c

    def model(y):
        c = numpyro.sample("c", dist.Normal(0.0, 2.0))
        x = numpyro.sample("x", DiffusionPrior(score, (2,), OU, condition=c))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    kernel = RTKGibbs(NUTS(model), path_segments=10, **OPTIONS)
    state = kernel.init(jr.key(0), 0, None, (Y2,), {})
    step = jax.jit(lambda state: kernel.sample(state, (Y2,), {}))
    state = jax.block_until_ready(step(state))
    before = counter.count
    state = jax.block_until_ready(step(state))
    told = int(state.num_score_evals)
    own = int(state.block_states[0].num_score_evals)
    assert told - own == 10 * (1 + int(state.block_states[1].num_steps))
    # NUTS evaluates its last point again for the state that it keeps.
    assert told <= counter.count - before <= told + 30


@pytest.mark.slow
def test_sequential_chains():
    kernel = RTKGibbs(NUTS(tiny), path_segments=10, **OPTIONS)
    draws = run(kernel, Y2, num_warmup=5, num_samples=5, num_chains=2, chain_method="sequential")
    draws = draws.get_samples(group_by_chain=True)
    assert draws["c"].shape == (2, 5)
    assert np.all(np.ptp(np.asarray(draws["c"]), axis=1) > 0)


def test_kernels_that_cannot_are_refused():
    message = "`condition` of diffusion site 'x' depends on 'c'"
    for kernel in (ScoreHMC(tiny), RTKGibbs(ScoreHMC(tiny))):
        with pytest.raises(ValueError, match=message) as caught:
            kernel.init(jr.key(0), 10, None, (Y2,), {})
        assert "RTKGibbs(NUTS(model))" in str(caught.value)

    def unnormalised(y):
        c = numpyro.sample("c", dist.Normal(0.0, 2.0))
        x = numpyro.sample("x", DiffusionPrior(located, (2,), OU, condition=c, density=rtk.LineIntegral()))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"posterior of 'c' would be wrong. Use `RTKGibbs\(NUTS\(model\)\)`"):
        run(NUTS(unnormalised), Y2, num_warmup=2, num_samples=2, num_chains=1, chain_method="sequential")


def test_a_condition_that_is_a_diffusion_site_is_refused():
    def chained(y):
        first = numpyro.sample("first", DiffusionPrior(lambda x, t: -x, (), OU))
        x = numpyro.sample("x", DiffusionPrior(located, (2,), OU, condition=first))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="'x' depends on diffusion site 'first'"):
        RTKParticleGibbs(chained).init(jr.key(0), 10, None, (Y2,), {})


def test_an_observed_site_with_a_latent_condition_is_refused():
    def observed(z, y):
        c = numpyro.sample("c", dist.Normal(0.0, 2.0))
        x = numpyro.sample("x", DiffusionPrior(lambda x, t: -x, (2,), OU))
        numpyro.sample("z", DiffusionPrior(located, (2,), OU, condition=c), obs=z)
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="observed diffusion site 'z' depends on latent site 'c'"):
        RTKGibbs(NUTS(observed)).init(jr.key(0), 10, None, (Y2, Y2), {})


def test_a_score_that_closes_over_a_latent_is_told_of_conditions():
    def closed(y):
        c = numpyro.sample("c", dist.Normal(0.0, 2.0))
        x = numpyro.sample("x", DiffusionPrior(lambda x, t: located(x, t, c), (2,), OU))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"'x' depends on latent site 'c'.*condition=c"):
        RTKGibbs(NUTS(closed)).init(jr.key(0), 10, None, (Y2,), {})


@pytest.mark.slow
def test_a_network_without_a_derivative_in_its_condition():
    def score(x, t, c):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(
            lambda x, t, c: np.asarray(located(x, t, c)), shape, x, t, c, vmap_method="sequential"
        )

    def model(y):
        c = numpyro.sample("c", dist.Normal(0.0, 2.0))
        x = numpyro.sample("x", DiffusionPrior(score, (2,), OU, condition=c))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="'x' is not differentiable in its `condition`, which"):
        RTKGibbs(NUTS(model), guidance="mean", **OPTIONS).init(jr.key(0), 10, None, (Y2,), {})


def test_a_condition_that_is_no_number_at_placeholders():
    """Models are looked at where diffusion sites have placeholders: a rate that they give may be negative."""

    def model(y):
        rate = numpyro.sample("rate", DiffusionPrior(lambda x, t: -x, (), OU))
        c = numpyro.sample("c", dist.Gamma(2.0, rate))
        x = numpyro.sample("x", DiffusionPrior(located, (2,), OU, condition=c))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    for key in range(4):
        found = inspect_model("RTKGibbs", model, jr.key(key), (Y2,), {})
        assert found.conditions == {"x": ("c",)}
    conditions = draw_conditions(model, ("x",), (Y2,), {})["x"]
    assert conditions.shape == (16,)
    assert np.all(np.isfinite(np.asarray(conditions)))

    def data(y, c):
        x = numpyro.sample("x", DiffusionPrior(located, (2,), OU, condition=c))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="`condition` of diffusion site 'x' has NaN"):
        inspect_model("RTKGibbs", data, jr.key(0), (Y2, jnp.asarray(jnp.nan)), {})


@pytest.mark.slow
def test_too_few_segments_of_a_path():
    """Warned of with a number; silent at the default."""
    scaled = lambda x, t, c: -x / (OU.alpha(t) ** 2 * jnp.exp(2 * c) + OU.sigma(t) ** 2)

    def model(y):
        c = numpyro.sample("c", dist.Normal(0.0, 0.5))
        x = numpyro.sample("x", DiffusionPrior(scaled, (16,), OU, condition=c))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    y = jnp.ones(16)
    with pytest.warns(UserWarning, match=r"`path_segments=10` of `RTKGibbs` is too few"):
        RTKGibbs(NUTS(model), path_segments=10, **OPTIONS).init(jr.key(0), 10, None, (y,), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RTKGibbs(NUTS(model), **OPTIONS).init(jr.key(0), 10, None, (y,), {})


@pytest.mark.parametrize("value", [1, 2.5, True, "100"])
def test_path_segments_must_be_a_count(value):
    with pytest.raises(ValueError, match="`path_segments` must be an integer of at least 2"):
        RTKGibbs(NUTS(tiny), path_segments=value)


@pytest.mark.slow
def test_a_normalised_density_under_nuts_and_in_blocks():
    """NUTS differentiates a normalised density in the condition: no noising paths there."""
    y = np.asarray([1.0, -0.5])
    right = posterior_of_place(y, 2.0)
    inner = Gibbs([(RTKParticleGibbs(tiny, **OPTIONS), ["x"]), (NUTS(tiny), ["c"])])
    for kernel, method in ((NUTS(tiny), "vectorized"), (inner, jax.vmap)):
        draws = run(kernel, Y2, num_samples=400, chain_method=method).get_samples(True)["c"]
        assert check(draws, *right, mean_within=0.0, sd_within=0.02) > 50
