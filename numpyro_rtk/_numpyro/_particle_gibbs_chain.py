"""One chain of particle Gibbs: its start, its iterations, its restarts. Pure functions of a state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float

from numpyro_rtk._numpyro._particle_gibbs_options import Chosen, Options
from numpyro_rtk._numpyro._problem import Problem, Shared
from numpyro_rtk._numpyro._states import lists_fields
from numpyro_rtk._numpyro._step_sizes import STEP_SIZES
from numpyro_rtk._reverse._pass import rule_step_size
from numpyro_rtk._reverse._pilot import Pilot
from numpyro_rtk._smc._conditional import (
    conditional_sweep,
    full_sweep_evaluations,
    no_sweep,
    sweep_evaluations,
    SweepTuning,
)
from numpyro_rtk._smc._moves import max_step_size, no_move, preconditioner
from numpyro_rtk._smc._posterior import Floor, Posterior
from numpyro_rtk._smc._unconditional import choose_sweep, unconditional_evaluations, unconditional_sweep
from numpyro_rtk._tuning._sweeps import Iteration, ParticleGibbsAdaptState, SweepTuner


DEFAULT_STATISTICS = ("diverging", "unresolved", "accept_prob", "changed")
"""What is collected without being asked for: whether something failed, and whether sweeps moved."""


@lists_fields
class ParticleGibbsState(NamedTuple):
    """State of `RTKParticleGibbs`; with vectorized chains every field but `shared` has a chain axis.

    Levels and segments run from noise to data. A partial refresh leaves noisier ones out: they have zeros,
    and `weighted` and `visited` say so.
    """

    z: dict[str, Array]
    """The draw, `{site: value}`."""
    accept_prob: Float[Array, ""]
    """Mean acceptance probability of the reverse kernel over the segments of the last sweep."""
    segment_accept_prob: Float[Array, " segments"]
    """The same by segment, of this iteration's sweep."""
    guided_accept_prob: Float[Array, " segments"]
    """Mean acceptance probability of the guided moves at the start of each segment."""
    local_accept_prob: Float[Array, ""]
    """Mean acceptance probability of the local moves."""
    particle_ess: Float[Array, " levels"]
    """Effective sample size of the particles' weights at each level, from 1 to `num_particles`; mean over
    elements."""
    weighted: Bool[Array, " levels"]
    """Levels at which the sweep weighed its particles."""
    visited: Bool[Array, " segments"]
    """Segments that the sweep went through."""
    changed: Float[Array, ""]
    """Share of the elements in which the sweep left the pinned path: 0 or 1 where there is one."""
    depth: Array
    """Levels refreshed, 1 to the number of levels (a full sweep); 0 in an iteration without a sweep."""
    log_evidence: Float[Array, ""] | None
    """Estimate of the log evidence from the unconditional sweep at the start, the sum over elements; constant
    over the run. Low by half its variance. `None` in a composite, where it would be given arbitrary values of
    the other latents."""
    diverging: Bool[Array, ""]
    """Whether something non-finite was met, or no particle had any weight; in any element."""
    unresolved: Bool[Array, ""]
    """Whether a local path was too coarse to know its energy error from scores, so that it was rejected; in
    any element."""
    num_score_evals: Array
    """Score evaluations of the iteration, over all events of all sites."""
    adapt_state: ParticleGibbsAdaptState
    """What warmup learns."""
    shared: Shared
    """What all chains share."""
    rng_key: Any
    """Random key of the next iteration."""


