"""`RTKKernel` in NumPyro's `MCMC`: chain methods, warmup, resuming, model arguments, failures, cost."""

import os
import pickle
import subprocess
import sys
import textwrap
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from numpyro.infer import MCMC

import numpyro_rtk as rtk
from numpyro_rtk._diagnosis._start import num_pilot_draws
from numpyro_rtk._numpyro import _rtk_kernel
from numpyro_rtk._reverse._pilot import PILOT_SEGMENTS, TERMINAL_ROUNDS


Z_MAX = 5.5
"""Standard errors allowed; a false alarm of 4e-8 a comparison, below 1e-5 for every test here."""

FIELDS = ("accept_prob", "segment_accept_prob", "num_score_evals", "adapt_state.step_size")

INNER_KERNELS = {
    "MALA": rtk.MALA(num_steps=2),
    "PreconditionedMALA": rtk.PreconditionedMALA(num_steps=2),
    "ULA": rtk.ULA(num_steps=2),
    "ULD": rtk.ULD(num_steps=2),
    "GaussianTransition-1": rtk.GaussianTransition(),
    "GaussianTransition-2": rtk.GaussianTransition(order=2),
}


SOME_INNER_KERNELS = [
    name if name in ("MALA", "GaussianTransition-2") else pytest.param(name, marks=pytest.mark.slow)
    for name in INNER_KERNELS
]

# NumPyro donates buffers that cannot be re-used when `MCMC` runs under `jax.vmap`, whatever the kernel.
pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers were not usable:UserWarning")


def score(x, t, shift=0.5, scale=0.6):
    """Score of N(shift, scale^2) in every coordinate under OU; at module level, so that it pickles."""
    alpha = jnp.exp(-t)
    return -(x - alpha * shift) / (scale**2 * alpha**2 + 1 - alpha**2)


def make_kernel(score_fn=score, *, inner=None, segments=3, event_shape=(2,), **options):
    inner = rtk.MALA(num_steps=2) if inner is None else inner
    return rtk.RTKKernel(score_fn, event_shape=event_shape, segments=segments, inner=inner, **options)


def make_mcmc(kernel, *, num_warmup=4, num_samples=6, **options):
    return MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, progress_bar=False, **options)


def run(kernel, *args, key=None, extra_fields=FIELDS, init_params=None, **options):
    mcmc = make_mcmc(kernel, **options)
    mcmc.run(jr.key(1) if key is None else key, *args, extra_fields=extra_fields, init_params=init_params)
    return mcmc


def draws(mcmc, site="x"):
    return np.asarray(mcmc.get_samples(group_by_chain=True)[site])


def field(mcmc, name):
    return np.asarray(mcmc.get_extra_fields(group_by_chain=True)[name])


def one_pass(kernel, state, *args):
    return jax.jit(lambda state: kernel.sample(state, args, {}))(state)


@pytest.fixture
def count_traces(monkeypatch):
    """Number of times the reverse pass was traced, that is the sampling program was built."""
    counts = {"traces": 0}
    original = _rtk_kernel.reverse_pass

    def counting(*args, **kwargs):
        counts["traces"] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(_rtk_kernel, "reverse_pass", counting)
    return counts


# Chain methods


