"""Wall time of a pass over the time its score evaluations would take alone, on the galaxy network.

    python -m benchmarks.overhead [--num-chains 64]

The network alone is evaluated jitted and vmapped at the same batch size; a pass is what `MCMC` runs per
iteration.
"""

import argparse

import jax
import jax.numpy as jnp
import jax.random as jr

import numpyro_rtk as rtk
from benchmarks.problems import galaxy_network, timed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-chains", type=int, default=64)
    options = parser.parse_args()
    network, schedule = galaxy_network()
    keys = jr.split(jr.key(0), options.num_chains)
    x = jr.normal(jr.key(1), (options.num_chains, 1, 32, 32))
    bare = timed(jax.jit(lambda x, t: jax.vmap(network, (0, None))(x, t)), x, jnp.asarray(1.0), repeats=20)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(network) if isinstance(leaf, jax.Array))
    print(
        f"network of {num_parameters:,} parameters alone, batch of {options.num_chains}: {1e3 * bare:.2f} ms"
    )
    inners = {
        "MALA": rtk.MALA(4),
        "MALA, Simpson": rtk.MALA(4, energy_difference=rtk.Simpson()),
        "PreconditionedMALA": rtk.PreconditionedMALA(4),
        "ULD": rtk.ULD(4),
        "GaussianTransition": rtk.GaussianTransition(),
    }
    for name, inner in inners.items():
        kernel = rtk.RTKKernel(network, event_shape=(1, 32, 32), schedule=schedule, segments=8, inner=inner)
        state = kernel.init(keys, 10, None, (), {})
        seconds = timed(jax.jit(lambda state, kernel=kernel: kernel.sample(state, (), {})), state)
        ratio = seconds / (kernel.num_score_evals * bare)
        print(
            f"{name:20s} {kernel.num_score_evals:4d} evaluations  {seconds:6.2f} s  ratio {ratio:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
