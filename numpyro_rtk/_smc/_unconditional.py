"""Unconditional SMC through the noise levels: a start, and an estimate of the evidence."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float

from numpyro_rtk._custom_types import Count, Flag, RandomKey, Scalar
from numpyro_rtk._smc._conditional import mean_ess, SweepTuning, weight_difference
from numpyro_rtk._smc._moves import (
    evaluations_per_reverse,
    mala,
    max_step_size,
    preconditioner,
    reverse,
    terminal,
)
from numpyro_rtk._smc._point import Point, take_points
from numpyro_rtk._smc._posterior import Posterior
from numpyro_rtk._smc._resampling import normalized_weights, systematic


MIN_LOG_BETA = -20.0
"""Least log power of a tempered twist."""


class StartInfo(NamedTuple):
    """What an unconditional sweep reports."""

    log_evidence: Array
    """By element; unbiased on the natural scale if nothing was adapted along the way."""
    particle_ess: Float[Array, " levels"]
    """Effective sample size of the particles at each level."""
    guided_step_size: Float[Array, " segments"]
    """Step sizes of the guided moves, adapted or as given."""
    log_beta: Float[Array, " levels"]
    """Log powers of what twists temper, adapted or as given."""


class _Particles(NamedTuple):
    """What is carried from level to level."""

    points: Point
    base: Array
    """Log twists of the parents."""
    log_beta: Float[Array, " levels"]
    log_step_size: Scalar
    """Of the guided moves at the level before."""


def unconditional_sweep(
    key: RandomKey,
    posterior: Posterior,
    tuning: SweepTuning,
    num_particles: int,
    num_guided_steps: int,
    target_accept_prob: float,
    adapt: Flag,
) -> tuple[Point, StartInfo]:
    """SMC from terminal noise to `p_0 L` through the levels, with guided moves: a start, and an estimate of
    the evidence.

    With `adapt` the guided step sizes follow their acceptance, and the powers of tempered twists keep half of
    the effective sample size where they can; then the estimate of the evidence is not exactly unbiased.
    `unconditional_evaluations` score evaluations.
    """
    last, log_max_step = posterior.last, jnp.log(max_step_size(posterior))
    elements = posterior.elements
    noise_key, scan_key, resample_key, choose_key = jr.split(key, 4)

    def weigh(level: Count, points: Point, base: Array, log_beta: Array) -> tuple[Point, Array, Array]:
        """Powers and log weights at a level."""
        given = log_beta[level]
        lowest = jnp.where(level > 0, log_beta[level - 1], MIN_LOG_BETA)
        power = jnp.where(
            adapt & (level < last), _choose_power(posterior, points, base, given, lowest), given
        )
        change = (jnp.exp(power) - jnp.exp(given)) * _finite(points.other)
        points = points._replace(log_twist=points.log_twist + change)
        return points, weight_difference(points.log_twist, base), log_beta.at[level].set(power)

    def body(carry: _Particles, inputs: tuple[RandomKey, Count, Array, Array]) -> Any:
        key, level, reverse_step_size, given_step_size = inputs
        resample_key, move_key, reverse_key = jr.split(key, 3)
        points, log_weights, log_beta = weigh(level, carry.points, carry.base, carry.log_beta)
        ancestors = elements.each(
            systematic, elements.each(normalized_weights, log_weights), key=resample_key
        )
        points = take_points(elements, points, ancestors)
        now = posterior.with_powers(log_beta)
        # With another power the twist has another gradient.
        points = jax.vmap(lambda p: now.with_twist(level, p.x, p.score, p.energy))(points)
        points = now.prepared(level, points)
        mass = preconditioner(now, level)

        def move(carry: tuple[Point, Scalar], inputs: tuple[RandomKey, Scalar]) -> Any:
            (points, log_step), (key, i) = carry, inputs
            one = jax.vmap(lambda k, p: mala(k, now, level, p, mass, jnp.exp(log_step)))
            points, info = one(jr.split(key, num_particles), points)
            change = 1.5 / jnp.sqrt(i + 1.0) * (jnp.mean(info.accept_prob) - target_accept_prob)
            return (points, jnp.where(adapt, jnp.minimum(log_step + change, log_max_step), log_step)), None

        log_step = jnp.where(adapt, carry.log_step_size, jnp.log(given_step_size))
        steps = (jr.split(move_key, num_guided_steps), jnp.arange(num_guided_steps, dtype=posterior.dtype))
        (points, log_step), _ = jax.lax.scan(move, (points, log_step), steps)
        down = jax.vmap(lambda key, point: reverse(key, now, level, point, reverse_step_size))
        new, _ = down(jr.split(reverse_key, num_particles), points)
        mean = jax.nn.logsumexp(log_weights, axis=0) - jnp.log(num_particles)
        reported = (mean, mean_ess(posterior, log_weights), jnp.exp(log_step))
        return _Particles(new, points.log_twist, log_beta, log_step), reported

    xs = jax.vmap(lambda key: terminal(key, posterior))(jr.split(noise_key, num_particles))
    points = jax.vmap(lambda x: posterior.evaluate(jnp.zeros((), int), x))(xs)
    start = _Particles(
        points,
        jnp.zeros((num_particles, *elements.shape), posterior.dtype),
        posterior.log_beta,
        jnp.log(tuning.guided_step_size[0]),
    )
    inputs = (jr.split(scan_key, last), jnp.arange(last), tuning.reverse_step_size, tuning.guided_step_size)
    end, (means, all_ess, step_sizes) = jax.lax.scan(body, start, inputs)
    log_weights = weight_difference(end.points.log_twist, end.base)
    ancestors = elements.each(systematic, elements.each(normalized_weights, log_weights), key=resample_key)
    # Any particle is a draw once resampled, but their order is that of their ancestors.
    slots = jr.randint(choose_key, elements.shape, 0, num_particles)
    chosen = elements.each(lambda ancestors, slot: ancestors[slot], ancestors, slots)
    return take_points(elements, end.points, chosen), StartInfo(
        log_evidence=jnp.sum(means, axis=0) + jax.nn.logsumexp(log_weights, axis=0) - jnp.log(num_particles),
        particle_ess=jnp.append(all_ess, mean_ess(posterior, log_weights)),
        guided_step_size=step_sizes,
        log_beta=end.log_beta,
    )


def unconditional_evaluations(posterior: Posterior, num_particles: int, num_guided_steps: int) -> int:
    """Score evaluations of an unconditional sweep, each counted for one event of every site."""
    per_level = num_guided_steps * posterior.evaluations_per_mala_step
    per_level += evaluations_per_reverse(posterior) + posterior.evaluations_to_prepare
    return num_particles * (1 + posterior.last * per_level)


def _finite(other: Array) -> Array:
    """Log probabilities as numbers that powers may multiply."""
    return jnp.nan_to_num(other, nan=-1e30, neginf=-1e30)


def choose_sweep(
    key: RandomKey, finite: Bool[Array, " sweeps"], log_twists: Array, log_evidence: Array
) -> Count:
    """Index of one of several unconditional sweeps of an element, in proportion to their evidence.

    Their draws weighted so are draws of an importance sampler on the space of all their particles (Andrieu et
    al. 2010, section 4.2). A draw that is impossible or not finite is left out, unless all are.
    """
    usable = (log_twists > -jnp.inf) & finite
    evidence = jnp.nan_to_num(log_evidence, nan=-1e30, neginf=-1e30)
    return jr.categorical(key, jnp.where(usable, evidence, -jnp.inf))


def _choose_power(
    posterior: Posterior, points: Point, base: Array, log_beta: Scalar, lowest: Scalar
) -> Scalar:
    """Largest log power of at most 0 that keeps half the effective sample size; the level above's if none
    does.
    """
    other = jnp.nan_to_num(points.other, nan=-jnp.inf, neginf=-1e30)
    rest = points.log_twist - jnp.exp(log_beta) * other

    def ess(candidate: Scalar) -> Scalar:
        return mean_ess(posterior, weight_difference(rest + jnp.exp(candidate) * other, base))

    def body(bounds: tuple[Scalar, Scalar], _: None) -> tuple[tuple[Scalar, Scalar], None]:
        low, high = bounds
        middle = 0.5 * (low + high)
        enough = ess(middle) >= 0.5 * base.shape[0]
        return (jnp.where(enough, middle, low), jnp.where(enough, high, middle)), None

    zero = jnp.zeros_like(lowest)
    (low, _), _ = jax.lax.scan(body, (lowest, zero), None, length=20)
    return jnp.where(ess(zero) >= 0.5 * base.shape[0], zero, low)
