"""`ScoreHMC`: the law, the cost, and everything NumPyro and ArviZ expect of a kernel."""

import functools
import pickle

import arviz as az
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import DiscreteGibbs, Gibbs, HMC, MCMC, NUTS
from scipy import stats

import numpyro_rtk as rtk
from numpyro_rtk import DiffusionPrior, ScoreHMC
from numpyro_rtk._numpyro import _score_hmc_chain
from tests.helpers import Counter, run_mcmc


# NumPyro donates buffers that cannot be re-used when `MCMC` runs under `jax.vmap`, whatever the kernel.
pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers were not usable:UserWarning")

# False-alarm level of a single comparison, as elsewhere in the suite.
P_MIN = 2.5e-5
Z_MAX = stats.norm.isf(P_MIN / 2)
T_MIN = rtk.OU().t_min


def standard_normal(x, t):
    """Score of N(0, I) data under `OU()`, at every noise level."""
    del t
    return -x


def skewed_energy(x, t):
    """`-log p` of log Exp(1) in every coordinate at `t_min`, which is all that the posterior depends on; N(0,
    I) above.
    """
    return jnp.where(t < 1.01 * T_MIN, jnp.sum(jnp.exp(x) - x), 0.5 * jnp.sum(x**2))


def skewed_score(x, t):
    return jnp.where(t < 1.01 * T_MIN, 1 - jnp.exp(x), -x)


# NumPyro and ArviZ draw from the prior when they trace a model, and each draw compiles a reverse pass: a
# short one here.
prior_of = functools.partial(DiffusionPrior, segments=2, reverse=rtk.GaussianTransition())

GAUSSIAN = prior_of(standard_normal, (10,))
SCALAR = prior_of(standard_normal, ())
SKEWED = prior_of(skewed_score, (4,))
SKEWED_SCALAR = prior_of(skewed_score, ())
SKEWED_ENERGY = prior_of(rtk.EnergyScore(skewed_energy), (4,))


def denoising(y):
    """design.md, section 1: the mean is 0.8 y, the sd sqrt(0.2)."""
    x = numpyro.sample("x", GAUSSIAN)
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def correlated_pair(y):
    """A diffusion site times an unknown amplitude; the likelihood is a thin curved ridge."""
    a = numpyro.sample("a", dist.LogNormal(0.0, 0.5))
    x = numpyro.sample("x", SKEWED_SCALAR)
    product = numpyro.deterministic("product", a * jnp.exp(0.5 * x))
    numpyro.sample("y", dist.Normal(product, 0.2), obs=y)


# A given mass matrix and start leave out the prior draws of `init`, which take a second each to compile.
QUICK = functools.partial(ScoreHMC, inverse_mass_matrix=np.ones(10))
START = {"init_params": {"x": np.zeros(10, np.float32)}}
FIELDS = (
    "energy",
    "diverging",
    "accept_prob",
    "num_steps",
    "num_score_evals",
    "unresolved",
    "adapt_state.step_size",
)
run = functools.partial(run_mcmc, num_warmup=300, num_samples=500, num_chains=4, extra_fields=FIELDS)
Y = 2.0 * np.ones(10, np.float32)


def z_score(draws, expected):
    """Of a mean over chains and iterations, shape `(chains, iterations)`."""
    draws = np.asarray(draws, np.float64)
    error = draws.std() / np.sqrt(effective_sample_size(draws))
    return (draws.mean() - expected) / error


@pytest.fixture(scope="module")
def gaussian_run():
    return run(ScoreHMC(denoising), Y)


@pytest.mark.slow
def test_the_case_of_the_constant_log_prob(gaussian_run):
    x = np.asarray(gaussian_run.get_samples(group_by_chain=True)["x"])
    for i in range(10):
        assert abs(z_score(x[..., i], 1.6)) < Z_MAX
        assert abs(z_score((x[..., i] - 1.6) ** 2, 0.2)) < Z_MAX
    assert not np.any(gaussian_run.get_extra_fields()["diverging"])
    assert 0.8 < np.mean(gaussian_run.get_extra_fields()["accept_prob"]) < 0.99
    # The mean itself, so that large errors cannot make the test easy.
    np.testing.assert_allclose([x.mean(), x.std()], [1.6, 0.447], rtol=0.02)