class Chain(NamedTuple):
    """What an iteration depends on besides the state."""

    options: Options
    problem: Problem
    shared: Shared

    def posterior(self, log_beta: Array, floor: Floor) -> Posterior:
        """The level targets, for powers of the twists and what stands for an impossible likelihood."""
        return self.problem.posterior(self.shared, log_beta, floor)

    def tuner(self, posterior: Posterior) -> SweepTuner:
        """What warmup learns, and how."""
        options, least = self.options, 1.0
        if options.local is not None:
            most = full_sweep_evaluations(posterior, options.num_particles, options.num_guided_steps)
            least = min(1.0, 0.5 * options.local.num_evaluations(posterior) / most)
        return SweepTuner(
            posterior,
            options.local,
            options.target_accept_prob,
            options.num_particles,
            STEP_SIZES,
            options.sweep_prob,
            least,
        )

    @property
    def chosen(self) -> Chosen:
        """What the options came to for the model."""
        options, problem = self.options, self.problem
        zero = jnp.zeros((), problem.dtype)
        posterior = self.posterior(initial_log_beta(self._pilots), Floor(zero, zero))
        count = full_sweep_evaluations(posterior, options.num_particles, options.num_guided_steps)
        count += 1 + (0 if options.local is None else options.local.num_evaluations(posterior))
        return Chosen(
            options,
            problem.kernel,
            problem.num_levels,
            problem.jacobian,
            problem.elements.count,
            count * problem.num_events,
        )

    @property
    def _pilots(self) -> tuple[Pilot, ...]:
        return tuple(seen.pilot for seen in self.shared.measured)

    def start(self, key: Any, given: dict[str, Array], floor: Floor, num_warmup: int) -> ParticleGibbsState:
        """State before the first iteration: two unconditional sweeps, the draw of one of them, and what is
        given.

        The first sweep adapts, the second does not and estimates the evidence.
        """
        sweep_key, next_key = jr.split(key)
        *sweep_keys, choose_key = jr.split(sweep_key, 3)
        log_beta = initial_log_beta(self._pilots)
        posterior = self.posterior(log_beta, floor)
        initial = _initial_tuning(posterior)

        def sweep(carry: tuple[Array, Array], inputs: tuple[Any, Array]) -> Any:
            (log_beta, guided), (key, adapt) = carry, inputs
            tuning = initial._replace(guided_step_size=guided)
            point, info = self._unconditional(key, self.posterior(log_beta, floor), tuning, adapt)
            return (info.log_beta, info.guided_step_size), (point.x, point.log_twist, info)

        inputs = (jnp.stack(sweep_keys), jnp.array([True, False]))
        (log_beta, guided), (xs, log_twists, infos) = jax.lax.scan(
            sweep, (log_beta, initial.guided_step_size), inputs
        )
        info = jax.tree.map(lambda leaf: leaf[1], infos)
        elements = posterior.elements
        finite = jax.vmap(elements.all_finite)(xs)
        chosen = elements.each(choose_sweep, finite, log_twists, infos.log_evidence, key=choose_key)
        x = xs[elements.spread(chosen), jnp.arange(posterior.dim)]
        num_levels, dtype = posterior.num_levels, posterior.dtype
        scalar, segments, no = jnp.zeros((), dtype), jnp.zeros(num_levels - 1, dtype), jnp.zeros((), bool)
        num_depths = len(self.options.depths(num_levels))
        tuning = initial._replace(guided_step_size=guided)
        return ParticleGibbsState(
            z=self.problem.unflatten(x) | given,
            accept_prob=scalar,
            segment_accept_prob=segments,
            guided_accept_prob=segments,
            local_accept_prob=scalar,
            particle_ess=info.particle_ess,
            weighted=jnp.ones(num_levels, bool),
            visited=jnp.ones(num_levels - 1, bool),
            changed=scalar,
            depth=jnp.asarray(num_levels, int),
            log_evidence=jnp.sum(info.log_evidence),
            diverging=no,
            unresolved=no,
            num_score_evals=jnp.zeros((), int),
            adapt_state=self.tuner(posterior).init(tuning, log_beta, num_depths, num_warmup),
            shared=None,  # pyright: ignore[reportArgumentType] - filled in without a chain axis
            rng_key=next_key,
        )

    def _unconditional(self, key: Any, posterior: Posterior, tuning: SweepTuning, adapt: Array) -> Any:
        options = self.options
        return unconditional_sweep(
            key,
            posterior,
            tuning,
            options.num_particles,
            options.start_steps,
            options.target_accept_prob,
            adapt,
        )

    def step(self, state: ParticleGibbsState) -> ParticleGibbsState:
        """One iteration: a sweep to a random depth, or none, and local moves."""
        options, adapt = self.options, state.adapt_state
        posterior = self.posterior(adapt.log_beta, adapt.floor)
        next_key, depth_key, sweep_key, local_key = jr.split(state.rng_key, 4)
        depths = jnp.asarray(options.depths(posterior.num_levels))
        choice = jr.categorical(depth_key, jnp.log(adapt.depth_prob))
        # The coin is that of the iteration: vectorized chains take as long as if all of them swept.
        swept = jr.uniform(jr.fold_in(jr.key(0), self.shared.iteration)) < options.sweep_prob_of(adapt)
        # Depth 0 is no sweep.
        depth = jnp.where(swept, depths[choice], 0)
        x = self.problem.flatten(state.z)
        point = posterior.at_data(x)
        particles = (options.num_particles, options.num_guided_steps)
        if options.sweep_prob != 0:
            new, info = conditional_sweep(sweep_key, posterior, adapt.tuning, point, depth, *particles)
        else:
            # Nothing to compile.
            new, info = point, no_sweep(posterior)
        jump = jnp.mean((new.x - x) ** 2 / posterior.mean_square[0])
        local = no_move(posterior)
        if options.local is not None:
            mass = preconditioner(posterior, jnp.asarray(posterior.last))
            new, local = options.local(local_key, posterior, new, mass, adapt.local_step_size)
        evaluations = 1 + sweep_evaluations(posterior, depth, *particles) + local.num_evaluations
        seen = Iteration(self.shared.iteration, info, local, choice, swept, jump)
        count = jnp.maximum(jnp.sum(info.visited), 1)
        return state._replace(
            z=self.problem.unflatten(new.x),
            accept_prob=jnp.where(swept, jnp.sum(info.accept_prob) / count, state.accept_prob),
            segment_accept_prob=info.accept_prob,
            guided_accept_prob=info.guided_accept_prob,
            local_accept_prob=local.accept_prob,
            particle_ess=info.particle_ess,
            weighted=info.weighted,
            visited=info.visited,
            changed=jnp.mean(info.changed, dtype=posterior.dtype),
            depth=depth,
            diverging=info.diverging | local.diverging,
            unresolved=local.unresolved,
            num_score_evals=(evaluations * self.problem.num_events).astype(state.num_score_evals.dtype),
            adapt_state=self.tuner(posterior).update(adapt, seen),
            rng_key=next_key,
        )

    def restart(self, state: ParticleGibbsState) -> ParticleGibbsState:
        """A warmup iteration that draws the sites anew given the other latents."""
        next_key, sweep_key = jr.split(state.rng_key)
        adapt = state.adapt_state
        posterior = self.posterior(adapt.log_beta, adapt.floor)
        point, info = self._unconditional(sweep_key, posterior, adapt.tuning, jnp.ones((), bool))
        elements = posterior.elements
        usable = (point.log_twist > -jnp.inf) & elements.all_finite(point.x)
        x = jnp.where(elements.spread(usable), point.x, self.problem.flatten(state.z))
        evaluations = unconditional_evaluations(
            posterior, self.options.num_particles, self.options.start_steps
        )
        return state._replace(
            z=self.problem.unflatten(x),
            segment_accept_prob=jnp.zeros_like(state.segment_accept_prob),
            guided_accept_prob=jnp.zeros_like(state.guided_accept_prob),
            particle_ess=info.particle_ess,
            weighted=jnp.ones_like(state.weighted),
            visited=jnp.zeros_like(state.visited),
            changed=jnp.mean(usable, dtype=posterior.dtype),
            depth=jnp.full_like(state.depth, posterior.num_levels),
            diverging=~jnp.all(usable),
            unresolved=jnp.zeros_like(state.unresolved),
            num_score_evals=jnp.full_like(state.num_score_evals, evaluations * self.problem.num_events),
            adapt_state=self.tuner(posterior).restart(adapt, info),
            rng_key=next_key,
        )


def _initial_tuning(posterior: Posterior) -> SweepTuning:
    """Step sizes before anything is learnt."""
    kernel, num_levels = posterior.kernel, posterior.num_levels
    by_site = [
        rule_step_size(
            kernel, law.grid, jnp.mean(law.pilot.curvature.reshape(num_levels, -1)[1:], -1), law.event_size
        )
        for law in posterior.sites
    ]
    reverse = jnp.minimum(jnp.stack(by_site, axis=1), kernel.largest_step_size)
    guided = 0.5 * max_step_size(posterior) * posterior.element_dim ** (-1 / 3)
    return SweepTuning(reverse, jnp.full(num_levels - 1, guided, posterior.dtype))


def initial_log_beta(pilots: tuple[Pilot, ...]) -> Array:
    """Share of the prior's variance that the denoiser explains at each level."""
    unexplained = sum(jnp.sum(p.mean_square.reshape(p.mean_square.shape[0], -1), axis=1) for p in pilots)
    assert isinstance(unexplained, jax.Array)
    share = jnp.clip(1 - unexplained / unexplained[0], 1e-4, 1.0)
    return jnp.log(share.at[-1].set(1.0))
