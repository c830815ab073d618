"""Denoise, deconvolve and inpaint a galaxy, with unknown background level and noise scale.

The galaxy is real: a disc in the Hubble eXtreme Deep Field. Its image is blurred by a point-spread function,
made noisy, a block of pixels is hidden, and neither the background level nor the noise scale is given. What
is known is the prior: the pretrained network `HSC_32` of the package `galaxygrad`, trained on galaxies of
another telescope, the Hyper Suprime-Cam survey. `RTKGibbs(NUTS(model))` samples image, background and noise
scale together.

    python examples/galaxy_restore.py --output demo-output

Draws of the image have the noise of `t_min`, and the galaxy has not: everything shown and printed is of draws
of clean light, `prior.clean_draws`. With `--galaxy simulated` the galaxy is a draw of the prior, for which
posterior intervals must cover what they say.
"""

import argparse
import functools
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
from numpyro.infer import MCMC, NUTS
from skimage.color import rgb2xyz
from skimage.data import hubble_deep_field

import numpyro_rtk as rtk


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces ArviZ 1 at import
    import arviz as az


BACKGROUND, NOISE_SD, PSF_SD = 0.05, 0.03, 0.6

# A Gaussian point-spread function is separable: this matrix blurs the columns, its transpose the rows.
PIXELS = np.arange(32)
PSF = np.exp(-0.5 * (PIXELS[:, None] - PIXELS[None, :]) ** 2 / PSF_SD**2)
PSF = jnp.asarray(PSF / PSF[16].sum(), jnp.float32)

# True where a pixel was observed: a block beside the centre is missing.
OBSERVED = np.ones((32, 32), bool)
OBSERVED[10:14, 18:23] = False


def network_prior(t_min, **options):
    """The law of galaxies with the noise of `t_min`: of sd 0.17 at t = 0.03, where the brightest pixels have
    6.
    """
    schedule = rtk.VP(beta_min=1.0, beta_max=1.0, t_max=10.0, t_min=t_min)
    return rtk.DiffusionPrior(HSC_32, event_shape=(1, 32, 32), schedule=schedule, **options)


def light_of(image):
    """Light of images `(..., 1, 32, 32)`: the network was trained on `10 log(1 + light)`. The brightest pixel
    of a galaxy has about 0.9.
    """
    return jnp.expm1(image[..., 0, :, :] / 10)


def blur(light):
    return PSF @ light @ PSF.T


def model(y, prior):
    background = numpyro.sample("background", dist.Normal(0.0, 0.2))
    noise_sd = numpyro.sample("noise_sd", dist.HalfNormal(0.1))
    # `alpha` times the clean image, with noise of its own, which stands for a part of the noise of the data.
    alpha = prior.schedule.alpha(prior.schedule.t_min)
    light = numpyro.deterministic("noised_light", light_of(numpyro.sample("image", prior) / alpha))
    with numpyro.handlers.mask(mask=OBSERVED):
        numpyro.sample("y", dist.Normal(blur(light) + background, noise_sd), obs=y)


def noise_of_data(noise_sd, prior):
    """That of the model, and the noise of `t_min` as it is seen in pixels without light, blurred."""
    return np.hypot(noise_sd, prior.noise.data_sd / 10 * float(jnp.sum(PSF[16] ** 2)))


def hubble_galaxy():
    """A disc in the Hubble eXtreme Deep Field: its light, without that of the sky. Pixel (15, 15) is the
    centre, as in draws.
    """
    cutout = rgb2xyz(hubble_deep_field()[661:693, 54:86])[..., 1]  # luminance is linear in the light
    cutout = cutout - np.median(np.concatenate([cutout[[0, -1]].ravel(), cutout[:, [0, -1]].ravel()]))
    return jnp.asarray(0.9 * cutout / cutout.max(), jnp.float32)


def covered(light, truth):
    """Pixels whose truth is inside the 90 % interval of draws `(chains, draws, 32, 32)`."""
    low, high = np.quantile(light, [0.05, 0.95], axis=(0, 1))
    return (truth >= low) & (truth <= high)