def test_statistics_in_arviz(gaussian_run):
    data = az.from_numpyro(gaussian_run)
    assert {"energy", "diverging", "acceptance_rate", "step_size"} <= set(data.sample_stats)
    # Trajectories start from fresh momentum: E[(dE)^2] / Var(E) of independent draws is at least 1.
    assert np.all(bfmi(data.sample_stats["energy"]) > 0.6)


def bfmi(energy):
    energy = np.asarray(energy)
    return np.sum(np.diff(energy, axis=1) ** 2, axis=1) / (energy.shape[1] * np.var(energy, axis=1))


def exact_denoising(y):
    x = numpyro.sample("x", dist.Normal(0, 1).expand([10]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


@pytest.mark.slow
def test_bfmi_agrees_with_hmc_on_the_exact_density():
    ours = run(ScoreHMC(denoising), Y, num_samples=2000)
    exact = run(
        HMC(exact_denoising, trajectory_length=np.pi / 2), Y, num_samples=2000, extra_fields=("energy",)
    )
    energies = [np.asarray(mcmc.get_extra_fields(group_by_chain=True)["energy"]) for mcmc in (ours, exact)]
    values = [bfmi(energy).mean() for energy in energies]
    assert abs(values[0] - values[1]) < 0.15
    # The energy itself, up to a constant: both have the variance of d chi-squared halves.
    variances = [
        np.var(np.asarray(mcmc.get_extra_fields(group_by_chain=True)["energy"]), axis=1).mean()
        for mcmc in (ours, exact)
    ]
    np.testing.assert_allclose(variances, 10, rtol=0.2)


# Exact draws stay exact. Every chain starts from its own draw; the last iterations are independent.
def stationary(prior, step_size, num_chains=4000):
    def model():
        numpyro.sample("x", prior)

    kernel = ScoreHMC(
        model,
        step_size=step_size,
        inverse_mass_matrix=np.ones(4),
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )
    start = np.log(np.random.default_rng(0).exponential(size=(num_chains, 4))).astype(np.float32)
    state = kernel.init(jr.split(jr.key(1), num_chains), 0, {"x": start}, (), {})
    many = jax.jit(lambda state: jax.lax.fori_loop(0, 10, lambda _, s: kernel.sample(s, (), {}), state))
    return np.asarray(many(state).z["x"], np.float64)


def p_values(draws):
    exact = stats.gumbel_l
    values = [stats.kstest(draws[:, 0], exact.cdf).pvalue]
    for power in (1, 2):
        mean, variance = exact.moment(power), exact.moment(2 * power) - exact.moment(power) ** 2
        z = (np.mean(draws**power) - mean) / np.sqrt(variance / draws.size)
        values.append(2 * stats.norm.sf(abs(z)))
    return values


# With an energy the law is exact at any step size, from the score up to the fourth order.
@pytest.mark.parametrize(
    ("prior", "step_size"), [(SKEWED, 0.4), (SKEWED_ENERGY, 0.9)], ids=["score", "energy"]
)
def test_exact_draws_stay_exact(prior, step_size):
    assert min(p_values(stationary(prior, step_size))) > P_MIN


@pytest.mark.parametrize("broken", ["no accept step", "sign", "kinetic energy left out"])
def test_a_broken_kernel_is_caught(monkeypatch, broken):
    original = _score_hmc_chain.leapfrog

    def leapfrog(*args, **options):
        end = original(*args, **options)
        kinetic = end.energy_error - end.potential_difference
        error = {
            "no accept step": -jnp.ones_like(end.energy_error),
            "sign": -end.energy_error,
            "kinetic energy left out": end.energy_error - kinetic,
        }
        return end._replace(energy_error=error[broken])

    monkeypatch.setattr(_score_hmc_chain, "leapfrog", leapfrog)
    assert min(p_values(stationary(SKEWED_ENERGY, 0.9))) < P_MIN


def quadrature():
    """Means and variances of `log a` and `x` in `correlated_pair` with y = 1.5."""
    log_a, x = np.meshgrid(np.linspace(-4, 6, 2001), np.linspace(-14, 5, 2001), indexing="ij")
    log_p = -0.5 * (log_a / 0.5) ** 2 + x - np.exp(x) - 0.5 * ((np.exp(log_a + 0.5 * x) - 1.5) / 0.2) ** 2
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    moments = {}
    for name, value in {"log_a": log_a, "x": x}.items():
        mean = np.sum(p * value)
        moments[name] = mean, np.sum(p * (value - mean) ** 2)
    return moments


@pytest.mark.slow
def test_correlated_pair_agrees_with_quadrature():
    mcmc = run(ScoreHMC(correlated_pair, target_accept_prob=0.95), 1.5, num_samples=1500)
    draws = mcmc.get_samples(group_by_chain=True)
    np.testing.assert_allclose(draws["product"], draws["a"] * np.exp(0.5 * draws["x"]), rtol=1e-4)
    values = {"log_a": np.log(draws["a"]), "x": draws["x"]}
    for name, (mean, variance) in quadrature().items():
        assert abs(z_score(values[name], mean)) < Z_MAX
        assert abs(z_score((values[name] - mean) ** 2, variance)) < Z_MAX


MIXTURE = rtk.GaussianMixtureScore([0.6, 0.4], [[-0.2], [1.2]], [[[0.5]], [[0.15]]], rtk.OU())


def mixture_score(x, t):
    """Without its energy, and a coherent law at all levels, as particle Gibbs needs."""
    return MIXTURE(x, t)


def thin_ridge(y):
    """Posterior correlation of `log a` and `x`: -0.95."""
    a = numpyro.sample("a", dist.LogNormal(0.0, 0.5))
    x = numpyro.sample("x", prior_of(mixture_score, (1,)))
    numpyro.sample("y", dist.Normal(a * x[0], 0.1), obs=y)


@pytest.mark.slow
def test_a_thin_ridge_against_quadrature():
    mcmc = run(ScoreHMC(thin_ridge), 1.5, num_samples=3000)
    log_a, x = np.meshgrid(np.linspace(-3, 4, 1501), np.linspace(0.01, 5, 1501), indexing="ij")
    log_prior = np.asarray(
        jax.vmap(lambda x: MIXTURE.log_density(x[None], T_MIN))(jnp.asarray(x[0], jnp.float32))
    )
    log_p = -0.5 * (log_a / 0.5) ** 2 + log_prior[None] - 0.5 * ((np.exp(log_a) * x - 1.5) / 0.1) ** 2
    p = np.exp(log_p - log_p.max()) / np.sum(np.exp(log_p - log_p.max()))
    draws = mcmc.get_samples(group_by_chain=True)
    values = {"log_a": np.log(draws["a"]), "x": np.asarray(draws["x"])[..., 0]}
    for name, grid in {"log_a": log_a, "x": x}.items():
        mean = np.sum(p * grid)
        assert abs(z_score(values[name], mean)) < Z_MAX
        assert abs(z_score((values[name] - mean) ** 2, np.sum(p * (grid - mean) ** 2))) < Z_MAX


def skewed_10(density):
    prior = prior_of(skewed_score if density == "score" else rtk.EnergyScore(skewed_energy), (10,))
    return lambda: numpyro.sample("x", prior)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is not the score of its own draws")
def test_no_chain_runs_away():
    # Without the check of coarse paths one of these four chains went to -900, and said so by nothing but its
    # BFMI.
    mcmc = run(ScoreHMC(skewed_10("score")), num_warmup=500, num_samples=4000)
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"], np.float64)
    np.testing.assert_allclose([x.mean(), x.var()], [-np.euler_gamma, np.pi**2 / 6], rtol=0.03)
    assert x.min() > -25


@pytest.mark.slow
def test_one_evaluation_per_leapfrog_step():
    counter = Counter(standard_normal)
    counter.schedule = rtk.OU()
    prior = prior_of(counter, (3,))

    def model():
        with numpyro.plate("n", 2):
            numpyro.sample("x", prior)
        numpyro.sample("s", dist.LogNormal(0, 1))

    kernel = ScoreHMC(model, inverse_mass_matrix=np.ones(7))
    mcmc = MCMC(kernel, num_warmup=20, num_samples=30, progress_bar=False)
    mcmc.warmup(jr.key(0))
    before = counter.count
    mcmc.run(jr.key(1), extra_fields=FIELDS)
    fields = mcmc.get_extra_fields()
    # The two events of the plate both count; `run` after `warmup` repeats no start.
    np.testing.assert_array_equal(fields["num_score_evals"], 2 * fields["num_steps"])
    assert counter.count - before == np.sum(fields["num_score_evals"])


def rotated():
    x = numpyro.sample("x", prior_of(standard_normal, (2,)))
    numpyro.sample("y", dist.Normal(x[0] + x[1], 0.1), obs=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("dense_mass", [True, pytest.param([("x",)], marks=pytest.mark.slow)])
def test_dense_mass(dense_mass):
    mcmc = run(ScoreHMC(rotated, dense_mass=dense_mass), num_chains=1, num_warmup=500, num_samples=100)
    (inverse,) = mcmc.last_state.adapt_state.inverse_mass_matrix.values()
    precision = np.eye(2) + 100 * np.ones((2, 2))
    np.testing.assert_allclose(inverse, np.linalg.inv(precision), atol=0.2)
    assert inverse[0, 1] < -0.3
    assert mcmc.last_state.adapt_state.step_size > 0.5


def test_given_settings_are_used_as_they_are():
    fixed = {"adapt_step_size": False, "adapt_mass_matrix": False}
    kernel = ScoreHMC(
        denoising, step_size=0.3, inverse_mass_matrix=0.2 * np.ones(10), max_num_steps=3, **fixed
    )
    mcmc = run(kernel, Y, num_warmup=5, num_samples=5, num_chains=1, init_params={"x": jnp.zeros(10)})
    state = mcmc.last_state
    assert state.adapt_state.step_size == np.float32(0.3)
    np.testing.assert_array_equal(state.adapt_state.inverse_mass_matrix[("x",)], np.float32(0.2))
    assert np.max(mcmc.get_extra_fields()["num_steps"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "chain_method",
    ["sequential", "parallel"],
)
def test_chain_methods(chain_method):
    kernel = ScoreHMC(correlated_pair)
    mcmc = MCMC(
        kernel,
        num_warmup=10,
        num_samples=10,
        num_chains=2,
        thinning=2,
        chain_method=chain_method,
        progress_bar=False,
    )
    mcmc.run(jr.key(0), 1.5, extra_fields=FIELDS)
    samples = mcmc.get_samples(group_by_chain=True)
    assert {name: value.shape for name, value in samples.items()} == dict.fromkeys(
        ("a", "product", "x"), (2, 5)
    )
    assert np.all(np.asarray(samples["a"]) > 0)
    assert not np.allclose(samples["x"][0], samples["x"][1])


def test_going_on_and_pickling():
    mcmc = run(QUICK(denoising), Y, num_warmup=20, num_samples=5, num_chains=1, **START)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jr.key(3), Y, **START)
    assert mcmc.last_state.i == mcmc.post_warmup_state.i + 5
    assert mcmc.last_state.adapt_state.step_size == mcmc.post_warmup_state.adapt_state.step_size
    copy = pickle.loads(pickle.dumps(mcmc))
    np.testing.assert_array_equal(copy.get_samples()["x"], mcmc.get_samples()["x"])
    copy.run(jr.key(3), Y, **START)
    np.testing.assert_array_equal(copy.get_samples()["x"], mcmc.get_samples()["x"])


def test_another_network_is_refused():
    def make(scale):
        prior = prior_of(functools.partial(scaled_score, jnp.asarray(scale)), (3,))
        return ScoreHMC(lambda: numpyro.sample("x", prior))

    kernel = make(1.0)
    state = kernel.init(jr.key(0), 2, {"x": jnp.zeros(3)}, (), {})
    kernel.sample(state, (), {})
    with pytest.raises(ValueError, match="other network weights"):
        make(1.1).sample(state, (), {})


def scaled_score(scale, x, t):
    del t
    return -scale * x


@pytest.mark.slow
# Scores of N(0, 1 / scale) at every time, which no noising has.
@pytest.mark.filterwarnings("ignore:.*is not the score of its own draws:UserWarning")
def test_a_network_among_the_arguments():
    def model(scale):
        numpyro.sample("x", prior_of(functools.partial(scaled_score, scale), (5,)))

    mcmc = MCMC(ScoreHMC(model), num_warmup=200, num_samples=400, jit_model_args=True, progress_bar=False)
    mcmc.run(jr.key(0), jnp.asarray(1.1))
    first = mcmc.get_samples()["x"].std()
    mcmc.run(jr.key(0), jnp.asarray(0.9))
    assert mcmc.get_samples()["x"].std() > first


def with_scale(y):
    x = numpyro.sample("x", GAUSSIAN)
    c = numpyro.sample("c", dist.Bernoulli(0.5))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(x, 0.5 + s + c).to_event(1), obs=y)


@pytest.mark.slow
def test_block_of_gibbs():
    kernel = Gibbs(
        [(DiscreteGibbs(with_scale), ["c"]), (QUICK(with_scale), ["x"]), (NUTS(with_scale), ["s"])]
    )
    mcmc = MCMC(kernel, num_warmup=50, num_samples=50, progress_bar=False)
    mcmc.run(jr.key(0), Y, extra_fields=("block_states.1.accept_prob", "block_states.1.diverging"))
    samples = mcmc.get_samples()
    assert samples["x"].shape == (50, 10)
    assert np.mean(mcmc.get_extra_fields()["block_states.1.accept_prob"]) > 0.6
    assert len(np.unique(np.asarray(samples["c"]))) == 2


def constrained_block(y):
    x = numpyro.sample("x", SCALAR)
    a = numpyro.sample("a", dist.LogNormal(0.0, 0.5))
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(a * x + m, 0.5), obs=y)


@pytest.mark.slow
def test_refresh_evaluates_no_score():
    counter = Counter(standard_normal)
    counter.schedule = rtk.OU()

    def model(y):
        x = numpyro.sample("x", prior_of(counter, (2,)))
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    kernel = ScoreHMC(model)
    state = kernel.init(jr.key(0), 0, None, (jnp.zeros(2),), {})
    before = counter.count
    fresh = kernel.refresh(state, (jnp.ones(2),), {})
    assert counter.count == before
    # The start that a kernel finds by itself depends on the data.
    direct = kernel.init(jr.key(0), 0, state.z, (jnp.ones(2),), {})
    np.testing.assert_allclose(fresh.potential, direct.potential, rtol=1e-6)
    np.testing.assert_allclose(fresh.gradient["x"], direct.gradient["x"], rtol=1e-6)
    np.testing.assert_allclose(fresh.relative_potential_energy, direct.potential - state.potential, rtol=1e-5)


@pytest.mark.slow
def test_gibbs_with_constrained_siblings_agrees_with_nuts():
    def exact(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        a = numpyro.sample("a", dist.LogNormal(0.0, 0.5))
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(a * x + m, 0.5), obs=y)

    kernel = Gibbs([(ScoreHMC(constrained_block), ["x", "a"]), (NUTS(constrained_block), ["m"])])
    ours = MCMC(kernel, num_warmup=500, num_samples=4000, progress_bar=False)
    ours.run(jr.key(0), 1.5)
    nuts = MCMC(NUTS(exact), num_warmup=500, num_samples=4000, progress_bar=False)
    nuts.run(jr.key(1), 1.5)
    for name in ("x", "a", "m"):
        values = [np.asarray(mcmc.get_samples(group_by_chain=True)[name]) for mcmc in (ours, nuts)]
        for power in (1, 2):
            draws = [value**power for value in values]
            errors = [value.std() / np.sqrt(effective_sample_size(value)) for value in draws]
            assert abs(draws[0].mean() - draws[1].mean()) < Z_MAX * np.hypot(*errors)


def discrete():
    numpyro.sample("x", SCALAR)
    numpyro.sample("k", dist.Poisson(3.0))


def no_diffusion():
    numpyro.sample("x", dist.Normal(0, 1))


def impossible():
    x = numpyro.sample("x", SCALAR)
    numpyro.factor("f", jnp.where(x < jnp.inf, -jnp.inf, 0.0))


def simple():
    numpyro.sample("x", GAUSSIAN)


def with_dynamic_support():
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("x", SCALAR)
    numpyro.sample("b", dist.Uniform(a, a + 1))


@pytest.mark.parametrize(
    ("model", "options", "init_params", "error", "match"),
    [
        (discrete, {}, None, ValueError, r"discrete latent sites \['k'\].*RTKGibbs\(Discrete"),
        (no_diffusion, {}, None, ValueError, "needs a model with a latent `DiffusionPrior`"),
        (
            simple,
            {},
            {"y": np.zeros(10)},
            ValueError,
            r"`init_params` has \['y'\], but the latents are \['x'\]",
        ),
        (simple, {}, {"x": np.zeros(9)}, ValueError, r"`init_params\['x'\]` has shape \(9,\)"),
        (simple, {}, {"x": np.full(10, np.nan)}, ValueError, r"`init_params\['x'\]` contains NaN"),
        (simple, {}, np.zeros(10), TypeError, "`init_params` must be a dict"),
        (simple, {"dense_mass": [("y",)]}, None, ValueError, "`dense_mass=.*the latents are"),
        (
            simple,
            {"inverse_mass_matrix": np.ones(3)},
            None,
            ValueError,
            "`inverse_mass_matrix` of .* must have shape",
        ),
        (simple, {"inverse_mass_matrix": {("y",): np.ones(3)}}, None, ValueError, "they must name latents"),
    ],
)
def test_refused_at_init(model, options, init_params, error, match):
    with pytest.raises(error, match=match):
        ScoreHMC(model, **options).init(jr.key(0), 10, init_params, (), {})


@pytest.mark.slow
def test_impossible_start():
    with pytest.raises(
        (ValueError, RuntimeError), match=r"cannot start|Cannot find valid initial parameters"
    ):
        ScoreHMC(impossible).init(jr.key(0), 10, None, (), {})


def test_dynamic_support_in_a_composite():
    with pytest.raises(
        ValueError,
        match="support of site 'b' depends on latent site 'a', and `ScoreHMC`",
    ):
        Gibbs([(ScoreHMC(with_dynamic_support), ["x", "b"]), (NUTS(with_dynamic_support), ["a"])]).init(
            jr.key(0), 10, None, (), {}
        )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"step_size": 0.0}, ValueError, "`step_size` must be a positive number, got 0.0"),
        ({"trajectory_length": np.inf}, ValueError, "`trajectory_length` must be a positive number"),
        ({"target_accept_prob": 1.0}, ValueError, "`target_accept_prob` must be strictly between 0 and 1"),
        ({"max_num_steps": 0}, ValueError, "`max_num_steps` must be an integer of at least 2"),
        ({"dense_mass": ("x",)}, TypeError, "`dense_mass` must be True, False or a list"),
        ({"model": None}, TypeError, "`model` must be a NumPyro model"),
    ],
)
def test_refused_at_construction(options, error, match):
    with pytest.raises(error, match=match):
        ScoreHMC(**{"model": simple} | options)


