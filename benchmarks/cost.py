"""Sliced W2 on the ring mixture at equal score evaluations: RTK beside DDPM, DDIM and DPM-Solver++(2M).

    python -m benchmarks.cost [--replicates 10] [--rho 7]

All samplers use the grid of `segment_times` from the same terminal noise. Entries are the mean over
replicates of the distance of 20,000 draws to 20,000 exact draws, divided by the same for two exact samples;
the standard error of that ratio is printed beside it.
"""

import argparse

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import numpyro_rtk as rtk
from benchmarks.problems import DIM, draw, ring_mixture, RingReference


NUM_DRAWS = 20_000


def deterministic_solver(score, schedule, times, order, key, num_draws):
    """DDIM (`order=1`) or DPM-Solver++(2M) (`order=2`), Lu et al. (2022), one evaluation a step."""
    t = jnp.asarray(times, jnp.float32)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    half_log_snr = 0.5 * schedule.log_snr(t)

    @jax.jit
    def solve(x):
        previous, previous_step = None, None
        for i in range(len(times) - 1):
            data = (x + sigma[i] ** 2 * jax.vmap(score, (0, None))(x, t[i])) / alpha[i]
            step = half_log_snr[i + 1] - half_log_snr[i]
            estimate = data
            if order == 2 and previous is not None:
                estimate = data + 0.5 * (step / previous_step) * (data - previous)
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * jnp.expm1(-step) * estimate
            previous, previous_step = data, step
        return x

    return np.asarray(solve(jr.normal(key, (num_draws, DIM))))


def samplers(evaluations):
    """Label to (inner kernel, number of segments) at about `evaluations` score evaluations."""
    inners = {
        "RTK-MALA, 4 steps": rtk.MALA(4),
        "RTK-MALA, 2 steps, Simpson": rtk.MALA(2, energy_difference=rtk.Simpson()),
        "PreconditionedMALA, 2 steps": rtk.PreconditionedMALA(2),
        "same, Simpson, long moves": rtk.PreconditionedMALA(
            2, energy_difference=rtk.Simpson(), max_step_size=4.0
        ),
    }
    return {
        label: (inner, evaluations // inner.evaluations_per_segment) for label, inner in inners.items()
    } | {
        "GaussianTransition(order=2)": (rtk.GaussianTransition(order=2), evaluations),
        "DDPM": (rtk.GaussianTransition(), evaluations),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=10)
    parser.add_argument(
        "--rho", type=float, default=None, help="spacing of segment_times; its default if not given"
    )
    parser.add_argument("--evaluations", type=int, nargs="+", default=[60, 100, 200])
    options = parser.parse_args()
    spacing = {} if options.rho is None else {"rho": options.rho}

    schedule = rtk.OU()
    score = ring_mixture(schedule)
    reference = RingReference(NUM_DRAWS, options.replicates)
    print(f"Monte Carlo floor {reference.floor:.5f}; ratio to the floor (standard error), evaluations used")
    for evaluations in options.evaluations:
        rows = {}
        for label, (inner, segments) in samplers(evaluations).items():
            times = rtk.segment_times(schedule, segments, **spacing)
            kernel = rtk.RTKKernel(score, event_shape=(DIM,), segments=times, inner=inner)
            num_warmup = 0 if isinstance(inner, rtk.GaussianTransition) else 200
            mcmc = draw(kernel, NUM_DRAWS * options.replicates, num_warmup=num_warmup, num_chains=200)
            replicates = np.asarray(mcmc.get_samples()["x"]).reshape(options.replicates, NUM_DRAWS, DIM)
            rows[label] = (replicates, kernel.num_score_evals)
        for label, order in (("DDIM", 1), ("DPM-Solver++(2M)", 2)):
            times = rtk.segment_times(schedule, evaluations, **spacing)
            replicates = [
                deterministic_solver(score, schedule, times, order, jr.key(i), NUM_DRAWS)
                for i in range(options.replicates)
            ]
            rows[label] = (replicates, evaluations)
        for label, (replicates, used) in rows.items():
            ratios = np.array(reference.distances(replicates)) / reference.floor
            error = ratios.std() / np.sqrt(max(len(ratios) - 1, 1))
            print(f"{evaluations:4d}  {label:30s} {ratios.mean():6.3f} ({error:.3f})  {used}", flush=True)


if __name__ == "__main__":
    main()
