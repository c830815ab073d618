"""Compile time and peak memory of `MCMC(RTKKernel(network))` for 10 thousand and 10 million parameters.

    python -m benchmarks.large_network

Each row is a fresh process: `hoisted` is what the library does (the arrays travel in the state), `constant`
the same with the network hidden from it (inside a jitted function) so that JAX bakes the arrays in,
`argument` passes the network through `MCMC.run(key, arrays)` with `jit_model_args=True`.
"""

import argparse
import resource
import subprocess
import sys
import time


def measure(mode, width):
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.random as jr
    from numpyro.infer import MCMC

    import numpyro_rtk as rtk

    network = eqx.nn.MLP(16, 16, width, 4, activation=jax.nn.silu, key=jr.key(0))
    arrays, static = eqx.partition(network, eqx.is_array)
    num_parameters = sum(array.size for array in jax.tree.leaves(arrays))

    class Residual(eqx.Module):
        network: eqx.nn.MLP

        def __call__(self, x, t):
            return -x + 0.01 * jnp.exp(-t) * self.network(x)

    # What a jitted function inside another function closes over is out of the library's reach.
    jitted = jax.jit(lambda x, t: Residual(network)(x, t))

    jax.block_until_ready(arrays)
    args = ()
    if mode == "hoisted":
        score = Residual(network)
    elif mode == "constant":

        def score(x, t):
            return jitted(x, t)

    else:
        args = (arrays,)

        def score(x, t, arrays):
            return Residual(eqx.combine(arrays, static))(x, t)

    kernel = rtk.RTKKernel(score, event_shape=(16,), segments=4)
    mcmc = MCMC(kernel, num_warmup=2, num_samples=2, progress_bar=False, jit_model_args=mode == "argument")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    mcmc.run(jr.key(0), *args)
    jax.block_until_ready(mcmc.get_samples())
    first = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lowered = (
        jax.jit(lambda state: kernel.sample(state, args, {})).lower(mcmc.last_state)
        if mode != "argument"
        else None
    )
    size = len(lowered.as_text()) / 1e6 if lowered is not None else float("nan")
    print(f"{mode:9s} {num_parameters:11,d}  {first:9.2f}  {after - before:12.0f}  {size:12.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("MODE", "WIDTH"))
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], int(options.one[1]))
        return
    print("mode       parameters  first run  peak memory+  program text")
    print("                         seconds           MiB    million chars", flush=True)
    for mode in ("hoisted", "argument", "constant"):
        for width in (52, 1820):
            subprocess.run(
                [sys.executable, "-m", "benchmarks.large_network", "--one", mode, str(width)], check=True
            )


if __name__ == "__main__":
    main()
