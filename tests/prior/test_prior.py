"""`DiffusionPrior` as a NumPyro distribution: law of its draws, handlers, NUTS, SVI, bad input."""

import functools
import pickle
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.distributions import constraints
from numpyro.infer import (
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
    MCMC,
    NUTS,
    Predictive,
    SVI,
)
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.elbo import Trace_ELBO
from numpyro.infer.reparam import TransformReparam
from numpyro.infer.util import log_density

import numpyro_rtk as rtk
from benchmarks.problems import ring_mixture, RingReference
from tests.helpers import Counter, SCHEDULES


def normal_score(x, t):
    """Score of N(0, 1) per coordinate, at every noise level of the OU process."""
    return -x


def normal(shape=(3,), **options):
    """The standard normal as a prior known by its score alone; the line integral is exact for it, and
    cheap.
    """
    return rtk.DiffusionPrior(
        normal_score, shape, **{"density": rtk.LineIntegral(num_nodes=1), "segments": 8} | options
    )


def value(*shape):
    return jr.normal(jr.key(5), shape)


# Draws


@pytest.mark.slow
def test_law_of_draws():
    num_draws, num_replicates = 4000, 6
    reference = RingReference(num_draws, num_replicates)
    score = ring_mixture(rtk.OU())
    prior = rtk.DiffusionPrior(lambda x, t: score(x, t), (10,))
    draws = [np.asarray(prior.sample(jr.key(seed), (num_draws,))) for seed in range(num_replicates)]
    assert np.mean(reference.distances(draws)) < 1.3 * reference.floor
    # Control: far too few segments.
    coarse = rtk.DiffusionPrior(score, (10,), segments=3)
    draws = [np.asarray(coarse.sample(jr.key(seed), (num_draws,))) for seed in range(num_replicates)]
    assert np.mean(reference.distances(draws)) > 2 * reference.floor


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["OU", *[pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES if name != "OU"]]
)
def test_moments_of_draws(name):
    schedule = SCHEDULES[name]
    scale = np.array([0.3, 1.0, 2.0])
    score = rtk.GaussianMixtureScore([1.0], np.zeros((1, 3)), np.diag(scale**2)[None], schedule)
    draws = np.asarray(rtk.DiffusionPrior(score, (3,)).sample(jr.key(0), (10_000,)))
    expected = np.sqrt(
        float(schedule.alpha(schedule.t_min)) ** 2 * scale**2 + float(schedule.sigma(schedule.t_min)) ** 2
    )
    np.testing.assert_allclose(draws.std(0), expected, rtol=0.03)
    assert np.all(np.abs(draws.mean(0)) < 5 * expected / 100)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (2,), (1, 4, 4)])
def test_shapes_of_draws(shape):
    prior = normal(shape)
    assert (prior.event_shape, prior.batch_shape, prior.event_dim) == (shape, (), len(shape))
    for sample_shape in ((), (3,), (2, 3), (0,)):
        draws = prior.sample(jr.key(0), sample_shape)
        assert draws.shape == prior.shape(sample_shape) == (*sample_shape, *shape)
        assert np.all(np.isfinite(draws))
    np.testing.assert_array_equal(prior.sample(jr.key(0), (3,)), prior.sample(jr.key(0), (3,)))
    assert np.any(prior.sample(jr.PRNGKey(1)) != prior.sample(jr.PRNGKey(2)))


