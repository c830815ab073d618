"""`RTKParticleGibbs` in NumPyro's `MCMC`: laws against closed forms, shapes, chain methods, cost,
failures.
"""

import functools
import os
import pickle
import subprocess
import sys
import textwrap

import arviz as az
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import Gibbs, MCMC, NUTS
from scipy import stats

import numpyro_rtk as rtk
from numpyro_rtk import DiffusionPrior, RTKParticleGibbs
from numpyro_rtk._numpyro import _particle_gibbs_chain
from numpyro_rtk._numpyro._collapse import warn_collapsed
from numpyro_rtk._numpyro._sites import latent_diffusion_sites
from tests.helpers import Counter, run_mcmc


# False-alarm level of a single comparison, as elsewhere in the suite.
P_MIN = 2.5e-5
Z_MAX = stats.norm.isf(P_MIN / 2)

# NumPyro donates buffers that cannot be re-used when `MCMC` runs under `jax.vmap`, whatever the kernel.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Some donated buffers were not usable:UserWarning"),
    # Few particles and levels are quick; weights may collapse.
    pytest.mark.filterwarnings("ignore:Particle weights collapsed:UserWarning"),
]


def standard_normal(x, t):
    """Score of N(0, I) data under `OU()`, at every noise level."""
    del t
    return -x


prior_of = functools.partial(DiffusionPrior, segments=2, reverse=rtk.GaussianTransition())
PAIR, SCALAR, IMAGE = (
    prior_of(standard_normal, (2,)),
    prior_of(standard_normal, ()),
    prior_of(standard_normal, (3, 4)),
)
Y = jnp.array([1.5, -0.5])


def denoising(y, sd=0.5):
    """Mean 0.8 y and variance 0.2 at the default sd."""
    x = numpyro.sample("x", PAIR)
    numpyro.deterministic("total", jnp.sum(x))
    numpyro.sample("y", dist.Normal(x, sd).to_event(1), obs=y)


FIELDS = (
    "accept_prob",
    "segment_accept_prob",
    "guided_accept_prob",
    "local_accept_prob",
    "particle_ess",
    "changed",
    "depth",
    "log_evidence",
    "diverging",
    "weighted",
    "visited",
    "num_score_evals",
    "adapt_state.step_size",
    "adapt_state.guided_step_size",
    "adapt_state.local_step_size",
    "adapt_state.log_beta",
    "adapt_state.depth_prob",
)
SEGMENTS = 6
make = functools.partial(
    RTKParticleGibbs,
    segments=SEGMENTS,
    num_particles=6,
    reverse=rtk.PreconditionedMALA(1),
    num_pilot_draws=32,
)


run = functools.partial(run_mcmc, num_warmup=20, num_samples=30, extra_fields=FIELDS)


def assert_moments(draws, mean, sd):
    """Mean and sd of draws, shape `(chains, draws, ...)`, by coordinate, within their Monte Carlo errors."""
    draws = np.asarray(draws, np.float64)
    for values, m, s in ((draws, mean, sd), ((draws - mean) ** 2, np.square(sd), np.sqrt(2) * np.square(sd))):
        ess = np.minimum(effective_sample_size(values), draws.shape[0] * draws.shape[1])
        z = (values.mean((0, 1)) - m) / (s / np.sqrt(ess))
        assert np.all(np.abs(z) < Z_MAX), z


@pytest.fixture(scope="module")
def gaussian():
    return run(make(denoising), Y, num_warmup=150, num_samples=400, num_chains=4)


def test_a_gaussian_posterior(gaussian):
    draws = gaussian.get_samples(group_by_chain=True)
    assert_moments(draws["x"], 0.8 * np.asarray(Y), np.sqrt(0.2))
    np.testing.assert_allclose(draws["total"], draws["x"].sum(-1), rtol=1e-5, atol=1e-6)
    assert np.mean(gaussian.get_extra_fields()["changed"]) > 0.3


