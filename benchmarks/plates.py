"""Many objects in a plate: each moves by itself, or all as one vector.

Objects have three numbers each, under a prior of two modes, and one datum each that hardly tells the modes
apart, so that every object's posterior has two modes whose weights are known by quadrature. `apart` is the
model as one writes it; `together` is the same with a term that joins all objects and is zero, so that they
have one weight. Per number of objects: the share of objects that a sweep changes, the lowest mean particle
ESS of a level, the error of the weights of the modes (root mean square over objects; that of as many
independent draws beside it), score evaluations of an iteration for each object, and seconds for all
iterations, compilation included.

Run with:  python -m benchmarks.plates [--objects 1 8 30 200] [--draws 200]
"""

import argparse
import time
import warnings

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC
from scipy import stats

import numpyro_rtk as rtk


MOST_TOGETHER = 30
"""Objects that move as one vector in a time that one can wait for."""
SCHEDULE = rtk.OU()
PLACE, VARIANCE, NOISE_SD = 1.5, 0.1, 0.3
MEANS = np.array([[-PLACE, 0.0, 0.0], [PLACE, 0.0, 0.0]])
SCORE = rtk.GaussianMixtureScore(
    jnp.array([0.5, 0.5]), jnp.asarray(MEANS), jnp.stack([VARIANCE * jnp.eye(3)] * 2), SCHEDULE
)


def signal(x):
    """What is observed of an object, but for the noise: nearly the size of its first number."""
    return (x**2 + 0.01) ** 0.5 + 0.05 * x


def make_data(num_objects):
    """Data of objects that are drawn from the prior."""
    rng = np.random.default_rng(0)
    x = rng.choice([-PLACE, PLACE], num_objects) + VARIANCE**0.5 * rng.standard_normal(num_objects)
    return signal(x) + NOISE_SD * rng.standard_normal(num_objects)


def exact_weights(y):
    """Probability of each object that its first number is positive, by quadrature."""
    a, sigma = float(SCHEDULE.alpha(SCHEDULE.t_min)), float(SCHEDULE.sigma(SCHEDULE.t_min))
    grid = np.linspace(-5, 5, 20_001)
    sd = np.hypot(a * VARIANCE**0.5, sigma)
    prior = sum(stats.norm.pdf(grid, a * place, sd) for place in (-PLACE, PLACE))
    density = prior * stats.norm.pdf(y[:, None], signal(grid), NOISE_SD)
    return (density * (grid > 0)).sum(1) / density.sum(1)


def model(y, joined):
    """Two-mode objects; `joined` adds a term of zero that every object is in."""
    with numpyro.plate("objects", len(y)):
        x = numpyro.sample("x", rtk.DiffusionPrior(SCORE, (3,), schedule=SCHEDULE))
        numpyro.sample("y", dist.Normal(signal(x[:, 0]), NOISE_SD), obs=y)
    if joined:
        numpyro.factor("nothing", 0.0 * jnp.sum(x))


def measure(num_objects, joined, draws):
    """One row of the table."""
    y = make_data(num_objects)
    options = {"chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(rtk.RTKParticleGibbs(model), num_warmup=100, num_samples=draws, num_chains=2, **options)
    # NumPyro compiles its loop for each run.
    fields = ("changed", "particle_ess", "weighted", "num_score_evals")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # collapsed weights, which the table shows
        mcmc.warmup(jr.key(0), y, joined)
        start = time.perf_counter()
        mcmc.run(jr.key(1), y, joined, extra_fields=fields)
        x = np.asarray(jax.block_until_ready(mcmc.get_samples()["x"]))
    seconds = time.perf_counter() - start
    extra = {name: np.asarray(value) for name, value in mcmc.get_extra_fields().items()}
    exact = exact_weights(y)
    weighted = extra["weighted"]
    ess = (extra["particle_ess"] * weighted).sum(0) / weighted.sum(0)
    return {
        "changed": extra["changed"].mean(),
        "ess": ess.min(),
        "error": np.sqrt(np.mean(((x[..., 0] > 0).mean(0) - exact) ** 2)),
        "floor": np.sqrt(np.mean(exact * (1 - exact)) / (2 * draws)),
        "evaluations": extra["num_score_evals"].mean() / num_objects,
        "seconds": seconds,
    }


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 8, 30, 200])
    parser.add_argument("--draws", type=int, default=200, help="of each of two chains")
    args = parser.parse_args()
    print(
        "| Objects | Weights | Changed by a sweep | Lowest particle ESS | Error of mode weights (floor) | ",
        end="",
    )
    print("Evaluations | Seconds |\n|---|---|---|---|---|---|---|")
    for num_objects in args.objects:
        for joined in (False, True) if 1 < num_objects <= MOST_TOGETHER else (False,):
            row = measure(num_objects, joined, args.draws)
            cells = (
                str(num_objects),
                "together" if joined else "apart",
                f"{row['changed']:.3f}",
                f"{row['ess']:.1f}",
                f"{row['error']:.3f} ({row['floor']:.3f})",
                f"{row['evaluations']:.0f}",
                f"{row['seconds']:.1f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