@pytest.mark.slow
def test_draws_under_jit_and_vmap_are_the_same():
    prior = normal()
    keys = jr.split(jr.key(0), 3)
    expected = jnp.stack([prior.sample(key) for key in keys])
    np.testing.assert_allclose(jax.vmap(prior.sample)(keys), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(prior.sample))(keys), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.lax.map(prior.sample, keys), expected, rtol=1e-5, atol=1e-6)
    # A score that depends on a traced value cannot be tuned while tracing.
    shifted = lambda shift: rtk.DiffusionPrior(
        lambda x, t: -x + 0 * shift, (3,), density=rtk.LineIntegral(), segments=8
    )
    np.testing.assert_allclose(
        jax.jit(lambda s: shifted(s).sample(keys[0]))(1.0), expected[0], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        jax.vmap(lambda s: shifted(s).sample(keys[0]))(jnp.ones(2)),
        jnp.stack([expected[0]] * 2),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.slow
def test_precision_of_draws(x64):
    assert normal().sample(jr.key(0)).dtype == jnp.float64


@pytest.mark.slow
def test_evaluations_of_draws():
    counter = Counter(normal_score)
    build = lambda: rtk.DiffusionPrior(counter, (3,), segments=10)
    assert build().num_score_evals == 10 * 3
    counts = []
    for num_draws in (1, 4):
        before = counter.count
        jax.block_until_ready(build().sample(jr.key(0), (num_draws,)))
        counts.append(counter.count - before)
    # Two to check the score, the pilot (40 segments, 11 levels) and 3 rounds for the terminal Gaussian, at
    # the first call with this score.
    assert counts == [2 + 16 * (40 + 11) + 3 * 32 + 30, 120]


@pytest.mark.slow
def test_failed_passes_are_nan():
    """No draw of a pass that met a NaN may look valid; one bad draw of the pilot does not spoil the
    others.
    """
    half = lambda x, t: jnp.where((t < 0.3) & (x[0] > 0.2), jnp.nan, -x)
    # The value check of the first draw, whose point is arbitrary, is for concrete scores.
    draw = jax.jit(
        lambda zero: rtk.DiffusionPrior(lambda x, t: half(x, t) + zero, (3,), segments=8).sample(
            jr.key(0), (64,)
        )
    )
    draws = np.asarray(draw(0.0))
    failed = np.isnan(draws).any(1)
    assert 0 < failed.sum() < 64
    assert np.all(np.isnan(draws[failed]))
    assert np.all(draws[~failed, 0] <= 0.2)
    with pytest.raises(ValueError, match="returned NaN or infinity at its first call"):
        rtk.DiffusionPrior(lambda x, t: jnp.where(t < 0.3, jnp.nan, -x), (3,)).sample(jr.key(0))


# As a distribution


def test_is_a_distribution():
    prior = normal()
    assert isinstance(prior, dist.Distribution)
    assert normal(()).support is constraints.real
    assert prior.support.event_dim == 1
    assert not prior.support.is_discrete
    assert not prior.has_rsample
    assert "event_shape=(3,)" in repr(prior)
    for name in ("mean", "variance"):
        with pytest.raises(NotImplementedError):
            getattr(prior, name)
    assert prior.score_fn is normal_score
    assert isinstance(prior.reverse, rtk.PreconditionedMALA)
    assert (prior.segment_times.shape, prior.segment_times[0], prior.segment_times[-1]) == ((9,), 5.0, 1e-3)
    assert rtk.DiffusionPrior(normal_score, (3,)).segment_times.shape == (33,)


def test_validation():
    with pytest.warns(UserWarning, match="Out-of-support"):
        assert normal(validate_args=True).log_prob(jnp.array([1.0, jnp.nan, 0.0])) == -jnp.inf
    assert jnp.isnan(normal(validate_args=False).log_prob(jnp.array([1.0, jnp.nan, 0.0])))
    with pytest.raises(ValueError, match="got a value of shape"):
        normal().log_prob(jnp.zeros(2))
    with pytest.raises(ValueError, match="got a value of shape"):
        normal().log_prob(jnp.zeros(()))


@pytest.mark.slow
def test_expand_to_event_mask():
    prior = normal()
    x = value(4, 2, 3)
    each = prior.log_prob(x)
    np.testing.assert_allclose(each, -0.5 * jnp.sum(x**2, -1), rtol=1e-5)
    expanded = prior.expand((4, 2))
    assert (expanded.batch_shape, expanded.event_shape) == ((4, 2), (3,))
    np.testing.assert_allclose(expanded.log_prob(x), each, rtol=1e-6)
    assert expanded.sample(jr.key(0), (5,)).shape == (5, 4, 2, 3)
    draws = np.asarray(expanded.sample(jr.key(0)))
    assert len(np.unique(draws.reshape(8, 3), axis=0)) == 8
    independent = expanded.to_event(1)
    assert (independent.batch_shape, independent.event_shape) == ((4,), (2, 3))
    np.testing.assert_allclose(independent.log_prob(x), each.sum(1), rtol=1e-5)
    masked = expanded.mask(jnp.array([True, False]))
    np.testing.assert_allclose(masked.log_prob(x), each * np.array([[1.0, 0.0]]), rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(masked.log_prob(x)))(x)
    np.testing.assert_allclose(gradient, -x * np.array([1.0, 0.0])[None, :, None], rtol=1e-6)


@pytest.mark.slow
def test_transformed():
    prior = normal()
    affine = dist.TransformedDistribution(prior, dist.transforms.AffineTransform(2.0, 3.0))
    x = value(5, 3)
    np.testing.assert_allclose(affine.log_prob(x), prior.log_prob((x - 2) / 3) - 3 * np.log(3), rtol=1e-5)
    assert affine.sample(jr.key(0), (2,)).shape == (2, 3)
    exp = dist.TransformedDistribution(prior, dist.transforms.ExpTransform())
    np.testing.assert_allclose(
        exp.log_prob(jnp.exp(x)), prior.log_prob(x) - jnp.sum(x, -1), rtol=1e-4, atol=1e-5
    )
    assert np.all(exp.sample(jr.key(0), (4,)) > 0)
    gradient = jax.grad(lambda x: affine.log_prob(x))(x[0])
    np.testing.assert_allclose(gradient, -(x[0] - 2) / 9, rtol=1e-5)


class Network(eqx.Module):
    """A score with an array."""

    precision: jax.Array

    def __call__(self, x, t):
        return -self.precision * x


@pytest.mark.slow
def test_pytree():
    prior = rtk.DiffusionPrior(
        Network(jnp.ones(3)), (3,), density=rtk.LineIntegral(np.full(3, 0.1)), segments=8
    )
    leaves, structure = jax.tree.flatten(prior)
    assert len(leaves) == 2
    again = jax.tree.unflatten(structure, leaves)
    assert jax.tree.structure(again) == structure
    x = value(3)
    np.testing.assert_array_equal(again.log_prob(x), prior.log_prob(x))
    np.testing.assert_array_equal(again.sample(jr.key(0)), prior.sample(jr.key(0)))
    np.testing.assert_allclose(jax.jit(lambda p, x: p.log_prob(x))(prior, x), prior.log_prob(x), rtol=1e-6)
    returned = jax.jit(lambda p: p.expand((2,)))(prior)
    assert returned.batch_shape == (2,)
    np.testing.assert_allclose(returned.log_prob(jnp.stack([x, x])), [prior.log_prob(x)] * 2, rtol=1e-6)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, prior)
    np.testing.assert_allclose(jax.grad(doubled.log_prob)(x), -2 * x, rtol=1e-6)
    carried, values = jax.lax.scan(lambda p, x: (p, p.log_prob(x)), prior, jnp.stack([x, x]))
    np.testing.assert_allclose(values, [prior.log_prob(x)] * 2, rtol=1e-6)
    assert carried.event_shape == (3,)
    # A function is no array: it belongs to the structure.
    traces = []
    jitted = jax.jit(lambda p, x: (traces.append(p), p.log_prob(x))[1])
    for _ in range(2):
        np.testing.assert_allclose(jitted(normal(), x), normal().log_prob(x), rtol=1e-6)
    assert len(traces) == 1