def test_what_the_state_reports(gaussian):
    extra = gaussian.get_extra_fields(group_by_chain=True)
    levels, chains, draws = SEGMENTS + 1, 4, 400
    assert extra["particle_ess"].shape == (chains, draws, levels)
    assert (
        extra["segment_accept_prob"].shape == extra["guided_accept_prob"].shape == (chains, draws, SEGMENTS)
    )
    assert set(np.unique(extra["depth"])) <= set(RTKParticleGibbs(denoising)._options.depths(levels))
    assert not np.any(extra["diverging"])
    # Levels that a partial refresh leaves out, and those alone, are masked, and zero.
    first = levels - 1 - np.minimum(np.asarray(extra["depth"]), levels - 1)
    visited = np.arange(SEGMENTS)[None, None] >= first[..., None]
    np.testing.assert_array_equal(extra["visited"], visited)
    assert np.all(extra["segment_accept_prob"][visited] > 0)
    assert not np.any(extra["segment_accept_prob"][~visited])
    assert not np.any(extra["guided_accept_prob"][~visited])
    full = np.asarray(extra["depth"]) == levels
    ess, weighted = np.asarray(extra["particle_ess"]), np.asarray(extra["weighted"])
    np.testing.assert_array_equal(weighted[..., 0], full)
    assert np.all(weighted[..., -1])
    np.testing.assert_array_equal(weighted[..., 1:], visited)
    assert ess[weighted].min() >= 1 - 1e-5
    assert ess[weighted].max() <= 6 + 1e-5
    assert not np.any(ess[~weighted])
    mean = np.sum(extra["segment_accept_prob"], axis=-1) / visited.sum(-1)
    np.testing.assert_allclose(extra["accept_prob"], mean, rtol=1e-5)
    for name in ("accept_prob", "local_accept_prob"):
        assert np.all((np.asarray(extra[name]) >= 0) & (np.asarray(extra[name]) <= 1 + 1e-6))


def test_warmup_ends_and_nothing_adapts_afterwards(gaussian):
    extra = gaussian.get_extra_fields(group_by_chain=True)
    for name in FIELDS:
        if name.startswith("adapt_state") or name == "log_evidence":
            values = np.asarray(extra[name])
            np.testing.assert_array_equal(values, np.broadcast_to(values[:, :1], values.shape))
    np.testing.assert_allclose(np.asarray(extra["adapt_state.depth_prob"]).sum(-1), 1, rtol=1e-5)
    assert np.all(
        np.ptp(np.asarray(extra["adapt_state.depth_prob"])[:, 0], axis=0) > 0
    )  # each chain on its own
    assert int(gaussian.last_state.shared.iteration) == 550


def test_the_evidence_of_a_gaussian(gaussian):
    # Four estimates of log N(y; 0, 1.25 I) from six particles: a loose check, the sharp one is slow.
    exact = stats.norm.logpdf(np.asarray(Y), 0, np.sqrt(1.25)).sum()
    assert np.all(
        np.abs(np.asarray(gaussian.get_extra_fields(group_by_chain=True)["log_evidence"])[:, 0] - exact) < 6
    )


def test_arviz_takes_it_all(gaussian):
    data = az.from_numpyro(gaussian)
    assert {"x", "total"} <= set(data["posterior"].data_vars)
    names = set(data["sample_stats"].data_vars)
    assert {
        "diverging",
        "particle_ess",
        "changed",
        "depth",
        "log_evidence",
        "num_score_evals",
    } <= names
    assert data["sample_stats"]["particle_ess"].shape == (4, 400, SEGMENTS + 1)
    assert float(az.rhat(data, var_names=["x"])["x"].max()) < 1.05


@pytest.mark.slow
def test_resuming_re_uses_the_state_and_does_not_adapt_again(gaussian):
    before = gaussian.last_state
    frozen = np.asarray(before.adapt_state.local_step_size)
    gaussian.post_warmup_state = before
    gaussian.run(before.rng_key, Y, extra_fields=FIELDS)
    assert int(gaussian.last_state.shared.iteration) == 950
    np.testing.assert_array_equal(gaussian.last_state.adapt_state.local_step_size, frozen)
    assert_moments(gaussian.get_samples(group_by_chain=True)["x"], 0.8 * np.asarray(Y), np.sqrt(0.2))