def plot(truth, y, light, path):
    panels = {
        "truth": truth,
        "data": np.where(OBSERVED, y, np.nan),
        "posterior mean": light.mean((0, 1)),
        "posterior sd": light.std((0, 1)),
        **{f"draw {i + 1}": light[i, -1] for i in range(4)},
    }
    figure, axes = plt.subplots(2, 4, figsize=(11, 5.8), layout="constrained")
    for axis, (title, image) in zip(axes.ravel(), panels.items(), strict=True):
        is_sd = title == "posterior sd"
        shown = axis.imshow(
            image,
            cmap="viridis" if is_sd else "magma",
            vmin=0 if is_sd else -0.05,
            vmax=None if is_sd else truth.max(),
        )
        figure.colorbar(shown, ax=axis, shrink=0.8)
        axis.set_title(title)
        axis.set_axis_off()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument(
        "--galaxy", choices=("hubble", "simulated"), default="hubble", help="real, or a draw of the prior"
    )
    parser.add_argument(
        "--t-min", type=float, default=0.03, help="noise of the prior; see docs/posteriors.md#images"
    )
    parser.add_argument("--small", action="store_true", help="few iterations, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    num_warmup, num_samples = (4, 6) if options.small else (150, 250)

    truth_key, noise_key, run_key = jr.split(jr.key(3), 3)
    clean_key = jr.fold_in(run_key, 1)
    prior = network_prior(options.t_min)
    if options.galaxy == "hubble":
        truth = hubble_galaxy()
    else:
        accurate = network_prior(options.t_min, segments=64, reverse=rtk.PreconditionedMALA(num_steps=8))
        truth = light_of(accurate.clean_draws(clean_key, accurate.sample(truth_key)))
    y = blur(truth) + BACKGROUND + NOISE_SD * jr.normal(noise_key, (32, 32))

    # Nearly every pixel has data: gradient moves do the work, from a start annealed through the noise levels.
    start = {"segments": 6, "num_start_steps": 2} if options.small else {"num_start_steps": 16}
    kernel = rtk.RTKGibbs(NUTS(functools.partial(model, prior=prior)), sweep_prob=0.0, **start)
    mcmc = MCMC(
        kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=4, chain_method="vectorized"
    )
    fields = (
        "block_states.0.local_accept_prob",
        "block_states.0.num_score_evals",
        "block_states.1.num_steps",
    )
    mcmc.run(run_key, y, extra_fields=fields)

    draws = mcmc.get_samples(group_by_chain=True)
    light, truth = np.asarray(light_of(prior.clean_draws(clean_key, draws["image"]))), np.asarray(truth)
    rows, columns = np.mgrid[:32, :32]
    positive = np.clip(light, 0, None)
    extra = mcmc.get_extra_fields()
    print(
        f"\nbackground {BACKGROUND}, noise sd {NOISE_SD}, flux {truth.sum():.1f}, hidden flux "
        f"{truth[~OBSERVED].sum():.2f}"
    )
    print_summary(
        {
            "background x 100": 100 * np.asarray(draws["background"]),
            "noise x 100": 100 * noise_of_data(np.asarray(draws["noise_sd"]), prior),
            "flux": light.sum((2, 3)),
            "hidden flux": light[:, :, ~OBSERVED].sum(-1),
            "centroid x": (positive * columns).sum((2, 3)) / positive.sum((2, 3)),
            "centroid y": (positive * rows).sum((2, 3)) / positive.sum((2, 3)),
        }
    )
    inside, noised_inside = (covered(x, truth) for x in (light, np.asarray(draws["noised_light"])))
    bright = truth > 0.1
    print(
        f"error of the posterior mean: {np.sqrt(np.mean((light.mean((0, 1)) - truth) ** 2)):.3f} (rms per "
        f"pixel)"
    )
    print(
        f"share of clean pixels inside their 90 % interval: {inside.mean():.3f}; of those with light "
        f"{inside[bright].mean():.3f}, of the others {inside[~bright].mean():.3f}"
    )
    print(f"the same by draws that have the noise of t_min: {noised_inside.mean():.3f}")
    print(f"acceptance of local moves: {np.mean(extra['block_states.0.local_accept_prob']):.2f}")
    print(
        f"score evaluations per iteration and chain: {np.mean(extra['block_states.0.num_score_evals']):.0f}"
    )

    plot(truth, np.asarray(y), light, options.output / "galaxy_restore.png")
    data = az.from_numpyro(mcmc, log_likelihood=False)
    data.posterior["light"] = (("chain", "draw", "row", "column"), light)
    data.to_netcdf(options.output / "galaxy_restore.nc", engine="h5netcdf")


if __name__ == "__main__":
    main()