@pytest.mark.slow
def test_chain_methods_agree():
    kernel = make_kernel()
    reference = run(kernel, num_chains=2, chain_method="sequential", key=jr.key(3))
    assert not np.allclose(draws(reference)[0], draws(reference)[1])
    # A batch of keys, or one key that `MCMC` splits.
    for chain_method, key in (("vectorized", jr.split(jr.key(3), 2)), (jax.vmap, jr.key(3))):
        mcmc = run(kernel, key=key, num_chains=2, chain_method=chain_method)
        np.testing.assert_allclose(draws(mcmc), draws(reference), rtol=1e-4, atol=1e-5)
        for name in FIELDS:
            np.testing.assert_allclose(
                field(mcmc, name), field(reference, name), rtol=1e-4, err_msg=f"{chain_method} {name}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("chain_method", ["sequential", "vectorized", jax.vmap])
def test_resume_with_chains(chain_method):
    kernel = make_kernel()
    once = run(kernel, num_chains=2, chain_method=chain_method)
    mcmc = make_mcmc(kernel, num_chains=2, chain_method=chain_method)
    mcmc.warmup(jr.key(1))
    mcmc.run(mcmc.post_warmup_state.rng_key, extra_fields=FIELDS)
    np.testing.assert_allclose(draws(mcmc), draws(once), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        field(mcmc, "adapt_state.step_size"), field(once, "adapt_state.step_size"), rtol=1e-5
    )


PARALLEL = """
    import sys
    import jax, jax.numpy as jnp, jax.random as jr, numpy as np
    import numpyro_rtk as rtk
    from numpyro.infer import MCMC

    assert jax.local_device_count() == 4

    def score(x, t):
        alpha = jnp.exp(-t)
        return -(x - 0.5 * alpha) / (0.36 * alpha**2 + 1 - alpha**2)

    kernel = rtk.RTKKernel(score, event_shape=(2,), segments=3, inner=rtk.MALA(num_steps=2))

    def run(num_chains, **options):
        mcmc = MCMC(kernel, num_warmup=4, num_samples=6, num_chains=num_chains, **options)
        mcmc.run(jr.key(1), extra_fields=("adapt_state.step_size",))
        return mcmc

    def draws(mcmc):
        return np.asarray(mcmc.get_samples(group_by_chain=True)["x"])

    sequential = run(4, chain_method="sequential", progress_bar=False)
    parallel = run(4, chain_method="parallel")  # NumPyro's default, with its progress bar
    assert parallel.chain_method == "parallel"
    np.testing.assert_allclose(draws(parallel), draws(sequential), rtol=1e-4, atol=1e-5)
    print("parallel chains: done", file=sys.stderr)

    bar = run(1)
    assert bar.progress_bar
    assert np.all(np.isfinite(draws(bar)))
"""


@pytest.mark.slow
def test_parallel_chains_and_progress_bar():
    environment = {
        key: value for key, value in os.environ.items() if key != "CI" and not key.startswith("PYTEST")
    }
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-W", "error::UserWarning:numpyro_rtk", "-c", textwrap.dedent(PARALLEL)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    bar = done.stderr.split("parallel chains: done")[1]
    assert "9 score evals/draw, acc. prob=" in bar
    assert "(lowest " in bar
    assert "100%" in bar


def test_diagnostics_string():
    kernel = make_kernel()
    state = kernel.init(jr.key(0), 2, None, (), {})
    state = state._replace(accept_prob=jnp.array(0.625), segment_accept_prob=jnp.array([0.75, 0.5, 0.625]))
    text = kernel.get_diagnostics_str(state)
    assert (
        text
        == f"9 score evals/draw, acc. prob=0.62 (lowest 0.50 in segment 1, t={kernel.segment_times[2]:.2g})"
    )
    assert kernel.get_diagnostics_str(state._replace(diverging=jnp.array(True))) == text + ", diverging"
    unadjusted = make_kernel(inner=rtk.ULA(num_steps=2))
    assert unadjusted.get_diagnostics_str(state) == "9 score evals/draw"
    assert (
        unadjusted.get_diagnostics_str(state._replace(diverging=jnp.array(True)))
        == "9 score evals/draw, diverging"
    )


# Warmup, resuming, thinning, keys


@pytest.fixture(scope="module")
def long_run():
    """Kernel and one run of 4 + 6 iterations with the key 1."""
    kernel = make_kernel()
    return kernel, run(kernel)


def test_warmup_then_run_then_resume(long_run):
    kernel, once = long_run
    mcmc = make_mcmc(kernel, num_samples=3)
    mcmc.warmup(jr.key(1), extra_fields=FIELDS, collect_warmup=True)
    warmup_steps = field(mcmc, "adapt_state.step_size")[0]
    assert warmup_steps.shape == (4, 3)
    assert np.all(np.any(np.diff(warmup_steps, axis=0) != 0, axis=1))  # every iteration adapts
    state = mcmc.post_warmup_state
    mcmc.run(state.rng_key, extra_fields=FIELDS)
    first, first_steps = draws(mcmc), field(mcmc, "adapt_state.step_size")
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.post_warmup_state.rng_key, extra_fields=FIELDS)
    second, second_steps = draws(mcmc), field(mcmc, "adapt_state.step_size")
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), draws(once), rtol=1e-4, atol=1e-5)
    # Frozen, to the last bit: over both runs, and at what warmup ended with.
    frozen = np.concatenate([first_steps, second_steps], axis=1)[0]
    np.testing.assert_array_equal(frozen, np.broadcast_to(state.adapt_state.step_size, frozen.shape))
    last = mcmc.last_state.adapt_state
    np.testing.assert_array_equal(last.curvature, state.adapt_state.curvature)
    assert int(last.iteration) == 10
    # A new key after warmup gives new draws with the same tuning.
    mcmc.post_warmup_state = state
    mcmc.run(jr.key(9), extra_fields=FIELDS)
    assert not np.any(draws(mcmc) == first)
    np.testing.assert_array_equal(field(mcmc, "adapt_state.step_size"), first_steps)


