"""A linear-Gaussian observation of a mixture, against the closed form.

The prior is a mixture of six Gaussians on a ring in ten dimensions, given by its score alone; two noisy
linear combinations of the coordinates are observed. `RTKParticleGibbs` draws from the posterior, which is a
mixture itself, so that its mode weights and means are known exactly.

    python examples/posterior_mixture.py --output demo-output
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
from matplotlib import pyplot as plt
from numpyro.infer import MCMC

import numpyro_rtk as rtk


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces ArviZ 1 at import
    import arviz as az


NUM_MODES, DIM, RADIUS, SD = 6, 10, 1.5, 0.3
ANGLES = 2 * np.pi * np.arange(NUM_MODES) / NUM_MODES
MEANS = np.zeros((NUM_MODES, DIM))
MEANS[:, 0], MEANS[:, 1] = RADIUS * np.cos(ANGLES), RADIUS * np.sin(ANGLES)
OPERATOR, NOISE_SD = np.random.default_rng(0).standard_normal((2, DIM)), 1.0


def model(score_fn, y):
    x = numpyro.sample("x", rtk.DiffusionPrior(score_fn, event_shape=(DIM,), schedule=rtk.OU()))
    numpyro.sample("y", dist.Normal(OPERATOR @ x, NOISE_SD).to_event(1), obs=y)


def exact_posterior(y):
    """Weights, means and common covariance of the posterior."""
    covariance = np.linalg.inv(np.eye(DIM) / SD**2 + OPERATOR.T @ OPERATOR / NOISE_SD**2)
    means = (MEANS / SD**2 + y @ OPERATOR / NOISE_SD**2) @ covariance
    marginal = SD**2 * OPERATOR @ OPERATOR.T + NOISE_SD**2 * np.eye(len(y))
    residuals = y - MEANS @ OPERATOR.T
    log_weights = -0.5 * np.sum(residuals @ np.linalg.inv(marginal) * residuals, axis=1)
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum(), means, covariance


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--small", action="store_true", help="few draws, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    num_warmup, num_samples = (10, 20) if options.small else (200, 1000)

    covariances = np.tile(SD**2 * np.eye(DIM), (NUM_MODES, 1, 1))
    mixture = rtk.GaussianMixtureScore(np.full(NUM_MODES, 1 / NUM_MODES), MEANS, covariances, rtk.OU())

    def score_fn(x, t):  # a network would stand here: no energy
        return mixture(x, t)

    rng = np.random.default_rng(1)
    truth = MEANS[0] + SD * rng.standard_normal(DIM)
    y = OPERATOR @ truth + NOISE_SD * rng.standard_normal(2)

    kernel = rtk.RTKParticleGibbs(model)
    mcmc = MCMC(
        kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=4, chain_method="vectorized"
    )
    fields = ("changed", "particle_ess", "weighted", "num_score_evals", "log_evidence")
    mcmc.run(jr.key(0), score_fn, jnp.asarray(y), extra_fields=fields)

    x = np.asarray(mcmc.get_samples()["x"])
    extra = mcmc.get_extra_fields()
    weights, means, covariance = exact_posterior(y)
    nearest = np.argmin(((x[:, None, :2] - means[None, :, :2]) ** 2).sum(-1), axis=1)
    print("\nmode    exact weight   share of draws")
    for mode in range(NUM_MODES):
        print(f"{mode:4d} {weights[mode]:15.3f} {np.mean(nearest == mode):16.3f}")
    print("\ncoordinate   exact mean     mean   exact sd       sd")
    exact_mean = weights @ means
    exact_sd = np.sqrt(np.diag(covariance) + weights @ (means - exact_mean) ** 2)
    for i in range(4):
        print(f"{i:10d} {exact_mean[i]:12.3f} {x[:, i].mean():8.3f} {exact_sd[i]:10.3f} {x[:, i].std():8.3f}")
    print(f"\nscore evaluations per draw and chain: {np.mean(extra['num_score_evals']):.0f}")
    print(f"share of sweeps in which the draw changed: {np.mean(extra['changed']):.2f}")
    by_level = np.sum(extra["particle_ess"], axis=0) / np.maximum(np.sum(extra["weighted"], axis=0), 1)
    print(f"lowest particle ESS of a level: {by_level.min():.1f} of 16")

    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    exact = means[rng.choice(NUM_MODES, p=weights, size=len(x))] + rng.multivariate_normal(
        np.zeros(DIM), covariance, size=len(x)
    )
    for axis, draws, title in zip(axes, (x, exact), ("particle Gibbs", "exact posterior"), strict=True):
        axis.scatter(*draws[:2000, :2].T, s=3, alpha=0.4, linewidths=0)
        axis.plot(*MEANS[:, :2].T, "k+", label="modes of the prior")
        axis.plot(*truth[:2], "r*", label="truth")
        axis.set(title=title, xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xlabel="$x_0$", ylabel="$x_1$")
    axes[0].legend(loc="upper left", fontsize="small")
    figure.savefig(options.output / "posterior_mixture.png", dpi=150)
    az.from_numpyro(mcmc).to_netcdf(options.output / "posterior_mixture.nc", engine="h5netcdf")


if __name__ == "__main__":
    main()
