"""How far each move of a posterior kernel takes exact draws from their law: `python -m benchmarks.bias`.

Independent chains start from exact posterior draws, warm up and go on; what their draws are off after that is
the bias of the move, but for the standard errors in brackets. Two laws without an energy: the plane with two
modes, observed with noise, where sweeps do the work, and the log of an exponential variable in 10 dimensions
(strongly skewed), where only local moves and joint trajectories apply, as its score is known at `t_min` only.
"""

import argparse

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
SKEWED_DIM, WARMUP = 10, 100


def two_modes():
    """Prior of two modes, one noisy observation of each coordinate."""
    x = numpyro.sample("x", rtk.DiffusionPrior(lambda x, t: MODES(x, t), (2,), SCHEDULE))
    numpyro.sample("y", dist.Normal(x, NOISE_SD).to_event(1), obs=jnp.asarray(OBSERVED))


def skewed():
    """A law known by its score at one time, and no data."""
    times = np.array([1.1e-3, 1.0e-3])
    x = numpyro.sample("x", rtk.DiffusionPrior(lambda x, t: 1 - jnp.exp(x), (SKEWED_DIM,), segments=times))
    numpyro.factor("nothing", 0.0 * jnp.sum(x))


def exact_two_modes(key, num):
    """Draws of the posterior, a mixture again, and its mean and variance by coordinate."""
    t = SCHEDULE.t_min
    alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    prior_variance = alpha**2 * 0.2 + sigma**2
    means = alpha * np.asarray(MODES.means, np.float64)
    log_weights = np.asarray(MODES.log_weights, np.float64)
    log_weights -= 0.5 * np.sum((OBSERVED - means) ** 2, 1) / (prior_variance + NOISE_SD**2)
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    gain = prior_variance / (prior_variance + NOISE_SD**2)
    posterior_means, variance = means + gain * (OBSERVED - means), (1 - gain) * prior_variance
    rng = np.random.default_rng(int(jr.randint(key, (), 0, 2**31 - 1)))
    which = rng.choice(2, num, p=weights)
    draws = posterior_means[which] + np.sqrt(variance) * rng.standard_normal((num, 2))
    mean = weights @ posterior_means
    return draws, mean, variance + weights @ posterior_means**2 - mean**2


def exact_skewed(key, num):
    """Draws, mean and variance."""
    draws = np.log(np.asarray(jr.exponential(key, (num, SKEWED_DIM)), np.float64))
    return draws, np.full(SKEWED_DIM, -np.euler_gamma), np.full(SKEWED_DIM, np.pi**2 / 6)


SWEEPS = {"local": None, "segments": 24, "num_particles": 8, "refresh_depths": (1.0, 0.5)}
LOCAL = {"sweep_prob": 0.0, "segments": 2, "num_pilot_draws": 8}
MOVES = {
    "sweeps, no guided moves": (two_modes, {**SWEEPS, "num_guided_steps": 0}),
    "sweeps, guided moves": (two_modes, SWEEPS),
    "`LocalMALA`": (skewed, {**LOCAL, "local": rtk.LocalMALA()}),
    "`LocalHMC`": (skewed, {**LOCAL, "local": rtk.LocalHMC()}),
    "`ScoreHMC`": (skewed, None),
}
EXACT = {two_modes: exact_two_modes, skewed: exact_skewed}


def bias(model, options, chains, samples):
    """Deviations of mean (in sds) and variance (relative) from the exact ones, and their standard errors."""
    start, mean, variance = EXACT[model](jr.key(1), chains)
    kernel = rtk.ScoreHMC(model) if options is None else rtk.RTKParticleGibbs(model, **options)
    mcmc = MCMC(
        kernel,
        num_warmup=WARMUP,
        num_samples=samples,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jr.key(0), init_params={"x": jnp.asarray(start, jnp.float32)})
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["x"], np.float64)
    # Chains are independent: their means are what the standard errors come from.
    means = ((draws - mean) / np.sqrt(variance)).mean((1, 2))
    squares = ((draws - mean) ** 2 / variance).mean((1, 2)) - 1
    return [(values.mean(), values.std() / np.sqrt(chains)) for values in (means, squares)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=400)
    parser.add_argument("--samples", type=int, default=400)
    arguments = parser.parse_args()
    print("| Move | Law | Mean, in sds (s.e.) | Variance, relative (s.e.) |\n|---|---|---|---|")
    for name, (model, options) in MOVES.items():
        # A sweep costs as much as fifty trajectories, and forgets more.
        samples = arguments.samples // 10 if model is two_modes else arguments.samples
        (mean, mean_se), (variance, variance_se) = bias(model, options, arguments.chains, samples)
        law = "two modes in the plane" if model is two_modes else "skewed, 10 dimensions"
        print(
            f"| {name} | {law} | {mean:+.4f} ({mean_se:.4f}) | {variance:+.4f} ({variance_se:.4f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
