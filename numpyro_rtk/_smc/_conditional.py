r"""Particle Gibbs over noise levels: conditional and unconditional SMC on `pi_t`, proportional to `p_t G_t`.
Pure JAX.

One conditional sweep leaves `p_0 L` invariant for any twist and any number of particles of at least 2, up to
the error of the reverse kernel. Going up, the pinned path is noised to each level and there takes a move
`K_t` reversible for `pi_t`. Coming down, particles are resampled given the pinned path, moved by the same
`K_t`, taken to the next level by the reverse transition, and weighted by `G_s(z) / G_t(x)`. Noising and
reverse transition are reversals of each other under the prior, so that the weight needs no prior density.

References:
    Andrieu, Doucet and Holenstein (2010), *Particle Markov chain Monte Carlo methods*; Corenflos et al.
    (2024), arXiv 2405.13794; Cardoso et al. (2023), arXiv 2308.07983.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float

from numpyro_rtk._custom_types import Count, Flag, RandomKey, Scalar
from numpyro_rtk._moves._preconditioner import Preconditioner
from numpyro_rtk._smc._moves import (
    evaluations_per_reverse,
    mala_steps,
    noise,
    preconditioner,
    reverse,
    terminal,
)
from numpyro_rtk._smc._point import MoveInfo, Point, take_points
from numpyro_rtk._smc._posterior import Posterior
from numpyro_rtk._smc._resampling import conditional_systematic, forced_move, particle_ess, pinned_weights


class SweepTuning(NamedTuple):
    """Step sizes of a sweep."""

    reverse_step_size: Float[Array, "segments sites"]
    """Of the reverse kernel, in its own unit."""
    guided_step_size: Float[Array, " segments"]
    """Of the guided MALA moves at the start of each segment, relative to the preconditioner."""


class SweepInfo(NamedTuple):
    """What a sweep reports; levels and segments that it did not visit have zeros."""

    particle_ess: Float[Array, " levels"]
    """Effective sample size of the particles' weights, from 1 to their number; mean over elements."""
    weighted: Bool[Array, " levels"]
    """Levels at which the sweep weighed its particles."""
    visited: Bool[Array, " segments"]
    """Segments that the sweep went through."""
    accept_prob: Float[Array, " segments"]
    """Mean acceptance probability of the reverse kernel."""
    guided_accept_prob: Float[Array, " segments"]
    """That of the guided moves at the start of each segment."""
    changed: Array
    """Whether another particle than the pinned one was chosen, by element."""
    diverging: Flag
    """Whether something non-finite was met, or no particle of an element had any weight."""


class _Climb(NamedTuple):
    """What is carried up the levels: at each, the point that the path leaves downwards from, and the one it
    arrives at from above.
    """

    level: Count
    point: Point
    leave: Point
    arrive: Point
    accept_prob: Float[Array, " levels"]
    diverging: Flag


class _Descent(NamedTuple):
    """What is carried down the levels: the free particles, and what is reported."""

    level: Count
    points: Point
    log_weights: Array
    pinned: Array
    particle_ess: Float[Array, " levels"]
    accept_prob: Float[Array, " segments"]
    guided_accept_prob: Float[Array, " levels"]
    diverging: Flag


def at(points: Point, index: Count) -> Point:
    """Some of many points."""
    return jax.tree.map(lambda leaf: leaf[index], points)


def _keep(points: Point, index: Count, point: Point) -> Point:
    """Write a point into an array of points."""
    return jax.tree.map(lambda many, one: many.at[index].set(one), points, point)


def _joined(one: Point, many: Point) -> Point:
    return jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), one, many)


def _empty(posterior: Posterior, size: int) -> Point:
    vector = jnp.zeros((size, posterior.dim), posterior.dtype)
    scalar = jnp.zeros((size, *posterior.elements.shape), posterior.dtype)
    return Point(vector, vector, scalar, scalar, vector, scalar)


