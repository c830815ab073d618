"""Unconditional SMC through the noise levels: a start, and an estimate of the evidence."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from numpyro_rtk._custom_types import Count, Flag, RandomKey, Scalar
from numpyro_rtk._smc._conditional import _at, _difference, max_step_size, SweepTuning
from numpyro_rtk._smc._posterior import Point, Posterior
from numpyro_rtk._smc._resampling import (
    effective_sample_size,
    normalized_weights,
    systematic,
)


MIN_LOG_BETA = -20.0
"""Least log power of a tempered twist."""


class StartInfo(NamedTuple):
    """What an unconditional sweep reports."""

    log_evidence: Scalar
    """Unbiased on the natural scale if nothing was adapted along the way."""
    effective_sample_size: Float[Array, " levels"]
    guided_step_size: Float[Array, " segments"]
    log_beta: Float[Array, " levels"]


def unconditional_sweep(
    key: RandomKey,
    posterior: Posterior,
    tuning: SweepTuning,
    reference: Array,
    num_particles: int,
    num_guided_steps: int,
    target_accept_prob: float,
    adapt: Flag,
) -> tuple[Point, StartInfo]:
    """SMC from terminal noise to `p_0 L` through the levels, with guided moves: a start, and an estimate of
    the evidence.

    With `adapt` the guided step sizes follow their acceptance, and the powers of tempered twists keep half of
    the effective sample size where they can; then the estimate of the evidence is not exactly unbiased.
    `num_particles * (1 + segments * (guided + evaluations_per_reverse))` evaluations, with `guided` for
    `num_guided_steps * evaluations_per_guided_step`.
    """
    last, max_step = posterior.num_levels - 1, max_step_size(posterior)
    noise_key, scan_key, resample_key, choose_key = jr.split(key, 4)

    def weigh(level: Count, points: Point, base: Array, log_beta: Array) -> tuple[Point, Array, Array]:
        """Powers and log weights at a level."""
        given = log_beta[level]
        lowest = jnp.where(level > 0, log_beta[level - 1], MIN_LOG_BETA)
        power = jnp.where(adapt & (level < last), _choose_power(points, base, given, lowest), given)
        other = jnp.nan_to_num(points.other, nan=-1e30, neginf=-1e30)
        points = points._replace(log_twist=points.log_twist + (jnp.exp(power) - jnp.exp(given)) * other)
        return points, _difference(points.log_twist, base), log_beta.at[level].set(power)

    def body(carry: Any, inputs: Any) -> Any:
        points, base, log_beta, step_before = carry
        key, level, reverse_step_size, step_given = inputs
        resample_key, move_key, reverse_key = jr.split(key, 3)
        points, log_weights, log_beta = weigh(level, points, base, log_beta)
        ess, mean = effective_sample_size(log_weights), jax.nn.logsumexp(log_weights) - jnp.log(num_particles)
        points = _at(points, systematic(resample_key, normalized_weights(log_weights)))
        now = posterior_with(posterior, log_beta)
        # With another power the twist has another gradient.
        points = jax.vmap(lambda p: now.with_twist(level, p.x, p.score, p.energy))(points)
        points = now.prepared(level, points)
        preconditioner = now.preconditioner(level, reference)

        def move(carry: Any, inputs: Any) -> Any:
            points, log_step = carry
            key, i = inputs
            one = jax.vmap(lambda k, p: now.mala(k, level, p, preconditioner, jnp.exp(log_step), guided=True))
            points, info = one(jr.split(key, num_particles), points)
            change = 1.5 / jnp.sqrt(i + 1.0) * (jnp.mean(info.accept_prob) - target_accept_prob)
            return (
                points,
                jnp.where(adapt, jnp.minimum(log_step + change, jnp.log(max_step)), log_step),
            ), None

        keys = jr.split(move_key, num_guided_steps)
        log_step = jnp.log(jnp.where(adapt, step_before, step_given))
        inputs = (keys, jnp.arange(num_guided_steps, dtype=posterior.dtype))
        (points, log_step), _ = jax.lax.scan(move, (points, log_step), inputs)
        reverse = jax.vmap(lambda key, point: now.reverse(key, level, point, reverse_step_size))
        new, _ = reverse(jr.split(reverse_key, num_particles), points)
        return (new, points.log_twist, log_beta, jnp.exp(log_step)), (mean, ess, jnp.exp(log_step))

    xs = jax.vmap(posterior.terminal)(jr.split(noise_key, num_particles))
    points = jax.vmap(lambda x: posterior.evaluate(jnp.zeros((), int), x))(xs)
    carry = (
        points,
        jnp.zeros(num_particles, posterior.dtype),
        posterior.log_beta,
        tuning.guided_step_size[0],
    )
    inputs = (jr.split(scan_key, last), jnp.arange(last), tuning.reverse_step_size, tuning.guided_step_size)
    (points, base, log_beta, _), (means, all_ess, step_sizes) = jax.lax.scan(body, carry, inputs)
    log_weights = _difference(points.log_twist, base)
    ancestors = systematic(resample_key, normalized_weights(log_weights))
    # Any particle is a draw once resampled, but their order is that of their ancestors.
    chosen = ancestors[jr.randint(choose_key, (), 0, num_particles)]
    return _at(points, chosen), StartInfo(
        log_evidence=jnp.sum(means) + jax.nn.logsumexp(log_weights) - jnp.log(num_particles),
        effective_sample_size=jnp.append(all_ess, effective_sample_size(log_weights)),
        guided_step_size=step_sizes,
        log_beta=log_beta,
    )


def choose_sweep(
    key: RandomKey,
    xs: Float[Array, "sweeps dim"],
    log_twists: Float[Array, " sweeps"],
    log_evidence: Float[Array, " sweeps"],
) -> Count:
    """Index of one of several unconditional sweeps, in proportion to their evidence.

    Their draws weighted so are draws of an importance sampler on the space of all their particles (Andrieu et
    al. 2010, section 4.2). A draw that is impossible or not finite is left out, unless all are.
    """
    usable = (log_twists > -jnp.inf) & jnp.all(jnp.isfinite(xs), axis=1)
    finite = jnp.nan_to_num(log_evidence, nan=-1e30, neginf=-1e30)
    return jr.categorical(key, jnp.where(usable, finite, -jnp.inf))


def posterior_with(posterior: Posterior, log_beta: Array) -> Posterior:
    """The same with other powers."""
    return Posterior(posterior.sites, posterior.terms, posterior.inner, log_beta, jacobian=posterior.jacobian)


def _choose_power(points: Point, base: Array, log_beta: Scalar, lowest: Scalar) -> Scalar:
    """Largest log power of at most 0 that keeps half the effective sample size; the level above's if none
    does.
    """
    other = jnp.nan_to_num(points.other, nan=-jnp.inf, neginf=-1e30)
    rest = points.log_twist - jnp.exp(log_beta) * other

    def ess(candidate: Scalar) -> Scalar:
        return effective_sample_size(_difference(rest + jnp.exp(candidate) * other, base))

    def body(bounds: tuple[Scalar, Scalar], _: None) -> tuple[tuple[Scalar, Scalar], None]:
        low, high = bounds
        middle = 0.5 * (low + high)
        enough = ess(middle) >= 0.5 * base.shape[0]
        return (jnp.where(enough, middle, low), jnp.where(enough, high, middle)), None

    zero = jnp.zeros_like(lowest)
    (low, _), _ = jax.lax.scan(body, (lowest, zero), None, length=20)
    return jnp.where(ess(zero) >= 0.5 * base.shape[0], zero, low)