def test_step_sizes_are_frozen_in_one_run(long_run):
    steps = field(long_run[1], "adapt_state.step_size")[0]
    assert steps.shape == (6, 3)
    np.testing.assert_array_equal(steps, np.broadcast_to(steps[0], steps.shape))


def test_thinning(long_run):
    kernel, once = long_run
    thinned = run(kernel, thinning=2)
    assert draws(thinned).shape == (1, 3, 2)
    np.testing.assert_allclose(draws(thinned), draws(once)[:, 1::2], rtol=1e-4, atol=1e-5)


def test_old_and_new_style_keys(long_run):
    kernel, once = long_run
    old = run(kernel, key=jr.PRNGKey(1))
    np.testing.assert_allclose(draws(old), draws(once), rtol=1e-5)
    assert old.last_state.rng_key.dtype == jnp.uint32
    assert jnp.issubdtype(once.last_state.rng_key.dtype, jax.dtypes.prng_key)
    # Two chains of old-style keys have the shape (2, 2).
    batch = jr.split(jr.PRNGKey(1), 2)
    state = kernel.init(batch, 2, None, (), {})
    assert state.z["x"].shape == (2, 2)
    np.testing.assert_array_equal(state.z["x"], kernel.init(jr.split(jr.key(1), 2), 2, None, (), {}).z["x"])


@pytest.mark.parametrize("make_key", [jr.key, jr.PRNGKey], ids=["new-style", "old-style"])
def test_pickle(make_key):
    kernel = make_kernel()
    mcmc = run(kernel, key=make_key(1))
    copy = pickle.loads(pickle.dumps(mcmc))
    np.testing.assert_array_equal(draws(copy), draws(mcmc))
    # Kernel and state go through apart, too, and the chain goes on as from the original.
    kernel_copy, state_copy = pickle.loads(pickle.dumps((kernel, mcmc.last_state)))
    for state in (state_copy, copy.last_state):
        assert jax.tree.structure(state) == jax.tree.structure(mcmc.last_state)
        assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, mcmc.last_state)
    result, expected = one_pass(kernel_copy, copy.last_state), one_pass(kernel, mcmc.last_state)
    np.testing.assert_array_equal(result.z["x"], expected.z["x"])


def test_pickle_of_a_module():
    mixture = rtk.GaussianMixtureScore([0.4, 0.6], np.eye(2), np.stack([np.eye(2)] * 2), rtk.OU())
    kernel = make_kernel(mixture)
    state = kernel.init(jr.key(0), 2, None, (), {})
    kernel_copy, state_copy = pickle.loads(pickle.dumps((kernel, state)))
    expected, result = one_pass(kernel, state), one_pass(kernel_copy, state_copy)
    np.testing.assert_array_equal(result.z["x"], expected.z["x"])


# Model arguments


def network_score(x, t, arrays, static=None, *, shift=0.0):
    network = eqx.combine(arrays, static)
    return score(x, t) + 1e-3 * network(x) + shift


