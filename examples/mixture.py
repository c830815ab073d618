"""Draw from a closed-form mixture of Gaussians and look at the draws with ArviZ.

The mixture of the RTK paper's experiments: 6 Gaussians of sd 0.3 on a circle of radius 1.5, in 10 dimensions.
Its score is known at every noise level, so what comes out can be checked: each mode should hold 1/6 of the
draws.

    python examples/mixture.py --output demo-output
"""

import argparse
import warnings
from pathlib import Path

import jax.random as jr
import matplotlib


matplotlib.use("Agg")  # figures go to files

import numpy as np
from matplotlib import pyplot as plt
from numpyro.infer import MCMC

import numpyro_rtk as rtk


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces ArviZ 1 at import
    import arviz as az


NUM_MODES, DIM, RADIUS, SD = 6, 10, 1.5, 0.3


def mixture_means():
    angles = 2 * np.pi * np.arange(NUM_MODES) / NUM_MODES
    means = np.zeros((NUM_MODES, DIM))
    means[:, 0], means[:, 1] = RADIUS * np.cos(angles), RADIUS * np.sin(angles)
    return means


def save(plot, path):
    """Save an ArviZ plot: ArviZ 1 returns a collection that can save itself, ArviZ 0.x draws on pyplot's
    figure.
    """
    if hasattr(plot, "savefig"):
        plot.savefig(path)
    else:
        plt.gcf().savefig(path, dpi=120, bbox_inches="tight")
    plt.close("all")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--small", action="store_true", help="few draws, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    num_samples = 50 if options.small else 1000

    means = mixture_means()
    score = rtk.GaussianMixtureScore(
        np.full(NUM_MODES, 1 / NUM_MODES), means, [SD**2 * np.eye(DIM)] * NUM_MODES, rtk.OU()
    )
    kernel = rtk.RTKKernel(score, event_shape=(DIM,))
    mcmc = MCMC(kernel, num_warmup=0, num_samples=num_samples, num_chains=4, chain_method="vectorized")
    mcmc.run(jr.key(0), extra_fields=("num_score_evals",))
    mcmc.print_summary()

    draws = np.asarray(mcmc.get_samples()["x"])
    nearest = np.argmin(((draws[:, None] - means) ** 2).sum(-1), axis=1)
    print("Score evaluations per draw:", kernel.num_score_evals)
    print(
        "Fraction of draws per mode (exact: 0.167):", np.bincount(nearest, minlength=NUM_MODES) / len(draws)
    )

    data = az.from_numpyro(mcmc)
    data.to_netcdf(options.output / "mixture.nc", engine="h5netcdf")
    coords = {"x_dim_0": [0, 1]}
    save(az.plot_trace(data, var_names=["x"], coords=coords), options.output / "mixture_trace.png")
    save(az.plot_rank(data, var_names=["x"], coords=coords), options.output / "mixture_rank.png")


if __name__ == "__main__":
    main()
