"""Noise levels by a density: many where it is high."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def levels_by_density(weights: Array, lengths: Array, num_segments: int, even_share: float) -> Array:
    """Indices of the candidates that make a grid, as many in each stretch as the density says.

    Args:
        weights: Density between neighbouring candidates up to a constant, not all 0, shape
            `(candidates - 1,)`.
        lengths: Distance of neighbouring candidates, in what the density is of, the same shape: steps of a
            discrete schedule are longer near data.
        num_segments: Number of segments, at most `candidates - 1`.
        even_share: Share of the density that is even, whatever the weights.

    Returns:
        Shape `(num_segments + 1,)`, strictly increasing, from the first candidate to the last.
    """
    last = weights.shape[0]
    weighted = weights * lengths
    density = (1 - even_share) * weighted / jnp.sum(weighted) + even_share * lengths / jnp.sum(lengths)
    reached = jnp.concatenate([jnp.zeros(1, density.dtype), jnp.cumsum(density)])
    order = jnp.arange(num_segments + 1)
    wanted = jnp.interp(
        order / num_segments, reached / reached[-1], jnp.arange(last + 1, dtype=density.dtype)
    )
    indices = jnp.round(wanted).astype(order.dtype)
    # Distinct, and none beyond the ends.
    indices = jax.lax.cummax(indices - order) + order
    return jnp.minimum(indices, last - num_segments + order)