def test_model_arguments_reach_the_score():
    conditional, closed = make_kernel(), make_kernel(lambda x, t: score(x, t, 0.8, scale=0.3))
    expected = draws(run(closed))
    mcmc = make_mcmc(conditional)
    mcmc.run(jr.key(1), np.full(2, 0.8, np.float32), scale=0.3)
    np.testing.assert_allclose(draws(mcmc), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`score_fn` is not the score")  # the weights are random
@pytest.mark.parametrize("chain_method", ["vectorized", pytest.param("sequential", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_jit_model_args_with_a_network(chain_method, count_traces):
    networks = [eqx.nn.MLP(2, 2, 4, 1, key=jr.key(i)) for i in range(2)]
    arrays = [eqx.filter(network, eqx.is_array) for network in networks]
    static = eqx.filter(networks[0], eqx.is_array, inverse=True)
    num_python_calls = 0

    def score_fn(x, t, arrays, *, shift):
        nonlocal num_python_calls
        num_python_calls += 1
        return network_score(x, t, arrays, static, shift=shift)

    kernel = make_kernel(score_fn)
    mcmc = make_mcmc(kernel, num_chains=2, chain_method=chain_method, jit_model_args=True)
    mcmc.run(jr.key(1), arrays[0], shift=0.0)
    first = draws(mcmc)
    assert count_traces["traces"] == 1
    num_python_calls = 0
    mcmc.run(jr.key(1), arrays[1], shift=0.5)
    second = draws(mcmc)
    assert count_traces["traces"] == 1  # another network, the same program
    assert num_python_calls <= 3 * (2 if chain_method == "sequential" else 1)  # the checks of `init`
    assert not np.any(first == second)
    fresh = make_mcmc(
        make_kernel(lambda x, t: network_score(x, t, arrays[1], static, shift=0.5)), num_chains=2
    )
    fresh.chain_method = chain_method
    fresh.run(jr.key(1))
    np.testing.assert_allclose(second, draws(fresh), rtol=1e-3, atol=1e-4)


# Precision and NaN mode


def test_float64():
    with jax.enable_x64(True):
        mcmc = run(make_kernel(), num_chains=2, chain_method="vectorized")
        assert draws(mcmc).dtype == np.float64
        assert field(mcmc, "adapt_state.step_size").dtype == np.float64
        assert field(mcmc, "segment_accept_prob").dtype == np.float64
        assert np.all(np.isfinite(draws(mcmc)))


@pytest.mark.slow
def test_float32_in_x64_mode():
    # float32 initial values ask for float32 draws.
    with jax.enable_x64(True):
        mcmc = run(make_kernel(event_shape=None), init_params={"x": jnp.zeros(2, jnp.float32)})
        assert draws(mcmc).dtype == np.float32
        assert field(mcmc, "adapt_state.step_size").dtype == np.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME_INNER_KERNELS)
def test_debug_nans(name):
    kernel = make_kernel(inner=INNER_KERNELS[name])
    with jax.debug_nans(True):
        mcmc = run(kernel)
        assert not np.any(field(mcmc, "diverging"))
        # Without `jit` every single operation is looked at.
        with jax.disable_jit():
            small = make_kernel(inner=INNER_KERNELS[name], segments=2)
            state = small.init(jr.key(1), 2, None, (), {})
            state = small.sample(state, (), {})
    assert np.all(np.isfinite(state.z["x"]))


# The law


def assert_law(values, mean, variance):
    """z-tests of mean and second moment of independent Gaussian draws, shape `(draws,)`."""
    size = values.size
    assert abs(values.mean() - mean) < Z_MAX * np.sqrt(variance / size)
    second = np.mean((values - mean) ** 2)
    assert abs(second - variance) < Z_MAX * variance * np.sqrt(2 / size)


def unwarmed_draws(inner):
    """4,000 independent draws with `num_warmup=0`, standardised by the law they should have."""
    kernel = make_kernel(inner=inner, segments=20)
    mcmc = run(kernel, num_warmup=0, num_samples=2, num_chains=1000, chain_method="vectorized")
    assert not np.any(field(mcmc, "diverging"))
    alpha, variance = np.exp(-1e-3), 0.36 * np.exp(-2e-3) + 1 - np.exp(-2e-3)
    assert draws(mcmc).shape == (1000, 2, 2)
    return (draws(mcmc).ravel() - alpha * 0.5) / np.sqrt(variance)


def test_no_warmup_draws_are_roughly_right():
    # Steps as short as any data can need leave a bias after 2 steps: the mean is right, the sd is within 15
    # %.
    values = unwarmed_draws(rtk.PreconditionedMALA())
    assert abs(values.mean()) < Z_MAX / np.sqrt(values.size)
    assert 0.85 < values.std() < 1.05


@pytest.mark.slow
def test_no_warmup_draws_are_right_after_enough_steps():
    values = unwarmed_draws(rtk.PreconditionedMALA(num_steps=16))
    assert_law(values, 0.0, 1.0)
    with pytest.raises(AssertionError):  # the check can fail
        assert_law(0.9 * values, 0.0, 1.0)


def test_step_sizes_do_not_change_without_warmup():
    kernel = make_kernel()
    state = kernel.init(jr.key(0), 0, None, (), {})
    new = one_pass(kernel, one_pass(kernel, state))
    np.testing.assert_array_equal(new.adapt_state.step_size, state.adapt_state.step_size)
    np.testing.assert_array_equal(new.adapt_state.curvature, state.adapt_state.curvature)


@pytest.mark.slow
def test_target_accept_prob_is_reached():
    weights, means = [0.3, 0.7], np.stack([np.full(10, 0.9), np.full(10, -0.5)])
    mixture = rtk.GaussianMixtureScore(
        weights, means, np.stack([0.3 * np.eye(10), 0.5 * np.eye(10)]), rtk.OU()
    )
    for target in (0.6, 0.8):
        kernel = make_kernel(
            mixture, inner=rtk.MALA(num_steps=4), segments=5, event_shape=(10,), target_accept_prob=target
        )
        mcmc = run(kernel, num_warmup=300, num_samples=50, num_chains=40, chain_method="vectorized")
        by_chain = field(mcmc, "segment_accept_prob").mean(axis=1)
        mean, error = by_chain.mean(axis=0), by_chain.std(axis=0, ddof=1) / np.sqrt(by_chain.shape[0])
        print(target, mean, error, flush=True)
        assert np.all(error < 0.01)
        assert np.all(np.abs(mean - target) < Z_MAX * error + 0.01)
        np.testing.assert_allclose(
            field(mcmc, "accept_prob"), field(mcmc, "segment_accept_prob").mean(axis=-1), rtol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "step_size"),
    [
        ("MALA", 0.03),
        ("ULD", 0.03),
        ("PreconditionedMALA", (0.02, 0.01, 0.005)),
        ("ULA", (0.02, 0.01, 0.005)),
    ],
)
def test_given_step_size_is_used_as_it_is(name, step_size):
    kernel = make_kernel(
        inner=eqx.tree_at(lambda k: k.step_size, INNER_KERNELS[name], step_size, is_leaf=lambda x: x is None)
    )
    expected = np.broadcast_to(np.asarray(step_size, np.float32), (3,))
    state = kernel.init(jr.key(0), 2, None, (), {})
    np.testing.assert_array_equal(state.adapt_state.step_size, expected)
    step = jax.jit(lambda state: kernel.sample(state, (), {}))
    for _ in range(4):  # two of warmup, two after it
        state = step(state)
        np.testing.assert_array_equal(state.adapt_state.step_size, expected)


# Failures


def hole(x, t):
    """NaN in a part of space, at low noise."""
    return score(x, t) * jnp.where((x[0] < 0.0) & (t < 1.5), jnp.nan, 1.0)


@pytest.mark.parametrize("name", SOME_INNER_KERNELS)
def test_nan_in_a_part_of_space(name, capsys):
    kernel = make_kernel(hole, inner=INNER_KERNELS[name])
    start = jnp.array([7.0, 7.0])
    mcmc = run(kernel, num_warmup=20, num_samples=40, init_params={"x": start})
    values, diverging = draws(mcmc)[0], field(mcmc, "diverging")[0]
    assert np.all(np.isfinite(values))
    assert 0 < diverging.sum() < diverging.size
    kept = np.all(values[1:] == values[:-1], axis=1)
    assert np.any(kept)
    assert np.all(diverging[1:][kept])  # only passes that failed keep the draw before
    assert np.all(np.isfinite(field(mcmc, "segment_accept_prob")))
    assert np.all(np.isfinite(field(mcmc, "adapt_state.step_size")))
    capsys.readouterr()
    mcmc.print_summary()
    assert f"Number of divergences: {diverging.sum()}" in capsys.readouterr().out


@pytest.mark.parametrize("name", INNER_KERNELS)
def test_failure_at_the_start_of_a_segment_keeps_the_draw_before(name):
    # The state says when: NaN from a model argument, in the middle of the grid, where `init` does not look.
    def failing(x, t, broken):
        return score(x, t) * jnp.where(broken & (t > 0.01) & (t < 4.0), jnp.nan, 1.0)

    kernel = make_kernel(failing, inner=INNER_KERNELS[name])
    state = kernel.init(jr.key(0), 2, {"x": jnp.array([7.0, -7.0])}, (jnp.array(False),), {})
    step = jax.jit(lambda state, broken: kernel.sample(state, (broken,), {}))
    failed = step(state, jnp.array(True))
    np.testing.assert_array_equal(failed.z["x"], [7.0, -7.0])
    assert bool(failed.diverging)
    good = step(failed, jnp.array(False))
    assert not bool(good.diverging)
    assert np.all(np.isfinite(good.z["x"]))
    assert not np.any(np.asarray(good.z["x"]) == np.array([7.0, -7.0]))
    again = step(good, jnp.array(True))
    np.testing.assert_array_equal(again.z["x"], good.z["x"])
    for leaf in jax.tree.leaves(again._replace(rng_key=None)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize(
    "inner", [rtk.ULA(num_steps=6, step_size=100.0), rtk.ULD(num_steps=6, step_size=100.0)]
)
def test_exploding_steps_are_flagged(inner):
    kernel = make_kernel(inner=inner)
    mcmc = run(kernel, init_params={"x": jnp.array([7.0, -7.0])})
    assert np.all(field(mcmc, "diverging"))
    np.testing.assert_array_equal(draws(mcmc)[0], np.broadcast_to([7.0, -7.0], (6, 2)))


# The kernel is a value


def test_sample_depends_on_its_arguments_only():
    kernel = make_kernel()
    state = kernel.init(jr.key(0), 3, None, (0.1,), {})
    before = one_pass(kernel, state, 0.1)
    kernel.init(jr.key(7), 50, {"x": jnp.full(2, 9.0)}, (4.0,), {"scale": 0.1})
    kernel.init(jr.split(jr.key(7), 3), 50, None, (jnp.array([1.0, 2.0]),), {})
    after = one_pass(kernel, state, 0.1)
    for leaf, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other = jr.key_data(leaf), jr.key_data(other)
        np.testing.assert_array_equal(leaf, other)


def mixture_with_mean(mean):
    return rtk.GaussianMixtureScore([1.0], np.full((1, 2), mean), np.eye(2)[None], rtk.OU())


def test_state_of_other_weights_is_refused():
    kernel = make_kernel(mixture_with_mean(0.5))
    mcmc = make_mcmc(kernel, num_samples=3)
    mcmc.warmup(jr.key(1))
    state = mcmc.post_warmup_state
    expected = one_pass(kernel, state)
    same = one_pass(make_kernel(mixture_with_mean(0.5)), state)
    np.testing.assert_array_equal(same.z["x"], expected.z["x"])
    other = make_kernel(mixture_with_mean(0.6))
    with pytest.raises(
        ValueError, match=r"state comes from a kernel with other network weights.*Start a new `MCMC`"
    ):
        one_pass(other, state)
    resumed = make_mcmc(other, num_samples=3)
    resumed.post_warmup_state = state
    with pytest.raises(ValueError, match=r"state comes from a kernel with other network weights"):
        resumed.run(jr.key(2))


# Event shapes


@pytest.mark.slow
def test_scalar_event():
    scalar, vector = make_kernel(event_shape=()), make_kernel(event_shape=(1,))
    mcmc = run(scalar, num_chains=2, chain_method="vectorized")
    assert draws(mcmc).shape == (2, 6)
    expected = run(vector, num_chains=2, chain_method="vectorized")
    np.testing.assert_allclose(draws(mcmc), draws(expected)[..., 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOME_INNER_KERNELS)
@pytest.mark.slow
def test_matrix_event_is_a_vector_reshaped(name):
    inner = INNER_KERNELS[name]
    matrix, vector = (make_kernel(inner=inner, event_shape=shape) for shape in ((2, 3), (6,)))
    keys = jr.split(jr.key(0), 2)
    step_matrix = one_pass(matrix, matrix.init(keys, 2, None, (), {}))
    step_vector = one_pass(vector, vector.init(keys, 2, None, (), {}))
    assert step_matrix.z["x"].shape == (2, 2, 3)
    np.testing.assert_allclose(step_matrix.z["x"].reshape(2, 6), step_vector.z["x"], rtol=1e-4, atol=1e-5)


def test_site_name_and_run_of_matrices():
    mcmc = run(make_kernel(event_shape=(2, 3), site="galaxy"))
    assert set(mcmc.get_samples()) == {"galaxy"}
    assert draws(mcmc, "galaxy").shape == (1, 6, 2, 3)


# Cost


class CountEvaluations:
    """Counts evaluations at run time; under `vmap` every event counts."""

    def __init__(self):
        self.count, self._lock = 0, threading.Lock()

    def _add(self, x):
        with self._lock:
            self.count += 1

    def __call__(self, x, t):
        jax.debug.callback(self._add, x)
        return score(x, t)


@pytest.mark.parametrize(
    ("inner", "evaluations_per_segment"),
    [
        (rtk.PreconditionedMALA(num_steps=2, energy_difference=rtk.Trapezoid()), 3),
        (rtk.MALA(num_steps=2, energy_difference=rtk.Simpson()), 5),
        (rtk.ULD(num_steps=4), 5),
        (rtk.GaussianTransition(), 1),
    ],
)
def test_evaluations_are_counted_right(inner, evaluations_per_segment):
    counter = CountEvaluations()
    kernel = make_kernel(counter, inner=inner)
    mcmc = run(kernel)
    jax.effects_barrier()
    per_pass = 3 * evaluations_per_segment
    np.testing.assert_array_equal(field(mcmc, "num_score_evals"), np.full((1, 6), per_pass))
    assert kernel.num_score_evals == per_pass
    # `init` calls the score at both ends of the grid, draws from the prior and noises the draws.
    start = 2 + num_pilot_draws(2) * (TERMINAL_ROUNDS + PILOT_SEGMENTS + kernel.num_segments + 1)
    assert counter.count == (4 + 6) * per_pass + start


def test_no_more_evaluations_than_asked_for():
    counter = CountEvaluations()
    counter.schedule = rtk.OU()
    mcmc = run(rtk.RTKKernel(counter, event_shape=(2,), evaluations=7, denoise=True))
    jax.effects_barrier()
    before = counter.count
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jr.key(1), extra_fields=("num_score_evals",))
    jax.effects_barrier()
    assert counter.count - before == field(mcmc, "num_score_evals").sum() == 6 * 7


@pytest.mark.parametrize("chain_method", ["vectorized", pytest.param("sequential", marks=pytest.mark.slow)])
def test_second_run_traces_nothing(chain_method, count_traces):
    num_python_calls = 0

    def score_fn(x, t):
        nonlocal num_python_calls
        num_python_calls += 1
        return score(x, t)

    mcmc = make_mcmc(make_kernel(score_fn), num_chains=2, chain_method=chain_method)
    mcmc.run(jr.key(1))
    assert count_traces["traces"] == 1
    num_python_calls = 0
    mcmc.run(jr.key(2))
    assert count_traces["traces"] == 1
    # `init` asks for the shape of the score and for its arrays, which traces it; nothing is compiled.
    assert num_python_calls <= 2 * (2 if chain_method == "sequential" else 1)
