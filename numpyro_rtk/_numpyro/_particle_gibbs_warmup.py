"""What `RTKParticleGibbs` learns in warmup, and what it warns of when warmup ends."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.infer.hmc_util import dual_averaging

from numpyro_rtk._smc._conditional import max_step_size, SweepInfo
from numpyro_rtk._smc._local import AbstractLocalMove
from numpyro_rtk._smc._posterior import Posterior


MIN_STEP_SIZE, MAX_LOCAL_STEP_SIZE = 1e-6, 1.5
COLLAPSED = 2.0
"""An effective sample size below this is a collapse."""


class ParticleGibbsAdaptState(NamedTuple):
    """What warmup learns; frozen afterwards."""

    step_size: Float[Array, "segments sites"]
    """Step sizes of the inner kernel."""
    guided_step_size: Float[Array, " segments"]
    """Step sizes of the guided moves, at the start of each segment."""
    local_step_size: Float[Array, ""]
    """Step size of the local move."""
    log_beta: Float[Array, " levels"]
    """Log powers of what the twist tempers."""
    depth_prob: Float[Array, " depths"]
    """Probabilities of the refresh depths."""
    depth_jump: Float[Array, " depths"]
    """Mean squared jump of the sweeps of each depth, in units of the prior's variance."""
    depth_count: Float[Array, " depths"]
    """Sweeps of each depth so far."""
    num_collapsed: Float[Array, " levels"]
    """Sweeps in which the effective sample size of a level was below 2."""
    num_visits: Float[Array, " levels"]
    """Sweeps that visited a level."""
    averaging: Any
    """States of the dual averaging of the log step sizes."""
    num_warmup: Array
    """Length of the warmup."""


def update_adaptation(
    state: ParticleGibbsAdaptState,
    posterior: Posterior,
    iteration: Array,
    info: SweepInfo,
    local_accept: Array,
    choice: Array,
    swept: Array,
    jump: Array,
    *,
    target_accept_prob: float,
    num_particles: int,
    local_move: AbstractLocalMove | None,
) -> ParticleGibbsAdaptState:
    """One warmup update; the identity once warmup is over."""
    warming, is_last = iteration < state.num_warmup, iteration + 1 == state.num_warmup
    _, update = dual_averaging()
    dtype = state.depth_prob.dtype

    def average(one: Any, accept: Array, bounds: tuple[Any, Any]) -> tuple[Any, Array]:
        usable = warming & ~jnp.isnan(accept)
        new = update(target_accept_prob - jnp.where(usable, accept, 0.0), one)
        new = jax.tree.map(lambda x, y: jnp.where(usable, x, y), new, one)
        return new, jnp.exp(jnp.clip(jnp.where(is_last, new[1], new[0]), *map(jnp.log, bounds)))

    largest = max_step_size(posterior)
    inner_bounds = (MIN_STEP_SIZE, getattr(posterior.inner, "max_step_size", 1e6))
    guided_averaging, guided = jax.vmap(lambda s, p: average(s, p, (MIN_STEP_SIZE, largest)))(
        state.averaging[1], info.guided_accept_prob
    )
    local_averaging, local = average(state.averaging[2], local_accept, (MIN_STEP_SIZE, MAX_LOCAL_STEP_SIZE))
    inner_averaging, inner = state.averaging[0], state.step_size
    if posterior.inner.adapts_step_size and getattr(posterior.inner, "step_size", None) is None:
        by_site = jax.vmap(lambda s, p: average(s, p, inner_bounds), in_axes=(0, None))
        inner_averaging, inner = jax.vmap(by_site)(state.averaging[0], info.accept_prob)
    local = given_step_size(local_move, local)

    # Powers: levels that lose less of the effective sample size than the next one take more of the
    # likelihood.
    visited = ~jnp.isnan(info.effective_sample_size)
    share = jnp.where(visited, info.effective_sample_size / num_particles, 0.0)
    gain = 1.0 / (1.0 + iteration.astype(dtype)) ** 0.6
    change = jnp.where(visited[:-1] & visited[1:], gain * (share[:-1] - share[1:]), 0.0)
    log_beta = jnp.append(jnp.minimum(state.log_beta[:-1] + change, 0.0), 0.0)

    # Depths: by their squared jump, and a tenth of the sweeps spread over all, as rare moves between modes
    # may be deep.
    count = state.depth_count.at[choice].add(jnp.where(swept, 1.0, 0.0))
    change = jnp.where(swept, (jump - state.depth_jump[choice]) / jnp.maximum(count[choice], 1.0), 0.0)
    mean_jump = state.depth_jump.at[choice].add(change)
    score = jnp.where(count > 0, mean_jump, 0.0)
    total, uniform = jnp.sum(score), 1 / count.shape[0]
    prob = jnp.where(total > 0, 0.9 * score / jnp.where(total > 0, total, 1.0) + 0.1 * uniform, uniform)

    new = ParticleGibbsAdaptState(
        step_size=inner,
        guided_step_size=guided,
        local_step_size=local,
        log_beta=log_beta,
        depth_prob=jnp.where(is_last, prob, state.depth_prob),
        depth_jump=mean_jump,
        depth_count=count,
        num_collapsed=state.num_collapsed + (visited & (info.effective_sample_size < COLLAPSED)),
        num_visits=state.num_visits + visited,
        averaging=(inner_averaging, guided_averaging, local_averaging),
        num_warmup=state.num_warmup,
    )
    return jax.tree.map(lambda x, y: jnp.where(warming, x, y).astype(y.dtype), new, state)


def given_step_size(local: AbstractLocalMove | None, step_size: Array) -> Array:
    given = None if local is None else local.step_size
    return step_size if given is None else jnp.asarray(given, step_size.dtype)


def warn_at_end(
    state: ParticleGibbsAdaptState, times: Array, iteration: Array, num_warmup: Array, num_particles: int
) -> None:
    """Warn of collapsed levels when warmup ends; called once per program, fires once per run and chain."""
    num_warmup = jnp.max(num_warmup)

    def warn(is_end: Any, collapsed: Any, visits: Any, times: Any) -> None:
        # Where chains are mapped from outside, the `cond` is a select, and this is called in every iteration.
        if np.all(is_end):
            times = np.asarray(times).reshape(-1, np.shape(collapsed)[-1])[0]
            warn_collapsed(np.asarray(collapsed), np.asarray(visits), times, num_particles)

    if num_particles > COLLAPSED:
        is_end = iteration == num_warmup
        jax.lax.cond(
            is_end,
            lambda: jax.debug.callback(warn, is_end, state.num_collapsed, state.num_visits, times),
            lambda: None,
        )


def warn_collapsed(collapsed: np.ndarray, visits: np.ndarray, times: np.ndarray, num_particles: int) -> None:
    shares = collapsed.reshape(-1, times.size).sum(0) / np.maximum(visits.reshape(-1, times.size).sum(0), 1)
    bad = np.flatnonzero(shares > 0.5)
    if bad.size:
        named = ", ".join(f"level {i} (t={times[i]:.3g}, {shares[i]:.0%})" for i in bad[:6])
        more = f" and {bad.size - 6} more" if bad.size > 6 else ""
        warnings.warn(
            f"Particle weights collapsed: the effective sample size was below 2 of {num_particles} in most "
            f"warmup sweeps at "
            f"{named}{more}. Sweeps through these levels rarely move the draw. Use more `segments` or "
            f"`num_particles`, or rely "
            "on local moves (`local=LocalHMC(...)`) where the data are informative in every coordinate.",
            UserWarning,
            stacklevel=2,
        )
