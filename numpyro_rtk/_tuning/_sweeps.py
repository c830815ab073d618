"""What the warmup of particle Gibbs learns: step sizes, powers of tempered twists, how deep and how often to
sweep.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_rtk._custom_types import Count, Flag, Scalar
from numpyro_rtk._moves._accept import ENERGY_ACCEPT_PROB
from numpyro_rtk._smc._conditional import SweepInfo, SweepTuning
from numpyro_rtk._smc._local import AbstractLocalMove
from numpyro_rtk._smc._moves import max_step_size
from numpyro_rtk._smc._point import MoveInfo
from numpyro_rtk._smc._posterior import Floor, Posterior
from numpyro_rtk._smc._unconditional import StartInfo
from numpyro_rtk._tuning._step_size import StepSizeState, StepSizeTuner


MIN_STEP_SIZE, MAX_LOCAL_STEP_SIZE = 1e-6, 1.5

COLLAPSED = 2.0
"""A particle effective sample size below this is a collapse."""

UNIFORM_DEPTHS = 0.1
"""Share of the sweeps that is spread over all depths, as rare moves between modes may be deep."""


WORTH_SWEEPING = 0.05
"""Sweeps of which this share changes the draw are made in every iteration; rarer ones in proportion."""


class ParticleGibbsAdaptState(NamedTuple):
    """What warmup learns; frozen afterwards."""

    step_size: Float[Array, "segments sites"]
    """Step sizes of the reverse kernel."""
    guided_step_size: Float[Array, " segments"]
    """Step sizes of the guided moves, at the start of each segment."""
    local_step_size: Float[Array, ""]
    """Step size of the local move."""
    log_beta: Float[Array, " levels"]
    """Log powers of what the twist tempers."""
    floor: Floor
    """What stands for the likelihood where a denoised point is impossible: learnt at the start."""
    depth_prob: Float[Array, " depths"]
    """Probabilities of the refresh depths."""
    depth_jump: Float[Array, " depths"]
    """Mean squared jump of the sweeps of each depth, in units of the prior's variance."""
    depth_count: Float[Array, " depths"]
    """Sweeps of each depth so far."""
    sweep_prob: Float[Array, ""]
    """Probability that an iteration has a sweep."""
    num_changed: Float[Array, ""]
    """Sweeps that changed the draw so far: of several elements, the mean."""
    num_collapsed: Float[Array, " levels"]
    """Sweeps in which the particle effective sample size of a level was below 2."""
    num_visits: Float[Array, " levels"]
    """Sweeps that visited a level."""
    averaging: tuple[StepSizeState, StepSizeState, StepSizeState]
    """States of the adaptation of the three step sizes."""
    num_warmup: Count
    """Length of the warmup."""

    @property
    def tuning(self) -> SweepTuning:
        """What a sweep takes."""
        return SweepTuning(self.step_size, self.guided_step_size)


class Iteration(NamedTuple):
    """What one iteration did, as far as warmup learns from it."""

    index: Count
    """Iterations before it."""
    sweep: SweepInfo
    """What its sweep reports."""
    local: MoveInfo
    """What its local moves report."""
    choice: Count
    """Index of the depth that was drawn."""
    swept: Flag
    """Whether there was a sweep."""
    jump: Scalar
    """Mean squared jump of the sweep, in units of the prior's variance."""


