"""Systematic resampling, with and without a pinned particle. Pure JAX."""

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

from numpyro_rtk._custom_types import Flag, RandomKey, Scalar


def particle_ess(log_weights: Float[Array, " particles"]) -> Scalar:
    """Effective sample size `1 / sum(W^2)` of the normalised weights; 0 where no weight is positive."""
    weights = normalized_weights(log_weights)
    return jnp.where(jnp.any(log_weights > -jnp.inf), 1 / jnp.sum(weights**2), 0.0)


def normalized_weights(log_weights: Float[Array, " particles"]) -> Float[Array, " particles"]:
    """Weights that sum to one; uniform where none is positive."""
    usable = jnp.any(log_weights > -jnp.inf)
    return jax.nn.softmax(jnp.where(usable, log_weights, 0.0))


def pinned_weights(log_weights: Float[Array, " particles"]) -> tuple[Float[Array, " particles"], Flag]:
    """Weights that sum to one, given that particle 0 exists; and whether none of them was positive.

    Then the pinned particle has all the weight: to choose another one would leave the law.
    """
    usable = jnp.any(log_weights > -jnp.inf)
    pinned = jnp.zeros_like(log_weights).at[0].set(1.0)
    return jnp.where(usable, normalized_weights(log_weights), pinned), ~usable


def systematic(key: RandomKey, weights: Float[Array, " particles"]) -> Int[Array, " particles"]:
    """Ancestors by systematic resampling: each particle gets its expected number of offspring, up to
    rounding.
    """
    return _ancestors(weights, jr.uniform(key, dtype=weights.dtype))


def conditional_systematic(key: RandomKey, weights: Float[Array, " particles"]) -> Int[Array, " particles"]:
    """Systematic resampling given that slot 0 keeps particle 0.

    The law of systematic resampling whose slots are shifted by a uniform number, given that the ancestor of
    slot 0 is particle 0: the uniform offset has a density proportional to the number of offspring it gives
    particle 0, and the shift puts one of them, chosen uniformly, in slot 0.

    References:
        Chopin and Singh (2015), *On particle Gibbs sampling*, Bernoulli 21(3), section 4.
    """
    num_particles = weights.shape[0]
    offset_key, branch_key, shift_key = jr.split(key, 3)
    expected = num_particles * weights[0]
    base = jnp.floor(expected)
    remainder = expected - base
    # Offsets below the remainder give base + 1 offspring, the others base.
    many = jr.uniform(branch_key, dtype=weights.dtype) * expected < remainder * (base + 1)
    uniform = jr.uniform(offset_key, dtype=weights.dtype)
    offset = jnp.where(many, uniform * remainder, remainder + uniform * (1 - remainder))
    ancestors = _ancestors(weights, offset)
    # Ancestors are sorted, so that the offspring of particle 0 come first.
    offspring = jnp.maximum(jnp.sum(ancestors == 0), 1)
    shift = jr.randint(shift_key, (), 0, offspring)
    return jnp.roll(ancestors, -shift).at[0].set(0)


def _ancestors(weights: Float[Array, " particles"], offset: Scalar) -> Int[Array, " particles"]:
    num_particles = weights.shape[0]
    points = (jnp.arange(num_particles, dtype=weights.dtype) + offset) / num_particles
    cumulative = jnp.cumsum(weights)
    return jnp.minimum(jnp.searchsorted(cumulative / cumulative[-1], points, side="right"), num_particles - 1)


def forced_move(key: RandomKey, weights: Float[Array, " particles"]) -> Int[Array, ""]:
    """A particle drawn so that the weights stay invariant, and particle 0 is left as often as possible.

    One of the others is proposed by its weight and accepted with probability `(1 - W_0) / (1 - W_j)`, or 1.

    References:
        Liu (1996), *Peskun's theorem and a modified discrete-state Gibbs sampler*; Chopin and Singh (2015),
        section 3.
    """
    choose_key, accept_key = jr.split(key)
    others = weights.at[0].set(0.0)
    left = jnp.sum(others)
    proposal = jr.categorical(
        choose_key, jnp.where(others > 0, jnp.log(jnp.where(others > 0, others, 1.0)), -jnp.inf)
    )
    accept = jr.uniform(accept_key, dtype=weights.dtype) * (1 - weights[proposal]) < left
    return jnp.where((left > 0) & accept, proposal, 0)
