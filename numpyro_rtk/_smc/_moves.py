"""Moves on the level targets: noising, reverse transitions, guided MALA, and HMC at `t_min`."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from numpyro_rtk._custom_types import Count, RandomKey, Scalar
from numpyro_rtk._moves._accept import MAX_ENERGY_DROP, metropolis
from numpyro_rtk._moves._elements import Elements
from numpyro_rtk._moves._langevin import langevin_move, log_langevin_ratio
from numpyro_rtk._moves._leapfrog import leapfrog, PathPoint, unit_velocity
from numpyro_rtk._moves._preconditioner import Preconditioner, preconditioner_of
from numpyro_rtk._reverse._base import first_entry, SegmentTuning
from numpyro_rtk._reverse._markov import AbstractMarkovKernel
from numpyro_rtk._reverse._segment import ReverseTransition
from numpyro_rtk._smc._point import MoveInfo, Point, select_point, SiteLaw, TransitionInfo
from numpyro_rtk._smc._posterior import Posterior
from numpyro_rtk._smc._twist import linearize_twist


MAX_GUIDED_STEP_SIZE = 0.3
"""Largest step of MALA moves whose energy difference is estimated by the trapezoid rule: proposals keep 70 %
of the distance."""

MAX_EXACT_STEP_SIZE = 1.0
"""The same where energies are exact."""


def max_step_size(posterior: Posterior) -> float:
    """Largest adapted step of the guided moves."""
    return MAX_EXACT_STEP_SIZE if posterior.has_energy else MAX_GUIDED_STEP_SIZE


def noise(key: RandomKey, posterior: Posterior, level: Count, x: Array) -> Array:
    """From `level` to the next noisier one, `level - 1`."""
    keys = jr.split(key, len(posterior.sites))
    parts = []
    for key, site, part in zip(keys, posterior.sites, posterior.events(x), strict=True):
        a, v = site.grid.a[level - 1], site.grid.v[level - 1]
        parts.append(a * part + jnp.sqrt(v) * jr.normal(key, part.shape, part.dtype))
    return posterior.flat(parts)


def terminal(key: RandomKey, posterior: Posterior) -> Array:
    """Draws of the terminal Gaussians of all sites, at the noisiest level."""
    keys = jr.split(key, len(posterior.sites))
    parts = [
        jax.vmap(site.terminal.sample)(jr.split(key, site.batch_size))
        for key, site in zip(keys, posterior.sites, strict=True)
    ]
    return posterior.flat(parts)


def reverse(
    key: RandomKey, posterior: Posterior, level: Count, point: Point, step_size: Array
) -> tuple[Point, TransitionInfo]:
    """Reverse transition from `level` to the next cleaner one, `level + 1`, by the reverse kernel.

    `num_steps + 1` evaluations with the MALA family and the trapezoid rule.
    """
    keys = jr.split(key, len(posterior.sites))
    xs, scores = [], []
    elements = posterior.elements
    accept, diverging = jnp.zeros((), posterior.dtype), jnp.zeros((), bool)
    failed = jnp.zeros(elements.shape, bool)
    states = zip(keys, posterior.sites, posterior.events(point.x), posterior.events(point.score), strict=True)
    for i, (key, site, x, score) in enumerate(states):
        segment = site.grid.segment(level)
        tuning = SegmentTuning(step_size[i], site.pilot.curvature[level + 1])

        def one(
            key: RandomKey,
            index: Count,
            x: Array,
            score: Array,
            site: SiteLaw = site,
            segment: Any = segment,
            tuning: Any = tuning,
        ) -> Any:
            target = ReverseTransition(site.score_fn.member(index), x, score, segment)
            return posterior.kernel.run_segment(key, target, first_entry(x), tuning)

        keys, events = jr.split(key, site.batch_size), jnp.arange(site.batch_size)
        result = jax.vmap(one)(keys, events, x, score)
        xs.append(result.x)
        scores.append(result.score)
        accept += jnp.mean(result.accept_prob) / len(posterior.sites)
        diverging |= jnp.any(result.diverging)
        failed |= elements.any_event(i, result.failed)
    x = posterior.flat(xs)
    known = posterior.flat(scores), jnp.zeros(elements.shape, posterior.dtype)
    if not _hands_back_score(posterior):
        known = posterior.scores(level + 1, x)
    new = posterior.with_twist(level + 1, x, *known)
    unusable = failed | ~_network_finite(elements, new)
    new = new._replace(log_twist=jnp.where(unusable, -jnp.inf, new.log_twist))
    return new, TransitionInfo(accept, diverging | jnp.any(unusable))


def _hands_back_score(posterior: Posterior) -> bool:
    """Whether the reverse kernel hands back all that is known of its draw."""
    return isinstance(posterior.kernel, AbstractMarkovKernel) and not posterior.has_energy


def evaluations_per_reverse(posterior: Posterior) -> int:
    """Score evaluations of one reverse transition."""
    return posterior.kernel.evaluations_per_segment + (0 if _hands_back_score(posterior) else 1)


def preconditioner(posterior: Posterior, level: Count) -> Preconditioner:
    """Mass of the gradient moves at a level: curvature of the prior, and of the linearised twist."""
    slope, likelihoods = posterior.denoiser_slope[level], posterior.likelihoods
    linear = linearize_twist(
        likelihoods.terms, likelihoods.center, posterior.error(level), posterior.blocks, posterior.elements
    )
    # Where the likelihood is impossible at the centre, moves know the curvature of the prior alone.
    elements = posterior.elements
    finite = elements.spread(elements.all_finite(linear.diagonal, *linear.jacobian))
    linear = jax.tree.map(lambda part: jnp.where(jnp.broadcast_to(finite, part.shape), part, 0.0), linear)
    scale = 1 / jnp.sqrt(posterior.curvature[level] + slope**2 * linear.diagonal)
    return preconditioner_of(scale, linear.jacobian * (slope * scale)[None], elements)


def mala(
    key: RandomKey,
    posterior: Posterior,
    level: Count,
    point: Point,
    mass: Preconditioner,
    step_size: Scalar,
) -> tuple[Point, MoveInfo]:
    """One MALA step on `pi_t`: reversible for it, up to the error of Simpson's rule, or of the trapezoid rule
    where the posterior takes no midpoints.

    `evaluations_per_mala_step` evaluations.
    """
    move_key, accept_key = jr.split(key)
    force = mass.transpose(point.score + point.twist_score)
    move = langevin_move(move_key, force, step_size)
    proposal = posterior.evaluate(level, point.x + mass.apply(move))
    new_force = mass.transpose(proposal.score + proposal.twist_score)
    if posterior.uses_midpoints:
        prior_difference = posterior.log_prior_difference_at_midpoint(level, point, proposal)
    else:
        prior_difference = posterior.log_prior_difference(point, proposal)
    log_ratio = prior_difference + proposal.log_twist - point.log_twist
    log_ratio += log_langevin_ratio(move, force, new_force, step_size, posterior.elements.dot)
    accept, accept_prob, diverging = metropolis(
        accept_key,
        log_ratio,
        _network_finite(posterior.elements, proposal),
        possible=_possible(point, proposal),
    )
    no, count = jnp.zeros_like(accept), jnp.asarray(posterior.evaluations_per_mala_step)
    info = MoveInfo(accept_prob, accept_prob, diverging, no, count)
    return select_point(posterior.elements, accept, proposal, point), info


def _network_finite(elements: Elements, point: Point) -> Array:
    return elements.all_finite(point.x, point.score) & jnp.isfinite(point.energy)


def _possible(here: Point, there: Point) -> Array:
    """Whether a proposal has a likelihood to speak of; where it has none its gradient may overflow."""
    return there.log_twist > here.log_twist - MAX_ENERGY_DROP


def mala_steps(
    key: RandomKey,
    posterior: Posterior,
    level: Count,
    point: Point,
    mass: Preconditioner,
    step_size: Scalar,
    num_steps: int,
) -> tuple[Point, MoveInfo]:
    """`num_steps` MALA steps; reversible as one move."""
    if num_steps == 0:
        return point, no_move(posterior)

    def body(point: Point, key: RandomKey) -> tuple[Point, MoveInfo]:
        return mala(key, posterior, level, point, mass, step_size)

    return _together(jax.lax.scan(body, point, jr.split(key, num_steps)))


def no_move(posterior: Posterior) -> MoveInfo:
    """What a move of no steps reports."""
    one, no = jnp.ones((), posterior.dtype), jnp.zeros((), bool)
    return MoveInfo(one, one, no, no, jnp.zeros((), int))


def _together(result: tuple[Point, MoveInfo]) -> tuple[Point, MoveInfo]:
    """Several moves of all elements, reported as one."""
    point, info = result
    resolved = ~jnp.any(info.unresolved, axis=0)
    return point, MoveInfo(
        jnp.mean(info.accept_prob),
        jnp.mean(jnp.where(resolved, jnp.mean(info.tuning_prob, axis=0), 0.0)),
        jnp.any(info.diverging),
        jnp.any(info.unresolved),
        jnp.sum(info.num_evaluations),
    )


def hmc(
    key: RandomKey,
    posterior: Posterior,
    point: Point,
    mass: Preconditioner,
    step_size: Scalar,
    num_steps: int,
) -> tuple[Point, MoveInfo]:
    """One HMC trajectory on `p_0 L` (the last level) of `num_steps` leapfrog steps, one evaluation each.

    The prior's share of the energy error is the line integral of the score along the path, unless its energy
    is known (see `numpyro_rtk._moves._leapfrog`). In coordinates `u` with `x = point.x + B u` and `B` the
    preconditioner, the mass matrix is the identity.
    """
    momentum_key, jitter_key, accept_key = jr.split(key, 3)
    momentum = {"u": jr.normal(momentum_key, point.x.shape, posterior.dtype)}
    # Resonances: periodic directions must not come back to where they were.
    epsilon = step_size * jr.uniform(jitter_key, (), posterior.dtype, 0.6, 1.2)

    def on_path(position: dict[str, Array], new: Point) -> PathPoint:
        if posterior.has_energy:
            gradient = -mass.transpose(new.score + new.twist_score)
            return PathPoint(position, {}, new.energy - new.log_twist, {"u": gradient}, new)
        score = {"u": mass.transpose(new.score)}
        return PathPoint(position, score, -new.log_twist, {"u": -mass.transpose(new.twist_score)}, new)

    def evaluate(position: dict[str, Array]) -> PathPoint:
        return on_path(position, posterior.at_data(point.x + mass.apply(position["u"])))

    start = on_path({"u": jnp.zeros_like(point.x)}, point)
    inner = posterior.elements.dot
    end = leapfrog(evaluate, unit_velocity, start, momentum, epsilon, num_steps, inner=inner)
    new: Point = end.point.extra
    possible, finite = _possible(point, new), _network_finite(posterior.elements, new)
    accept, accept_prob, diverging = metropolis(
        accept_key, -end.energy_error, finite, possible=possible, resolved=~end.unresolved
    )
    diverging |= end.diverging & possible
    tuning_prob = end.tuning_prob(accept_prob, finite & (new.log_twist == -jnp.inf))
    info = MoveInfo(accept_prob, tuning_prob, diverging, end.unresolved, end.num_evaluations)
    return select_point(posterior.elements, accept, new, point), info


def hmc_trajectories(
    key: RandomKey,
    posterior: Posterior,
    point: Point,
    mass: Preconditioner,
    step_size: Scalar,
    num_steps: int,
    num_trajectories: int,
) -> tuple[Point, MoveInfo]:
    """Several trajectories, each with its own accept step."""

    def body(point: Point, key: RandomKey) -> tuple[Point, MoveInfo]:
        return hmc(key, posterior, point, mass, step_size, num_steps)

    return _together(jax.lax.scan(body, point, jr.split(key, num_trajectories)))
