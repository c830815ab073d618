"""Posteriors of noisy galaxies under the pretrained network: error, coverage and R-hat, beside the route in
use.

Truths are drawn from the network itself, clean of the noise of `t_min`; every pixel gets Gaussian noise of
sd 0.5. `t_min` is 0.03, as in `examples/galaxy_restore.py`. Coverage and errors are of the clean truth, by
draws of clean data; beside them is what draws as they come would cover, which have the noise of `t_min`.
Routes: `ScoreHMC` with known noise scale; `RTKGibbs(NUTS(model))` without sweeps, with the scale as a further
latent; `RTKParticleGibbs(model)` with no options and known scale; and what is found in papers' code: NUTS on
a distribution whose `log_prob` returns 0 and whose gradient is the score.

Run with:  python -m benchmarks.galaxy_posterior [--galaxies 4] [--routes known unknown "no options" attached]
"""

import argparse
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import split_gelman_rubin
from numpyro.distributions import constraints
from numpyro.infer import NUTS

import numpyro_rtk as rtk
from benchmarks.problems import galaxy_network


NOISE_SD, SHAPE, NUM_CHAINS = 0.5, (1, 32, 32), 4
NETWORK, SCHEDULE = galaxy_network(t_min=0.03)
PRIOR = rtk.DiffusionPrior(NETWORK, SHAPE, SCHEDULE)


def known_scale(y):
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, NOISE_SD).to_event(3), obs=y)


def unknown_scale(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, scale).to_event(3), obs=y)


@jax.custom_vjp
def no_density(x):
    """Zero, with the score as its gradient."""
    return jnp.zeros(())


def _backward(x, cotangent):
    return (cotangent * NETWORK(x, jnp.asarray(SCHEDULE.t_min)),)


no_density.defvjp(lambda x: (no_density(x), x), _backward)


class AttachedScore(dist.Distribution):
    """The route in use: a constant log density with a score attached."""

    support = constraints.independent(constraints.real, 3)

    def __init__(self):
        super().__init__((), SHAPE)

    def sample(self, key, sample_shape=()):
        return jr.normal(key, sample_shape + SHAPE)

    def log_prob(self, value):
        return no_density(value)


def attached(y):
    x = numpyro.sample("x", AttachedScore())
    numpyro.sample("y", dist.Normal(x, NOISE_SD).to_event(3), obs=y)


def routes():
    gibbs = rtk.RTKGibbs(NUTS(unknown_scale), sweep_prob=0.0)
    hmc = rtk.ScoreHMC(known_scale, trajectory_length=5.0, target_accept_prob=0.8)
    return {
        "known": (hmc, 200, 300),
        "unknown": (gibbs, 200, 300),
        "no options": (rtk.RTKParticleGibbs(known_scale), 100, 200),
        "attached": (NUTS(attached), 100, 100),
    }


def make_run(kernel, num_warmup, num_samples):
    """`run(key, y)`: draws and diagnostics of four chains, compiled once for all galaxies."""

    def report(state):
        z = state.z
        block = state.block_states[0] if hasattr(state, "block_states") else state
        scale = jnp.exp(z["scale"]) if "scale" in z else jnp.full(NUM_CHAINS, NOISE_SD)
        accept = getattr(block, "local_accept_prob", None)
        return z["x"], scale, state.accept_prob if accept is None else accept, block.diverging

    def run(key, y):
        state = kernel.init(jr.split(key, NUM_CHAINS), num_warmup, None, (y,), {})

        def body(state, _):
            state = kernel.sample(state, (y,), {})
            return state, report(state)

        state, _ = jax.lax.scan(lambda state, _: (body(state, _)[0], None), state, None, length=num_warmup)
        return jax.lax.scan(body, state, None, length=num_samples)[1]

    return jax.jit(run)


def statistics(images):
    """Flux and centroid of images `(chains, draws, 1, 32, 32)`."""
    rows, columns = np.mgrid[:32, :32]
    light = np.clip(images[:, :, 0], 0, None)
    total = light.sum((2, 3))
    return {
        "flux": images.sum((2, 3, 4)),
        "x": (light * columns).sum((2, 3)) / total,
        "y": (light * rows).sum((2, 3)) / total,
    }