def test_pickle():
    prior = normal()
    again = pickle.loads(pickle.dumps(prior))
    np.testing.assert_array_equal(again.log_prob(value(3)), prior.log_prob(value(3)))
    np.testing.assert_array_equal(again.sample(jr.key(0)), prior.sample(jr.key(0)))


def test_does_not_import_inference():
    import numpyro_rtk._prior._prior as module

    assert "numpyro.infer" not in Path(module.__file__).read_text(encoding="utf-8")


# In models


def model(y=None, plate=2):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("items", plate):
        x = numpyro.sample("x", normal())
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


def expected_log_density(x, y, scale):
    terms = (
        dist.HalfNormal(1.0).log_prob(scale)
        - 0.5 * jnp.sum(x**2)
        + jnp.sum(dist.Normal(x, scale).log_prob(y))
    )
    return float(terms)


def test_handlers():
    x, y, scale = value(2, 3), value(2, 3) + 0.5, jnp.array(0.7)
    params = {"x": x, "scale": scale}
    total, trace = log_density(model, (y,), {}, params)
    np.testing.assert_allclose(total, expected_log_density(x, y, scale), rtol=1e-5)
    np.testing.assert_array_equal(trace["x"]["value"], x)
    trace = handlers.trace(handlers.seed(model, jr.key(0))).get_trace()
    assert trace["x"]["value"].shape == (2, 3)
    trace = handlers.trace(handlers.substitute(handlers.seed(model, jr.key(0)), data=params)).get_trace(y)
    np.testing.assert_array_equal(trace["x"]["value"], x)
    conditioned = handlers.condition(model, data={"x": x})
    trace = handlers.trace(handlers.seed(conditioned, jr.key(0))).get_trace(y)
    assert trace["x"]["is_observed"]
    scaled = handlers.scale(model, scale=2.0)
    np.testing.assert_allclose(log_density(scaled, (y,), {}, params)[0], 2 * total, rtol=1e-5)
    masked = handlers.mask(model, mask=False)
    np.testing.assert_allclose(log_density(masked, (y,), {}, params)[0], 0.0, atol=1e-6)
    blocked = handlers.trace(handlers.block(handlers.seed(model, jr.key(0)), hide=["x"])).get_trace()
    assert "x" not in blocked
    np.testing.assert_allclose(
        jax.vmap(lambda x: log_density(model, (y,), {}, params | {"x": x})[0])(jnp.stack([x, x])),
        [total] * 2,
        rtol=1e-5,
    )


