"""A population of objects, each with a diffusion prior conditional on its own unknown redshift.

Spectra have a narrow line or a broad one, at a place that the redshift sets. The prior knows them by its
conditional score alone. Eight noisy spectra are observed; their redshifts, and the mean and spread of the
population that they come from, are unknown. Here scores are exact, so that the posterior of the population is
known by quadrature.

    python examples/population.py --output demo-output
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
from matplotlib import pyplot as plt
from numpyro.infer import MCMC, NUTS

import numpyro_rtk as rtk


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces ArviZ 1 at import
    import arviz as az


SCHEDULE = rtk.OU()
BINS = np.linspace(-4.0, 4.0, 28)
SPECTRUM_SD, NOISE_SD = 0.3, 0.3
MU, TAU = 0.5, 0.6


def lines(redshift):
    """Mean spectra of both kinds at one redshift, shape `(2, bins)`: a narrow line, or a broad one."""
    narrow = 2.0 * jnp.exp(-0.5 * ((BINS - redshift) / 0.4) ** 2)
    broad = 1.2 * jnp.exp(-0.5 * ((BINS - redshift) / 0.9) ** 2)
    return jnp.stack([narrow, broad])


def score_fn(x, t, redshift):
    """Score of a spectrum given its redshift; put your network here."""
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    variance = (alpha * SPECTRUM_SD) ** 2 + sigma**2
    residuals = alpha * lines(redshift) - x[None]
    weights = jax.nn.softmax(-0.5 * jnp.sum(residuals**2, axis=1) / variance)
    return weights @ residuals / variance


def model(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("objects", y.shape[0]):
        redshift = numpyro.sample("redshift", dist.Normal(mu, tau))
        prior = rtk.DiffusionPrior(score_fn, (BINS.size,), SCHEDULE, condition=redshift)
        x = numpyro.sample("spectrum", prior)
        numpyro.sample("y", dist.Normal(x, NOISE_SD).to_event(1), obs=y)


def simulate(key, num_objects):
    """Redshifts, spectra and data."""
    redshift_key, kind_key, spectrum_key, noise_key = jr.split(key, 4)
    redshift = MU + TAU * jr.normal(redshift_key, (num_objects,))
    kind = jr.bernoulli(kind_key, shape=(num_objects,)).astype(int)
    mean = jax.vmap(lambda redshift, kind: lines(redshift)[kind])(redshift, kind)
    spectra = mean + SPECTRUM_SD * jr.normal(spectrum_key, mean.shape)
    return redshift, spectra, spectra + NOISE_SD * jr.normal(noise_key, mean.shape)


def exact_population(y):
    """Posterior of `mu` and `tau` on a grid, by quadrature over every redshift."""
    redshifts, mu, tau = np.linspace(-4, 5, 451), np.linspace(-1, 2, 121), np.linspace(0.02, 2.5, 125)
    means = np.asarray(jax.vmap(lines)(jnp.asarray(redshifts, jnp.float32)), np.float64)
    variance = SPECTRUM_SD**2 + NOISE_SD**2
    squares = np.sum((np.asarray(y, np.float64)[:, None, None] - means[None]) ** 2, axis=-1)
    likelihood = np.exp(-0.5 * (squares - squares.min((1, 2), keepdims=True)) / variance)
    likelihood = likelihood.sum(axis=2)
    width = tau[None, :, None]
    density = np.exp(-0.5 * ((redshifts[None, None] - mu[:, None, None]) / width) ** 2) / width
    logs = sum(np.log(density @ one) for one in likelihood) - 0.5 * mu[:, None] ** 2 - 0.5 * tau[None] ** 2
    weights = np.exp(logs - logs.max())
    return mu, tau, weights / weights.sum()


def draw_figure(path, posterior, truth, y, population):
    """Spectra of three objects, all redshifts, and the population."""
    redshift, spectra = truth
    mu, tau, weights = population
    flat = {name: np.asarray(values).reshape(-1, *values.shape[2:]) for name, values in posterior.items()}
    figure, axes = plt.subplots(1, 5, figsize=(16, 3.2), layout="constrained")
    for i, axis in enumerate(axes[:3]):
        low, high = np.quantile(flat["spectrum"][:, i], [0.05, 0.95], axis=0)
        axis.plot(BINS, y[i], "k.", label="data")
        axis.fill_between(BINS, low, high, alpha=0.4, label="posterior, 90 %")
        axis.plot(BINS, spectra[i], "C1", label="truth")
        axis.set(title=f"object {i}", xlabel="bin")
    axes[0].legend(fontsize="small")
    low, middle, high = np.quantile(flat["redshift"], [0.05, 0.5, 0.95], axis=0)
    axes[3].errorbar(redshift, middle, [middle - low, high - middle], fmt="o", ms=3)
    axes[3].axline((0, 0), slope=1, color="k", lw=0.5)
    axes[3].set(title="redshifts, 90 % intervals", xlabel="truth", ylabel="posterior")
    axes[4].plot(flat["mu"], flat["tau"], ".", ms=1, alpha=0.3, label="draws")
    axes[4].contour(mu, tau, weights.T / weights.max(), levels=[0.1, 0.5, 0.9], colors="k", linewidths=0.8)
    axes[4].plot(MU, TAU, "C1*", ms=10, label="truth")
    axes[4].set(title="population; contours are exact", xlabel="mu", ylabel="tau", ylim=(0, 1.6))
    axes[4].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--small", action="store_true", help="few objects and draws, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    num_objects, num_warmup, num_samples = (3, 5, 10) if options.small else (8, 150, 250)
    redshift, spectra, y = simulate(jr.key(1), num_objects)
    mcmc = MCMC(
        rtk.RTKGibbs(NUTS(model)),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jr.key(0), y)
    data = az.from_numpyro(mcmc)
    data.to_netcdf(options.output / "population.nc")
    print(az.summary(data, var_names=["mu", "tau", "redshift"]))
    mu, tau, weights = exact_population(y)
    draws = mcmc.get_samples(group_by_chain=True)
    for name, grid, marginal in (("mu", mu, weights.sum(1)), ("tau", tau, weights.sum(0))):
        mean = marginal @ grid
        sd = np.sqrt(marginal @ (grid - mean) ** 2)
        values = np.asarray(draws[name], np.float64)
        print(f"{name}: {values.mean():.3f} +- {values.std():.3f}; exact {mean:.3f} +- {sd:.3f}")
    draw_figure(
        options.output / "population.png", draws, (redshift, spectra), np.asarray(y), (mu, tau, weights)
    )
    print(f"Figure: {options.output / 'population.png'}")


if __name__ == "__main__":
    main()
