"""What noising paths tell of a condition, against the exact density of `x` given it.

    python -m benchmarks.conditions

Exact scores under OU. *Information*: mean curvature of the log density in the condition, over the exact one.
*Scatter*: sd of the error of its gradient at the truth, and *bias*, its mean, in posterior sds of the
condition given `x`. *Too wide*: the posterior sd that follows, over the exact one, where `x` is all that is
known. The last rows have errors of denoising that were measured of data of four times the scale.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import numpyro_rtk as rtk
from numpyro_rtk._noising._grid import noise_grid
from numpyro_rtk._noising._times import NoiseRange
from numpyro_rtk._reverse._path import noise_path, path_grid, path_log_density
from numpyro_rtk._reverse._pilot import run_pilot
from numpyro_rtk._score._model import resolve_score


OU = rtk.OU()
NOISE = NoiseRange(OU, t_min=OU.t_min, t_max=OU.t_max)
ALPHA, SIGMA = OU.alpha(jnp.float32(OU.t_min)), OU.sigma(jnp.float32(OU.t_min))


class Place:
    """`x | c ~ N(c, 1)` in every coordinate."""

    name, measured_at = "a place", 0.0

    def __init__(self, dim):
        self.dim, self.sd = dim, 1 / math.sqrt(dim)

    def log_density(self, x, c, alpha, sigma):
        return -0.5 * jnp.sum((x - alpha * c) ** 2) / (alpha**2 + sigma**2)

    def draw(self, key):
        return jr.normal(key, (self.dim,))


class Scale:
    """`x | c ~ N(0, exp(2 c))` in every coordinate."""

    def __init__(self, dim, measured_at=0.0):
        self.dim, self.sd, self.measured_at = dim, 1 / math.sqrt(2 * dim), measured_at
        self.name = "a scale, measured at another" if measured_at else "a scale"

    def log_density(self, x, c, alpha, sigma):
        variance = alpha**2 * jnp.exp(2 * c) + sigma**2
        return -0.5 * jnp.sum(x**2) / variance - 0.5 * self.dim * jnp.log(variance)

    def draw(self, key):
        return jr.normal(key, (self.dim,))


class TwoModes:
    """Modes of sd 0.3 at `c - 2` and `c + 2` of the first coordinate."""

    name, measured_at = "the place of two modes", 0.0

    def __init__(self, dim):
        self.dim, self.sd = dim, 0.3

    def log_density(self, x, c, alpha, sigma):
        first = jnp.zeros(self.dim).at[0].set(1.0)
        squares = [jnp.sum((x - alpha * (c + place) * first) ** 2) for place in (-2.0, 2.0)]
        return jax.nn.logsumexp(-0.5 * jnp.stack(squares) / (0.09 * alpha**2 + sigma**2))

    def draw(self, key):
        side_key, key = jr.split(key)
        side = jnp.where(jr.bernoulli(side_key), 2.0, -2.0)
        return 0.3 * jr.normal(key, (self.dim,)) + jnp.zeros(self.dim).at[0].set(side)


def measure(problem, num_segments, num_draws):
    """Information, bias and scatter of paths of that many segments."""

    def score(x, t, c):
        return jax.grad(problem.log_density)(x, c, OU.alpha(t), OU.sigma(t))

    family = resolve_score(score)

    def draw(key):
        key, noise_key = jr.split(key)
        return ALPHA * problem.draw(key) + SIGMA * jr.normal(noise_key, (problem.dim,))

    few = noise_grid(OU, NOISE.times(24, rho=math.inf), jnp.float32)
    pilots = math.exp(problem.measured_at) * jax.vmap(draw)(jr.split(jr.key(0), 128))
    pilot = run_pilot(jr.key(1), family.given(jnp.asarray(problem.measured_at)), few, pilots)
    grid = noise_grid(OU, NOISE.times(num_segments, rho=math.inf), jnp.float32)
    paths = path_grid(grid, few, pilot.mean_square)
    at = problem.sd * jnp.linspace(-1.5, 1.5, 7)

    def one(key):
        x_key, path_key = jr.split(key)
        x = draw(x_key)
        path = noise_path(path_key, grid, x)
        told = jax.vmap(lambda c: path_log_density(family.given(c), paths, path))(at)
        right = jax.vmap(lambda c: problem.log_density(x, c, ALPHA, SIGMA))(at)
        return told - told[3], right - right[3]

    told, right = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=50))(jr.split(jr.key(2), num_draws))
    # The density of two modes is far from quadratic; near the truth all are.
    told, right = (
        np.polyfit(np.asarray(at, float), np.asarray(one, float).T, 4)[-3:-1] for one in (told, right)
    )
    information = told[0].mean() / right[0].mean()
    error = (told[1] - right[1]) * problem.sd
    exact = -2 * right[0].mean() * problem.sd**2
    wide = math.sqrt(1 / information + error.var() / exact / information**2)
    return information, error.mean(), error.std(), wide


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=400)
    draws = parser.parse_args().draws
    print("| Condition | Dimensions | Segments | Information | Bias | Scatter | Too wide |")
    print("|---|---|---|---|---|---|---|")
    problems = [
        Place(64),
        Scale(16),
        Scale(64),
        Scale(1024),
        TwoModes(16),
        Scale(64, measured_at=math.log(4.0)),
    ]
    for problem in problems:
        for num_segments in (50, 100, 200):
            information, bias, scatter, wide = measure(problem, num_segments, draws)
            row = f"{information:.3f} | {bias:+.3f} | {scatter:.3f} | {wide:.3f}"
            print(f"| {problem.name} | {problem.dim} | {num_segments} | {row} |", flush=True)


if __name__ == "__main__":
    main()