@pytest.mark.slow
def test_predictive():
    prior_draws = Predictive(model, num_samples=5)(jr.key(0))
    assert prior_draws["x"].shape == prior_draws["y"].shape == (5, 2, 3)
    assert len(np.unique(np.asarray(prior_draws["x"]))) == 30
    parallel = Predictive(model, num_samples=5, parallel=True)(jr.key(0))
    np.testing.assert_allclose(parallel["x"], prior_draws["x"], rtol=1e-4, atol=1e-5)
    posterior = Predictive(model, posterior_samples={"x": value(4, 2, 3), "scale": jnp.ones(4)})(jr.key(1))
    assert posterior["y"].shape == (4, 2, 3)


def run_nuts(model, *args, num_warmup=200, num_samples=200, num_chains=1, seed=0, **options):
    kernel = model if isinstance(model, NUTS) else NUTS(model)
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
        **options,
    )
    mcmc.run(jr.key(seed), *args)
    return mcmc


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        init_to_sample,
        init_to_uniform,
        init_to_median,
        init_to_mean,
        init_to_value(values={"x": jnp.zeros((2, 3))}),
    ],
)
def test_initialisation(strategy):
    mcmc = run_nuts(NUTS(model, init_strategy=strategy), value(2, 3), num_warmup=2, num_samples=2)
    assert mcmc.get_samples()["x"].shape == (2, 2, 3)


@pytest.mark.slow
def test_svi_and_reparam():
    y = jnp.array([2.0, -1.0, 0.5])

    def conjugate():
        x = numpyro.sample("x", normal())
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    guide = AutoNormal(conjugate)
    # The step size falls, or the gradient noise of the last steps would be the error.
    optimizer = numpyro.optim.Adam(lambda i: 0.05 / (1 + 0.01 * i))
    result = SVI(conjugate, guide, optimizer, Trace_ELBO(num_particles=4)).run(
        jr.key(0), 3000, progress_bar=False
    )
    np.testing.assert_allclose(guide.median(result.params)["x"], 0.8 * y, atol=0.05)
    np.testing.assert_allclose(result.params["x_auto_scale"], np.sqrt(0.2), rtol=0.1)

    def transformed():
        base = dist.TransformedDistribution(normal(), dist.transforms.AffineTransform(0.0, 2.0))
        x = numpyro.sample("x", base)
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    mcmc = run_nuts(
        handlers.reparam(transformed, config={"x": TransformReparam()}), num_samples=1000, num_chains=2
    )
    draws = mcmc.get_samples()
    assert set(draws) == {"x", "x_base"}
    np.testing.assert_allclose(draws["x"].mean(0), 0.8 * y, atol=0.12)


@pytest.mark.parametrize(
    ("density", "match"),
    [
        (rtk.LineIntegral(), r"latent site 'shift', and its `density=LineIntegral\(\)` gives values up to"),
        (rtk.ProbabilityFlow(), "differentiated with respect to something that its `score_fn`"),
    ],
)
def test_a_score_that_depends_on_a_latent_is_refused_under_nuts(density, match):
    def dependent():
        shift = numpyro.sample("shift", dist.Normal())
        prior = rtk.DiffusionPrior(lambda x, t: -(x - shift), (3,), density=density, segments=4)
        numpyro.sample("x", prior)

    with pytest.raises(ValueError, match=match):
        run_nuts(dependent, num_warmup=1, num_samples=1)


