r"""Particle Gibbs over noise levels: conditional and unconditional SMC on `pi_t`, proportional to `p_t G_t`.
Pure JAX.

One conditional sweep leaves `p_0 L` invariant for any twist and any number of particles of at least 2, up to
the error of the inner kernel. Going up, the pinned path is noised to each level and there takes a move `K_t`
reversible for `pi_t`. Coming down, particles are resampled given the pinned path, moved by the same `K_t`,
taken to the next level by the reverse transition, and weighted by `G_s(z) / G_t(x)`. Noising and reverse
transition are reversals of each other under the prior, so that the weight needs no prior density.

References:
    Andrieu, Doucet and Holenstein (2010), *Particle Markov chain Monte Carlo methods*; Corenflos et al.
    (2024), arXiv 2405.13794; Cardoso et al. (2023), arXiv 2308.07983.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from numpyro_rtk._custom_types import Count, Flag, RandomKey
from numpyro_rtk._moves._preconditioner import Preconditioner
from numpyro_rtk._smc._posterior import MoveInfo, Point, Posterior
from numpyro_rtk._smc._resampling import (
    conditional_systematic,
    effective_sample_size,
    forced_move,
    normalized_weights,
)


class SweepTuning(NamedTuple):
    """Step sizes of a sweep."""

    reverse_step_size: Float[Array, "segments sites"]
    """Of the inner kernel, in its own unit."""
    guided_step_size: Float[Array, " segments"]
    """Of the guided MALA moves at the start of each segment, relative to the preconditioner."""


class SweepInfo(NamedTuple):
    """What a sweep reports; levels that it did not visit are NaN."""

    effective_sample_size: Float[Array, " levels"]
    accept_prob: Float[Array, " segments"]
    """Of the inner kernel."""
    guided_accept_prob: Float[Array, " segments"]
    """Of the guided moves at the start of each segment."""
    changed: Flag
    """Whether another particle than the pinned one was chosen."""
    diverging: Flag


MAX_GUIDED_STEP_SIZE = 0.3
"""Largest step of MALA moves whose energy difference is estimated by the trapezoid rule: proposals keep 70 %
of the distance.
"""
MAX_EXACT_STEP_SIZE = 1.0
"""The same where energies are exact."""


def max_step_size(posterior: Posterior) -> float:
    """Largest adapted step of the gradient moves."""
    return MAX_EXACT_STEP_SIZE if posterior.has_energy else MAX_GUIDED_STEP_SIZE


def _keep(points: Point, index: Any, point: Point) -> Point:
    """Write a point into an array of points."""
    return jax.tree.map(lambda many, one: many.at[index].set(one), points, point)


def _at(points: Point, index: Any) -> Point:
    return jax.tree.map(lambda leaf: leaf[index], points)


def _empty(posterior: Posterior, size: int) -> Point:
    vector, scalar = jnp.zeros((size, posterior.dim), posterior.dtype), jnp.zeros(size, posterior.dtype)
    return Point(vector, vector, scalar, scalar, vector, scalar)


def conditional_sweep(
    key: RandomKey,
    posterior: Posterior,
    tuning: SweepTuning,
    reference: Array,
    point: Point,
    depth: Count,
    num_particles: int,
    num_guided_steps: int,
) -> tuple[Point, SweepInfo]:
    """One particle Gibbs sweep from the current draw; leaves `p_0 L` invariant up to the error of the inner
    kernel.

    Args:
        key: Random key.
        posterior: The level targets.
        tuning: Step sizes.
        reference: Where twists are linearised for the guided moves' preconditioners, shape `(dim,)`; must not
            depend on the draw.
        point: The current draw, evaluated at the last level.
        depth: Levels to refresh, 0 (nothing is done) to `num_levels`: all of them, the noisiest included, is
            a full sweep; fewer start all particles from the pinned path's point `depth` levels above the
            data.
        num_particles: At least 2, the pinned one included.
        num_guided_steps: MALA steps per level above the data.
    """
    up_key, start_key, down_key, choose_key = jr.split(key, 4)
    num_levels, last = posterior.num_levels, posterior.num_levels - 1
    num_free = num_particles - 1
    # A full sweep climbs to the noisiest level, too, but draws the free particles there from noise.
    top, full = jnp.maximum(last - depth, 0), depth > last
    # Batched chains walk through the levels together, from the noisiest that any of them needs: levels, and
    # what was measured at them, have no chain axis. A chain's own sweep starts at its own `top`; what it does
    # before is ignored.
    shared = _least_of_batch(last - depth)
    first = jnp.maximum(shared, 0)
    up_keys, down_keys = jr.split(up_key, num_levels), jr.split(down_key, num_levels)

    def guided(
        key: RandomKey, level: Count, point: Point, preconditioner: Preconditioner
    ) -> tuple[Point, MoveInfo]:
        step_size = tuning.guided_step_size[level]
        return posterior.mala_steps(
            key, level, point, preconditioner, step_size, num_guided_steps, guided=True
        )

    # Up: at each level keep the point that the path leaves downwards from, and the one it arrives at from
    # above.
    def climb(carry: Any) -> Any:
        level, point, leave, arrive, accept = carry
        level = level - 1
        noise_key, move_key = jr.split(up_keys[level])
        new = posterior.evaluate(level, posterior.noise(noise_key, level + 1, point.x))
        moved, info = guided(move_key, level, new, posterior.preconditioner(level, reference))
        accept = accept.at[level].set(jnp.where(level >= top, info.accept_prob, jnp.nan))
        return level, moved, _keep(leave, level, new), _keep(arrive, level, moved), accept

    paths = _keep(_empty(posterior, num_levels), last, point)
    nan = jnp.full(num_levels, jnp.nan, posterior.dtype)
    carry = (jnp.asarray(last), point, paths, paths, nan)
    _, _, leave, arrive, up_accept = jax.lax.while_loop(lambda carry: carry[0] > first, climb, carry)

    # The free particles of a full sweep before the first move; those of others start at the pinned path's
    # point.
    def from_noise() -> Point:
        xs = jax.vmap(posterior.terminal)(jr.split(start_key, num_free))
        return jax.vmap(lambda x: posterior.evaluate(jnp.zeros((), int), x))(xs)

    points = jax.lax.cond(shared < 0, from_noise, lambda: _empty(posterior, num_free))
    log_weights, pinned = points.log_twist, arrive.log_twist[0]

    # Down: resample and move at a level, then go to the next.
    def descend(carry: Any) -> Any:
        level, points, log_weights, pinned, all_ess, inner_accept, guided_accept, diverging = carry
        resample_key, move_key, reverse_key = jr.split(down_keys[level], 3)
        active, starts = level >= top, (level == top) & ~full
        path = _at(arrive, level)
        points = jax.tree.map(lambda one, many: jnp.where(starts, one[None], many), path, points)
        log_weights = jnp.where(starts, 0.0, jnp.concatenate([pinned[None], log_weights]))
        ess = jnp.where(active & ~starts, effective_sample_size(log_weights), jnp.nan)
        ancestors = conditional_systematic(resample_key, normalized_weights(log_weights))[1:]
        everyone = jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), path, points)
        preconditioner = posterior.preconditioner(level, reference)
        move = jax.vmap(lambda key, point: guided(key, level, point, preconditioner))
        points = posterior.prepared(level, _at(everyone, ancestors))
        points, moved = move(jr.split(move_key, num_free), points)
        step_size = tuning.reverse_step_size[level]
        reverse = jax.vmap(lambda key, point: posterior.reverse(key, level, point, step_size))
        new, info = reverse(jr.split(reverse_key, num_free), points)
        diverging |= active & (jnp.any(info.diverging) | jnp.any(moved.diverging))
        return (
            level + 1,
            new,
            _difference(new.log_twist, points.log_twist),
            arrive.log_twist[level + 1] - leave.log_twist[level],
            all_ess.at[level].set(ess),
            inner_accept.at[level].set(jnp.where(active, jnp.mean(info.accept_prob), jnp.nan)),
            guided_accept.at[level].set(jnp.where(active, jnp.mean(moved.accept_prob), jnp.nan)),
            diverging,
        )

    carry = (first, points, log_weights, pinned, nan, nan[1:], nan, jnp.zeros((), bool))
    carry = jax.lax.while_loop(lambda carry: carry[0] < last, descend, carry)
    _, points, log_weights, pinned, all_ess, inner_accept, guided_accept, diverging = carry

    log_weights = jnp.concatenate([pinned[None], log_weights])
    chosen = jnp.where(depth > 0, forced_move(choose_key, normalized_weights(log_weights)), 0)
    everyone = jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), point, points)
    share = num_free / num_particles
    return _at(everyone, chosen), SweepInfo(
        effective_sample_size=all_ess.at[last].set(
            jnp.where(depth > 0, effective_sample_size(log_weights), jnp.nan)
        ),
        accept_prob=inner_accept,
        guided_accept_prob=(share * guided_accept + (1 - share) * up_accept)[:-1],
        changed=chosen != 0,
        diverging=diverging,
    )


@jax.custom_batching.custom_vmap
def _least_of_batch(level: Count) -> Count:
    """The level itself; under `vmap` the least of the batch, without its axis, so that it may bound a loop
    that all share.
    """
    return level


@_least_of_batch.def_vmap
def _(axis_size: int, in_batched: list[bool], level: Count) -> tuple[Count, bool]:
    del axis_size
    return _least_of_batch(jnp.min(level, axis=0) if in_batched[0] else level), False


def no_sweep(posterior: Posterior) -> SweepInfo:
    """What an iteration without a sweep reports."""
    nan, no = jnp.full(posterior.num_levels, jnp.nan, posterior.dtype), jnp.zeros((), bool)
    return SweepInfo(nan, nan[1:], nan[1:], no, no)


def _difference(new: Array, old: Array) -> Array:
    """Log weights; a particle whose parent was impossible stays so."""
    return jnp.where((new > -jnp.inf) & (old > -jnp.inf), new - jnp.where(old > -jnp.inf, old, 0.0), -jnp.inf)


def sweep_evaluations(posterior: Posterior, depth: Count, num_particles: int, num_guided_steps: int) -> Count:
    """Score evaluations of a conditional sweep of a depth, each counted for one event of every site.

    The pinned path costs its guided steps and 1 a level; each other particle one reverse transition and its
    guided steps. A full sweep evaluates the free particles at the noisiest level, too.
    """
    num_free, last = num_particles - 1, posterior.num_levels - 1
    transitions = jnp.minimum(depth, last)
    guided = num_guided_steps * posterior.evaluations_per_guided_step
    per_particle = guided + posterior.evaluations_per_reverse + posterior.evaluations_to_prepare
    per_level = guided + 1 + num_free * per_particle
    return transitions * per_level + jnp.where(depth > last, num_free, 0)
