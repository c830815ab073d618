"""How far each move of a posterior kernel takes exact draws from their law: `python -m benchmarks.bias`.

Independent chains start from exact posterior draws, warm up and go on; what their draws are off after that
is the bias of the move, but for the standard errors in brackets. Three laws without an energy: the plane
with two modes, observed with noise, where sweeps do the work; and two whose score is known at `t_min` only,
so that only local moves and joint trajectories apply, in 1, 2 and 10 dimensions: the log of an exponential
variable (strongly skewed), and two modes of sds 0.7 and 1 that are 3 apart in the first coordinate, Gaussian
in the others. Biases are those of the first coordinate.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC

import numpyro_rtk as rtk


SCHEDULE = rtk.OU()
MODES = rtk.GaussianMixtureScore([0.3, 0.7], [[-1.5, 0.0], [1.0, 0.5]], [0.2 * np.eye(2)] * 2, SCHEDULE)
NOISE_SD, OBSERVED = 1.0, np.array([0.2, 0.3])
T_MIN, WARMUP = 1.0e-3, 150
DIMS = (1, 2, 10)


class Law(NamedTuple):
    """A posterior that can be drawn from."""

    name: str
    model: Callable[[], Any]
    draw: Callable[[Any, int], np.ndarray]
    """Exact draws, from a key and their number."""
    mean: float
    """Of the first coordinate."""
    variance: float


def two_modes():
    """Prior of two modes, one noisy observation of each coordinate."""
    x = numpyro.sample("x", rtk.DiffusionPrior(lambda x, t: MODES(x, t), (2,), SCHEDULE))
    numpyro.sample("y", dist.Normal(x, NOISE_SD).to_event(1), obs=jnp.asarray(OBSERVED))


def observed() -> Law:
    """The posterior of `two_modes`, a mixture again."""
    t = SCHEDULE.t_min
    alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    prior_variance = alpha**2 * 0.2 + sigma**2
    means = alpha * np.asarray(MODES.means, np.float64)
    log_weights = np.asarray(MODES.log_weights, np.float64)
    log_weights -= 0.5 * np.sum((OBSERVED - means) ** 2, 1) / (prior_variance + NOISE_SD**2)
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    gain = prior_variance / (prior_variance + NOISE_SD**2)
    means, variance = means + gain * (OBSERVED - means), (1 - gain) * prior_variance
    first = means[:, 0]
    mean = weights @ first

    def draw(key, num):
        rng = generator(key)
        which = rng.choice(2, num, p=weights)
        return means[which] + np.sqrt(variance) * rng.standard_normal((num, 2))

    return Law("two modes, observed", two_modes, draw, mean, variance + weights @ first**2 - mean**2)


def by_score(score, dim: int) -> Callable[[], Any]:
    """A prior known by its score at one time, and no data."""

    def model():
        times = np.array([1.1 * T_MIN, T_MIN])
        x = numpyro.sample("x", rtk.DiffusionPrior(lambda x, t: score(x), (dim,), SCHEDULE, segments=times))
        numpyro.factor("nothing", 0.0 * jnp.sum(x))

    return model


def skewed(dim: int) -> Law:
    """Logs of exponential variables."""

    def draw(key, num):
        return np.log(generator(key).exponential(size=(num, dim)))

    model = by_score(lambda x: 1 - jnp.exp(x), dim)
    return Law(f"skewed, d = {dim}", model, draw, -np.euler_gamma, np.pi**2 / 6)


def close_modes(dim: int) -> Law:
    """Weights 0.3 and 0.7 at -1.5 and 1.5."""
    places, variances, weights = np.array([-1.5, 1.5]), np.array([0.5, 1.0]), np.array([0.3, 0.7])
    means = np.zeros((2, dim))
    means[:, 0] = places
    mixture = rtk.GaussianMixtureScore(weights, means, list(variances[:, None, None] * np.eye(dim)), SCHEDULE)
    alpha, sigma = float(SCHEDULE.alpha(T_MIN)), float(SCHEDULE.sigma(T_MIN))
    variances, places = alpha**2 * variances + sigma**2, alpha * places
    mean = weights @ places

    def draw(key, num):
        rng = generator(key)
        which = rng.choice(2, num, p=weights)
        return alpha * means[which] + np.sqrt(variances[which, None]) * rng.standard_normal((num, dim))

    model = by_score(lambda x: mixture(x, jnp.float32(T_MIN)), dim)
    return Law(f"two modes, d = {dim}", model, draw, mean, weights @ (variances + places**2) - mean**2)


def generator(key) -> np.random.Generator:
    """NumPy's generator, seeded by a key."""
    return np.random.default_rng(int(jr.randint(key, (), 0, 2**31 - 1)))


SWEEPS = {"local": None, "segments": 24, "num_particles": 8, "refresh_depths": (1.0, 0.5)}
LOCAL = {"sweep_prob": 0.0, "segments": 2, "num_pilot_draws": 8}
SWEEPING = {"sweeps, no guided moves": {**SWEEPS, "num_guided_steps": 0}, "sweeps, guided moves": SWEEPS}
MOVING = {
    "`LocalMALA`": lambda model: rtk.RTKParticleGibbs(model, local=rtk.LocalMALA(), **LOCAL),
    "`LocalHMC`": lambda model: rtk.RTKParticleGibbs(model, local=rtk.LocalHMC(), **LOCAL),
    "`ScoreHMC`": rtk.ScoreHMC,
    "`ScoreHMC`, `target_accept_prob=0.9`": lambda model: rtk.ScoreHMC(model, target_accept_prob=0.9),
}


def bias(law: Law, kernel, chains: int, samples: int):
    """Deviations of mean (in sds) and variance (relative) from the exact ones, and their standard errors."""
    # By design: these scores are those of their law at `t_min` only.
    warnings.filterwarnings("ignore", message=".*is not the score of its own draws")
    mcmc = MCMC(
        kernel,
        num_warmup=WARMUP,
        num_samples=samples,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jr.key(0), init_params={"x": jnp.asarray(law.draw(jr.key(1), chains), jnp.float32)})
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["x"], np.float64)[..., 0]
    # Chains are independent: their means are what the standard errors come from.
    means = ((draws - law.mean) / np.sqrt(law.variance)).mean(1)
    squares = ((draws - law.mean) ** 2 / law.variance).mean(1) - 1
    return [(values.mean(), values.std() / np.sqrt(chains)) for values in (means, squares)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=400)
    parser.add_argument("--samples", type=int, default=800)
    arguments = parser.parse_args()
    # A sweep costs as much as fifty trajectories, and forgets more.
    few = arguments.samples // 20
    runs = [(name, observed(), rtk.RTKParticleGibbs(two_modes, **o), few) for name, o in SWEEPING.items()]
    for law in [kind(dim) for kind in (skewed, close_modes) for dim in DIMS]:
        runs += [(name, law, make(law.model), arguments.samples) for name, make in MOVING.items()]
    print("| Move | Law | Mean, in sds (s.e.) | Variance, relative (s.e.) |\n|---|---|---|---|")
    for name, law, kernel, samples in runs:
        (mean, mean_se), (variance, variance_se) = bias(law, kernel, arguments.chains, samples)
        print(
            f"| {name} | {law.name} | {mean:+.4f} ({mean_se:.4f}) | {variance:+.4f} ({variance_se:.4f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