def test_pickling(gaussian):
    kernel = pickle.loads(pickle.dumps(make(denoising)))
    start = "RTKParticleGibbs(num_particles=6, segments=6, reverse=PreconditionedMALA("
    assert repr(kernel).startswith(start)
    # What was chosen for the model is known once a start has seen it.
    assert "guidance=chosen at the start" in repr(kernel)
    seen = repr(gaussian.sampler)
    assert "guidance=mean" in seen
    assert "None" not in seen
    evaluations = np.asarray(gaussian.get_extra_fields()["num_score_evals"])
    assert f"at most {evaluations.max()} score evaluations an iteration" in seen
    again = pickle.loads(pickle.dumps(gaussian))
    np.testing.assert_array_equal(again.get_samples()["x"], gaussian.get_samples()["x"])


def test_another_kernel_refuses_the_state(gaussian):
    with pytest.raises(ValueError, match="other network weights or another reverse kernel, other segments"):
        make(denoising, num_particles=5).sample(gaussian.last_state, (Y,), {})


# Cost.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("local", "energy"), [(None, False), (rtk.LocalMALA(3), True), (rtk.LocalHMC(4, 2), False)]
)
def test_num_score_evals_are_those_of_the_network(local, energy):
    counter = Counter(standard_normal)

    def score(x, t):
        return counter(x, t)

    class Energy(rtk.EnergyScore):
        def energy_and_score(self, x, t):
            return 0.5 * jnp.sum(x**2), counter(x, t)

    score_fn = Energy(lambda x, t: 0.5 * jnp.sum(x**2)) if energy else score
    prior = prior_of(score_fn, (2,), rtk.OU())

    def model():
        with numpyro.plate("n", 2):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=jnp.ones((2, 2)))

    segments, particles = 3, 3
    kernel = make(
        model, local=local, num_guided_steps=2, num_pilot_draws=8, segments=segments, num_particles=particles
    )
    state = kernel.init(jr.key(0), 0, None, (), {})
    step = jax.jit(lambda state: kernel.sample(state, (), {}))
    jax.block_until_ready(step.lower(state).compile())
    depths = kernel._options.depths(segments + 1)
    for i, depth in enumerate(depths):
        one = jnp.zeros(len(depths)).at[i].set(1.0)
        state = state._replace(adapt_state=state.adapt_state._replace(depth_prob=one))
        before = counter.count
        state = jax.block_until_ready(step(state))
        assert int(state.depth) == depth
        # The energies of `PreconditionedMALA` are not asked for: one more evaluation a transition where there
        # are any. Two guided steps a level: two evaluations each where Simpson's rule needs a midpoint.
        inner, guided, last = 2 + energy, 2 if energy else 4, min(depth, segments)
        expected = 1 + last * (guided + 1 + 2 * (guided + inner)) + (2 if depth > segments else 0)
        # Three MALA steps take as many midpoints; HMC takes none.
        midpoints = 3 if isinstance(local, rtk.LocalMALA) and not energy else 0
        expected += 0 if local is None else {rtk.LocalMALA: 3, rtk.LocalHMC: 8}[type(local)] + midpoints
        assert int(state.num_score_evals) == 2 * expected
        if energy:
            continue  # the inner kernel's own calls are not counted here
        assert counter.count - before == int(state.num_score_evals)


def placed_times(score_fn, segments):
    prior = DiffusionPrior(score_fn, (1,), rtk.OU(t_max=7.0))

    def model():
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.zeros(1))

    state = make(model, segments=segments, num_pilot_draws=64).init(jr.key(0), 0, None, (), {})
    return np.asarray(state.shared.measured[0].grid.t)


