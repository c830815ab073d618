"""How good `RTKKernel(score_fn, evaluations=...)` is for its evaluations, on laws of several kinds.

    python -m benchmarks.evaluations [--seeds 8] [--evaluations 20 35 60]

Sliced W2 of 20,000 draws to 20,000 exact draws over the same for two exact samples (1 is as good as exact),
mean over laws of other random places and weights, and its standard error. Beside it the kernel with no
argument, and transitions of second and third order on levels that are even in the log signal-to-noise ratio.
"""

import argparse
import itertools
import warnings

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from numpyro.infer import MCMC

import numpyro_rtk as rtk
from benchmarks.problems import sliced_w2


NUM_DRAWS, NUM_CHAINS = 20_000, 200


class Products:
    """Mixtures of normals with independent coordinates: of whole events, or of each coordinate by itself."""

    def __init__(self, schedule, by_coordinate=False):
        self.schedule, self.axes = schedule, () if by_coordinate else (-1,)

    def __call__(self, x, t, log_weights, means, sds):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        offset, variance = alpha * means - x, (alpha * sds) ** 2 + sigma**2
        log_density = -0.5 * (offset**2 / variance + jnp.log(variance))
        if self.axes:
            log_density = jnp.sum(log_density, axis=-1, keepdims=True)
        shares = jax.nn.softmax(log_weights + log_density, axis=0)
        return jnp.sum(shares * offset / variance, axis=0)

    def sample(self, key, num, log_weights, means, sds):
        """Exact draws at `t_min`."""
        which_key, noise_key = jr.split(key)
        shape = (num, 1) if self.axes else (num, means.shape[1])
        which = jr.categorical(which_key, log_weights, axis=0, shape=shape)
        mean, sd = (jnp.take_along_axis(leaf[None], which[:, None], axis=1)[:, 0] for leaf in (means, sds))
        alpha, sigma = (
            at(jnp.asarray(self.schedule.t_min)) for at in (self.schedule.alpha, self.schedule.sigma)
        )
        noise = jr.normal(noise_key, mean.shape)
        return alpha * mean + jnp.sqrt((alpha * sd) ** 2 + sigma**2) * noise


def on_a_sphere(seed, num, dim, radius, sd):
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((num, dim))
    means *= radius / np.linalg.norm(means, axis=1, keepdims=True)
    weights = rng.dirichlet(np.full(num, 3.0))
    return np.log(weights)[:, None], means, np.full((num, dim), sd)


def ill_conditioned(seed):
    del seed
    return np.zeros((1, 1)), np.zeros((1, 10)), np.geomspace(0.02, 2.0, 10)[None]


def skewed(seed):
    del seed
    columns = ([0.2, 0.3, 0.3, 0.2], [-0.9, -0.6, 0.1, 1.5], [0.1, 0.3, 0.5, 0.8])
    weights, means, sds = (np.tile(np.asarray(column)[:, None], (1, 10)) for column in columns)
    return np.log(weights), means, sds


def laws():
    """Label to (schedule, whether coordinates are mixtures by themselves, parameters of a seed)."""

    def sphere(seed):
        return on_a_sphere(seed, 6, 10, 1.5, 0.3)

    schedules = {
        "OU": rtk.OU(),
        "VP": rtk.VP(),
        "VE": rtk.VE(sigma_max=20.0),
        "EDM": rtk.EDM(),
        "FlowMatching": rtk.FlowMatching(),
    }
    return {f"6 modes, {name}": (schedule, False, sphere) for name, schedule in schedules.items()} | {
        "40 modes in 50 dimensions": (rtk.OU(), False, lambda seed: on_a_sphere(seed, 40, 50, 1.5, 0.3)),
        "condition number 1e4": (rtk.OU(), False, ill_conditioned),
        "skewed": (rtk.OU(), True, skewed),
    }


def kernels(score, evaluations, dim):
    """Label to kernel."""
    options = {"event_shape": (dim,), "schedule": score.schedule}
    chosen = {f"{number}": rtk.RTKKernel(score, evaluations=number, **options) for number in evaluations}
    least = min(evaluations)
    even = rtk.segment_times(score.schedule, least, rho=np.inf)
    beside = {
        f"{least}, order 2": rtk.RTKKernel(
            score, segments=even, inner=rtk.GaussianTransition(order=2), **options
        ),
        f"{least}, even levels": rtk.RTKKernel(
            score, segments=even, inner=rtk.GaussianTransition(order=3), **options
        ),
        "no argument": rtk.RTKKernel(score, **options),
    }
    return chosen | beside


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[20, 35, 60])
    parser.add_argument("--laws", nargs="+", default=list(laws()), help=", ".join(laws()))
    options = parser.parse_args()
    for label in options.laws:
        schedule, by_coordinate, law = laws()[label]
        score = Products(schedule, by_coordinate)
        parameters = [[jnp.asarray(leaf, jnp.float32) for leaf in law(seed)] for seed in range(options.seeds)]
        samples = jax.jit(lambda key, *law, score=score: score.sample(key, NUM_DRAWS, *law))
        exact = [[np.asarray(samples(jr.key(i), *law)) for i in range(4)] for law in parameters]
        # One law's floor is another's but for scatter, which is larger.
        floor = np.mean([sliced_w2(*pair) for x in exact for pair in itertools.combinations(x, 2)])
        row = []
        for name, kernel in kernels(score, options.evaluations, parameters[0][1].shape[1]).items():
            num_warmup = 100 if kernel.inner.adapts_step_size else 0
            mcmc = MCMC(
                kernel,
                num_warmup=num_warmup,
                num_samples=NUM_DRAWS // NUM_CHAINS,
                num_chains=NUM_CHAINS,
                chain_method="vectorized",
                progress_bar=False,
                jit_model_args=True,
            )
            ratios = []
            for seed, one in enumerate(parameters):
                with warnings.catch_warnings():
                    # What is too few evaluations is what this table shows.
                    warnings.filterwarnings("ignore", message="Segment")
                    mcmc.run(jr.key(seed), *one)
                draws = np.asarray(mcmc.get_samples()["x"])
                ratios.append(np.mean([sliced_w2(draws, one) for one in exact[seed]]) / floor)
            # NumPyro compiles its loop for each run, and a process has a limited number of memory mappings.
            jax.clear_caches()
            error = np.std(ratios) / np.sqrt(max(len(ratios) - 1, 1))
            row.append(f"{name}: {np.mean(ratios):.2f} ({error:.2f})")
        print(f"{label:28s} {'  '.join(row)}", flush=True)


if __name__ == "__main__":
    main()
