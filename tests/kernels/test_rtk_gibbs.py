"""`RTKGibbs`: diffusion sites by particle Gibbs and everything else by another kernel, against quadrature."""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import DiscreteGibbs, Gibbs, HMC, NUTS
from numpyro.infer.gibbs import conditioned, with_conditioning
from scipy import stats

import numpyro_rtk as rtk
from numpyro_rtk import DiffusionPrior, RTKGibbs, RTKParticleGibbs
from numpyro_rtk._numpyro._blocks import refresh
from tests.helpers import Counter, run_mcmc


P_MIN = 2.5e-5
Z_MAX = stats.norm.isf(P_MIN / 2)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Some donated buffers were not usable:UserWarning"),
    # Few particles and levels are quick; weights may collapse.
    pytest.mark.filterwarnings("ignore:Particle weights collapsed:UserWarning"),
]


def standard_normal(x, t):
    del t
    return -x


prior_of = functools.partial(DiffusionPrior, segments=2, reverse=rtk.GaussianTransition())
PAIR, SCALAR = prior_of(standard_normal, (3,)), prior_of(standard_normal, ())
Y = jnp.array([1.5, -0.5, 0.3])
OPTIONS = {"segments": 8, "num_particles": 8, "reverse": rtk.PreconditionedMALA(1), "num_pilot_draws": 32}


def unknown_noise(y):
    """Integrating the site out, `y ~ N(0, 1 + scale^2)`: a posterior of one dimension."""
    scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.6))
    x = numpyro.sample("x", PAIR)
    numpyro.deterministic("ratio", x[0] / scale)
    numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


def quadrature(log_density, low, high, size=4001):
    """Mean and sd on a grid."""
    grid = np.linspace(low, high, size)
    weights = np.exp(log_density(grid) - log_density(grid).max())
    weights /= weights.sum()
    mean = weights @ grid
    return mean, np.sqrt(weights @ (grid - mean) ** 2)


LOG_SCALE = quadrature(
    lambda u: (
        stats.norm.logpdf(u, -0.5, 0.6)
        + stats.norm.logpdf(np.asarray(Y)[None], 0, np.sqrt(1 + np.exp(2 * u))[:, None]).sum(1)
    ),
    -5.0,
    5.0,
)


FIELDS = ("block_states.0.num_score_evals", "block_states.0.particle_ess", "block_states.1.num_steps")
run = functools.partial(run_mcmc, num_warmup=30, num_samples=30, extra_fields=FIELDS)


def z_scores(draws, mean, sd):
    """Of the mean and the mean square, draws of shape `(chains, draws, ...)`."""
    draws = np.asarray(draws, np.float64)
    result = []
    for values, m in ((draws, mean), ((draws - mean) ** 2, np.square(sd))):
        ess = np.minimum(effective_sample_size(values), draws.shape[0] * draws.shape[1])
        result.append((values.mean((0, 1)) - m) / (values.std((0, 1)) / np.sqrt(ess)))
    return np.stack(result)


@pytest.fixture(scope="module")
def unknown():
    return run(RTKGibbs(NUTS(unknown_noise), **OPTIONS), Y, num_warmup=300, num_samples=1000, num_chains=4)


@pytest.mark.slow
def test_an_unknown_noise_scale_against_quadrature(unknown):
    draws = unknown.get_samples(group_by_chain=True)
    assert set(draws) == {"scale", "x", "ratio"}
    assert np.all(np.abs(z_scores(np.log(np.asarray(draws["scale"], np.float64)), *LOG_SCALE)) < Z_MAX)
    np.testing.assert_allclose(draws["ratio"], draws["x"][..., 0] / draws["scale"], rtol=1e-4)
    # E[x | y, scale] = y / (1 + scale^2), averaged over the draws of the scale themselves.
    shrunk = np.asarray(Y) / (1 + np.asarray(draws["scale"], np.float64)[..., None] ** 2)
    difference = np.asarray(draws["x"], np.float64) - shrunk
    error = difference.std((0, 1)) / np.sqrt(effective_sample_size(difference))
    assert np.all(np.abs(difference.mean((0, 1))) < Z_MAX * error)