@pytest.mark.slow
def test_a_number_of_segments_is_placed_and_a_grid_is_kept():
    schedule = rtk.OU(t_max=7.0)
    modes = rtk.GaussianMixtureScore(np.ones(2), np.array([[-8.0], [8.0]]), np.ones((2, 1, 1)), schedule)
    even = rtk.segment_times(schedule, 8, rho=np.inf)
    np.testing.assert_allclose(placed_times(standard_normal, 8), even, rtol=0.02)
    np.testing.assert_array_equal(placed_times(modes, even), np.float32(even))
    placed = placed_times(modes, 8)
    assert placed.shape == even.shape

    def where_modes_part(times):
        ratio = np.asarray(schedule.sigma(times) / schedule.alpha(times))
        return np.sum((ratio > 2.0) & (ratio < 16.0))

    assert where_modes_part(placed) >= where_modes_part(even) + 2


@pytest.mark.parametrize(
    ("has_energy", "dim", "expected"),
    [
        (False, 100, rtk.PreconditionedMALA(num_steps=1, energy_difference=rtk.Simpson(), max_step_size=4.0)),
        (False, 101, rtk.PreconditionedMALA()),
        (True, 101, rtk.PreconditionedMALA(energy_difference=rtk.ExactEnergy(), max_step_size=4.0)),
    ],
)
def test_the_default_reverse_kernel(has_energy, dim, expected):
    score_fn = rtk.EnergyScore(lambda x, t: 0.5 * jnp.sum(x**2)) if has_energy else standard_normal

    def model():
        x = numpyro.sample("x", DiffusionPrior(score_fn, (dim,)))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.zeros(dim))

    kernel = RTKParticleGibbs(model)
    inner = kernel._options.kernel_for(latent_diffusion_sites(model, jr.key(0), (), {}), 1)
    assert inner == expected
    # Either way three evaluations a transition.
    assert inner.evaluations_per_segment == 3


# Bad input.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_particles": 1}, ValueError, "`num_particles` must be an integer of at least 2"),
        ({"num_particles": 2.5}, ValueError, "`num_particles` must be an integer"),
        ({"num_particles": True}, ValueError, "`num_particles` must be an integer"),
        ({"num_guided_steps": -1}, ValueError, "`num_guided_steps` must be an integer of at least 0"),
        ({"num_pilot_draws": 1}, ValueError, "`num_pilot_draws` must be an integer of at least 8"),
        ({"refresh_depths": ()}, ValueError, r"`refresh_depths` must be fractions of the levels.*got \(\)"),
        ({"refresh_depths": (1, 24)}, ValueError, "`refresh_depths` must be fractions of the levels"),
        (
            {"refresh_depths": "full"},
            ValueError,
            "`refresh_depths` must be fractions of the levels.*got 'full'",
        ),
        ({"refresh_depths": 0.5}, ValueError, "`refresh_depths` must be fractions of the levels"),
        ({"target_accept_prob": 1.0}, ValueError, "`target_accept_prob` must be strictly between 0 and 1"),
        ({"reverse": rtk.MALA}, TypeError, r"`reverse` must be a reverse kernel .* Did you mean `MALA\(\)`"),
        ({"reverse": rtk.GaussianTransition(order=2)}, ValueError, r"`reverse=.*order=2.*first order"),
        ({"twist": rtk.GaussianTwist}, TypeError, r"`twist` must be .* Did you mean `GaussianTwist\(\)`"),
        ({"twist": "gaussian"}, TypeError, "`twist` must be"),
        ({"local": rtk.LocalHMC}, TypeError, r"`local` must be .* Did you mean `LocalHMC\(\)`"),
        ({"local": True}, TypeError, "`local` must be"),
    ],
)
def test_arguments_are_checked_when_the_kernel_is_made(options, error, message):
    with pytest.raises(error, match=message):
        RTKParticleGibbs(denoising, **options)


