"""Two blended galaxies: two diffusion sites, and their positions as latents.

Light of two galaxies overlaps on one noisy image. Each has the pretrained network `HSC_32` as prior, which knows centred
galaxies; where they are is unknown. Images and positions are strongly correlated, so `ScoreHMC` moves
them together.

    python examples/galaxy_blend.py --output demo-output
"""

import argparse
import warnings
from pathlib import Path

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
# Where the two were detected, in pixels from the centre of the image, and the error of that.
DETECTED, DETECTION_SD = jnp.array([[-4.0, -5.0], [4.0, 5.0]]), 0.3
NOISE_SD = 0.3
FREQUENCIES = jnp.stack(jnp.meshgrid(jnp.fft.fftfreq(32), jnp.fft.fftfreq(32), indexing="ij"))


def shift(image, offset):
    """Move an image by a fraction of pixels. By Fourier's shift theorem: smooth in the offset, where interpolation has kinks."""
    phase = jnp.exp(-2j * jnp.pi * jnp.tensordot(offset, FREQUENCIES, axes=1))
    return jnp.fft.ifft2(jnp.fft.fft2(image[0]) * phase).real


def model(y):
    prior = rtk.DiffusionPrior(HSC_32, event_shape=SHAPE, schedule=SCHEDULE)
    offsets = numpyro.sample("offsets", dist.Normal(DETECTED, DETECTION_SD).to_event(2))
    first, second = numpyro.sample("first", prior), numpyro.sample("second", prior)
    scene = shift(first, offsets[0]) + shift(second, offsets[1])
    numpyro.sample("y", dist.Normal(scene, NOISE_SD).to_event(2), obs=y)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--small", action="store_true", help="few iterations, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    num_warmup, num_samples = (4, 6) if options.small else (200, 250)

    offset_key, noise_key, run_key = jr.split(jr.key(8), 3)
    prior = rtk.DiffusionPrior(HSC_32, event_shape=SHAPE, schedule=SCHEDULE)
    # Draws that are large enough to overlap.
    truths = jnp.stack([prior.sample(jr.split(jr.key(seed), 3)[0]) for seed in (3, 5)])
    offsets = DETECTED + DETECTION_SD * jr.normal(offset_key, (2, 2))
    y = shift(truths[0], offsets[0]) + shift(truths[1], offsets[1]) + NOISE_SD * jr.normal(noise_key, (32, 32))

    kernel = rtk.ScoreHMC(
        model,
        init_strategy=numpyro.infer.init_to_median(num_samples=5),
        max_num_steps=4 if options.small else 128,
        trajectory_length=6.0,
        target_accept_prob=0.8,
    )
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=4, chain_method="vectorized")
    mcmc.run(run_key, y, extra_fields=("energy", "accept_prob", "num_steps"))

    draws = mcmc.get_samples(group_by_chain=True)
    extra = mcmc.get_extra_fields()
    print(
        f"\noffsets {np.round(np.asarray(offsets), 2).tolist()}, fluxes {np.round(np.asarray(truths.sum((1, 2, 3))), 1).tolist()}"
    )
    fluxes = {f"flux of the {name}": np.asarray(draws[name]).sum((2, 3, 4)) for name in ("first", "second")}
    print_summary({"offsets": np.asarray(draws["offsets"]), **fluxes})
    for name, truth in zip(("first", "second"), np.asarray(truths), strict=True):
        images = np.asarray(draws[name])
        low, high = np.quantile(images, [0.05, 0.95], axis=(0, 1))
        error = np.sqrt(np.mean((images.mean((0, 1)) - truth) ** 2))
        coverage = np.mean((truth >= low) & (truth <= high))
        print(f"{name}: error of the posterior mean {error:.3f}, share inside 90 % intervals {coverage:.3f}")
    print(f"acceptance {np.mean(extra['accept_prob']):.2f}, {np.mean(extra['num_steps']):.0f} leapfrog steps a draw")

    panels = {"data": y}
    for name, truth in zip(("first", "second"), truths, strict=True):
        images = np.asarray(draws[name])[:, :, 0]
        panels |= {f"{name}, truth": truth[0], f"{name}, mean": images.mean((0, 1)), f"{name}, sd": images.std((0, 1))}
    figure, axes = plt.subplots(2, 4, figsize=(12, 6), layout="constrained")
    places = [axes[0, 0], *axes[0, 1:], *axes[1, 1:]]
    axes[1, 0].set_axis_off()
    for axis, (title, image) in zip(places, panels.items(), strict=True):
        figure.colorbar(axis.imshow(image, cmap="viridis" if "sd" in title else "magma"), ax=axis, shrink=0.8)
        axis.set_title(title)
        axis.set_axis_off()
    figure.savefig(options.output / "galaxy_blend.png", dpi=150)
    az.from_numpyro(mcmc, log_likelihood=False).to_netcdf(options.output / "galaxy_blend.nc", engine="h5netcdf")


if __name__ == "__main__":
    main()
