"""A network's arrays are arguments of the compiled program, not constants in it."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import numpyro_rtk as rtk
from numpyro_rtk._numpyro import _rtk_kernel
from numpyro_rtk._score._hoist import fingerprint_of, hoist
from numpyro_rtk._score._model import resolve_score


SCHEDULE = rtk.OU()
X, T = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
NUM_ARRAYS = 4  # two layers


class Network(eqx.Module):
    """Predicts the noise of N(0, I) data, and a little more."""

    mlp: eqx.nn.MLP

    def __init__(self, width, seed=0):
        self.mlp = eqx.nn.MLP(2, 2, width, 1, key=jr.key(seed))

    def __call__(self, x, t):
        return x * SCHEDULE.sigma(t) + 1e-3 * self.mlp(x)


def apply(network, x, t):
    return -network(x, t) / SCHEDULE.sigma(t)


GLOBAL = {}


def read_global(x, t):
    return apply(GLOBAL["network"], x, t)


def from_global(network):
    """A function without a Python closure, as in a notebook."""
    GLOBAL["network"] = network
    return read_global


def from_numpy(network):
    weights = [(np.asarray(layer.weight), np.asarray(layer.bias)) for layer in network.mlp.layers]

    def score_fn(x, t):
        (w0, b0), (w1, b1) = weights
        return -x - 1e-3 * (w1 @ jax.nn.relu(w0 @ x + b0) + b1) / SCHEDULE.sigma(t)

    return score_fn


class Energetic(eqx.Module):
    """No pytree of arrays only: an energy that calls a function that closes over the network."""

    function: object

    def __call__(self, x, t):
        return -jax.grad(self.function)(x, t)

    def energy(self, x, t):
        return self.function(x, t)


def energy_fn(network):
    return lambda x, t: 0.5 * jnp.sum(x**2) + 0.1 * jnp.sum(network.mlp(x))


MAKERS = {
    "module": lambda network: rtk.NoisePrediction(network, SCHEDULE),
    "closure": lambda network: lambda x, t: apply(network, x, t),
    "global": from_global,
    "partial": lambda network: functools.partial(apply, network),
    "tree-partial": lambda network: jax.tree_util.Partial(apply, network),
    "bound-method": lambda network: rtk.NoisePrediction(network, SCHEDULE).__call__,
    "adapter-of-closure": lambda network: rtk.NoisePrediction(lambda x, t: network(x, t), SCHEDULE),
    "data-adapter-of-batched": lambda network: rtk.DataPrediction(
        rtk.BatchedNetwork(
            jax.vmap(lambda x, t: (x - SCHEDULE.sigma(t) * network(x, t)) / SCHEDULE.alpha(t))
        ),
        SCHEDULE,
    ),
    "jit-of-closure": lambda network: jax.jit(lambda x, t: apply(network, x, t)),
    "filter-jit-of-module": lambda network: eqx.filter_jit(rtk.NoisePrediction(network, SCHEDULE)),
    "adapter-of-jit": lambda network: rtk.NoisePrediction(jax.jit(network.__call__), SCHEDULE),
    "numpy": from_numpy,
    "energy": lambda network: rtk.EnergyScore(energy_fn(network)),
}


def split(score_fn):
    return hoist(score_fn, X, T, (), {})


@pytest.mark.parametrize("name", MAKERS)
def test_arrays_are_found_and_put_back(name):
    score_fn = MAKERS[name](Network(5))
    hoisted, rebuild = split(score_fn)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(hoisted))
    assert sizes == [2, 5, 10, 10]
    x, t = jnp.array([0.3, -0.2]), jnp.array(0.5)
    np.testing.assert_allclose(rebuild(hoisted.arrays)(x, t), score_fn(x, t), rtol=1e-6)
    # What is put back is used: other arrays, other score.
    others = jax.tree.map(lambda leaf: 30 * leaf, hoisted.arrays)
    assert not np.allclose(rebuild(others)(x, t), score_fn(x, t), rtol=1e-3)


@pytest.mark.parametrize("name", MAKERS)
def test_fingerprint(name):
    make = MAKERS[name]
    fingerprint = split(make(Network(5)))[0].fingerprint
    assert split(make(Network(5)))[0].fingerprint == fingerprint  # equal weights
    assert split(make(Network(5, seed=1)))[0].fingerprint != fingerprint


def test_fingerprint_sees_values_shapes_and_dtypes():
    arrays = [
        jnp.zeros(4),
        jnp.ones(4),
        jnp.zeros((2, 2)),
        jnp.zeros(4, jnp.int32),
        jnp.zeros(0),
        jnp.zeros(()),
        jr.key(0),
        jr.key(1),
    ]
    assert len({fingerprint_of(array) for array in arrays}) == len(arrays)
    assert fingerprint_of([arrays[0], arrays[1]]) != fingerprint_of([arrays[1], arrays[0]])
    assert fingerprint_of(np.zeros(4, np.float32)) == fingerprint_of(jnp.zeros(4))


@pytest.mark.parametrize(
    "make",
    [lambda network: rtk.EnergyScore(energy_fn(network)), lambda network: Energetic(energy_fn(network))],
)
def test_energies_are_put_back(make):
    score_fn = make(Network(5))
    hoisted, rebuild = split(score_fn)
    assert len(hoisted.arrays) == NUM_ARRAYS  # each once, though several methods use them
    rebuilt = rebuild(hoisted.arrays)
    x, t = jnp.array([0.3, -0.2]), jnp.array(0.5)
    assert rebuilt.has_energy
    energy, score = rebuilt.energy_and_score(x, t)
    np.testing.assert_allclose(energy, score_fn.energy(x, t), rtol=1e-6)
    np.testing.assert_allclose(score, score_fn(x, t), rtol=1e-6)
    np.testing.assert_allclose(rebuilt(x, t), score_fn(x, t), rtol=1e-6)
    others = jax.tree.map(lambda leaf: 30 * leaf, hoisted.arrays)
    assert not np.allclose(rebuild(others).energy_and_score(x, t)[0], energy, rtol=1e-3)
    without, rebuild = split(score_fn.__call__)
    assert not rebuild(without.arrays).has_energy


def test_further_arguments():
    network = Network(5)

    def score_fn(x, t, shift, *, factor):
        return apply(network, x - shift, t) * factor

    shift = jnp.array([0.1, 0.2])
    hoisted, rebuild = hoist(score_fn, X, T, (shift,), {"factor": 2.0})
    assert len(hoisted.arrays) == NUM_ARRAYS  # the arguments are not among them
    x, t = jnp.array([0.3, -0.2]), jnp.array(0.5)
    np.testing.assert_allclose(rebuild(hoisted.arrays)(x, t), score_fn(x, t, shift, factor=2.0), rtol=1e-6)


# The program


def make_kernel(score_fn, **inner):
    return rtk.RTKKernel(
        score_fn, event_shape=(2,), schedule=SCHEDULE, segments=2, inner=rtk.MALA(num_steps=1, **inner)
    )


def program_size(score_fn, **inner):
    kernel = make_kernel(score_fn, **inner)
    state = kernel.init(jr.key(0), 2, None, (), {})
    return len(jax.jit(lambda state: kernel.sample(state, (), {})).lower(state).as_text())


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("module", "global") else pytest.param(name, marks=pytest.mark.slow)
        for name in MAKERS
        if name not in ("energy", "tree-partial")
    ],
)
def test_program_does_not_grow_with_the_network(name):
    small, large = (program_size(MAKERS[name](Network(width))) for width in (4, 2000))
    assert (
        abs(large - small) < 0.02 * small
    )  # 40 kB of weights would be 80,000 characters, as long again as the program


def test_program_with_energies_does_not_grow():
    small, large = (
        program_size(rtk.EnergyScore(energy_fn(Network(width))), energy_difference=rtk.ExactEnergy())
        for width in (4, 2000)
    )
    assert abs(large - small) < 0.02 * small


def test_the_check_can_fail(monkeypatch):
    """Without hoisting, the same measure sees the weights."""
    hoisted = program_size(MAKERS["closure"](Network(2000)))
    monkeypatch.setattr(
        _rtk_kernel,
        "hoist",
        lambda score_fn, *args: (
            hoist(lambda x, t: -x, X, T, (), {})[0],
            lambda arrays: resolve_score(score_fn),
        ),
    )
    assert program_size(MAKERS["closure"](Network(2000))) > hoisted + 70_000


def test_arrays_are_in_the_state():
    network = Network(5)
    state = make_kernel(MAKERS["closure"](network)).init(jr.key(0), 2, None, (), {})
    weights = state.shared.score_arrays.arrays
    assert any(leaf is network.mlp.layers[0].weight for leaf in weights)  # not a copy
    batch = make_kernel(MAKERS["closure"](network)).init(jr.split(jr.key(0), 3), 2, None, (), {})
    assert jax.tree.map(jnp.shape, batch.shared.score_arrays) == jax.tree.map(
        jnp.shape, state.shared.score_arrays
    )  # no chain axis


def test_same_draws_as_without_hoisting(monkeypatch):
    score_fn = MAKERS["closure"](Network(5))
    kernel = make_kernel(score_fn)
    state = kernel.init(jr.key(0), 2, None, (), {})
    expected = jax.jit(lambda state: kernel.sample(state, (), {}))(state)
    monkeypatch.setattr(
        _rtk_kernel, "hoist", lambda *args: (hoist(*args)[0], lambda arrays: resolve_score(score_fn))
    )
    result = jax.jit(lambda state: kernel.sample(state, (), {}))(state)
    np.testing.assert_allclose(result.z["x"], expected.z["x"], rtol=1e-5)


@pytest.mark.parametrize("name", ["closure", "global", "adapter-of-closure"])
def test_other_weights_are_refused(name):
    state = make_kernel(MAKERS[name](Network(5))).init(jr.key(0), 2, None, (), {})
    other = make_kernel(MAKERS[name](Network(5, seed=1)))
    with pytest.raises(ValueError, match="state comes from a kernel with other network weights"):
        jax.eval_shape(lambda state: other.sample(state, (), {}), state)


@pytest.mark.parametrize(
    "options", [{"inner": rtk.ULA(num_steps=1)}, {"segments": 3}, {"segments": [4.0, 1.0, 0.1]}]
)
def test_other_inner_kernel_or_segments_are_refused(options):
    score_fn = MAKERS["closure"](Network(5))
    settings = {"event_shape": (2,), "schedule": SCHEDULE, "segments": 2, "inner": rtk.MALA(num_steps=1)}
    state = rtk.RTKKernel(score_fn, **settings).init(jr.key(0), 2, None, (), {})
    other = rtk.RTKKernel(score_fn, **(settings | options))
    with pytest.raises(ValueError, match="state comes from a kernel with other"):
        jax.eval_shape(lambda state: other.sample(state, (), {}), state)


WEIGHT = np.random.default_rng(3).normal(size=(2, 700, 200)).astype(np.float32) / 40


def jitted_layers():
    """A network of two matrices under `jax.jit`, with a jitted part of its own."""
    weight = jnp.asarray(WEIGHT)
    part = jax.jit(lambda x: jax.nn.relu(jnp.pad(x, (0, 698)) @ weight[0]))
    return jax.jit(lambda x, t: -x * t - jax.nn.silu(part(x) @ weight[1].T)[:2])


def reference(x, t):
    return -x * t - jax.nn.silu(jax.nn.relu(jnp.pad(x, (0, 698)) @ WEIGHT[0]) @ WEIGHT[1].T)[:2]


@pytest.mark.parametrize("outer", ["lambda", "bound", "grad"])
def test_a_jitted_network_inside_a_callable(outer):
    network = jitted_layers()
    score_fn = {
        "lambda": lambda x, t: network(x, t),
        "bound": functools.partial(lambda apply, x, t: 1.0 * apply(x, t), network),
        "grad": lambda x, t: jax.grad(lambda x: jnp.sum(network(x, t) ** 2))(x),
    }[outer]
    arrays, rebuild = hoist(score_fn, X, T)
    assert sum(np.size(leaf) for leaf in arrays.arrays) >= WEIGHT.size
    x, t = jnp.asarray([0.3, -0.7]), jnp.asarray(0.4)
    expected = jax.grad(lambda x: jnp.sum(reference(x, t) ** 2))(x) if outer == "grad" else reference(x, t)
    np.testing.assert_allclose(rebuild(arrays.arrays)(x, t), expected, rtol=1e-5, atol=1e-6)
    # Other arrays give another score: nothing of the old ones is left inside.
    other = [jnp.zeros_like(leaf) if leaf.size > 100 else leaf for leaf in arrays.arrays]
    assert not np.allclose(rebuild(other)(x, t), expected, rtol=1e-3)


def test_arrays_that_stay_hidden_are_named():
    network = jitted_layers()

    def score_fn(x, t):
        return jax.lax.scan(lambda x, _: (network(x, t), None), x, None, length=2)[0]

    with pytest.warns(UserWarning, match=r"Arrays of 2\.1 MiB stay constants .*`score_fn` \(score_fn\)"):
        arrays, rebuild = hoist(score_fn, X, T)
    x, t = jnp.asarray([0.3, -0.7]), jnp.asarray(0.4)
    expected = reference(reference(x, t), t)
    np.testing.assert_allclose(rebuild(arrays.arrays)(x, t), expected, rtol=1e-5)