@pytest.mark.slow
def test_each_block_reports(unknown):
    extra = unknown.get_extra_fields(group_by_chain=True)
    assert extra["block_states.0.particle_ess"].shape == (4, 1000, 9)
    assert np.mean(extra["block_states.1.num_steps"]) > 1
    assert unknown.last_state.block_states[0].shared.iteration == 1300


@pytest.mark.slow
def test_the_inner_kernel_never_evaluates_the_network():
    counter = Counter(standard_normal)
    prior = prior_of(lambda x, t: counter(x, t), (3,))

    def model():
        scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.6))
        numpyro.sample("y", dist.Normal(numpyro.sample("x", prior), scale).to_event(1), obs=Y)

    kernel = RTKGibbs(NUTS(model), **OPTIONS)
    state = kernel.init(jr.key(0), 0, None, (), {})
    step = jax.jit(lambda state: kernel.sample(state, (), {}))
    step.lower(state).compile()
    leapfrogs = 0
    for _ in range(4):
        before = counter.count
        state = jax.block_until_ready(step(state))
        leapfrogs += int(state.block_states[1].num_steps)
        assert counter.count - before == int(state.block_states[0].num_score_evals)
    assert leapfrogs >= 4


@pytest.mark.slow
def test_restarts_leave_the_other_latents_time_to_settle():
    """Iterations 0, 1, 3, 7, ... of the first half of the warmup are full sweeps; with `sweep_prob=0` the
    others have none.
    """
    kernel = RTKGibbs(NUTS(unknown_noise), num_restarts=4, sweep_prob=0.0, **(OPTIONS | {"num_particles": 2}))
    state = kernel.init(jr.split(jr.key(0), 2), 14, None, (Y,), {})
    sample = jax.jit(lambda state: kernel.sample(state, (Y,), {}))
    depths = []
    for _ in range(17):
        state = sample(state)
        depths.append(np.asarray(state.block_states[0].depth))
    full = state.block_states[0].particle_ess.shape[1]
    restarted = [i for i, depth in enumerate(depths) if np.all(depth == full)]
    assert restarted == [0, 1, 3]
    assert all(np.all(depth == 0) for i, depth in enumerate(depths) if i not in restarted)
    due = RTKParticleGibbs(unknown_noise, num_restarts=5)._options.restarts_at(
        jnp.arange(200), jnp.asarray(200)
    )
    assert np.flatnonzero(due).tolist() == [0, 1, 3, 7, 15]


def test_repr_and_pickle():
    kernel = pickle.loads(pickle.dumps(RTKGibbs(NUTS(unknown_noise), **OPTIONS)))
    assert repr(kernel).startswith("RTKGibbs(NUTS, RTKParticleGibbs(num_particles=8, segments=8")
    assert kernel.model is unknown_noise


@pytest.mark.parametrize(
    ("inner", "error", "message"),
    [
        (
            unknown_noise,
            TypeError,
            r"`inner_kernel` must be a NumPyro kernel such as `NUTS\(model\)`, got function",
        ),
        ("NUTS", TypeError, "`inner_kernel` must be a NumPyro kernel"),
        (NUTS(potential_fn=lambda z: z), TypeError, "must be built on a model"),
        (RTKParticleGibbs(unknown_noise), TypeError, "pass its options to `RTKGibbs` itself"),
    ],
)
def test_bad_inner_kernels(inner, error, message):
    with pytest.raises(error, match=message):
        RTKGibbs(inner)


def no_diffusion(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("m", dist.Normal(0, 1)), 1.0), obs=y)


def with_discrete(y):
    """A discrete latent beside the diffusion site; all of it is Gaussian given `k`."""
    k = numpyro.sample("k", dist.Bernoulli(0.3))
    x = numpyro.sample("x", PAIR)
    # As near as this, `k` changes often enough to be looked at: by 2 it changes once in thousands of draws.
    numpyro.sample("y", dist.Normal(x + k, 0.5).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (no_diffusion, "does not own|owns no sites|latent `DiffusionPrior`"),
        (with_discrete, r"discrete latent sites \['k'\].*`RTKGibbs\(DiscreteGibbs\(model\)\)`"),
    ],
)
def test_bad_models(model, message):
    with pytest.raises(ValueError, match=message):
        RTKGibbs(NUTS(model), **OPTIONS).init(jr.key(0), 10, None, (Y,), {})


