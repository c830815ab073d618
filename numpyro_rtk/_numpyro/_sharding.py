"""Chains over devices: `shard_chains`, and how a kernel runs a step for every chain of its state."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


AXIS = "chains"

_MESH: ContextVar[Mesh | None] = ContextVar("numpyro_rtk_mesh", default=None)


def over_chains(function: Callable[..., Any], in_axes: Any, out_axes: Any = 0) -> Callable[..., Any]:
    """`jax.vmap` over chains; in a run by `shard_chains` each device has the chains that it holds.

    No device waits for another: loops of a step, as the leapfrog steps of a trajectory, are as long as the
    longest of the device's own chains.

    Args:
        function: A function of one chain.
        in_axes: 0 or `None` for each argument, or trees of them, as `jax.vmap` takes them.
        out_axes: The same for the results.
    """
    batched, mesh = jax.vmap(function, in_axes, out_axes), _MESH.get()
    if mesh is None:
        return batched
    return jax.shard_map(
        batched, mesh=mesh, in_specs=_specs(in_axes), out_specs=_specs(out_axes), check_vma=False
    )


def _specs(axes: Any) -> Any:
    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(AXIS)

    return jax.tree.map(spec, axes, is_leaf=lambda axis: axis is None)


def shard_chains(devices: Sequence[Any] | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Vectorized chains over several devices, as a value of `MCMC(chain_method=...)`.

    Each device moves its share of the chains at once, and none waits for another: compiled programs of
    `RTKKernel`, `RTKParticleGibbs`, `RTKGibbs` and `ScoreHMC` have no communication between devices while
    they sample. The network's arrays are arguments of the program, with a copy on each device. NumPyro's own
    kernels run, too, where XLA puts them.

    Draws are those of `chain_method="vectorized"`, up to the order of reductions in floating point.

    On a CPU, ask for devices before JAX starts: `numpyro.set_host_device_count(2)`.

    Args:
        devices: Devices to use; `None`: all of this process. With `jax.distributed`, each process has chains
            of its own.

    Raises:
        ValueError: in `MCMC.run`, if the number of chains is no multiple of the number of devices.
        TypeError: if `devices` is not a sequence of devices.
    """
    if devices is not None:
        if isinstance(devices, str | int) or not len(devices):
            raise TypeError(
                f"`devices` must be a sequence of devices such as `jax.local_devices()`, got {devices!r}."
            )
        wrong = [device for device in devices if not isinstance(device, jax.Device)]
        if wrong:
            raise TypeError(
                f"`devices` must be devices such as those of `jax.local_devices()`, got {wrong[0]!r}."
            )
    return _ShardedChains(None if devices is None else tuple(devices))


class _ShardedChains:
    """What NumPyro calls in place of a vectorizing transform."""

    def __init__(self, devices: tuple[Any, ...] | None) -> None:
        self._devices = devices

    def __repr__(self) -> str:
        return "shard_chains()" if self._devices is None else f"shard_chains({list(self._devices)})"

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        mcmc = getattr(getattr(function, "func", None), "__self__", None)
        if mcmc is None or not hasattr(mcmc, "chain_method"):
            raise TypeError(
                "`shard_chains()` is a value of NumPyro's `MCMC(chain_method=...)`, no transform."
            )
        return functools.partial(self._run, mcmc, function)

    def _run(self, mcmc: Any, function: Callable[..., Any], inputs: Any) -> Any:
        devices = jax.local_devices() if self._devices is None else self._devices
        if mcmc.num_chains % len(devices):
            raise ValueError(
                f"`MCMC(num_chains={mcmc.num_chains}, chain_method=shard_chains())` needs as many chains on "
                f"each of the {len(devices)} devices: give `num_chains` as a multiple of {len(devices)}, or "
                "fewer `devices`."
            )
        mesh = Mesh(np.asarray(devices), (AXIS,))
        keys, state, params = inputs
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        keys, params = jax.device_put((keys, params), sharding)
        state = jax.tree.map(functools.partial(_placed, sharding=sharding), state)
        with _vectorized(mcmc), _on(mesh):
            states, last = function((keys, state, params))
        # NumPyro has draws first where chains are vectorized.
        return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), states), last


def _placed(leaf: Any, sharding: NamedSharding) -> Any:
    """A part of a state that a run before, perhaps on other devices, left on several: chains on the devices
    of this run, and what all chains share, which kernels close over, on none in particular.
    """
    if not isinstance(leaf, jax.Array) or leaf.sharding.num_devices == 1:
        return leaf
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    if leaf.sharding.is_fully_replicated and not is_key:
        return jnp.asarray(np.asarray(leaf))
    return jax.device_put(leaf, sharding)


@contextlib.contextmanager
def _vectorized(mcmc: Any) -> Iterator[None]:
    """NumPyro maps what it computes of draws over chains only where the method has this name."""
    given, mcmc.chain_method = mcmc.chain_method, "vectorized"
    try:
        yield
    finally:
        mcmc.chain_method = given


@contextlib.contextmanager
def _on(mesh: Mesh) -> Iterator[None]:
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)
