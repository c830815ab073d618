"""What the score of a diffusion site depends on, and what is refused for it, before anything is sampled."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import DiscreteGibbs, DiscreteHMCGibbs, Gibbs, MCMC, NUTS

import numpyro_rtk as rtk
from numpyro_rtk._numpyro._dependence import dependence
from numpyro_rtk._numpyro._sites import inspect_model
from numpyro_rtk._numpyro._tracing import user_model, without_diffusion


def prior(mean=0.0, shape=(2,), **options):
    return rtk.DiffusionPrior(lambda x, t: -(x - mean), shape, **options)


def inspect(model, *args, **kwargs):
    return inspect_model("Kernel", model, jr.key(0), args, kwargs)


# The walk.


def _while(a, b):
    return jax.lax.while_loop(lambda s: s[0] < a, lambda s: (s[0] + 1, s[1] * b), (0.0, 1.0))


def _carried(a, b):
    # `b` reaches the last place of the carry after three turns only.
    return jax.lax.scan(lambda c, _: ((b, c[0], c[1], c[3]), c[3]), (0.0, 0.0, 0.0, a), None, length=5)


def _callback(a, b):
    return jax.pure_callback(lambda a, b: np.float32(0.0), jax.ShapeDtypeStruct((), "float32"), a, b)


@jax.custom_jvp
def _custom(a, b):
    return a, 2.0 * b


_custom.defjvp(lambda primals, tangents: (_custom(*primals), tangents))

FUNCTIONS = {
    "shape": (lambda a, b: jnp.zeros(a.shape), [""]),
    "product with 0": (lambda a, b: 0 * a, ["a"]),
    "cast": (lambda a, b: a.astype(int).astype(float), ["a"]),
    "where": (lambda a, b: jnp.where(a > 0, 1.0, 2.0), ["a"]),
    "index": (lambda a, b: jnp.arange(3.0)[b.astype(int)], ["b"]),
    "jit": (lambda a, b: jax.jit(lambda a, b: (b, a))(a, b), ["b", "a"]),
    "closed over": (lambda a, b: jax.jit(lambda x: x * b)(1.0), ["b"]),
    "checkpoint": (lambda a, b: jax.checkpoint(lambda a, b: (a, b))(a, b), ["a", "b"]),
    "custom derivative": (_custom, ["a", "b"]),
    "cond": (lambda a, b: jax.lax.cond(a > 0, lambda: (b, 1.0), lambda: (2.0, 1.0)), ["ab", "a"]),
    "scan": (_carried, ["b", "b", "b", "a", "a"]),
    "scanned": (lambda a, b: jax.lax.scan(lambda c, x: (c, x), a, b[None]), ["a", "b"]),
    "while": (_while, ["ab", "ab"]),
    "fori": (lambda a, b: jax.lax.fori_loop(0, 3, lambda i, c: c + a, 0.0), ["a"]),
    "gradient of a scan": (
        lambda a, b: jax.jvp(lambda a: jax.lax.scan(lambda c, x: (c * a, x), a, b[None]), (a,), (a,)),
        ["a", "b", "a", ""],
    ),
    "gradient": (lambda a, b: jax.grad(lambda a: a**2 * b)(a), ["ab"]),
    "vmap": (lambda a, b: jax.vmap(lambda x: x * a)(jnp.ones(3)), ["a"]),
    "callback": (_callback, ["ab"]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_walk(name):
    function, expected = FUNCTIONS[name]

    def results(inputs):
        leaves = jax.tree.leaves(function(inputs["a"], inputs["b"]))
        return {str(i): leaf for i, leaf in enumerate(leaves)}

    found = dependence(results, {"b": jax.ShapeDtypeStruct((), "float32"), "a": jnp.zeros(())})
    assert ["".join(sorted(found[str(i)])) for i in range(len(found))] == expected


# Scores of latents.

MEANS = jnp.array([-1.0, 0.5, 3.0])
WAYS = {
    "index": lambda label: MEANS[label],
    "where": lambda label: jnp.where(label == 2, 1.0, 0.0),
    "cast": lambda label: label.astype(float),
    "scan": lambda label: jax.lax.scan(lambda c, _: (c + MEANS[label], None), 0.0, None, length=3)[0],
}


def labelled(y, way="index", shape=()):
    with numpyro.plate_stack("labels", shape):
        label = numpyro.sample("label", dist.Categorical(jnp.ones(3) / 3))
    numpyro.sample("x", prior(WAYS[way](label)))
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def unrelated(y):
    label = numpyro.sample("label", dist.Bernoulli(0.5))
    x = numpyro.sample("x", prior(jnp.zeros(jnp.shape(label))))
    numpyro.sample("y", dist.Normal(x[0] + label, 1.0), obs=y)


def two_sites(z=None):
    x = numpyro.sample("x", prior())
    numpyro.sample("z", prior(x[0] ** 2), obs=z)


@pytest.mark.parametrize("way", WAYS)
def test_an_integer_latent_is_a_latent(way):
    with pytest.raises(ValueError, match="score of diffusion site 'x' depends on latent site 'label'"):
        inspect(labelled, 0.3, way)


def test_a_latent_that_gives_a_shape_or_a_likelihood_only_is_fine():
    found = inspect(unrelated, 0.3)
    assert [site.name for site in found.diffusion] == ["x"]
    assert found.others == ("label",)


Z = jnp.array([1.0, 2.0])
TWO_SITES = {
    "latent": (two_sites, (), "The score of diffusion site 'z' depends on latent site 'x'"),
    "observed": (two_sites, (Z,), "The score of observed diffusion site 'z' depends on latent site 'x'"),
    "conditioned": (handlers.condition(two_sites, {"z": Z}), (), "observed diffusion site 'z' .* site 'x'"),
    "substituted": (handlers.substitute(two_sites, {"x": Z}), (), "diffusion site 'z' depends on .* 'x'"),
    "intervened": (handlers.do(two_sites, {"z": Z}), (), "diffusion site 'z' depends on latent site 'x'"),
}


@pytest.mark.parametrize("name", TWO_SITES)
def test_a_score_of_another_diffusion_site(name):
    model, args, message = TWO_SITES[name]
    with pytest.raises(ValueError, match=message):
        inspect(model, *args)


def test_what_is_fixed_is_no_latent():
    for handler in (handlers.condition, handlers.do):
        assert "z" in [site.name for site in inspect(handler(two_sites, {"x": Z})).diffusion]


def test_the_energy_of_a_score_counts():
    def model():
        a = numpyro.sample("a", dist.Normal())

        class Score(eqx.Module):
            def __call__(self, x, t):
                return -x

            def energy(self, x, t):
                return 0.5 * jnp.sum(x**2) + a

        numpyro.sample("x", rtk.DiffusionPrior(Score(), (2,)))

    with pytest.raises(ValueError, match="'x' depends on latent site 'a'"):
        inspect(model)


def test_an_observed_site_in_a_scan():
    def model(zs):
        numpyro.sample("x", prior())

        def body(carry, z):
            numpyro.sample("z", prior(carry), obs=z)
            return z[0], None

        scan(body, 0.0, zs)

    with pytest.raises(ValueError, match="'z' is inside a `scan`"):
        inspect(model, jnp.ones((3, 2)))


# Every kernel, in every running mode.

KERNELS = {
    "RTKParticleGibbs": lambda model: Gibbs(
        [(rtk.RTKParticleGibbs(model), ["x"]), (DiscreteGibbs(model), ["label"])]
    ),
    "RTKGibbs": lambda model: rtk.RTKGibbs(DiscreteGibbs(model)),
    "ScoreHMC": lambda model: Gibbs([(DiscreteGibbs(model), ["label"]), (rtk.ScoreHMC(model), ["x"])]),
}


@pytest.mark.parametrize(
    "method", ["sequential", "vectorized", jax.vmap], ids=["sequential", "vectorized", "vmap"]
)
@pytest.mark.parametrize("name", KERNELS)
def test_refused_in_every_running_mode(name, method):
    if method == "vectorized" and name != "RTKGibbs":
        pytest.skip("NumPyro's `Gibbs` has no vectorized chains")
    mcmc = MCMC(
        KERNELS[name](labelled),
        num_warmup=1,
        num_samples=1,
        num_chains=1 if method == "sequential" else 2,
        chain_method=method,
        progress_bar=False,
    )
    with pytest.raises(ValueError, match=f"'x' depends on latent site 'label', and `{name}` needs"):
        mcmc.run(jr.key(0), 0.3, "where")


def test_floating_latents_of_a_composite():
    def model():
        a = numpyro.sample("a", dist.Normal())
        numpyro.sample("x", prior(a))

    for kernel in (rtk.RTKGibbs(NUTS(model)), rtk.RTKGibbs(rtk.ScoreHMC(model)), rtk.ScoreHMC(model)):
        with pytest.raises(ValueError, match="'x' depends on latent site 'a'"):
            kernel.init(jr.key(0), 1, None, (), {})


# Models.


def counts(y, sd=0.0):
    x = numpyro.sample("x", prior(2.0))
    numpyro.sample("y", dist.Poisson(x + sd).to_event(1), obs=y)


class Counts(eqx.Module):
    """A model with an array; Equinox modules have no `__name__`, and `==` compares their arrays."""

    sd: jax.Array

    def __call__(self, y):
        counts(y, self.sd)


class Callable:
    def __call__(self, y, sd):
        counts(y, sd)


@pytest.mark.parametrize(
    "model",
    [counts, Counts(jnp.ones(2)), functools.partial(Callable(), sd=0.1)],
    ids=["function", "module", "partial"],
)
def test_any_callable_is_a_model_and_placeholders_are_not_validated(model):
    y = jnp.array([1, 2])
    assert [site.name for site in inspect(model, y).diffusion] == ["x"]
    assert user_model(without_diffusion(model)) is model
    kernel = rtk.RTKGibbs(NUTS(model))
    assert user_model(kernel.blocks[1][0].model) is model


def test_validation_is_on_again():
    inspect(counts, jnp.ones(2, int))
    with pytest.raises(ValueError, match="invalid rate"):
        dist.Poisson(-1.0)


# Words that work.


def test_the_lines_for_missing_values_work():
    y = jnp.array([0.4, jnp.nan, -1.0])
    lines = []

    def model(y, text=None):
        x = numpyro.sample("x", rtk.DiffusionPrior(lambda x, t: -(x - 0.5) / 4.0, (3,)))
        if text is None:
            numpyro.sample("y", dist.Normal(x, 0.7).to_event(1), obs=y)
        else:
            names = {"jnp": jnp, "y": y, "numpyro": numpyro, "dist": dist}
            exec("\n".join(text).replace("Normal(...)", "Normal(x, 0.7)"), names | {"x": x})

    with pytest.raises(ValueError, match="'y' has 1 NaN") as error:
        inspect(model, y)
    lines = [line.strip() for line in str(error.value).splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    inspect(model, y, lines)
    x = jnp.array([0.1, 5.0, -0.2])
    trace = handlers.trace(handlers.substitute(without_diffusion(model), {"x": x})).get_trace(y, lines)
    kept = jnp.array([True, False, True])
    right = dist.Normal(x, 0.7).mask(kept).log_prob(jnp.nan_to_num(y))
    np.testing.assert_allclose(trace["y"]["fn"].log_prob(trace["y"]["value"]).sum(), right.sum(), rtol=1e-6)


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.slow
def test_discrete_latents_are_told_the_kernel_that_works(more):
    def model(y):
        label = numpyro.sample("label", dist.Bernoulli(0.4))
        shift = numpyro.sample("shift", dist.Normal()) if more else 0.0
        x = numpyro.sample("x", prior())
        numpyro.sample("y", dist.Normal(x + label + shift, 1.0).to_event(1), obs=y)

    advice = "RTKGibbs(DiscreteHMCGibbs(NUTS(model)))" if more else "RTKGibbs(DiscreteGibbs(model))"
    names = {"model": model, "RTKGibbs": rtk.RTKGibbs, "NUTS": NUTS, "DiscreteGibbs": DiscreteGibbs}
    names["DiscreteHMCGibbs"] = numpyro.infer.DiscreteHMCGibbs
    for kernel in (rtk.RTKGibbs(NUTS(model)), rtk.ScoreHMC(model)):
        with pytest.raises(ValueError, match=r"discrete latent sites \['label'\]") as error:
            kernel.init(jr.key(0), 1, None, (Z,), {})
        assert f"`{advice}`" in str(error.value)
    state = eval(advice, names).init(jr.key(0), 1, None, (Z,), {})
    assert {"label", "x"} <= set(state.z)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RTKParticleGibbs", "RTKGibbs", "ScoreHMC"])
def test_a_rate_without_a_link(name):
    def model(y):
        x = numpyro.sample("x", rtk.DiffusionPrior(score_of_rates, (4,)))
        numpyro.sample("y", dist.Poisson(x).to_event(1), obs=y)

    def score_of_rates(x, t):
        alpha, sigma = jnp.exp(-t), jnp.sqrt(-jnp.expm1(-2 * t))
        return -(x - 5.0 * alpha) / (0.25 * alpha**2 + sigma**2)

    kernel = {
        "RTKParticleGibbs": lambda: rtk.RTKParticleGibbs(model, segments=12, num_pilot_draws=32),
        "RTKGibbs": lambda: rtk.RTKGibbs(NUTS(model), segments=12, num_pilot_draws=32),
        "ScoreHMC": lambda: rtk.ScoreHMC(model),
    }[name]()
    mcmc = MCMC(kernel, num_warmup=150, num_samples=600, progress_bar=False)
    mcmc.run(jr.key(0), jnp.full(4, 9))
    grid = np.linspace(2.0, 9.0, 2001)
    log_posterior = -((grid - 5.0) ** 2) / 0.5 + 9 * np.log(grid) - grid
    weights = np.exp(log_posterior - log_posterior.max())
    right = weights @ grid / weights.sum()
    np.testing.assert_allclose(np.asarray(mcmc.get_samples()["x"]).mean(), right, atol=0.08)
    # The data move the mean by more than that.
    assert abs(right - 5.0) > 0.15


@pytest.mark.slow
def test_the_posterior_with_missing_values_written_as_the_message_says():
    y = jnp.array([1.5, jnp.nan, -1.0])

    def model(y):
        x = numpyro.sample("x", rtk.DiffusionPrior(lambda x, t: -x, (3,)))
        observed = ~jnp.isnan(y)
        numpyro.sample("y", dist.Normal(x, 0.5).mask(observed).to_event(1), obs=jnp.nan_to_num(y))

    kernel = rtk.RTKParticleGibbs(model, segments=12, num_pilot_draws=32)
    mcmc = MCMC(kernel, num_warmup=150, num_samples=800, progress_bar=False)
    mcmc.run(jr.key(0), y)
    draws = np.asarray(mcmc.get_samples()["x"])
    np.testing.assert_allclose(draws.mean(0), [1.2, 0.0, -0.8], atol=0.15)
    np.testing.assert_allclose(draws.std(0), [0.2**0.5, 1.0, 0.2**0.5], rtol=0.12)


# What is observed of a diffusion site, and supports.


def residuals(y):
    """The diffusion model as a law of noise."""
    x = numpyro.sample("x", prior())
    numpyro.sample("e", prior(), obs=y - x)


def weighted(y, how):
    numpyro.sample("x", prior())
    label = numpyro.sample("label", dist.Bernoulli(0.5))
    if how == "scale":
        with numpyro.handlers.scale(scale=1.0 + label):
            numpyro.sample("e", prior(), obs=y)
    else:
        numpyro.sample("e", prior().mask(label == 1), obs=y)


@pytest.mark.parametrize("make", [rtk.RTKParticleGibbs, rtk.ScoreHMC])
def test_an_observed_diffusion_site_whose_value_depends_on_a_latent(make):
    match = "mask or condition of observed diffusion site 'e' depends on latent site 'x'.*numpyro.factor"
    with pytest.raises(ValueError, match=match):
        make(residuals).init(jr.key(0), 10, None, (jnp.zeros(2),), {})


@pytest.mark.parametrize("how", ["scale", "mask"])
def test_an_observed_diffusion_site_whose_weight_depends_on_a_latent(how):
    with pytest.raises(ValueError, match="observed diffusion site 'e' depends on latent site 'label'"):
        inspect(weighted, jnp.zeros(2), how)


def bounded(how):
    x = numpyro.sample("x", prior(shape=()))
    u = numpyro.sample("u", dist.Uniform(0.0, 1.0))
    law = {
        "less than": lambda: dist.TruncatedNormal(0.0, 1.0, high=x),
        "interval": lambda: dist.Uniform(0.0, jnp.exp(x)),
        "event": lambda: dist.Uniform(0.0, jnp.exp(x)).expand([2]).to_event(1),
        "another latent": lambda: dist.Uniform(u, 2.0),
    }
    numpyro.sample("b", law[how]())


@pytest.mark.parametrize("inner", [NUTS, lambda model: DiscreteHMCGibbs(NUTS(model)), rtk.ScoreHMC])
@pytest.mark.parametrize("how", ["less than", "interval", "event", "another latent"])
def test_supports_that_depend_on_what_moves_in_turn(how, inner):
    on = "'u'" if how == "another latent" else "'x'"
    with pytest.raises(ValueError, match=f"support of site 'b' depends on latent site {on}, and `RTKGibbs`"):
        rtk.RTKGibbs(inner(bounded)).init(jr.key(0), 10, None, (how,), {})


def bounded_by_data(y, width):
    x = numpyro.sample("x", prior(shape=()))
    b = numpyro.sample("b", dist.Uniform(jnp.min(y) - width, jnp.max(y) + width))
    numpyro.sample("y", dist.Normal(x + b, 0.5), obs=y)


@pytest.mark.slow
def test_bounds_that_are_data():
    y, width = jnp.array([1.0, 2.0]), jnp.asarray(4.0)
    kernel = rtk.RTKGibbs(NUTS(bounded_by_data), segments=8)
    mcmc = MCMC(
        kernel,
        num_warmup=200,
        num_samples=500,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jr.key(0), y, width)
    b = np.asarray(mcmc.get_samples()["b"])
    assert np.all((b > -3) & (b < 6))
    assert abs(np.mean(b) - 1.5) < 0.5