@pytest.mark.parametrize(
    ("given", "depths"),
    [
        ({}, (2, 5, 9, 12, 19, 25)),
        ({"refresh_depths": (1.0,)}, (25,)),
        ({"refresh_depths": [0.5, 0.01]}, (1, 12)),
    ],
)
def test_depths_of_refreshes(given, depths):
    assert RTKParticleGibbs(denoising, **given)._options.depths(25) == depths


@pytest.mark.parametrize(
    ("make_move", "message"),
    [
        (lambda: rtk.LocalHMC(num_steps=0), r"`LocalHMC\(num_steps=...\)`"),
        (lambda: rtk.LocalHMC(num_trajectories=0), r"`LocalHMC\(num_trajectories=...\)` must be an integer"),
        (lambda: rtk.LocalHMC(step_size=-1.0), r"`LocalHMC\(step_size=...\)` must be positive"),
        (lambda: rtk.LocalMALA(num_steps=0), r"`LocalMALA\(num_steps=...\)`"),
        (lambda: rtk.LocalMALA(step_size=0.0), r"`LocalMALA\(step_size=...\)` must be positive"),
    ],
)
def test_arguments_of_local_moves_are_checked(make_move, message):
    with pytest.raises(ValueError, match=message):
        make_move()


def test_a_model_that_is_no_model():
    with pytest.raises(TypeError, match="`model` must be a NumPyro model"):
        RTKParticleGibbs(NUTS(denoising))


def no_diffusion():
    numpyro.sample("x", dist.Normal(0, 1))


def other_latents(y):
    scale = numpyro.sample("scale", dist.LogNormal(0, 1))
    numpyro.sample("y", dist.Normal(numpyro.sample("x", PAIR), scale), obs=y)


def discrete_left_over(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(numpyro.sample("x", PAIR), 1.0 + k), obs=y)


def enumerated(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    numpyro.sample("y", dist.Normal(numpyro.sample("x", PAIR), 1.0 + k), obs=y)


def subsampled(y):
    x = numpyro.sample("x", SCALAR)
    with numpyro.plate("n", 2, subsample_size=1) as index:
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y[index])


def dependent(y):
    first = numpyro.sample("first", SCALAR)
    x = numpyro.sample("x", prior_of(lambda x, t: -x * (1 + 0 * first), ()))
    numpyro.sample("y", dist.Normal(first + x, 1.0), obs=y[0])


def scanned(y):
    def body(carry, value):
        x = numpyro.sample("x", SCALAR)
        numpyro.sample("y", dist.Normal(x, 1.0), obs=value)
        return carry, x

    scan(body, 0.0, y)


def masked_prior(y):
    with handlers.mask(mask=False):
        x = numpyro.sample("x", PAIR)
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def scaled_prior(y):
    with handlers.scale(scale=2.0):
        x = numpyro.sample("x", PAIR)
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def transformed(y):
    x = numpyro.sample("x", dist.TransformedDistribution(PAIR, dist.transforms.ExpTransform()))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def impossible(y):
    x = numpyro.sample("x", PAIR)
    numpyro.factor("f", jnp.where(jnp.sum(x) > 1e6, 0.0, -jnp.inf))


def not_a_number(y):
    x = numpyro.sample("x", PAIR)
    numpyro.factor("f", jnp.log(-1.0 - x[0] ** 2))


def counts(y):
    x = numpyro.sample("x", PAIR)
    numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)