def error(images, truth):
    """RMS error per pixel of the mean of `(chains, draws, ...)`."""
    return np.sqrt(np.mean((images.mean((0, 1)) - truth) ** 2))


def covered(images, truth):
    """Pixels whose truth is inside the 90 % interval of `(chains, draws, ...)`."""
    low, high = np.quantile(images, [0.05, 0.95], axis=(0, 1))
    return (truth >= low) & (truth <= high)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--galaxies", type=int, default=4)
    parser.add_argument("--routes", nargs="+", default=list(routes()))
    options = parser.parse_args()
    truth_key, noise_key = jr.split(jr.key(42))
    # Draws with default settings have a little more noise in dark pixels than the prior.
    accurate = {"segments": 64, "reverse": rtk.PreconditionedMALA(num_steps=8)}
    noised = rtk.DiffusionPrior(NETWORK, SHAPE, SCHEDULE, **accurate).sample(truth_key, (options.galaxies,))
    clean_key = jr.fold_in(truth_key, 1)
    # Each by itself: galaxies are not of the same law.
    truths = np.stack([PRIOR.clean_draws(jr.fold_in(clean_key, i), x) for i, x in enumerate(noised)])
    data = truths + NOISE_SD * jr.normal(noise_key, truths.shape)
    print(
        f"{options.galaxies} galaxies, noise sd {NOISE_SD}, {NUM_CHAINS} chains; error of the data {NOISE_SD}"
    )
    print(
        "coverage: of the clean truth by 90 % intervals of clean draws; lit: of pixels above 1; noised: by "
        f"draws as they come, with the noise of t_min, of sd {PRIOR.noise.data_sd:.2f}"
    )
    print(
        "one chain: error of the mean and coverage by the draws of the first chain alone, as a user with one "
        "chain sees them"
    )
    print(
        "route      galaxy  error  coverage    lit  noised  (one chain)     sd  R-hat flux   x      y   "
        "scale (R-hat)  acceptance  diverging  s"
    )
    for name in options.routes:
        kernel, num_warmup, num_samples = routes()[name]
        run = make_run(kernel, num_warmup, num_samples)
        rows = []
        for i in range(options.galaxies):
            start = time.perf_counter()
            x, scale, accept, diverging = (
                np.asarray(leaf) for leaf in jax.block_until_ready(run(jr.key(i), data[i]))
            )
            seconds = time.perf_counter() - start
            x, scale, truth = x.swapaxes(0, 1), scale.T, truths[i]
            images = np.asarray(PRIOR.clean_draws(jr.key(i), x))
            inside, one_chain = covered(images, truth), images[:1]
            coverage = inside.mean(), inside[truth > 1].mean(), covered(x, truth).mean()
            sd = images.std((0, 1)).mean()
            rhat = {key: float(split_gelman_rubin(value)) for key, value in statistics(images).items()}
            scale_rhat = float(split_gelman_rubin(scale)) if name == "unknown" else np.nan
            rows.append((error(images, truth), *coverage, sd, *rhat.values()))
            one = f"({error(one_chain, truth):.3f} {covered(one_chain, truth).mean():.3f})"
            print(
                f"{name:10} {i:6d} {rows[-1][0]:6.3f} {coverage[0]:9.3f} {coverage[1]:6.3f} "
                f"{coverage[2]:7.3f} {one} {sd:6.3f} {rhat['flux']:11.3f} {rhat['x']:6.3f} {rhat['y']:6.3f}"
                f" {scale.mean():7.3f} ({scale_rhat:.3f}) {accept.mean():11.2f} {int(diverging.sum()):10d} "
                f"{seconds:8.0f}",
                flush=True,
            )
        mean = np.mean(rows, axis=0)
        print(
            f"{name:10}   mean {mean[0]:6.3f} {mean[1]:9.3f} {mean[2]:6.3f} {mean[3]:7.3f} {'':13} "
            f"{mean[4]:6.3f} {mean[5]:11.3f} {mean[6]:6.3f} {mean[7]:6.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