def test_divergence_is_data():
    kernel = ScoreHMC(denoising, step_size=40.0, trajectory_length=400.0, adapt_step_size=False)
    mcmc = run(kernel, Y, num_warmup=0, num_samples=3, num_chains=1, init_params={"x": jnp.zeros(10)})
    assert np.all(mcmc.get_extra_fields()["diverging"])
    np.testing.assert_array_equal(mcmc.get_samples()["x"], 0.0)


@pytest.mark.slow
def test_values_are_unconstrained_and_draws_constrained():
    kernel = ScoreHMC(correlated_pair)
    state = kernel.init(jr.key(0), 0, {"a": jnp.array(0.7)}, (1.5,), {})
    np.testing.assert_allclose(state.z["a"], np.log(0.7), rtol=1e-6)
    constrained = kernel.get_constrain_fn((1.5,), {})(state.z)
    np.testing.assert_allclose(constrained["a"], 0.7, rtol=1e-6)
    assert set(constrained) == {"a", "x"}
    assert set(kernel.postprocess_fn((1.5,), {})(state.z)) == {"a", "x", "product"}
    assert kernel.model is correlated_pair


@pytest.mark.slow
# The grid is all at the data, so that the law is known in closed form: no score of noised data at its top.
@pytest.mark.filterwarnings("ignore:.*score_fn:UserWarning")
def test_a_short_warmup_takes_no_single_steps():
    """With one step a trajectory only the chord tells its energy error, to second order, and nothing sees it.

    After 100 iterations of warmup draws of a skewed law had a mean off by 0.2 sd and a variance by a quarter.
    """
    dim, chains = 6, 64

    def model():
        times = np.array([1.2e-3, 1e-3])
        x = numpyro.sample("x", DiffusionPrior(lambda x, t: 2 - 2 * jnp.exp(x), (dim,), segments=times))
        numpyro.factor("nothing", 0.0 * jnp.sum(x))

    # exp(x) has a gamma law of shape 2 and rate 2.
    start = jnp.log(jr.gamma(jr.key(1), 2.0, (chains, dim)) / 2)
    mcmc = MCMC(
        ScoreHMC(model),
        num_warmup=100,
        num_samples=200,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jr.key(0), init_params={"x": start}, extra_fields=("num_steps", "diverging"))
    extra = mcmc.get_extra_fields()
    assert extra["num_steps"][~extra["diverging"]].min() >= 2
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["x"], np.float64)
    # digamma(2) - log(2) and trigamma(2).
    mean, variance = 1 - np.euler_gamma - np.log(2), np.pi**2 / 6 - 1
    z = (draws - mean) / np.sqrt(variance)
    for by_chain, right in ((z.mean((1, 2)), 0.0), ((z**2).mean((1, 2)), 1.0)):
        assert abs(by_chain.mean() - right) < 0.02 + 4 * by_chain.std() / np.sqrt(chains)