def positive(y):
    """Impossible where the site is not positive, whatever the scale."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    x = numpyro.sample("x", PAIR)
    numpyro.factor("support", jnp.where(jnp.all(x > 0), 0.0, -jnp.inf))
    numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


@pytest.mark.slow
def test_starts_of_vectorized_chains_are_checked():
    start = {"x": jnp.array([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [1.0, 1.0, 2.0]])}
    with pytest.raises(ValueError, match=r"log likelihood is -inf at the start of chain 1\."):
        RTKGibbs(NUTS(positive), **OPTIONS).init(jr.split(jr.key(0), 3), 10, start, (Y,), {})


def test_signature_shows_the_options():
    shown = inspect.signature(RTKGibbs).parameters
    options = inspect.signature(RTKParticleGibbs).parameters
    assert list(shown) == ["inner_kernel", "path_segments", *list(options)[1:]]
    assert all(shown[name].default == options[name].default for name in list(options)[1:])


@pytest.mark.slow
def test_fields_by_their_names():
    names = ("particle_ess", "depth", "energy", "local_accept_prob")
    mcmc = run(RTKGibbs(NUTS(unknown_noise), **OPTIONS), Y, num_warmup=3, num_samples=4, extra_fields=names)
    extra = mcmc.get_extra_fields(group_by_chain=True)
    assert set(extra) == {*names, "diverging", "unresolved", "accept_prob", "changed"}
    assert extra["particle_ess"].shape == (2, 4, 9)
    np.testing.assert_array_equal(extra["energy"][:, -1], mcmc.last_state.block_states[1].energy)
    assert mcmc.last_state.block_states[0].log_evidence is None
    # Over all chains, though NumPyro asks for one chain only.
    assert "score evals" in mcmc.sampler.get_diagnostics_str(mcmc.last_state)
    for name, known in (("ess", "particle_ess, changed"), ("block_states.0.ess", "particle_ess, weighted")):
        with pytest.raises(ValueError, match=f"no field 'ess'.* {known}"):
            mcmc.run(jr.key(0), Y, extra_fields=(name,))


def test_options_are_those_of_particle_gibbs():
    with pytest.raises(ValueError, match="`num_particles`"):
        RTKGibbs(NUTS(unknown_noise), num_particles=1)
    with pytest.raises(TypeError, match="unexpected keyword"):
        RTKGibbs(NUTS(unknown_noise), particles=4)


# Everything below runs more programs, and is slow.


def exact_discrete():
    y = np.asarray(Y, np.float64)
    one = np.log(0.3) + stats.norm.logpdf(y, 1.0, np.sqrt(1.25)).sum()
    zero = np.log(0.7) + stats.norm.logpdf(y, 0.0, np.sqrt(1.25)).sum()
    return 1 / (1 + np.exp(zero - one))


@pytest.mark.slow
def test_a_discrete_latent():
    options = {"extra_fields": ("block_states.0.num_score_evals",)}
    mcmc = run(
        RTKGibbs(DiscreteGibbs(with_discrete), **OPTIONS), Y, num_warmup=100, num_samples=2000, **options
    )
    k = np.asarray(mcmc.get_samples(group_by_chain=True)["k"], np.float64)
    error = np.sqrt(k.var() / min(effective_sample_size(k), k.size))
    assert 0 < k.mean() < 1
    assert abs(k.mean() - exact_discrete()) < Z_MAX * error


def both(y):
    k = numpyro.sample("k", dist.Bernoulli(0.3))
    scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.6))
    x = numpyro.sample("x", PAIR)
    numpyro.sample("y", dist.Normal(x + 2.0 * k, scale).to_event(1), obs=y)


def composite():
    return Gibbs([(NUTS(both), ["scale"]), (DiscreteGibbs(both), ["k"])])


def composite_errors(kernel):
    """In standard errors, of the probability of `k` and of the mean log scale, the site integrated out."""
    mcmc = run(kernel, Y, num_warmup=200, num_samples=2000, num_chains=4, extra_fields=())
    draws = mcmc.get_samples(group_by_chain=True)
    u, k = np.linspace(-4, 3, 1401)[:, None], np.arange(2)
    sd = np.sqrt(1 + np.exp(2 * u))
    weights = stats.norm.pdf(u, -0.5, 0.6) * np.array([0.7, 0.3])
    for y in np.asarray(Y):
        weights = weights * stats.norm.pdf(y, 2.0 * k, sd)
    weights /= weights.sum()
    errors = []
    for values, grid in ((draws["k"], k), (jnp.log(draws["scale"]), u)):
        values, mean = np.asarray(values, np.float64), (weights * grid).sum()
        sd = np.sqrt((weights * (grid - mean) ** 2).sum())
        size = min(effective_sample_size(values), values.size) if np.ptp(values) else values.size
        errors.append((values.mean() - mean) / sd * np.sqrt(size))
    return np.abs(errors)


@pytest.mark.slow
def test_a_composite_as_the_inner_kernel():
    assert max(composite_errors(RTKGibbs(composite(), **OPTIONS))) < Z_MAX


@pytest.mark.slow
def test_a_composite_that_is_not_refreshed_is_caught(monkeypatch):
    monkeypatch.setattr("numpyro_rtk._numpyro._gibbs.refresh", lambda kernel, state, args, kwargs: state)
    assert max(composite_errors(RTKGibbs(composite(), **OPTIONS))) > Z_MAX


@pytest.mark.slow
def test_blocks_of_a_composite_are_refreshed():
    """What each block keeps belongs to the values that the others, and the site, have now."""
    kernel = RTKGibbs(composite(), **OPTIONS)
    state = kernel.init(jr.key(0), 10, {"scale": jnp.asarray(1.5), "k": jnp.asarray(1)}, (Y,), {})
    x = state.z["x"] + 1.0
    new = refresh(kernel.blocks[1][0], state.block_states[1], (Y,), with_conditioning({}, {"x": x}))
    rest = dist.Normal(x + 2.0, 1.5).log_prob(Y).sum() + dist.Bernoulli(0.3).log_prob(1)
    # In the space of each block: unconstrained for NUTS, with the Jacobian of the logarithm.
    right = (
        rest + dist.Normal(-0.5, 0.6).log_prob(jnp.log(1.5)),
        rest + dist.LogNormal(-0.5, 0.6).log_prob(1.5),
    )
    got = [-block.potential_energy for block in new.block_states]
    np.testing.assert_allclose(got, right, rtol=1e-5)


def test_a_composite_within_a_composite_is_refused():
    nested = Gibbs([(composite(), ["scale", "k"])])
    with pytest.raises(TypeError, match="`inner_kernel` is a `Gibbs` with a `Gibbs` among its blocks"):
        RTKGibbs(nested)


def accept_probs_after_a_change():
    """Of a step that hardly moves, after what encloses the kernel has changed, either way: 1 where the energy
    that it starts from is the one of now.
    """
    fixed = {"adapt_step_size": False, "adapt_mass_matrix": False}
    inner = HMC(both, step_size=1e-3, trajectory_length=1e-3, **fixed)
    kernel = RTKGibbs(inner, **OPTIONS).wrap_model(conditioned)
    step = jax.jit(lambda state, k: kernel.sample(state, (Y,), with_conditioning({}, {"k": k})))
    found = []
    for k in jnp.array([0, 1]):
        state = kernel.init(jr.key(0), 0, None, (Y,), with_conditioning({}, {"k": k}))
        found.append(float(step(state, 1 - k).block_states[1].accept_prob))
    return found


@pytest.mark.slow
def test_as_a_block_it_knows_what_has_changed(monkeypatch):
    np.testing.assert_allclose(accept_probs_after_a_change(), 1.0, atol=1e-2)
    monkeypatch.setattr("numpyro_rtk._numpyro._gibbs.refresh", lambda kernel, state, args, kwargs: state)
    assert min(accept_probs_after_a_change()) < 0.9


@pytest.mark.slow
def test_sequential_chains():
    mcmc = run(RTKGibbs(HMC(unknown_noise), **OPTIONS), Y, chain_method="sequential")
    draws = mcmc.get_samples(group_by_chain=True)
    assert draws["x"].shape == (2, 30, 3)
    assert draws["scale"].shape == draws["ratio"].shape == (2, 30)
    assert np.all(np.isfinite(np.asarray(draws["x"])))
    assert np.all(np.ptp(np.asarray(draws["scale"]), axis=1) > 0)


@pytest.mark.slow
def test_a_start_that_was_given_is_kept():
    """Constrained values of any latents; a restart draws no site anew that was given."""
    kernel = RTKGibbs(NUTS(unknown_noise), sweep_prob=0.0, **OPTIONS)
    params = {"x": jnp.array([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]]), "scale": jnp.array([1.0, 2.0])}
    state = kernel.init(jr.split(jr.key(0)), 10, params, (Y,), {})
    np.testing.assert_array_equal(state.z["x"], params["x"])
    np.testing.assert_array_equal(state.block_states[0].z["x"], params["x"])
    np.testing.assert_allclose(state.z["scale"], np.log(params["scale"]), rtol=1e-6)
    # What the inner kernel has cached belongs to this start.
    potential = [
        float(-dist.Normal(x, scale).log_prob(Y).sum() - dist.Normal(-0.5, 0.6).log_prob(jnp.log(scale)))
        for x, scale in zip(params["x"], params["scale"], strict=True)
    ]
    np.testing.assert_allclose(state.block_states[1].potential_energy, potential, rtol=1e-5)
    # The first iteration of a warmup is a restart unless the start was given.
    state = jax.jit(lambda state: kernel.sample(state, (Y,), {}))(state)
    assert not np.any(state.block_states[0].depth)
    one = kernel.init(jr.key(0), 10, {"scale": jnp.asarray(1.5)}, (Y,), {})
    np.testing.assert_allclose(one.z["scale"], np.log(1.5), rtol=1e-6)
    assert bool(one.block_states[0].shared.restarts)


def hierarchical(y):
    """A latent between the diffusion site and the data: part of what the site's moves see."""
    x = numpyro.sample("x", SCALAR)
    z = numpyro.sample("z", dist.Normal(x, 0.5))
    numpyro.sample("y", dist.Normal(z, 0.5), obs=y)