REFUSED = [
    (no_diffusion, (), {}, "needs a model with a latent `DiffusionPrior` site"),
    (other_latents, (Y,), {}, r"other latent sites: \['scale'\].*RTKGibbs"),
    (discrete_left_over, (Y,), {}, r"other latent sites: \['k'\]"),
    (enumerated, (Y,), {}, "enumerated sites: 'k'"),
    (subsampled, (Y,), {}, "plate 'n' takes 1 of 2"),
    (dependent, (Y,), {}, "score of diffusion site 'x' depends on latent site 'first'"),
    (scanned, (Y,), {}, "inside a `scan`"),
    (masked_prior, (Y,), {}, "'x' has a mask"),
    (scaled_prior, (Y,), {}, "'x' has a scale"),
    (transformed, (Y,), {}, "'x' transforms a diffusion prior"),
    (denoising, (Y.at[0].set(jnp.nan),), {}, "Observed site 'y' has 1 NaN"),
    (impossible, (Y,), {}, "log likelihood is -inf at all 32 prior draws"),
    (not_a_number, (Y,), {}, "log likelihood is NaN"),
    (
        counts,
        (jnp.ones(2),),
        {"twist": rtk.GaussianTwist()},
        r"`twist=GaussianTwist\(\)` needs Gaussian observations",
    ),
    (denoising, (Y,), {"segments": 0}, "`segments` must be at least 1"),
    (denoising, (Y,), {"segments": "many"}, "`segments` must be"),
    (
        denoising,
        (Y,),
        {"reverse": rtk.MALA(2, energy_difference=rtk.ExactEnergy())},
        r"needs a score with a method `energy\(x, t\)`",
    ),
]


