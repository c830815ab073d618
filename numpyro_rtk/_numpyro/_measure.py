"""What particle Gibbs measures of its priors before the first sweep."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_rtk._numpyro._problem import (
    draw_and_probe,
    first_calls,
    flatten_draws,
    fly_site,
    initial_grids,
    measured_of,
    place,
    Problem,
    run_pilots,
    Shared,
)
from numpyro_rtk._numpyro._start_checks import check_likelihood, check_scores, check_twist
from numpyro_rtk._score._checks import check_first_call
from numpyro_rtk._smc._posterior import Floor
from numpyro_rtk._smc._twist import log_likelihood, most_observations, num_residuals


def measure(problem: Problem, num_warmup: int, run: Callable[..., Any]) -> tuple[Shared, Floor]:
    """What all chains share, from prior draws with a fixed key: it is a property of the priors. And what
    stands for an impossible likelihood.

    Args:
        problem: The model with its arguments.
        num_warmup: Length of the warmup.
        run: `run(name, function, *inputs)` is `function(problem, *inputs)`, compiled, with the arguments of
            the model as arguments of the program.

    Raises:
        ValueError: for scores, segments and likelihoods that cannot be right.
    """
    arrays = problem.scores.arrays
    for one, grid in zip(run("first", first_calls, arrays), initial_grids(problem), strict=True):
        check_first_call(one, grid)
    seen = run("probe", draw_and_probe, arrays)
    draws, grids = [one[0] for one in seen], place(problem, seen)
    pilots, terms, center = run("pilot", _pilot, draws, grids, arrays)

    def fly(i: int, *inputs: Any) -> Any:
        def trips(inner: Problem, grid: Any, curvature: Array, arrays: Any, inputs: Any) -> Any:
            return fly_site(inner, i, grid, curvature, arrays, inputs)

        return run(f"trips {i}", trips, grids[i], pilots[i].curvature[1:], arrays, inputs)

    check_scores(problem, draws, grids, pilots, fly)
    num_observations = most_observations(problem.elements, terms.whitened.shape[1])
    check_twist(problem.options.twist, num_observations)
    check_likelihood(log_likelihood(terms, problem.elements))
    kept = num_residuals(num_observations, problem.options.num_pilot_draws)
    shared = Shared(
        score_arrays=problem.scores,
        measured=measured_of(seen, grids, pilots, kept),
        center=center,
        iteration=jnp.zeros((), int),
        num_warmup=jnp.asarray(num_warmup, int),
        restarts=jnp.ones((), bool),
        partition=problem.partition,
    )
    return shared, Floor.of(terms, problem.elements)


def _pilot(problem: Problem, draws: list[Array], grids: Any, arrays: Any) -> tuple[Any, Any, Array]:
    """Denoising errors, terms of the likelihood at prior draws, and their mean."""
    flat = flatten_draws(problem, draws)
    pilots = run_pilots(problem, draws, grids, arrays)
    return pilots, jax.vmap(problem.terms)(flat), jnp.mean(flat, axis=0)
