"""Chains over several devices: the same draws, and no device waits for another."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from numpyro.infer import MCMC

import numpyro_rtk as rtk


COMMON = """
import functools
import jax, jax.numpy as jnp, jax.random as jr, numpy as np, numpyro, numpyro.distributions as dist
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro.infer import MCMC, NUTS
import numpyro_rtk as rtk
from numpyro_rtk._numpyro._sharding import _on, AXIS

assert jax.local_device_count() == 8
TABLE = jr.normal(jr.key(1), (17, 2))  # an array of the network
score = lambda x, t: -x + 0.001 * jnp.tanh(TABLE @ x) @ TABLE
schedule = rtk.OU()
Y = jnp.array([0.3, -0.4])

def hierarchy(y):
    offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", rtk.DiffusionPrior(score, (2,), schedule=schedule))
    numpyro.deterministic("total", x.sum() + offset)
    numpyro.sample("y", dist.Normal(offset + x, 0.5).to_event(1), obs=y)

sweeps = {"segments": 4, "num_particles": 2, "num_start_steps": 0, "num_pilot_draws": 16}
KERNELS = {
    "generation": (lambda: rtk.RTKKernel(score, event_shape=(2,), schedule=schedule, segments=4), ()),
    "gibbs": (lambda: rtk.RTKGibbs(NUTS(hierarchy, max_tree_depth=3), **sweeps), (Y,)),
    "joint": (lambda: rtk.ScoreHMC(hierarchy), (Y,)),
}
make, args = KERNELS[NAME]
"""

SAME = """
def run(method):
    options = {"num_warmup": 6, "num_samples": 5, "num_chains": 8, "progress_bar": False}
    mcmc = MCMC(make(), chain_method=method, **options)
    mcmc.run(jr.key(0), *args)
    return mcmc.get_samples(group_by_chain=True), mcmc.get_extra_fields(group_by_chain=True), mcmc.last_state

expected, extra, _ = run("vectorized")
found, others, state = run(rtk.shard_chains())
assert set(found) == set(expected)
for name, values in expected.items():
    assert found[name].shape == values.shape
    np.testing.assert_allclose(found[name], values, rtol=2e-3, atol=2e-3)
np.testing.assert_array_equal(others["diverging"], extra["diverging"])
assert len(state.rng_key.sharding.device_set) == 8
# What ran on eight devices goes on with two.
mcmc = MCMC(make(), num_warmup=6, num_samples=3, num_chains=8, progress_bar=False,
            chain_method=rtk.shard_chains(jax.local_devices()[:2]))
mcmc.post_warmup_state = state
mcmc.run(jr.key(2), *args)
assert len(mcmc.last_state.rng_key.sharding.device_set) == 2
"""

ALONE = """
mesh = Mesh(np.asarray(jax.local_devices()), (AXIS,))
keys = jax.device_put(jr.split(jr.key(0), 16), NamedSharding(mesh, PartitionSpec(AXIS)))
kernel = make()
words = ("all-reduce", "all-gather", "all-to-all", "collective", "reduce-scatter")

def program(apart):
    def many(state):
        return jax.lax.fori_loop(0, 3, lambda i, state: kernel.sample(state, args, {}), state)
    if not apart:
        return jax.jit(many).lower(state).compile().as_text()
    with _on(mesh):
        return jax.jit(many).lower(state).compile().as_text()

state = kernel.init(keys, 4, None, args, {})
text = program(True)
assert not any(word in text for word in words), [word for word in words if word in text]
# The network's array is an argument, and no constant, of which each call would have a copy.
if NAME == "generation":
    assert not [line for line in text.splitlines() if "f32[17,2]" in line and "constant(" in line]
if NAME != "generation":  # which has no loops as long as data say
    assert any(word in program(False) for word in words)
"""


def run(name, script):
    environment = dict(os.environ)
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    code = f"NAME = {name!r}\n{COMMON}\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generation", "gibbs", "joint"])
def test_chains_on_several_devices_have_the_draws_of_one(name):
    run(name, SAME)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generation", "gibbs", "joint"])
def test_devices_do_not_wait_for_each_other(name):
    run(name, ALONE)


def test_chains_that_do_not_fill_the_devices_are_refused():
    devices = jax.local_devices() * 2  # two, as far as counting goes
    kernel = rtk.RTKKernel(lambda x, t: -x, event_shape=(2,), schedule=rtk.OU())
    options = {"num_warmup": 0, "num_samples": 2, "progress_bar": False}
    mcmc = MCMC(kernel, num_chains=3, chain_method=rtk.shard_chains(devices), **options)
    with pytest.raises(ValueError, match=r"as a multiple of 2"):
        mcmc.run(jr.key(0))


@pytest.mark.parametrize("devices", [2, "cpu", [], [0, 1]])
def test_devices_are_devices(devices):
    with pytest.raises(TypeError, match=r"`devices` must be"):
        rtk.shard_chains(devices)


def test_it_is_no_transform():
    with pytest.raises(TypeError, match=r"chain_method=\.\.\."):
        rtk.shard_chains()(jnp.sin)


def test_it_shows_what_it_is():
    assert repr(rtk.shard_chains()) == "shard_chains()"


@pytest.mark.slow
def test_two_processes_merge_their_chains(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "two_processes.py"
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    command = [sys.executable, str(script), "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz as az
    x = np.asarray(az.from_netcdf(tmp_path / "two_processes.nc")["posterior"]["x"])
    assert x.shape == (8, 100, 2)
    # Chains of their own.
    assert len(np.unique(x[:, -1, 0])) == 8
    halves = x[:4, :, 0].mean(), x[4:, :, 0].mean()
    assert abs(halves[0] - halves[1]) < 0.5
