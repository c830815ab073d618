"""Bias of HMC whose energy error is a line integral of scores: `python benchmarks/trajectories.py`.

Independent chains start from exact draws of three laws in 10 dimensions; after 20 trajectories of length 1.5
their mean and variance should not have moved. Rows compare the rule of `ScoreHMC` with the plain trapezoid
rule and with no accept step.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from numpyro_rtk._moves._leapfrog import leapfrog, PathPoint, unit_velocity


DIM, NUM_TRAJECTORIES, LENGTH = 10, 20, 1.5
STEP_SIZES = (0.5, 0.375, 0.25)
RULES = {"fourth order": (4, True), "trapezoid": (2, True), "no accept step": (2, False)}


def _skewed(rng, shape):
    return np.log(rng.exponential(size=shape))


def _quartic(rng, shape):
    return rng.choice([-1, 1], shape) * (4 * rng.gamma(0.25, size=shape)) ** 0.25


def _wells(rng, shape):
    return rng.choice([-1.5, 1.5], shape) + 0.5 * rng.standard_normal(shape)


LAWS = {
    "log of an exponential": (lambda x: jnp.exp(x) - x, _skewed),
    "quartic": (lambda x: x**4 / 4, _quartic),
    "two wells": (lambda x: -jnp.logaddexp(-2 * (x - 1.5) ** 2, -2 * (x + 1.5) ** 2), _wells),
}


@functools.partial(jax.jit, static_argnames=("potential", "order", "accept", "num_steps"))
def run(key, x, *, potential, order, accept, step_size, num_steps):
    """End points, mean acceptance probability and share of unresolved trajectories."""
    score = jax.grad(lambda x: -jnp.sum(potential(x)))

    def evaluate(position):
        x = position["x"]
        return PathPoint(position, {"x": score(x)}, jnp.zeros(()), {"x": jnp.zeros_like(x)})

    def iteration(x, key):
        momentum_key, accept_key = jr.split(key)
        momentum = {"x": jr.normal(momentum_key, x.shape)}
        end = leapfrog(
            evaluate, unit_velocity, evaluate({"x": x}), momentum, step_size, num_steps, order=order
        )
        accepted = (jnp.log(jr.uniform(accept_key)) < -end.energy_error) | (not accept)
        accepted &= ~end.diverging & ~end.unresolved
        return jnp.where(accepted, end.point.position["x"], x), (
            jnp.minimum(1, jnp.exp(-end.energy_error)),
            end.unresolved,
        )

    x, (accept_prob, unresolved) = jax.vmap(
        lambda key, x: jax.lax.scan(iteration, x, jr.split(key, NUM_TRAJECTORIES))
    )(jr.split(key, x.shape[0]), x)
    return x, jnp.mean(accept_prob), jnp.mean(unresolved)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=40_000)
    chains = parser.parse_args().chains
    print("law | step | rule | accept | unresolved | mean - exact (se) | variance / exact - 1 (se)")
    for name, (potential, draw) in LAWS.items():
        start = draw(np.random.default_rng(0), (chains, DIM))
        exact = draw(np.random.default_rng(1), 4_000_000)
        for step_size in STEP_SIZES:
            for rule, (order, accept) in RULES.items():
                options = {"potential": potential, "order": order, "accept": accept}
                num_steps = round(LENGTH / step_size)
                x, accept_prob, unresolved = run(
                    jr.key(0), jnp.asarray(start), step_size=step_size, num_steps=num_steps, **options
                )
                x = np.asarray(x, np.float64)
                variance_se = np.std((x - x.mean()) ** 2) / exact.var() / np.sqrt(x.size)
                print(
                    f"{name} | {step_size} | {rule} | {accept_prob:.3f} | {unresolved:.4f} | "
                    f"{x.mean() - exact.mean():+.4f} "
                    f"({x.std() / np.sqrt(x.size):.4f}) | {x.var() / exact.var() - 1:+.4f} "
                    f"({variance_se:.4f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
