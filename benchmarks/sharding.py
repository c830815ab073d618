"""Chains over host devices: draws per second of one device and of several, by `shard_chains`.

Each number of devices has a process of its own. The time of a draw is the difference of a long and a short
run, so that compilation, which NumPyro does for each run, drops out. Two laws: a closed-form mixture in the
plane, of which a device does little at once, and a network of three layers of 256 units, whose products of
matrices one device spreads over all cores by itself.

Run with:  python -m benchmarks.sharding [--devices 1 2] [--chains 256]
"""

import argparse
import os
import subprocess
import sys
import time


def measure(name, num_chains):
    """Draws per second of this process."""
    import jax
    import jax.numpy as jnp
    import jax.random as jr
    from numpyro.infer import MCMC

    import numpyro_rtk as rtk

    schedule = rtk.OU()
    if name == "mixture":
        means = jnp.array([[-1.5, 0.0], [1.5, 0.0]])
        score = rtk.GaussianMixtureScore(
            jnp.array([0.3, 0.7]), means, jnp.stack([0.1 * jnp.eye(2)] * 2), schedule
        )
        shape = (2,)
    else:
        layers = [0.05 * jr.normal(key, (256, 256)) for key in jr.split(jr.key(0), 3)]

        def score(x, t):
            h = x
            for layer in layers:
                h = jnp.tanh(layer @ h)
            return -x + 1e-4 * h

        shape = (256,)
    kernel = rtk.RTKKernel(score, event_shape=shape, schedule=schedule, segments=8)
    few, many = (20, 420) if name == "mixture" else (5, 45)

    def seconds(num_samples):
        options = {
            "num_warmup": 0,
            "num_samples": num_samples,
            "num_chains": num_chains,
            "progress_bar": False,
        }
        mcmc = MCMC(kernel, chain_method=rtk.shard_chains(), **options)
        start = time.perf_counter()
        mcmc.run(jr.key(0))
        jax.block_until_ready(mcmc.get_samples())
        return time.perf_counter() - start

    seconds(few)
    return num_chains * (many - few) / (seconds(many) - seconds(few))


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--chains", type=int, default=256)
    parser.add_argument("--measure", help="of a process that this script starts")
    args = parser.parse_args()
    if args.measure:
        print(measure(args.measure, args.chains))
        return
    print("| Law | Devices | Draws per second | To the first |\n|---|---|---|---|")
    for name in ("mixture", "network"):
        first = None
        for count in args.devices:
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
            command = [
                sys.executable,
                "-m",
                "benchmarks.sharding",
                "--measure",
                name,
                "--chains",
                str(args.chains),
            ]
            done = subprocess.run(
                command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, check=True
            )
            speed = float(done.stdout.split()[-1])
            first = speed if first is None else first
            print(f"| {name} | {count} | {speed:.0f} | {speed / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
