"""Two blended galaxies: two diffusion sites, and their positions as latents.

Light of two real galaxies of the Hubble eXtreme Deep Field overlaps on noisy images in two bands, given
colours of their own. Each has the pretrained network `HSC_32` as prior, which knows centred galaxies; where
they are is uncertain. Images and positions are strongly correlated, so `ScoreHMC` moves them together.

Draws have the noise of `t_min`, and real galaxies have not: fluxes, intervals and figures are of clean light,
`PRIOR.clean_draws`. The likelihood sees that noise on top of `NOISE_SD`, so that intervals are somewhat wide.

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
from skimage.color import rgb2xyz
from skimage.data import hubble_deep_field

import numpyro_rtk as rtk


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces ArviZ 1 at import
    import arviz as az


# The law of galaxies with the noise of t = 0.03, as in `galaxy_restore.py`.
SCHEDULE = rtk.VP(beta_min=1.0, beta_max=1.0, t_max=10.0, t_min=0.03)
PRIOR = rtk.DiffusionPrior(HSC_32, event_shape=(1, 32, 32), schedule=SCHEDULE)
ALPHA = SCHEDULE.alpha(SCHEDULE.t_min)  # draws are that times clean images, and noise
# Where the two were detected, in pixels from the centre of the image, and the error of that.
DETECTED, DETECTION_SD = jnp.array([[-2.0, -3.0], [2.0, 3.0]]), 0.3
NOISE_SD = 0.03
# Brightness of each galaxy (rows) in each band: what tells their outskirts apart. In one band, either could
# have them, and chains would seldom move from one answer to the other.
COLOURS = jnp.array([[1.0, 0.5], [0.5, 1.0]])
NAMES = ("first", "second")
FREQUENCIES = jnp.stack(jnp.meshgrid(jnp.fft.fftfreq(32), jnp.fft.fftfreq(32), indexing="ij"))


def light_of(image):
    """Light of images `(..., 1, 32, 32)`: the network was trained on `10 log(1 + light)`. The brightest pixel
    of a galaxy has about 0.9.
    """
    return jnp.expm1(image[..., 0, :, :] / 10)


def shift(light, offset):
    """Move an image by a fraction of pixels. By Fourier's shift theorem: smooth in the offset, where
    interpolation has kinks.
    """
    phase = jnp.exp(-2j * jnp.pi * jnp.tensordot(offset, FREQUENCIES, axes=1))
    return jnp.fft.ifft2(jnp.fft.fft2(light) * phase).real


def scene(lights, offsets):
    """What is seen without noise, shape (bands, 32, 32)."""
    shifted = jnp.stack([shift(light, offset) for light, offset in zip(lights, offsets, strict=True)])
    return jnp.einsum("gb,gij->bij", COLOURS, shifted)


def model(y):
    offsets = numpyro.sample("offsets", dist.Normal(DETECTED, DETECTION_SD).to_event(2))
    lights = [light_of(numpyro.sample(name, PRIOR) / ALPHA) for name in NAMES]
    numpyro.sample("y", dist.Normal(scene(lights, offsets), NOISE_SD).to_event(3), obs=y)


def hubble_galaxy(row, column):
    """A galaxy whose brightest pixel is at `row`, `column`: its light, without that of the sky."""
    # Pixel (15, 15) is the centre, as in draws of the network.
    cutout = rgb2xyz(hubble_deep_field()[row - 15 : row + 17, column - 15 : column + 17])[..., 1]
    cutout = cutout - np.median(np.concatenate([cutout[[0, -1]].ravel(), cutout[:, [0, -1]].ravel()]))
    return 0.9 * cutout / cutout.max()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--small", action="store_true", help="few iterations, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    num_warmup, num_samples = (4, 6) if options.small else (200, 250)

    offset_key, noise_key, run_key = jr.split(jr.key(8), 3)
    truths = np.stack([hubble_galaxy(676, 69), hubble_galaxy(71, 229)]).astype(np.float32)
    offsets = DETECTED + DETECTION_SD * jr.normal(offset_key, (2, 2))
    y = scene(truths, offsets) + NOISE_SD * jr.normal(noise_key, (2, 32, 32))

    kernel = rtk.ScoreHMC(
        model,
        init_strategy=numpyro.infer.init_to_median(num_samples=5),
        max_num_steps=4 if options.small else 128,
        trajectory_length=6.0,
        target_accept_prob=0.8,
    )
    mcmc = MCMC(
        kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=4, chain_method="vectorized"
    )
    mcmc.run(run_key, y, extra_fields=("energy", "accept_prob", "num_steps"))

    draws = mcmc.get_samples(group_by_chain=True)
    extra = mcmc.get_extra_fields()
    clean_keys = jr.split(jr.fold_in(run_key, 1))
    lights = [
        np.asarray(light_of(PRIOR.clean_draws(key, draws[name])))
        for key, name in zip(clean_keys, NAMES, strict=True)
    ]
    print(
        f"\noffsets {np.round(np.asarray(offsets), 2).tolist()}, fluxes "
        f"{np.round(truths.sum((1, 2)), 1).tolist()}"
    )
    fluxes = {f"flux of the {name}": light.sum((2, 3)) for name, light in zip(NAMES, lights, strict=True)}
    print_summary({"offsets": np.asarray(draws["offsets"]), **fluxes})
    panels = {}
    for name, light, truth, band, image in zip(NAMES, lights, truths, (1, 2), y, strict=True):
        low, high = np.quantile(light, [0.05, 0.95], axis=(0, 1))
        inside, bright = (truth >= low) & (truth <= high), truth > 0.1
        error = np.sqrt(np.mean((light.mean((0, 1)) - truth) ** 2))
        print(f"{name}: error of the posterior mean {error:.3f} (rms per pixel)")
        print(
            f"{name}: share of clean pixels inside 90 % intervals {inside.mean():.3f}, of those with light "
            f"{inside[bright].mean():.3f}"
        )
        panels |= {f"data, band {band}": image, f"{name}, truth": truth}
        panels |= {f"{name}, mean": light.mean((0, 1)), f"{name}, sd": light.std((0, 1))}
    print(
        f"acceptance {np.mean(extra['accept_prob']):.2f}, {np.mean(extra['num_steps']):.0f} leapfrog steps a "
        f"draw"
    )

    figure, axes = plt.subplots(2, 4, figsize=(12, 6), layout="constrained")
    for axis, (title, image) in zip(axes.ravel(), panels.items(), strict=True):
        is_sd = title.endswith("sd")
        low, high = (0, None) if is_sd else (-0.05, truths.max())
        shown = axis.imshow(image, cmap="viridis" if is_sd else "magma", vmin=low, vmax=high)
        figure.colorbar(shown, ax=axis, shrink=0.8)
        axis.set_title(title)
        axis.set_axis_off()
    figure.savefig(options.output / "galaxy_blend.png", dpi=150)
    data = az.from_numpyro(mcmc, log_likelihood=False)
    for name, light in zip(NAMES, lights, strict=True):
        data.posterior[f"light of the {name}"] = (("chain", "draw", "row", "column"), light)
    data.to_netcdf(options.output / "galaxy_blend.nc", engine="h5netcdf")


if __name__ == "__main__":
    main()
