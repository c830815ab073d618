"""Photon counts of a galaxy: a Poisson likelihood with an uncertain sky level.

As `galaxy_restore.py`, but each pixel counts photons, and few of them. The prior of the image is the
pretrained network `HSC_32`; `ScoreHMC` moves image and sky level together. The likelihood is not Gaussian:
the annealed start tempers it by itself. The truth is a draw of the prior as it comes, with the noise of
`t_min`, as the draws of the posterior have it: both are of the same law, and intervals are of that image.

    python examples/galaxy_counts.py --output demo-output
"""

import argparse
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib


matplotlib.use("Agg")  # figures go to files

import numpy as np
import numpyro
import numpyro.distributions as dist
from galaxygrad.scorenet import HSC_32
from matplotlib import pyplot as plt
from numpyro.diagnostics import print_summary
from numpyro.infer import MCMC

import numpyro_rtk as rtk


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces ArviZ 1 at import
    import arviz as az


SHAPE = (1, 32, 32)
SCHEDULE = rtk.VP(beta_min=1.0, beta_max=1.0, t_max=10.0, t_min=0.01)
EXPOSURE, SKY = 10.0, 2.0
# As found on empty sky nearby, with a relative error of 3 %. Without it faint light everywhere could not be
# told from sky, and the posterior would have a second mode.
MEASURED_SKY, SKY_ERROR = 1.96, 0.03


def rate(image, sky):
    """Expected counts: positive, and nearly proportional to the image where that is bright."""
    return EXPOSURE * jax.nn.softplus(4 * image[0]) / 4 + sky


def model(counts):
    sky = numpyro.sample("sky", dist.LogNormal(jnp.log(MEASURED_SKY), SKY_ERROR))
    image = numpyro.sample("image", rtk.DiffusionPrior(HSC_32, event_shape=SHAPE, schedule=SCHEDULE))
    numpyro.sample("counts", dist.Poisson(rate(image, sky)).to_event(2), obs=counts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--small", action="store_true", help="few iterations, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    num_warmup, num_samples = (4, 6) if options.small else (150, 250)

    truth_key, noise_key, run_key = jr.split(jr.key(5), 3)
    truth = rtk.DiffusionPrior(HSC_32, event_shape=SHAPE, schedule=SCHEDULE).sample(truth_key)
    counts = jr.poisson(noise_key, rate(truth, SKY))

    # Faint light in many pixels looks like a brighter sky: both must move together.
    kernel = rtk.ScoreHMC(
        model, max_num_steps=4 if options.small else 128, trajectory_length=5.0, target_accept_prob=0.8
    )
    mcmc = MCMC(
        kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=4, chain_method="vectorized"
    )
    mcmc.run(run_key, counts, extra_fields=("energy", "accept_prob", "num_steps"))

    draws = mcmc.get_samples(group_by_chain=True)
    images, truth = np.asarray(draws["image"])[:, :, 0], np.asarray(truth[0])
    print(f"\nsky {SKY}, flux {truth.sum():.1f}, {int(jnp.sum(counts))} photons")
    print_summary({"sky": np.asarray(draws["sky"]), "flux": images.sum((2, 3)), "peak": images.max((2, 3))})
    low, high = np.quantile(images, [0.05, 0.95], axis=(0, 1))
    print(
        f"error of the posterior mean: {np.sqrt(np.mean((images.mean((0, 1)) - truth) ** 2)):.3f} (rms per "
        f"pixel)"
    )
    inside = (truth >= low) & (truth <= high)
    print(
        f"share of pixels, with the noise of t_min in truth and draws, inside their 90 % interval: "
        f"{inside.mean():.3f}"
    )

    panels = {
        "truth": truth,
        "counts": counts,
        "posterior mean": images.mean((0, 1)),
        "posterior sd": images.std((0, 1)),
    }
    scales = {"counts": ("magma", 0, None), "posterior sd": ("viridis", 0, None)}
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained")
    for axis, (title, image) in zip(axes, panels.items(), strict=True):
        cmap, low, high = scales.get(title, ("magma", truth.min(), truth.max()))
        figure.colorbar(axis.imshow(image, cmap=cmap, vmin=low, vmax=high), ax=axis, shrink=0.8)
        axis.set_title(title)
        axis.set_axis_off()
    figure.savefig(options.output / "galaxy_counts.png", dpi=150)
    az.from_numpyro(mcmc, log_likelihood=False).to_netcdf(
        options.output / "galaxy_counts.nc", engine="h5netcdf"
    )


if __name__ == "__main__":
    main()