def conditional_sweep(
    key: RandomKey,
    posterior: Posterior,
    tuning: SweepTuning,
    point: Point,
    depth: Count,
    num_particles: int,
    num_guided_steps: int,
) -> tuple[Point, SweepInfo]:
    """One particle Gibbs sweep from the current draw; leaves `p_0 L` invariant up to the error of the reverse
    kernel.

    Args:
        key: Random key.
        posterior: The level targets.
        tuning: Step sizes.
        point: The current draw, evaluated at the last level.
        depth: Levels to refresh, 0 (nothing is done) to `num_levels`: all of them, the noisiest included, is
            a full sweep; fewer start all particles from the pinned path's point `depth` levels above the
            data.
        num_particles: At least 2, the pinned one included.
        num_guided_steps: MALA steps per level above the data.
    """
    up_key, start_key, down_key, choose_key = jr.split(key, 4)
    num_levels, last, num_free = posterior.num_levels, posterior.last, num_particles - 1
    # A full sweep climbs to the noisiest level, too, but draws the free particles there from noise.
    top, full = jnp.maximum(last - depth, 0), depth > last
    # Batched chains walk through the levels together, from the noisiest that any of them needs: levels, and
    # what was measured at them, have no chain axis. A chain's own sweep starts at its own `top`; what it does
    # before is ignored.
    shared = _least_of_batch(last - depth)
    first = jnp.maximum(shared, 0)
    up_keys, down_keys = jr.split(up_key, num_levels), jr.split(down_key, num_levels)
    zeros, no = jnp.zeros(num_levels, posterior.dtype), jnp.zeros((), bool)
    elements = posterior.elements

    def guided(key: RandomKey, level: Count, point: Point, mass: Preconditioner) -> tuple[Point, MoveInfo]:
        step_size = tuning.guided_step_size[level]
        return mala_steps(key, posterior, level, point, mass, step_size, num_guided_steps)

    def climb(carry: _Climb) -> _Climb:
        level = carry.level - 1
        active = level >= top
        noise_key, move_key = jr.split(up_keys[level])
        new = posterior.evaluate(level, noise(noise_key, posterior, level + 1, carry.point.x))
        moved, info = guided(move_key, level, new, preconditioner(posterior, level))
        return _Climb(
            level=level,
            point=moved,
            leave=_keep(carry.leave, level, new),
            arrive=_keep(carry.arrive, level, moved),
            accept_prob=carry.accept_prob.at[level].set(jnp.where(active, info.accept_prob, 0.0)),
            diverging=carry.diverging | active & info.diverging,
        )

    paths = _keep(_empty(posterior, num_levels), jnp.asarray(last), point)
    path = jax.lax.while_loop(
        lambda carry: carry.level > first, climb, _Climb(jnp.asarray(last), point, paths, paths, zeros, no)
    )
    arrive, leave = path.arrive, path.leave

    # The free particles of a full sweep before the first move; those of others start at the pinned path's.
    def from_noise() -> Point:
        xs = jax.vmap(lambda key: terminal(key, posterior))(jr.split(start_key, num_free))
        return jax.vmap(lambda x: posterior.evaluate(jnp.zeros((), int), x))(xs)

    points = jax.lax.cond(shared < 0, from_noise, lambda: _empty(posterior, num_free))

    def descend(carry: _Descent) -> _Descent:
        """Resample and move at a level, then go to the next."""
        level = carry.level
        resample_key, move_key, reverse_key = jr.split(down_keys[level], 3)
        active, starts = level >= top, (level == top) & jnp.logical_not(full)
        here = at(arrive, level)
        points = jax.tree.map(lambda one, many: jnp.where(starts, one[None], many), here, carry.points)
        log_weights = jnp.where(starts, 0.0, jnp.concatenate([carry.pinned[None], carry.log_weights]))
        weights, lost = elements.each(pinned_weights, log_weights)
        ancestors = elements.each(conditional_systematic, weights, key=resample_key)[1:]
        points = posterior.prepared(level, take_points(elements, _joined(here, points), ancestors))
        mass = preconditioner(posterior, level)
        move = jax.vmap(lambda key, point: guided(key, level, point, mass))
        points, moved = move(jr.split(move_key, num_free), points)
        step_size = tuning.reverse_step_size[level]
        down = jax.vmap(lambda key, point: reverse(key, posterior, level, point, step_size))
        new, info = down(jr.split(reverse_key, num_free), points)
        broken = jnp.any(lost) | jnp.any(info.diverging) | jnp.any(moved.diverging)
        ess = jnp.where(active & ~starts, mean_ess(posterior, log_weights), 0.0)
        return _Descent(
            level=level + 1,
            points=new,
            log_weights=weight_difference(new.log_twist, points.log_twist),
            pinned=weight_difference(arrive.log_twist[level + 1], leave.log_twist[level]),
            particle_ess=carry.particle_ess.at[level].set(ess),
            accept_prob=carry.accept_prob.at[level].set(jnp.where(active, jnp.mean(info.accept_prob), 0.0)),
            guided_accept_prob=carry.guided_accept_prob.at[level].set(
                jnp.where(active, jnp.mean(moved.accept_prob), 0.0)
            ),
            diverging=carry.diverging | active & broken,
        )

    carry = _Descent(
        first, points, points.log_twist, arrive.log_twist[0], zeros, zeros[1:], zeros, path.diverging
    )
    down = jax.lax.while_loop(lambda carry: carry.level < last, descend, carry)

    log_weights = jnp.concatenate([down.pinned[None], down.log_weights])
    weights, lost = elements.each(pinned_weights, log_weights)
    swept = depth > 0
    chosen = jnp.where(swept, elements.each(forced_move, weights, key=choose_key), 0)
    share = num_free / num_particles
    weighted, visited = visits(posterior, depth)
    return take_points(elements, _joined(point, down.points), chosen), SweepInfo(
        particle_ess=down.particle_ess.at[last].set(jnp.where(swept, mean_ess(posterior, log_weights), 0.0)),
        weighted=weighted,
        visited=visited,
        accept_prob=down.accept_prob,
        guided_accept_prob=(share * down.guided_accept_prob + (1 - share) * path.accept_prob)[:-1],
        changed=chosen != 0,
        diverging=down.diverging | swept & jnp.any(lost),
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


def visits(posterior: Posterior, depth: Count) -> tuple[Bool[Array, " levels"], Bool[Array, " segments"]]:
    """Levels at which a sweep of a depth weighs particles, and segments that it goes through."""
    lowest = posterior.last - depth
    levels = jnp.arange(posterior.num_levels)
    return levels > lowest, levels[:-1] >= lowest


def no_sweep(posterior: Posterior) -> SweepInfo:
    """What an iteration without a sweep reports."""
    zeros, no = jnp.zeros(posterior.num_levels, posterior.dtype), jnp.zeros((), bool)
    weighted, visited = visits(posterior, jnp.zeros((), int))
    changed = jnp.zeros(posterior.elements.shape, bool)
    return SweepInfo(zeros, weighted, visited, zeros[1:], zeros[1:], changed, no)


def mean_ess(posterior: Posterior, log_weights: Array) -> Scalar:
    """Effective sample size of the particles' weights, `(particles, *elements)`, mean over elements."""
    return jnp.mean(posterior.elements.each(particle_ess, log_weights))


def weight_difference(new: Array, old: Array) -> Array:
    """Log weights; a particle that is impossible, or whose parent was, has none."""
    return jnp.where((new > -jnp.inf) & (old > -jnp.inf), new - jnp.where(old > -jnp.inf, old, 0.0), -jnp.inf)


def sweep_evaluations(posterior: Posterior, depth: Count, num_particles: int, num_guided_steps: int) -> Count:
    """Score evaluations of a conditional sweep of a depth, each counted for one event of every site.

    The pinned path costs its guided steps and 1 a level; each other particle one reverse transition and its
    guided steps. A full sweep evaluates the free particles at the noisiest level, too.
    """
    num_free, last = num_particles - 1, posterior.last
    per_level = _evaluations_per_level(posterior, num_particles, num_guided_steps)
    return jnp.minimum(depth, last) * per_level + jnp.where(depth > last, num_free, 0)


def full_sweep_evaluations(posterior: Posterior, num_particles: int, num_guided_steps: int) -> int:
    """Those of a full sweep, the most that a sweep may take."""
    per_level = _evaluations_per_level(posterior, num_particles, num_guided_steps)
    return posterior.last * per_level + num_particles - 1


def _evaluations_per_level(posterior: Posterior, num_particles: int, num_guided_steps: int) -> int:
    guided = num_guided_steps * posterior.evaluations_per_mala_step
    per_particle = guided + evaluations_per_reverse(posterior) + posterior.evaluations_to_prepare
    return guided + 1 + (num_particles - 1) * per_particle
