"""The accept step, and what it does where something is not finite, impossible or unresolved."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr

from numpyro_rtk._custom_types import Flag, RandomKey, Scalar


MAX_ENERGY_DROP = 1000.0
"""A move that lowers the log density by more than this has left the law (HMC's threshold)."""

LINE_INTEGRAL_ACCEPT_PROB = 0.98
"""Acceptance that trajectories aim at whose energy error is a line integral of scores along their path.

There the law is right to about 1 %, in one dimension as in many (`python -m benchmarks.bias`). At 0.9 steps
are the longer the fewer dimensions there are: in one, the variance of a skewed law was a third too large; and
the mean of two modes was off by 0.05 sd in ten.
"""

MIDPOINT_ACCEPT_PROB = 0.9
"""The same for Langevin moves, whose line integral is taken along each step by itself."""

ENERGY_ACCEPT_PROB = 0.8
"""The same where energies are known: any acceptance is exact, and this one, NumPyro's own, mixes well."""


class Acceptance(NamedTuple):
    """What an accept step decides."""

    accept: Flag
    """Whether the proposal is taken."""
    accept_prob: Scalar
    """Its acceptance probability, 0 where the ratio could not be computed."""
    diverging: Flag
    """Whether something that ought to be finite was not."""


def metropolis(
    key: RandomKey, log_ratio: Scalar, finite: Flag, *, possible: Any = True, resolved: Any = True
) -> Acceptance:
    """Accept with probability `min(1, exp(log_ratio))`: the one rule of all kernels.

    A ratio of `-inf` is an ordinary rejection: outside the support, or a projected step. NaN and `+inf` are
    not: they are rejected and `diverging`, unless the proposal is impossible anyway, as where a likelihood of
    nearly zero overflows its gradient. A proposal whose ratio is unresolved, because its path was too coarse
    for the line integral, is rejected without being `diverging`.

    Args:
        key: Random key.
        log_ratio: Log Metropolis-Hastings ratio, or an array of them, each of a move of its own.
        finite: Whether the network's values at the proposal are finite.
        possible: Whether the proposal has a likelihood to speak of.
        resolved: Whether `log_ratio` is known well enough.
    """
    known = log_ratio < jnp.inf
    usable = finite & known & resolved
    accept = usable & (-jr.exponential(key, jnp.shape(log_ratio), log_ratio.dtype) < log_ratio)
    accept_prob = jnp.where(usable, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    return Acceptance(accept, accept_prob, ~finite | (~known & possible & resolved))


def all_finite(*arrays: Any) -> Flag:
    """Whether every entry of every array is finite."""
    return jnp.stack([jnp.all(jnp.isfinite(array)) for array in arrays]).all()


def select(condition: Flag, if_true: Any, if_false: Any) -> Any:
    """`jnp.where` over two PyTrees of the same structure."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), if_true, if_false)