@pytest.mark.slow
def test_a_score_that_depends_on_model_arguments():
    def conditional(precision, y):
        x = numpyro.sample(
            "x",
            rtk.DiffusionPrior(Network(precision), (3,), density=rtk.LineIntegral(num_nodes=1), segments=4),
        )
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    mcmc = run_nuts(conditional, jnp.full(3, 1.0), jnp.full(3, 2.0), num_samples=500, jit_model_args=True)
    np.testing.assert_allclose(mcmc.get_samples()["x"].mean(), 1.0, atol=0.2)
    mcmc.run(jr.key(1), jnp.full(3, 0.25), jnp.full(3, 2.0))
    np.testing.assert_allclose(mcmc.get_samples()["x"].mean(), 1.6, atol=0.2)


# NUTS is right


def gaussian_posterior(prior):
    def model(y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    mcmc = run_nuts(model, jnp.full(10, 2.0), num_warmup=300, num_samples=500, num_chains=4)
    draws = np.asarray(mcmc.get_samples()["x"])
    return draws.mean(), draws.std(0).mean()


@pytest.mark.slow
@pytest.mark.parametrize("density", [None, rtk.LineIntegral()])
def test_nuts_on_a_score_alone(density):
    mean, sd = gaussian_posterior(rtk.DiffusionPrior(normal_score, (10,), density=density))
    np.testing.assert_allclose((mean, sd), (1.6, np.sqrt(0.2)), atol=0.02)


class ScoreOnConstant(dist.Distribution):
    """The route in use: `log_prob` is 0 and its gradient the score."""

    support = constraints.real_vector

    def __init__(self):
        super().__init__((), (10,))

    def sample(self, key, sample_shape=()):
        return jr.normal(key, (*sample_shape, 10))

    def log_prob(self, value):
        @jax.custom_jvp
        def zero(x):
            return jnp.zeros(())

        zero.defjvp(lambda primals, tangents: (jnp.zeros(()), jnp.sum(-primals[0] * tangents[0])))
        return zero(value)


@pytest.mark.slow
def test_the_route_in_use_is_caught():
    mean, _ = gaussian_posterior(ScoreOnConstant())
    assert mean > 1.9


@pytest.mark.slow
def test_nuts_on_a_skewed_prior():
    """Two coordinates, each a skewed mixture with a known energy, against quadrature; by energy and by
    flow.
    """
    schedule = rtk.OU()
    weights, means, sds = np.array([0.7, 0.3]), np.array([-0.5, 1.2]), np.array([0.4, 1.0])
    covariances = (sds**2)[:, None, None] * np.eye(1)[None]
    score = rtk.GaussianMixtureScore(weights, means[:, None], covariances, schedule)

    def model(y, prior):
        with numpyro.plate("coordinates", 2):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(jnp.exp(0.5 * x[..., 0]), 0.7), obs=y)

    y = np.array([1.0, 2.0])
    grid = np.linspace(-5, 8, 20_001)
    log_prior = np.asarray(
        jax.vmap(lambda x: score.log_density(x[None], jnp.asarray(schedule.t_min)))(jnp.asarray(grid))
    )
    density = np.exp(log_prior[None] - 0.5 * ((y[:, None] - np.exp(0.5 * grid)[None]) / 0.7) ** 2)
    density /= density.sum(1, keepdims=True)
    mean = density @ grid
    sd = np.sqrt(density @ grid**2 - mean**2)
    third = np.sum(density * ((grid[None] - mean[:, None]) / sd[:, None]) ** 3, 1)
    for own in (score, lambda x, t: score(x, t)):
        prior = rtk.DiffusionPrior(own, (1,))
        mcmc = run_nuts(functools.partial(model, prior=prior), jnp.asarray(y), num_samples=2000, num_chains=4)
        draws = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])[..., 0]
        # The third central moment tells the skew; each with its own effective sample size.
        for power, expected in ((1, mean), (2, sd**2), (3, third * sd**3)):
            values = draws if power == 1 else (draws - mean) ** power
            error = values.std((0, 1)) / np.sqrt(effective_sample_size(values))
            assert np.all(np.abs(values.mean((0, 1)) - expected) < 4.5 * error), (
                power,
                values.mean((0, 1)),
                expected,
                error,
            )


