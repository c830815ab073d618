"""Do the nodes of `LineIntegral` resolve the score? The same integrals with about twice as many."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_rtk._custom_types import Event
from numpyro_rtk._diagnosis._report import Finding


MAX_DIFFERENCE = 0.1
"""Error, in nats, of the difference in log density between two draws from which it is said."""
MAX_NODES = 2048
"""Where the search for a number of nodes that would do ends."""
NUM_EXTREMES = 4
"""Draws that the search is made with."""
BATCH = 128
"""Evaluations made together."""


def check_line_integral(
    score_fn: Callable[[Event], Event], reference: Event, draws: Array, num_nodes: int, score: str
) -> list[Finding]:
    """Compare `num_nodes` nodes with `2 num_nodes + 1`, at draws of the prior.

    What enters a posterior is the difference between two draws, so an error that all have in common is
    none. Fewer nodes than resolve the score can agree by accident; the nodes that would do are the first of
    `n`, `2 n + 1`, ... that agree with the next.

    *Cost.* `draws * (3 num_nodes + 1)` evaluations; where they disagree, up to
    `4 NUM_EXTREMES MAX_NODES` more.

    Args:
        score_fn: Score at `t_min` of one event.
        reference: Where the lines begin.
        draws: Shape `(draws, *event)`.
        num_nodes: Of the density.
        score: Name of the score for the message.

    Returns:
        No finding, or one.
    """
    draws = draws[np.all(np.isfinite(np.asarray(draws).reshape(draws.shape[0], -1)), axis=1)]
    if draws.shape[0] < 2:
        return []
    evaluate = jax.jit(jax.vmap(score_fn))
    coarse = _line_integrals(evaluate, reference, draws, num_nodes)
    nodes = 2 * num_nodes + 1
    fine = _line_integrals(evaluate, reference, draws, nodes)
    error = float(np.ptp(coarse - fine))
    # Not finite where the network is not: that is said elsewhere.
    if not MAX_DIFFERENCE < error < np.inf:
        return []
    # The draws that differ most are those that decide.
    order = np.argsort(coarse - fine)
    extremes = np.unique(np.append(order[: NUM_EXTREMES // 2], order[-NUM_EXTREMES // 2 :]))
    coarse = fine[extremes]
    while nodes <= MAX_NODES:
        fine = _line_integrals(evaluate, reference, draws[extremes], 2 * nodes + 1)
        if np.ptp(coarse - fine) <= MAX_DIFFERENCE:
            break
        nodes, coarse = 2 * nodes + 1, fine
    if nodes <= MAX_NODES:
        remedy = f"{nodes} nodes would do: write `density=LineIntegral(num_nodes={nodes})`"
    else:
        remedy = (
            f"{MAX_NODES} nodes would not do, as the score is rough along the line, or the values too large "
            "for the precision: give a `reference` in the bulk, or a score with an energy"
        )
    message = (
        f"`LineIntegral(num_nodes={num_nodes})` does not resolve {score} between prior draws: differences of "
        f"their log densities change by up to {error:.2g} nats with {2 * num_nodes + 1} nodes. {remedy}."
    )
    return [Finding("line_integral", num_nodes, error, message)]


def _line_integrals(
    evaluate: Callable[[Array], Array], reference: Event, draws: Array, num_nodes: int
) -> np.ndarray:
    """Integrals of the score from the reference to each draw, summed in float64."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    event = np.asarray(reference).shape
    start = np.asarray(reference, np.float64).reshape(-1)
    lines = np.asarray(draws, np.float64).reshape(draws.shape[0], -1) - start
    fractions = 0.5 * (1 + nodes)
    num = lines.shape[0] * num_nodes
    derivatives = np.empty(num)
    # Batches of one size, so that one program serves any number of nodes.
    for first in range(0, num, BATCH):
        index = np.minimum(np.arange(first, first + BATCH), num - 1)
        line = lines[index // num_nodes]
        points = start + fractions[index % num_nodes, None] * line
        scores = evaluate(jnp.asarray(points.reshape(BATCH, *event), draws.dtype))
        along = np.sum(np.asarray(scores, np.float64).reshape(BATCH, -1) * line, axis=1)
        last = min(num, first + BATCH)
        derivatives[first:last] = along[: last - first]
    return derivatives.reshape(-1, num_nodes) @ (0.5 * weights)
