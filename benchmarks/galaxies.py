"""The law of galaxies drawn by RTK against 1000-step DDPM, on the pretrained network.

    python -m benchmarks.galaxies [--num-images 256]

Statistics of single images, as means over images; a difference passes below 5 % or below 4 standard errors.
"""

import argparse

import numpyro_rtk as rtk
from benchmarks.problems import compare_galaxies, ddpm_galaxies, draw, galaxy_network


def kernels():
    network, schedule = galaxy_network()
    options = {"event_shape": (1, 32, 32), "schedule": schedule}
    return {
        "RTKMALA": rtk.RTKMALA(network, **options),
        "RTKULD": rtk.RTKULD(network, **options),
        "RTKKernel": rtk.RTKKernel(network, **options),
        "PreconditionedMALA": rtk.RTKKernel(network, segments=32, **options),
        # Midpoints of long moves have less noise than the network was trained on; see docs/choosing.md.
        "Simpson, long moves": rtk.RTKKernel(
            network,
            inner=rtk.PreconditionedMALA(2, energy_difference=rtk.Simpson(), max_step_size=4.0),
            segments=20,
            **options,
        ),
    }


def galaxies(kernel, num_images=256, num_warmup=40, num_chains=8):
    """Draws at the kernel's settings, shape `(num_images, 1, 32, 32)`."""
    return draw(kernel, num_images, num_warmup=num_warmup, num_chains=num_chains).get_samples()["x"]


def agrees(relative, standard_errors):
    """The criterion: within 5 %, or within 4 standard errors."""
    return abs(relative) < 0.05 or abs(standard_errors) < 4


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--kernels", nargs="+", default=list(kernels()))
    options = parser.parse_args()
    reference = ddpm_galaxies(options.num_images)
    for name in options.kernels:
        kernel = kernels()[name]
        print(f"{name}, {kernel.num_score_evals} score evaluations per draw")
        rows = compare_galaxies(galaxies(kernel, options.num_images), reference)
        for statistic, (ours, theirs, relative, z) in rows.items():
            verdict = "" if agrees(relative, z) else "  DIFFERS"
            print(
                f"  {statistic:16s} {ours:8.4f}  DDPM {theirs:8.4f}  {100 * relative:+6.1f} %  {z:+5.1f} "
                f"s.e.{verdict}",
                flush=True,
            )


if __name__ == "__main__":
    main()