@pytest.mark.slow
def test_images_have_a_finite_density_and_gradient():
    prior = rtk.DiffusionPrior(normal_score, (1, 32, 32), density=rtk.LineIntegral(num_nodes=4), segments=4)
    x = value(1, 32, 32)
    total, gradient = jax.jit(jax.value_and_grad(prior.log_prob))(x)
    np.testing.assert_allclose(total, -0.5 * jnp.sum(x**2), rtol=1e-4)
    np.testing.assert_allclose(gradient, -x)
    assert prior.sample(jr.key(0)).shape == (1, 32, 32)


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: rtk.DiffusionPrior(3, (2,)), TypeError, "`score_fn` must be callable"),
        (lambda: rtk.DiffusionPrior(Network, (2,)), TypeError, "got the class Network"),
        (lambda: rtk.DiffusionPrior(normal_score, 2), TypeError, "`event_shape` must be a tuple"),
        (
            lambda: rtk.DiffusionPrior(normal_score, None),
            TypeError,
            "`event_shape` must be the shape of one event",
        ),
        (
            lambda: rtk.DiffusionPrior(normal_score, (0,)),
            ValueError,
            "`event_shape` must have positive sizes",
        ),
        (lambda: rtk.DiffusionPrior(normal_score, (2,), rtk.OU), TypeError, r"Did you mean `OU\(\)`"),
        (
            lambda: rtk.DiffusionPrior(ring_mixture(rtk.OU()), (10,), rtk.EDM()),
            ValueError,
            "another noising process",
        ),
        (
            lambda: rtk.DiffusionPrior(normal_score, (2,), segments=0),
            ValueError,
            "`segments` must be at least 1",
        ),
        (
            lambda: rtk.DiffusionPrior(normal_score, (2,), reverse=rtk.MALA),
            TypeError,
            "`reverse` must be a reverse kernel",
        ),
        (lambda: rtk.DiffusionPrior(lambda x, t: x[:1], (2,)), ValueError, "`score_fn` returned shape"),
        (lambda: rtk.DiffusionPrior(lambda x, t, c: x, (2,)), ValueError, "bind it: `lambda x, t: network"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_score_of_the_wrong_sign_is_an_error():
    with pytest.raises(ValueError, match="wrong sign"):
        rtk.DiffusionPrior(lambda x, t: x, (2,), segments=4).sample(jr.key(0))


# Memory and print.


@pytest.mark.slow
def test_draws_in_batches_are_the_same_and_bounded():
    widen = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4000)) / 60, jnp.float32)

    def wide(x, t):
        return -x + 0.01 * jnp.tanh(x @ widen) @ widen.T * t

    def draws(**options):
        prior = rtk.DiffusionPrior(wide, (4,), rtk.OU(), segments=4, density=rtk.LineIntegral(), **options)
        program = jax.jit(lambda key: prior.sample(key, (50,))).lower(jr.key(0)).compile()
        return program(jr.key(0)), program.memory_analysis().temp_size_in_bytes

    (one, all_memory), (other, batch_memory) = draws(), draws(batch_size=8)
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)
    assert batch_memory < 0.5 * all_memory


@pytest.mark.parametrize("batch_size", [0, 2.5, True])
def test_a_bad_batch_size(batch_size):
    with pytest.raises(ValueError, match="`batch_size` must be an integer of at least 1"):
        normal(batch_size=batch_size)


def test_what_a_prior_shows():
    shown = repr(rtk.DiffusionPrior(normal_score, (3,), rtk.VE(sigma_min=0.25), batch_size=7))
    assert "normal_score" in shown
    assert "noise of sd 0.25 at t_min=0" in shown
    assert "batch_size=7" in shown
    assert "num_score_evals=96" in shown
    assert "None" not in shown
    line = repr(
        rtk.DiffusionPrior(rtk.EnergyScore(normal_energy), (3,), rtk.OU(), density=rtk.LineIntegral())
    )
    assert "EnergyScore" in line
    assert "noise of sd 0.0447 at t_min=0.001" in line
    assert "None" not in line


def normal_energy(x, t):
    return 0.5 * jnp.sum(x**2)


@pytest.mark.slow
def test_a_score_that_was_changed_in_place_is_another_score():
    class Network:
        mean, sd = 0.0, 1.0

        def __call__(self, x, t):
            return -(x - self.mean) / (self.sd**2 + t**2)

    network, schedule = Network(), rtk.EDM()

    def draws_and_density():
        prior = rtk.DiffusionPrior(network, (2,), schedule, segments=4, density=rtk.ProbabilityFlow())
        return prior.sample(jr.key(0), (200,)), prior.log_prob(jnp.full(2, network.mean))

    draws_and_density()
    network.mean, network.sd = 128.0, 30.0
    draws, density = draws_and_density()
    assert abs(np.mean(draws) - 128.0) < 10.0
    np.testing.assert_allclose(density, -2 * np.log(30.0 * np.sqrt(2 * np.pi)), atol=0.01)
