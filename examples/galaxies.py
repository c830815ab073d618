"""Draw galaxies from a pretrained diffusion model of the Hyper Suprime-Cam survey.

The network `HSC_32` of the package `galaxygrad` (its weights ship in the wheel) is the score of 32x32 images
of real galaxies, noised by a variance-preserving process of constant rate 1 from t = 0 to 10. RTK-MALA and
RTK-ULD draw from it through NumPyro's `MCMC`; the draws go to a figure and, through ArviZ, to NetCDF.

    python examples/galaxies.py --output demo-output
"""

import argparse
import warnings
from pathlib import Path

import jax.random as jr
import matplotlib


matplotlib.use("Agg")  # figures go to files

import numpy as np
from galaxygrad.scorenet import HSC_32
from matplotlib import pyplot as plt
from numpyro.diagnostics import print_summary
from numpyro.infer import MCMC

import numpyro_rtk as rtk


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces ArviZ 1 at import
    import arviz as az


SHAPE = (1, 32, 32)
# Below t = 0.01 the noise (sd 0.1) is far below a pixel's range, and the network was hardly trained there.
SCHEDULE = rtk.VP(beta_min=1.0, beta_max=1.0, t_max=10.0, t_min=0.01)
FIELDS = ("accept_prob", "segment_accept_prob", "num_score_evals", "adapt_state.step_size")


def run(kernel, num_warmup, num_samples):
    mcmc = MCMC(
        kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=4, chain_method="vectorized"
    )
    mcmc.run(jr.key(0), extra_fields=FIELDS)
    return mcmc


def report(name, kernel, mcmc):
    """NumPyro's summary of what one would measure on a galaxy, and acceptance by segment."""
    images = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])[:, :, 0]
    fields = mcmc.get_extra_fields()
    print(
        f"\n{name}: {kernel.num_score_evals} score evaluations per galaxy, {int(fields['diverging'].sum())} "
        f"divergences"
    )
    print_summary({"flux": images.sum((2, 3)), "peak": images.max((2, 3)), "sd": images.std((2, 3))})
    print("segment   noise sd / signal   acceptance   step size")
    noise = noise_levels(kernel)
    accept = np.asarray(fields["segment_accept_prob"]).mean(0)
    step_size = np.asarray(fields["adapt_state.step_size"]).mean(0)
    for k in range(kernel.num_segments):
        print(f"{k:7d}   {noise[k]:17.3f}   {accept[k]:10.2f}   {step_size[k]:9.2g}")


def noise_levels(kernel):
    """`sigma / alpha` at the end of each segment."""
    times = kernel.segment_times[1:]
    return np.asarray(SCHEDULE.sigma(times) / SCHEDULE.alpha(times))


def plot_galaxies(runs, path):
    columns = 8
    figure = plt.figure(figsize=(columns * 1.2, 2.9 * len(runs)), layout="constrained")
    for part, (name, (_, mcmc)) in zip(
        np.atleast_1d(figure.subfigures(len(runs), 1)), runs.items(), strict=True
    ):
        part.suptitle(name)
        axes = part.subplots(2, columns).ravel()
        images = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])[:, :, 0]
        images = images.swapaxes(0, 1).reshape(-1, 32, 32)[: axes.size]
        for axis in axes:
            axis.set_axis_off()
        for image, axis in zip(images, axes, strict=False):
            axis.imshow(image, cmap="magma", vmin=-0.3, vmax=5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_segments(runs, path):
    figure, axes = plt.subplots(2, len(runs), figsize=(4.2 * len(runs), 5), sharex=True, squeeze=False)
    for column, (name, (kernel, mcmc)) in enumerate(runs.items()):
        fields = mcmc.get_extra_fields(group_by_chain=True)
        noise = noise_levels(kernel)
        accept = np.asarray(fields["segment_accept_prob"]).mean(1)
        step_size = np.asarray(fields["adapt_state.step_size"])[:, -1]
        axes[0, column].set_title(name)
        if kernel.inner.adapts_step_size:
            axes[0, column].semilogx(noise, accept.T, "o-", markersize=3)
            axes[0, column].axhline(kernel.target_accept_prob, color="grey", linewidth=0.8, linestyle="--")
        else:
            axes[0, column].text(0.5, 0.5, "no accept step", transform=axes[0, column].transAxes, ha="center")
        axes[0, column].set_ylim(0, 1.02)
        axes[1, column].loglog(noise, step_size.T, "o-", markersize=3)
        axes[1, column].set_xlabel("noise sd / signal at the end of the segment")
    axes[0, 0].set_ylabel("acceptance probability")
    axes[1, 0].set_ylabel("step size")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument(
        "--small", action="store_true", help="few galaxies from few segments, to see that it runs"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    num_warmup, num_samples = (4, 4) if options.small else (40, 16)
    grid = {"segments": 12} if options.small else {}

    kernels = {
        "RTK-MALA": rtk.RTKMALA(HSC_32, event_shape=SHAPE, schedule=SCHEDULE, **grid),
        "RTK-ULD": rtk.RTKULD(HSC_32, event_shape=SHAPE, schedule=SCHEDULE, **grid),
    }
    runs = {}
    for name, kernel in kernels.items():
        runs[name] = (kernel, run(kernel, num_warmup, num_samples))
        report(name, *runs[name])

    plot_galaxies(runs, options.output / "galaxies.png")
    plot_segments(runs, options.output / "galaxies_segments.png")
    az.from_numpyro(runs["RTK-MALA"][1]).to_netcdf(options.output / "galaxies.nc", engine="h5netcdf")
    az.from_numpyro(runs["RTK-ULD"][1]).to_netcdf(options.output / "galaxies_uld.nc", engine="h5netcdf")


if __name__ == "__main__":
    main()