@pytest.mark.parametrize(
    ("model", "args", "options", "message"),
    REFUSED,
    ids=[f"{one[0].__name__}-{i}" for i, one in enumerate(REFUSED)],
)
def test_models_that_cannot_be_sampled_are_refused_at_init(model, args, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(model, **options).init(jr.key(0), 10, None, args, {})


@pytest.mark.parametrize(
    ("init_params", "message"),
    [
        ({"z": jnp.zeros(2)}, r"`init_params` has \['z'\], but the latents are \['x'\]"),
        (jnp.zeros(2), r"must be a dict of constrained values"),
        ({"x": jnp.zeros(3)}, r"`init_params\['x'\]` has shape \(3,\); site 'x' has shape \(2,\)"),
        ({"x": jnp.array([0.0, jnp.nan])}, r"`init_params\['x'\]` contains NaN"),
    ],
)
def test_bad_init_params(init_params, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(denoising).init(jr.key(0), 10, init_params, (Y,), {})


def half_space(y):
    x = numpyro.sample("x", PAIR)
    numpyro.factor("support", jnp.where(x[0] > 0, 0.0, -jnp.inf))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def test_a_start_of_likelihood_zero_is_refused():
    with pytest.raises(ValueError, match="log likelihood is -inf at the start"):
        make(half_space).init(jr.key(0), 10, {"x": jnp.array([-1.0, 0.0])}, (Y,), {})


def test_the_warning_of_collapsed_weights_names_levels():
    times, ess = np.array([5.0, 1.0, 0.1]), np.array([[9.0, 1.2, 1.5], [9.0, 1.9, 2.5], [9.0, 2.5, 2.5]])
    with pytest.warns(UserWarning, match=r"below 2 of 16 at level 1 \(t=1\)\. The law is not affected"):
        warn_collapsed(ess, times, 16)
    warn_collapsed(ess[1:, ::2], times[::2], 16)  # nothing
    warn_collapsed(ess, times, 2)  # two particles are never more than two


# Everything below runs more programs, and is slow.


def sharp_tempered(y):
    x = numpyro.sample("x", prior_of(standard_normal, (20,)))
    numpyro.sample("y", dist.Normal(x, 0.02).to_event(1), obs=y)


@pytest.mark.slow
def test_a_collapse_is_warned_of_when_warmup_ends():
    mcmc = MCMC(
        make(sharp_tempered, segments=2, num_particles=4, twist=rtk.TemperedTwist(), local=None),
        num_warmup=20,
        num_samples=5,
        progress_bar=False,
    )
    with pytest.warns(UserWarning, match="Particle weights collapsed: .* level 2"):
        mcmc.run(jr.key(0), jnp.linspace(-2, 2, 20))


@pytest.mark.slow
def test_a_likelihood_with_a_boundary():
    # G = 0 at points of the path whose denoised value is outside the support, although the data are inside.
    y = jnp.array([-0.5, 0.4])
    mcmc = run(make(half_space, segments=8), y, num_warmup=200, num_samples=1500, num_chains=4)
    draws = mcmc.get_samples(group_by_chain=True)["x"]
    truncated = stats.truncnorm(0.25 / np.sqrt(0.5), np.inf, loc=-0.25, scale=np.sqrt(0.5))
    assert_moments(draws[..., 0], truncated.mean(), truncated.std())
    assert_moments(draws[..., 1], 0.2, np.sqrt(0.5))
    assert not np.any(mcmc.get_extra_fields()["diverging"])


def everything(y, z, scale=0.5):
    """Several sites, a plate of sites, an expanded site and an image."""
    a = numpyro.sample("a", SCALAR)
    with numpyro.plate("n", 3):
        b = numpyro.sample("b", PAIR)
        numpyro.sample("y", dist.Normal(b, scale).to_event(1), obs=y)
    c = numpyro.sample("c", SCALAR.expand([2]).to_event(1))
    image = numpyro.sample("image", IMAGE)
    numpyro.sample("z", dist.Normal(a + c[0], scale), obs=z)
    numpyro.sample("w", dist.Normal(jnp.sum(image, axis=0), scale), obs=jnp.ones(4))


@pytest.mark.slow
def test_several_sites_plates_batches_and_images():
    y = jnp.arange(6.0).reshape(3, 2) / 3
    mcmc = run(make(everything), y, 1.0, num_warmup=200, num_samples=600, num_chains=4)
    draws = mcmc.get_samples(group_by_chain=True)
    assert {name: value.shape[2:] for name, value in draws.items()} == {
        "a": (),
        "b": (3, 2),
        "c": (2,),
        "image": (3, 4),
    }
    assert_moments(draws["b"], 0.8 * np.asarray(y), np.sqrt(0.2))
    assert_moments(draws["a"], 1 / 2.25, np.sqrt(1 - 1 / 2.25))
    assert_moments(draws["c"], np.array([1 / 2.25, 0]), np.sqrt([1 - 1 / 2.25, 1.0]))
    assert_moments(draws["image"], 1 / 3.25, np.sqrt(1 - 1 / 3.25))


@pytest.mark.slow
def test_sequential_chains_agree_with_vectorized_chains(x64):
    # Other programs, with another rounding, that grows: in float64 there is little to grow.
    kernel, y = make(denoising), Y.astype(float)
    draws, vectorized = (
        run(kernel, y, chain_method=method).get_samples(group_by_chain=True)["x"]
        for method in ("sequential", "vectorized")
    )
    assert draws.shape == (2, 30, 2)
    np.testing.assert_allclose(draws[:, :3], vectorized[:, :3], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_thinning_old_keys_and_jit_model_args():
    mcmc = run(make(denoising), Y, thinning=3, key=jr.PRNGKey(0), jit_model_args=True)
    assert mcmc.get_samples()["x"].shape == (20, 2)
    assert mcmc.get_extra_fields()["depth"].shape == (20,)
    again = mcmc.get_samples()["x"]
    mcmc.run(jr.PRNGKey(0), -Y, extra_fields=FIELDS)
    assert not np.allclose(again, mcmc.get_samples()["x"])


@pytest.mark.slow
def test_init_params_are_the_start():
    kernel = make(denoising)
    start = {"x": jnp.array([[3.0, 1.0], [-3.0, 2.0]])}
    state = kernel.init(jr.split(jr.key(0)), 0, start, (Y,), {})
    np.testing.assert_array_equal(state.z["x"], start["x"])
    mcmc = run(make(denoising), Y, init_params=start)
    assert np.all(np.isfinite(mcmc.get_samples()["x"]))


@pytest.mark.slow
def test_the_start_is_the_draw_of_the_chosen_sweep(monkeypatch):
    def starts():
        state = make(denoising).init(jr.split(jr.key(0), 32), 0, None, (Y,), {})
        return np.asarray(state.z["x"]), np.asarray(state.log_evidence)

    chosen, evidence = starts()
    monkeypatch.setattr(_particle_gibbs_chain, "choose_sweep", lambda *args: 0)
    first, same = starts()
    # The estimate is that of the sweep that adapts nothing, whichever gives the start.
    np.testing.assert_allclose(same, evidence, rtol=1e-4)
    assert 0 < np.isclose(first, chosen, rtol=1e-4).all(axis=1).sum() < 32


@pytest.mark.slow
def test_float64(x64):
    mcmc = run(make(denoising), jnp.asarray(np.asarray(Y, np.float64)))
    assert mcmc.get_samples()["x"].dtype == np.float64
    assert mcmc.get_extra_fields()["particle_ess"].dtype == np.float64


@pytest.mark.slow
def test_warmup_then_run():
    mcmc = MCMC(
        make(denoising),
        num_warmup=20,
        num_samples=10,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.warmup(jr.key(0), Y, collect_warmup=True, extra_fields=("adapt_state.local_step_size",))
    warm = mcmc.get_extra_fields(group_by_chain=True)["adapt_state.local_step_size"]
    assert warm.shape == (2, 20)
    assert np.all(np.ptp(np.asarray(warm), axis=1) > 0)
    mcmc.run(jr.key(1), Y, extra_fields=("adapt_state.local_step_size",))
    after = mcmc.get_extra_fields(group_by_chain=True)["adapt_state.local_step_size"]
    np.testing.assert_array_equal(after, np.broadcast_to(np.asarray(warm)[:, -1:], (2, 10)))


@pytest.mark.slow
def test_the_evidence_is_unbiased():
    # Estimates of many chains on the natural scale, against the closed form, with their own standard error.
    sd = 0.1
    model = lambda y: denoising(y, sd)
    kernel = make(model, num_particles=8, segments=8, reverse=rtk.PreconditionedMALA(4), num_pilot_draws=128)
    state = kernel.init(jr.split(jr.key(3), 400), 0, None, (Y,), {})
    exact = stats.norm.logpdf(np.asarray(Y), 0, np.sqrt(1 + sd**2)).sum()
    ratio = np.exp(np.asarray(state.log_evidence, np.float64) - exact)
    error = ratio.std() / np.sqrt(ratio.size)
    assert error < 0.2  # a few large ones carry it
    assert abs(ratio.mean() - 1) < Z_MAX * error


def with_scale(y):
    x = numpyro.sample("x", PAIR)
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


@pytest.mark.slow
def test_a_block_of_numpyro_gibbs():
    kernel = Gibbs([(make(with_scale), ["x"]), (NUTS(with_scale), None)])
    mcmc = MCMC(kernel, num_warmup=30, num_samples=30, progress_bar=False)
    mcmc.run(jr.key(0), Y, extra_fields=("block_states.0.num_score_evals", "block_states.0.depth"))
    draws = mcmc.get_samples()
    assert draws["x"].shape == (30, 2)
    assert np.all(draws["scale"] > 0)
    assert np.all(np.isfinite(draws["x"]))
    assert len(np.unique(np.asarray(mcmc.get_extra_fields()["block_states.0.depth"]))) > 1


PARALLEL = """
import jax, jax.random as jr, numpy as np
from numpyro.infer import MCMC
from tests.kernels.test_particle_gibbs import denoising, make, Y

def draws(method):
    options = dict(num_warmup=4, num_samples=6, num_chains=2, progress_bar=False)
    mcmc = MCMC(make(denoising), chain_method=method, **options)
    mcmc.run(jr.key(1), Y)
    assert mcmc.chain_method == method
    return np.asarray(mcmc.get_samples(group_by_chain=True)["x"])

assert jax.device_count() == 2
np.testing.assert_allclose(draws("parallel"), draws("sequential"), rtol=1e-3, atol=1e-3)
"""


@pytest.mark.slow
def test_parallel_chains():
    environment = {
        key: value for key, value in os.environ.items() if key != "CI" and not key.startswith("PYTEST")
    }
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PARALLEL)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
