"""Where the segments go: spacings of `segment_times` compared on the ring mixture and on the galaxy network.

    python -m benchmarks.spacing [--galaxies]

Mixture: sliced W2 of 20,000 draws over the Monte Carlo floor, mean of the replicates (standard error).
Galaxies: 256 draws against 1000-step DDPM, relative differences in per cent (in standard errors).
"""

import argparse

import numpy as np

import numpyro_rtk as rtk
from benchmarks.problems import (
    compare_galaxies,
    ddpm_galaxies,
    DIM,
    draw,
    galaxy_network,
    ring_mixture,
    RingReference,
)


RHOS = (7.0, 20.0, np.inf)


def mixture(num_replicates):
    score, reference = ring_mixture(rtk.OU()), RingReference(20_000, num_replicates)
    for inner, segments in (
        (rtk.PreconditionedMALA(2), 20),
        (rtk.MALA(4), 20),
        (rtk.GaussianTransition(), 60),
    ):
        for rho in RHOS:
            times = rtk.segment_times(rtk.OU(), segments, rho=rho)
            kernel = rtk.RTKKernel(score, event_shape=(DIM,), segments=times, inner=inner)
            mcmc = draw(kernel, 20_000 * num_replicates, num_chains=200)
            replicates = np.asarray(mcmc.get_samples()["x"]).reshape(num_replicates, -1, DIM)
            ratios = np.array(reference.distances(replicates)) / reference.floor
            error = ratios.std() / np.sqrt(num_replicates - 1)
            print(
                f"rho={rho:<4g} {type(inner).__name__:20s} {kernel.num_score_evals:4d}  {ratios.mean():.3f} "
                f"({error:.3f})",
                flush=True,
            )


def galaxies():
    network, schedule = galaxy_network()
    reference = ddpm_galaxies(256)
    for inner, segments in ((rtk.PreconditionedMALA(4), 20), (rtk.MALA(4), 20)):
        for rho in RHOS:
            times = rtk.segment_times(schedule, segments, rho=rho)
            kernel = rtk.RTKKernel(
                network, event_shape=(1, 32, 32), schedule=schedule, segments=times, inner=inner
            )
            mcmc = draw(kernel, 256, num_warmup=40, num_chains=16)
            rows = compare_galaxies(mcmc.get_samples()["x"], reference)
            text = "  ".join(f"{name} {100 * r:+.1f} ({z:+.1f})" for name, (_, _, r, z) in rows.items())
            print(f"rho={rho:<4g} {type(inner).__name__:20s} {kernel.num_score_evals:4d}  {text}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=10)
    parser.add_argument("--galaxies", action="store_true")
    options = parser.parse_args()
    galaxies() if options.galaxies else mixture(options.replicates)
