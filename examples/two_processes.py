"""Chains in two processes, each over its own devices, merged into one ArviZ object.

What is done here on one machine works for one process on each node of a cluster: every process has chains of
its own, with keys of its own, and no draw crosses between them. `jax.distributed` says which process it is.

    python examples/two_processes.py --output demo-output
"""

import argparse
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path


NUM_PROCESSES, DEVICES_EACH, CHAINS_EACH = 2, 2, 4


def work(process, address, output):
    """What each process does."""
    import jax
    import jax.numpy as jnp
    import jax.random as jr
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import MCMC

    import numpyro_rtk as rtk

    jax.distributed.initialize(address, NUM_PROCESSES, process)
    schedule = rtk.OU()
    score_fn = rtk.GaussianMixtureScore(
        jnp.array([0.3, 0.7]),
        jnp.array([[-1.5, 0.0], [1.5, 0.0]]),
        jnp.stack([0.1 * jnp.eye(2)] * 2),
        schedule,
    )

    def model(y):
        x = numpyro.sample("x", rtk.DiffusionPrior(score_fn, (2,), schedule=schedule))
        numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)

    kernel = rtk.RTKParticleGibbs(model, segments=12)
    options = {"num_warmup": 50, "num_samples": 100, "progress_bar": False}
    mcmc = MCMC(kernel, num_chains=CHAINS_EACH, chain_method=rtk.shard_chains(), **options)
    mcmc.run(jr.fold_in(jr.key(0), jax.process_index()), jnp.asarray(0.3))
    arviz().from_numpyro(mcmc).to_netcdf(output / f"process-{process}.nc")


def arviz():
    """ArviZ, without what 0.23 says of 1 at import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def merge(paths):
    """One ArviZ object with the chains of all files."""
    az = arviz()
    parts = [az.from_netcdf(path) for path in paths]
    if hasattr(az, "concat"):  # ArviZ 0.x
        return az.concat(*parts, dim="chain")
    import xarray as xr

    def joined(group):
        data = xr.concat([part[group].dataset for part in parts], "chain")
        return data.assign_coords(chain=range(data.sizes["chain"]))

    groups = [name for name in parts[0].children if "chain" in parts[0][name].dims]
    return xr.DataTree.from_dict({group: joined(group) for group in groups})


def main():
    """Start the processes, wait, and merge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--small", action="store_true", help="accepted for symmetry: it is small")
    parser.add_argument("--process", type=int, help="of a process that this script starts")
    parser.add_argument("--address", help="of the first process")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.process is not None:
        work(options.process, options.address, options.output)
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES_EACH}"
    command = [sys.executable, __file__, "--output", str(options.output), "--address", address]
    started = [
        subprocess.Popen([*command, "--process", str(i)], env=os.environ | {"XLA_FLAGS": flags})
        for i in range(NUM_PROCESSES)
    ]
    if any([process.wait() for process in started]):
        raise SystemExit("A process failed.")
    data = merge([options.output / f"process-{i}.nc" for i in range(NUM_PROCESSES)])
    data.to_netcdf(options.output / "two_processes.nc")
    print(arviz().summary(data, var_names=["x"]))
    print(f"{data['posterior'].sizes['chain']} chains in {options.output / 'two_processes.nc'}")


if __name__ == "__main__":
    main()