class SweepTuner(NamedTuple):
    """What the adaptation depends on."""

    posterior: Posterior
    local: AbstractLocalMove | None
    target_accept_prob: float
    """Of the reverse kernel and of guided moves."""
    num_particles: int
    step_sizes: StepSizeTuner
    sweep_prob: float | None
    """Probability that an iteration has a sweep, where it is given."""
    least_sweep_prob: float
    """Where it is not, the least: at which sweeps take a third of all evaluations."""

    def init(
        self, tuning: SweepTuning, log_beta: Array, num_depths: int, num_warmup: int
    ) -> ParticleGibbsAdaptState:
        """Nothing learnt but what the start gives."""
        dtype, levels = self.posterior.dtype, jnp.zeros(self.posterior.num_levels, self.posterior.dtype)
        depths = jnp.zeros(num_depths, dtype)
        local = jnp.asarray(0.3 * self.posterior.element_dim ** (-1 / 4), dtype)
        return ParticleGibbsAdaptState(
            step_size=tuning.reverse_step_size,
            guided_step_size=tuning.guided_step_size,
            local_step_size=self._local(local),
            log_beta=log_beta,
            floor=self.posterior.likelihoods.floor,
            depth_prob=depths + 1 / num_depths,
            depth_jump=depths,
            depth_count=depths,
            sweep_prob=jnp.asarray(1.0 if self.sweep_prob is None else self.sweep_prob, dtype),
            num_changed=jnp.zeros((), dtype),
            num_collapsed=levels,
            num_visits=levels,
            averaging=(
                self.step_sizes.init(tuning.reverse_step_size),
                self.step_sizes.init(tuning.guided_step_size),
                self.step_sizes.init(local),
            ),
            num_warmup=jnp.asarray(num_warmup, int),
        )

    def restart(self, state: ParticleGibbsAdaptState, info: StartInfo) -> ParticleGibbsAdaptState:
        """The state after an unconditional sweep that adapted the guided moves and the powers."""
        reverse, _, local = state.averaging
        guided = self.step_sizes.init(info.guided_step_size)
        return state._replace(
            guided_step_size=info.guided_step_size,
            log_beta=info.log_beta,
            averaging=(reverse, guided, local),
        )

    def update(self, state: ParticleGibbsAdaptState, seen: Iteration) -> ParticleGibbsAdaptState:
        """One warmup update; the identity once warmup is over."""
        warming, is_last = seen.index < state.num_warmup, seen.index + 1 == state.num_warmup
        new = self._update(state, seen, is_last)
        return jax.tree.map(lambda x, y: jnp.where(warming, x, y).astype(y.dtype), new, state)

    def _update(
        self, state: ParticleGibbsAdaptState, seen: Iteration, is_last: Flag
    ) -> ParticleGibbsAdaptState:
        info, tune = seen.sweep, self.step_sizes
        reverse, guided, local = state.averaging
        kernel, step_size = self.posterior.kernel, state.step_size
        if kernel.adapts_step_size and kernel.given_step_size is None:
            accept, visited = info.accept_prob[:, None], info.visited[:, None]
            reverse = tune.update(reverse, accept, self.target_accept_prob, visited)
            step_size = tune.step_size(reverse, MIN_STEP_SIZE, kernel.largest_step_size, freeze=is_last)
        guided = tune.update(guided, info.guided_accept_prob, self.target_accept_prob, info.visited)
        local = tune.update(local, seen.local.tuning_prob, self.local_target, jnp.ones((), bool))
        count = state.depth_count.at[seen.choice].add(jnp.where(seen.swept, 1.0, 0.0))
        change = (seen.jump - state.depth_jump[seen.choice]) / jnp.maximum(count[seen.choice], 1.0)
        mean_jump = state.depth_jump.at[seen.choice].add(jnp.where(seen.swept, change, 0.0))
        num_changed = state.num_changed + jnp.where(seen.swept, jnp.mean(info.changed), 0.0)
        collapsed = info.weighted & (info.particle_ess < COLLAPSED)
        return ParticleGibbsAdaptState(
            step_size=step_size,
            guided_step_size=tune.step_size(
                guided, MIN_STEP_SIZE, max_step_size(self.posterior), freeze=is_last
            ),
            local_step_size=self._local(
                tune.step_size(local, MIN_STEP_SIZE, MAX_LOCAL_STEP_SIZE, freeze=is_last)
            ),
            log_beta=self._powers(state.log_beta, seen),
            floor=state.floor,
            depth_prob=jnp.where(is_last, _depth_prob(mean_jump, count), state.depth_prob),
            depth_jump=mean_jump,
            depth_count=count,
            sweep_prob=self._sweep_prob(state.sweep_prob, num_changed, jnp.sum(count)),
            num_changed=num_changed,
            num_collapsed=state.num_collapsed + collapsed,
            num_visits=state.num_visits + info.weighted,
            averaging=(reverse, guided, local),
            num_warmup=state.num_warmup,
        )

    @property
    def local_target(self) -> float:
        """Acceptance that local moves aim at: where their energy error is known well enough."""
        if self.local is None or self.posterior.has_energy:
            return ENERGY_ACCEPT_PROB
        return self.local.line_integral_accept_prob

    def _sweep_prob(self, current: Array, num_changed: Array, num_sweeps: Array) -> Array:
        """How often to sweep.

        Sweeps that hardly ever change the draw are made as seldom as their success says, but take a third
        of all evaluations: then local moves have two thirds of what they would have alone, and sweeps a
        third, whichever of the two the posterior needs.
        """
        if self.sweep_prob is not None:
            return current
        success = (num_changed + 0.5) / (num_sweeps + 1.0)
        return jnp.clip(success / WORTH_SWEEPING, self.least_sweep_prob, 1.0)

    def _local(self, step_size: Array) -> Array:
        given = None if self.local is None else self.local.step_size
        return step_size if given is None else jnp.asarray(given, step_size.dtype)

    def _powers(self, log_beta: Array, seen: Iteration) -> Array:
        """Levels that lose less of the effective sample size than the next one take more of the
        likelihood.
        """
        share, weighted = seen.sweep.particle_ess / self.num_particles, seen.sweep.weighted
        gain = 1.0 / (1.0 + seen.index.astype(share.dtype)) ** 0.6
        change = jnp.where(weighted[:-1] & weighted[1:], gain * (share[:-1] - share[1:]), 0.0)
        return jnp.append(jnp.minimum(log_beta[:-1] + change, 0.0), 0.0)


def _depth_prob(mean_jump: Array, count: Array) -> Array:
    """Depths by their squared jump."""
    score = jnp.where(count > 0, mean_jump, 0.0)
    total, uniform = jnp.sum(score), 1 / count.shape[0]
    by_jump = (1 - UNIFORM_DEPTHS) * score / jnp.where(total > 0, total, 1.0) + UNIFORM_DEPTHS * uniform
    return jnp.where(total > 0, by_jump, uniform)
