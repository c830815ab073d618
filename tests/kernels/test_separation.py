"""Which events of a plate share an observation: found by tracing, never too few."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC
from numpyro.infer.gibbs import conditioned, with_conditioning

import numpyro_rtk as rtk
from numpyro_rtk._numpyro._likelihood import Likelihood
from numpyro_rtk._numpyro._separation import separation
from numpyro_rtk._numpyro._sites import latent_diffusion_sites


NUM = 5
PARTS = {"x": np.broadcast_to(np.arange(NUM)[:, None], (NUM, 3))}
INDEX = np.array([0, 0, 1, 4, 3, 3, 2])
APART = [{i} for i in range(NUM)]
ALL = [set(range(NUM))] * NUM
ZEROS, KERNEL = jnp.zeros((NUM, 3)), jnp.array([0.2, 0.5, 0.3])


def reached(function, others=None):
    with jax.numpy_rank_promotion("allow"):
        numbers, sets = separation(lambda x, others: {"y": function(x["x"], others)}, PARTS, others or {})
    return [set(sets[number]) for number in numbers["y"].ravel()]


def scanned(v):
    return jax.lax.scan(lambda carry, s: (jnp.tanh(carry + s), carry), 0.0, v)


APART_FUNCTIONS = {
    "matrix": lambda x, o: jnp.exp(x @ jnp.ones((3, 7))).sum(-1),
    "einsum": lambda x, o: jnp.einsum("ei,eij->ej", x, jnp.ones((NUM, 3, 2))).sum(-1),
    "where": lambda x, o: jnp.where(x[:, 0] > 0, 1.0, 2.0),
    "cumsum": lambda x, o: jnp.cumsum(x, -1)[:, 1],
    "sort": lambda x, o: jnp.sort(x, -1)[:, 0],
    "fft": lambda x, o: jnp.abs(jnp.fft.rfft(x)).sum(-1),
    "convolution": lambda x, o: jax.vmap(lambda v: jnp.convolve(v, KERNEL, mode="same").sum())(x),
    "scan": lambda x, o: jax.vmap(lambda v: scanned(v)[0])(x),
    "stacked_scan": lambda x, o: jax.vmap(lambda v: scanned(v)[1].sum())(x),
    "jit": lambda x, o: jax.jit(lambda v: jnp.sum(v**2, -1))(x),
    "another": lambda x, o: x[:, 0] * o["scale"],
    "reversed": lambda x, o: x[::-1][::-1].prod(-1),
    "normal": lambda x, o: dist.Normal(x, 1.0).to_event(1).log_prob(ZEROS),
    "multivariate": lambda x, o: dist.MultivariateNormal(x, jnp.eye(3) + 0.2).log_prob(ZEROS),
    "poisson": lambda x, o: dist.Poisson(jnp.exp(x[:, 0])).log_prob(jnp.arange(NUM)),
    "negative_binomial": lambda x, o: dist.NegativeBinomial2(jnp.exp(x[:, 0]), 2.0).log_prob(jnp.arange(NUM)),
    "categorical": lambda x, o: dist.Categorical(logits=x).log_prob(jnp.array([0, 1, 2, 1, 0])),
    "student": lambda x, o: dist.StudentT(3.0, x[:, 0], 0.5).log_prob(0.3),
    "beta": lambda x, o: dist.Beta(jnp.exp(x[:, 0]), 2.0).log_prob(0.3),
}


@pytest.mark.parametrize("name", APART_FUNCTIONS)
def test_what_is_done_to_each_event_by_itself_keeps_them_apart(name):
    others = {"scale": jax.ShapeDtypeStruct((), jnp.float32)}
    assert reached(APART_FUNCTIONS[name], others) == APART


MIXED_FUNCTIONS = {
    "mean": lambda x, o: (x - x.mean(0)).sum(-1),
    "softmax": lambda x, o: jax.nn.softmax(x[:, 0]),
    "count": lambda x, o: x[:, 0] * jnp.sum(x[:, 0] > 0),
    "unknown_index": lambda x, o: x[o["index"], 0],
    "sorted_events": lambda x, o: jnp.sort(x[:, 0]),
    "solve": lambda x, o: jnp.linalg.solve(jnp.eye(NUM) + 0.1, x[:, 0]),
    "cholesky": lambda x, o: jnp.diag(jnp.linalg.cholesky(jnp.diag(jnp.exp(x[:, 0])))),
    "fft_of_events": lambda x, o: jnp.fft.fft(x[:, 0]).real,
    "scan_of_events": lambda x, o: scanned(x[:, 0])[1] + scanned(x[:, 0])[0],
    "while": lambda x, o: jax.lax.while_loop(lambda v: jnp.any(v < 9.0), lambda v: v + 1.0, x[:, 0]),
    "cond": lambda x, o: jax.lax.cond(x[0, 0] > 0, lambda v: v, lambda v: -v, x[:, 0]) + x[:, 0].sum(),
    "callback": lambda x, o: jax.pure_callback(
        lambda v: np.asarray(v), jax.ShapeDtypeStruct((NUM,), jnp.float32), x[:, 0]
    ),
}


@pytest.mark.parametrize("name", MIXED_FUNCTIONS)
def test_what_mixes_events_is_seen(name):
    others = {"index": jax.ShapeDtypeStruct((NUM,), jnp.int32)}
    found = reached(MIXED_FUNCTIONS[name], others)
    assert found == ALL


def test_indices_that_are_known_are_followed():
    assert reached(lambda x, o: x[INDEX].sum(-1)) == [{int(i)} for i in INDEX]
    neighbours = reached(lambda x, o: (x + jnp.roll(x, 1, axis=0)).sum(-1))
    assert neighbours == [{i, (i - 1) % NUM} for i in range(NUM)]
    # Also where they come out of constants, and inside another trace.
    order = jnp.argsort(jnp.asarray([3.0, 1.0, 2.0, 0.0, 4.0]))
    expected = [{3}, {1}, {2}, {0}, {4}]
    assert reached(lambda x, o: x[order, 0]) == expected

    @jax.jit
    def traced(offset):
        assert reached(lambda x, o: x[order, 0] + offset) == expected
        # What the outer trace holds is not known.
        assert reached(lambda x, o: x[order + offset.astype(int), 0]) == ALL
        return offset

    traced(jnp.zeros(()))


def test_values_decide_nothing_about_what_is_constant():
    # A product with zero, and a branch that is never taken, are dependences.
    assert reached(lambda x, o: x[:, 0] + 0.0 * x[:, 0].sum()) == ALL


# Models.


def prior(*shape):
    return rtk.DiffusionPrior(lambda x, t: -x, shape)


def partition_of(model, **others):
    kwargs = with_conditioning({}, {name: jnp.asarray(value) for name, value in others.items()})
    conditioned_model = conditioned(model)
    sites = latent_diffusion_sites(conditioned_model, jax.random.key(0), (), kwargs)
    shapes = {site.name: (site.batch_shape, site.prior.event_shape) for site in sites}
    return Likelihood(conditioned_model, (), kwargs).partition(shapes)


def plate_model(likelihood):
    def model():
        with numpyro.plate("objects", 4):
            x = numpyro.sample("x", prior(2))
            likelihood(x)

    return model


def observe(x):
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=jnp.zeros((4, 2)))


def test_events_with_data_of_their_own_are_elements():
    elements = partition_of(plate_model(observe)).elements
    assert elements.count == 4
    np.testing.assert_array_equal(elements.coordinates.owner, [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(elements.observations.owner, [0, 0, 1, 1, 2, 2, 3, 3])


def test_sites_of_one_plate_whose_data_they_share_make_elements_together():
    def model():
        with numpyro.plate("objects", 3):
            x = numpyro.sample("x", prior(2))
            z = numpyro.sample("z", prior(1))
            numpyro.sample("y", dist.Poisson(jnp.exp(x[:, 0] + z[:, 0])), obs=jnp.arange(3))

    elements = partition_of(model).elements
    assert elements.count == 3
    np.testing.assert_array_equal(elements.coordinates.owner, [0, 0, 1, 1, 2, 2, 0, 1, 2])
    assert elements.observations.owner.size == 0


def test_sites_that_share_nothing_are_elements_by_themselves():
    def model():
        x, z = numpyro.sample("x", prior(3)), numpyro.sample("z", prior(2))
        numpyro.sample("a", dist.Normal(z, 1.0).to_event(1), obs=jnp.zeros(2))
        numpyro.sample("b", dist.Normal(x, 1.0).to_event(1), obs=jnp.zeros(3))

    elements = partition_of(model).elements
    assert elements.count == 2
    np.testing.assert_array_equal(elements.coordinates.owner, [0, 0, 0, 1, 1])
    # Observations in the order of the model, which is another.
    np.testing.assert_array_equal(elements.observations.owner, [1, 1, 0, 0, 0])


def test_one_number_that_sees_all_joins_all():
    def likelihood(x):
        observe(x)
        numpyro.factor("total", -0.5 * jnp.sum(x) ** 2)

    assert partition_of(plate_model(likelihood)).elements.count == 1


def test_neighbours_that_share_a_number_are_one_element():
    def model():
        with numpyro.plate("objects", 4):
            x = numpyro.sample("x", prior(2))
        pairs = jnp.stack([x[0] + x[1], x[2]])
        numpyro.sample("y", dist.Normal(pairs, 0.5).to_event(2), obs=jnp.zeros((2, 2)))

    # `to_event(2)` makes one log probability of all; two of `to_event(1)` leave the last event alone.
    elements = partition_of(model).elements
    assert elements.count == 2
    np.testing.assert_array_equal(elements.coordinates.owner, [0, 0, 0, 0, 0, 0, 1, 1])


def test_other_latents_couple_nothing_once_they_are_given():
    def model():
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("objects", 4):
            x = numpyro.sample("x", prior(2))
            noise = numpyro.sample("noise", dist.HalfNormal(jnp.exp(x[:, 0])))
            numpyro.sample("y", dist.Normal(mu + x.sum(-1), noise), obs=jnp.zeros(4))

    assert partition_of(model, mu=0.3, noise=np.ones(4)).elements.count == 4


def test_a_latent_that_picks_events_joins_what_it_may_pick():
    def model():
        which = numpyro.sample("which", dist.Categorical(probs=jnp.ones(4) / 4).expand([6]).to_event(1))
        with numpyro.plate("objects", 4):
            x = numpyro.sample("x", prior(2))
        with numpyro.plate("data", 6):
            numpyro.sample("y", dist.Normal(x[which, 0], 0.5), obs=jnp.zeros(6))

    # Its present value picks one event for each datum; another iteration may pick another.
    assert partition_of(model, which=np.array([0, 1, 2, 3, 0, 1])).elements.count == 1


def test_data_of_different_numbers_for_each_event():
    index = np.array([0, 0, 0, 1, 3])

    def model():
        with numpyro.plate("objects", 4):
            x = numpyro.sample("x", prior(2))
        with numpyro.plate("data", 5):
            numpyro.sample("y", dist.Normal(x[index, 0], 0.5), obs=jnp.zeros(5))

    partition = partition_of(model)
    assert partition.elements.count == 4
    np.testing.assert_array_equal(partition.elements.observations.owner, index)
    np.testing.assert_array_equal(partition.log_probs["y"].owner, index)


@pytest.mark.parametrize("family", ["normal", "poisson", "multivariate"])
def test_terms_of_elements_are_those_of_each_by_itself(family):
    y = jnp.asarray(np.random.default_rng(0).poisson(2.0, (4, 2)))

    def model(y, num):
        numpyro.factor("constant", 1.7)
        with numpyro.plate("objects", num):
            x = numpyro.sample("x", prior(2))
            if family == "normal":
                mask = jnp.asarray([True, False])
                numpyro.sample("y", dist.Normal(x, 0.5).mask(mask).to_event(1), obs=y)
            elif family == "poisson":
                numpyro.sample("y", dist.Poisson(jnp.exp(x)).to_event(1), obs=y)
            else:
                numpyro.sample("y", dist.MultivariateNormal(x, jnp.eye(2) + 0.5), obs=y)

    def terms_of(y, x):
        likelihood = Likelihood(model, (y, x.shape[0]), {})
        return likelihood, functools.partial(likelihood.terms, {"x": x})

    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)), jnp.float32)
    likelihood, terms = terms_of(y, x)
    partition = likelihood.partition({"x": ((4,), (2,))})
    found = terms(partition)
    whole = terms()
    assert found.log_prob.shape == found.other.shape == found.log_normalizer.shape == (4,)
    for name in ("log_prob", "other", "log_normalizer"):
        np.testing.assert_allclose(getattr(found, name).sum(), getattr(whole, name), rtol=1e-5)
    for i in range(4):
        alone = terms_of(y[i : i + 1], x[i : i + 1])[1]()
        for name in ("log_prob", "other", "log_normalizer"):
            # The constant of the model is shared out.
            share = 0.0 if name == "other" else 1.7 * (1 - 1 / 4)
            np.testing.assert_allclose(
                getattr(found, name)[i], getattr(alone, name) - share, rtol=1e-4, atol=1e-5
            )


def test_numbers_that_are_written_in_place_may_hold_anything():
    def written(x, others):
        cell = jax.new_ref(jnp.zeros(()))
        cell[...] = x.sum()
        return x[:, 0] + cell[...]

    assert reached(written) == ALL
    # Inside of a function, too.
    assert reached(jax.jit(written)) == ALL


def test_products_of_two_vectors_are_followed():
    ones = jnp.ones(3)
    assert reached(lambda x, o: jnp.stack([jnp.dot(x[0], ones), jnp.vdot(x[1], x[2])])) == [{0}, {1, 2}]
    assert (
        reached(lambda x, o: jax.lax.map(lambda v: v @ ones, x)) == ALL
    )  # turns of a loop are not told apart


INDEXED = np.array([0, 0, 1, 2, 2, 2])


def indexed(y, index):
    with numpyro.plate("objects", 4):
        x = numpyro.sample("x", rtk.DiffusionPrior(standard, (2,), schedule=rtk.OU()))
    with numpyro.plate("data", 6):
        numpyro.sample("y", dist.Normal(x[index, 0], 0.5), obs=y)


def standard(x, t):
    return -x


def run_indexed(**options):
    small = {"segments": 4, "num_particles": 4, "num_start_steps": 0, "num_pilot_draws": 16}
    kernel = rtk.RTKParticleGibbs(indexed, **small)
    settings = {"num_warmup": 20, "num_samples": 200, "num_chains": 4, "chain_method": "vectorized"}
    mcmc = MCMC(kernel, progress_bar=False, **settings, **options)
    mcmc.run(jr.key(0), jnp.array([0.5, 0.7, -1.0, 1.5, 1.2, 1.4]), INDEXED)
    return mcmc


def check_indexed(mcmc, y, index):
    """Against the conjugate posterior."""
    x = np.asarray(mcmc.get_samples()["x"])[..., 0]
    for i in range(4):
        count, total = np.sum(index == i), np.sum(y[index == i])
        precision = 1 + count / 0.25
        mean, sd = (total / 0.25) / precision, precision**-0.5
        assert abs(x[:, i].mean() - mean) < 0.2 * sd
        assert abs(x[:, i].std() / sd - 1) < 0.15


@pytest.mark.slow
def test_an_index_among_the_arguments_joins_what_it_may_reach_only_where_it_has_no_values():
    y = np.array([0.5, 0.7, -1.0, 1.5, 1.2, 1.4])
    known = run_indexed()
    assert known.last_state.shared.partition.elements.count == 4
    check_indexed(known, y, INDEXED)
    check_indexed(run_indexed(jit_model_args=True), y, INDEXED)
    # Resumed with an index that joins other objects.
    other = np.array([3, 0, 1, 2, 2, 2])
    known.post_warmup_state = known.last_state
    known.run(jr.key(1), jnp.asarray(y), other)
    check_indexed(known, y, other)


def test_a_function_that_is_called_on_parts_of_an_array_is_not_followed():
    found = reached(lambda x, o: jax.pmap(lambda part: part.sum(-1))(x[None])[0])
    assert all(i in members for i, members in enumerate(found))


@pytest.mark.parametrize("method", ["scan", "sort", "compare_all"])
def test_indices_that_are_computed_by_a_loop_over_constants_are_followed(method):
    places = jnp.searchsorted(jnp.arange(5.0), jnp.array([0.5, 3.5, 1.5]), method=method)
    assert reached(lambda x, o: x[places, 0]) == [{1}, {4}, {2}]
    # Inside the function, too.
    edges, values = jnp.arange(5.0), jnp.array([0.5, 3.5, 1.5])
    found = reached(lambda x, o: x[jnp.searchsorted(edges, values, method=method), 0])
    assert found == [{1}, {4}, {2}]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Particle weights collapsed")
def test_elements_cost_no_further_evaluations():
    def evaluations(joined):
        calls = []

        def counted(x, t):
            jax.debug.callback(lambda x: calls.append(1), x)
            return -x

        def model(y):
            with numpyro.plate("objects", 3):
                x = numpyro.sample("x", rtk.DiffusionPrior(counted, (2,), schedule=rtk.OU()))
                numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
            if joined:
                numpyro.factor("nothing", 0.0 * x.sum())

        small = {"segments": 3, "num_particles": 3, "num_start_steps": 0, "num_pilot_draws": 16}
        kernel = rtk.RTKParticleGibbs(model, refresh_depths=(1.0,), sweep_prob=1.0, **small)
        state = kernel.init(jr.key(0), 0, None, (jnp.zeros((3, 2)),), {})
        assert state.shared.partition.elements.count == (1 if joined else 3)
        step = jax.jit(lambda state: kernel.sample(state, (jnp.zeros((3, 2)),), {}))
        jax.block_until_ready(step(state))
        jax.effects_barrier()
        calls.clear()
        state = jax.block_until_ready(step(state))
        jax.effects_barrier()
        assert len(calls) == state.num_score_evals
        return len(calls)

    assert evaluations(joined=False) == evaluations(joined=True)