@pytest.mark.slow
def test_a_latent_that_depends_on_the_diffusion_site():
    mcmc = run(RTKGibbs(NUTS(hierarchical), **OPTIONS), 1.5, num_warmup=200, num_samples=2000, num_chains=4)
    draws = mcmc.get_samples(group_by_chain=True)
    assert np.all(np.abs(z_scores(draws["x"], 1.0, np.sqrt(1 / 3))) < Z_MAX)
    # z given y alone: prior variance 1.25, noise 0.25.
    assert np.all(np.abs(z_scores(draws["z"], 1.25, np.sqrt(1.25 * 0.25 / 1.5))) < Z_MAX)


def correlated(y):
    a = numpyro.sample("a", dist.LogNormal(0.0, 0.5))
    x = numpyro.sample("x", SCALAR)
    numpyro.sample("y", dist.Normal(a * jnp.exp(0.5 * x), 0.4), obs=y)


@pytest.mark.slow
def test_a_correlated_pair_against_quadrature():
    mcmc = run(RTKGibbs(NUTS(correlated), **OPTIONS), 1.5, num_warmup=300, num_samples=4000, num_chains=4)
    draws = mcmc.get_samples(group_by_chain=True)
    u, x = np.meshgrid(np.linspace(-3, 3, 801), np.linspace(-5, 5, 801), indexing="ij")
    log_density = (
        stats.norm.logpdf(u, 0, 0.5) + stats.norm.logpdf(x) + stats.norm.logpdf(1.5, np.exp(u + 0.5 * x), 0.4)
    )
    weights = np.exp(log_density)
    weights /= weights.sum()
    for values, grid in ((np.log(np.asarray(draws["a"], np.float64)), u), (draws["x"], x)):
        mean = (weights * grid).sum()
        assert np.all(np.abs(z_scores(values, mean, np.sqrt((weights * (grid - mean) ** 2).sum()))) < Z_MAX)
    product = np.log(np.asarray(draws["a"], np.float64)) * np.asarray(draws["x"], np.float64)
    mean = (weights * u * x).sum()
    error = product.std() / np.sqrt(effective_sample_size(product))
    assert abs(product.mean() - mean) < Z_MAX * error
