"""One chain of `ScoreHMC`: its start and its iterations. Pure functions of a state."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float
from numpyro.infer.hmc import momentum_generator
from numpyro.infer.hmc_util import HMCAdaptState, IntegratorState

from numpyro_rtk._custom_types import Scalar
from numpyro_rtk._moves._accept import metropolis, select
from numpyro_rtk._moves._leapfrog import Evaluate, leapfrog, Leaves, MIN_STEPS, PathPoint
from numpyro_rtk._moves._line_integral import dot
from numpyro_rtk._numpyro._score_hmc_mass import mass_velocity
from numpyro_rtk._numpyro._score_hmc_options import Options
from numpyro_rtk._numpyro._states import lists_fields
from numpyro_rtk._score._hoist import HoistedArrays


class _NumWarmup(eqx.Module):
    """Length of the warmup, static: NumPyro's adaptation windows are laid out while tracing."""

    value: int = eqx.field(static=True)


@lists_fields
class ScoreHMCState(NamedTuple):
    """State of `ScoreHMC`; with vectorized chains every field but those of `SHARED` has a chain axis."""

    z: dict[str, Array]
    """Unconstrained values of all latent sites."""
    i: Array
    """Iteration, warmup included."""
    relative_potential_energy: Float[Array, ""]
    """Potential energy relative to the chain's start: the sum over accepted moves. Not comparable between
    chains.
    """
    energy: Float[Array, ""]
    """The same plus the kinetic energy, at the end of the trajectory or, where it was rejected, at its
    start.
    """
    num_steps: Array
    """Leapfrog steps of the last trajectory."""
    accept_prob: Float[Array, ""]
    """Its acceptance probability."""
    mean_accept_prob: Float[Array, ""]
    """Mean acceptance probability since the start of the warmup, or since its end."""
    diverging: Bool[Array, ""]
    """Whether it met a score that is not finite, or an energy error out of all proportion. A place that the
    likelihood rules out is an ordinary rejection.
    """
    unresolved: Bool[Array, ""]
    """Whether its steps were too coarse to know its energy error from scores, so that it was rejected."""
    num_score_evals: Array
    """Score evaluations of the last trajectory: one per step and diffusion event."""
    adapt_state: HMCAdaptState
    """Step size and mass matrix, as in NumPyro's `HMC`."""
    score: Leaves
    """Scores at `z` of the diffusion sites without an energy."""
    potential: Scalar
    """The part of the potential energy at `z` that is known exactly."""
    gradient: Leaves
    """Its gradient."""
    score_arrays: HoistedArrays
    """The networks' arrays, kept here so that they are arguments of the compiled program."""
    data: Array | None
    """A checksum of the model's arguments that `score`, `potential` and `gradient` are of."""
    num_warmup: _NumWarmup
    """Length of the warmup."""
    rng_key: Any
    """Random key of the next iteration."""

    @property
    def point(self) -> PathPoint:
        """`z` with all that is known there."""
        return PathPoint(self.z, self.score, self.potential, self.gradient, jnp.ones((), bool))


SHARED = ("score_arrays", "data")
"""Fields of a `ScoreHMCState` that all chains share."""


class Chain(NamedTuple):
    """What an iteration depends on besides the state."""

    options: Options
    evaluate: Evaluate
    """Evaluates unconstrained values of all latents; `extra` of its points says whether the networks are
    finite there.
    """
    num_events: int
    """Events that an evaluation evaluates the score of."""

    def start(self, key: Any, z: Leaves, inverse_mass: dict[Any, Any], num_warmup: int) -> ScoreHMCState:
        """State before the first iteration."""
        next_key, adapt_key = jr.split(key)
        point = self.evaluate(z)
        dtype = jnp.result_type(point.potential, *z.values())
        adapt_state = self.options.adapter(z, num_warmup)[0](
            IntegratorState(z=z),
            adapt_key,
            jnp.asarray(self.options.step_size, dtype),
            inverse_mass_matrix=dict(inverse_mass),
        )
        zero, count, no = jnp.zeros((), dtype), jnp.zeros((), int), jnp.zeros((), bool)
        return ScoreHMCState(
            z=z,
            i=count,
            relative_potential_energy=zero,
            energy=zero,
            num_steps=count,
            accept_prob=zero,
            mean_accept_prob=zero,
            diverging=no,
            unresolved=no,
            num_score_evals=count,
            adapt_state=adapt_state,
            score=point.score,
            potential=point.potential,
            gradient=point.gradient,
            score_arrays=HoistedArrays((), ""),  # both are filled in without a chain axis
            data=None,
            num_warmup=_NumWarmup(int(num_warmup)),
            rng_key=next_key,
        )

    def step(self, state: ScoreHMCState) -> ScoreHMCState:
        """One iteration: a trajectory, accepted or rejected."""
        next_key, momentum_key, length_key, accept_key = jr.split(state.rng_key, 4)
        options, adapt_state, num_warmup = self.options, state.adapt_state, state.num_warmup.value
        momentum = momentum_generator(state.z, adapt_state.mass_matrix_sqrt, momentum_key)
        length = options.trajectory_length * jr.uniform(length_key, (), state.energy.dtype, 0.5, 1.5)
        wanted = jnp.maximum(jnp.ceil(length / adapt_state.step_size), MIN_STEPS)
        # All steps of a trajectory have the same size, at most the adapted one.
        num_steps = jnp.minimum(wanted, options.max_num_steps).astype(int)
        step_size = length / wanted
        velocity = functools.partial(mass_velocity, adapt_state.inverse_mass_matrix)
        end = leapfrog(self.evaluate, velocity, state.point, momentum, step_size, num_steps)
        impossible = end.point.extra & ~(end.point.potential < jnp.inf)
        accept, accept_prob, diverging = metropolis(
            accept_key, -end.energy_error, ~end.diverging | impossible, resolved=~end.unresolved
        )
        seen = end.tuning_prob(accept_prob, impossible)
        point = select(accept, end.point, state.point)
        potential = state.relative_potential_energy
        in_warmup = state.i < num_warmup
        wa_update = options.adapter(state.z, num_warmup)[1]
        adapt_state = jax.lax.cond(
            in_warmup,
            lambda adapt_state: wa_update(state.i, seen, IntegratorState(z=point.position), adapt_state),
            lambda adapt_state: adapt_state,
            adapt_state,
        )
        i = state.i + 1
        n = jnp.where(in_warmup, i, i - num_warmup)
        return state._replace(
            z=point.position,
            i=i,
            relative_potential_energy=potential + jnp.where(accept, end.potential_difference, 0.0),
            energy=potential + end.kinetic_start + jnp.where(accept, end.energy_error, 0.0),
            num_steps=end.num_evaluations,
            accept_prob=accept_prob,
            mean_accept_prob=state.mean_accept_prob + (accept_prob - state.mean_accept_prob) / n,
            diverging=diverging,
            unresolved=end.unresolved,
            num_score_evals=end.num_evaluations * self.num_events,
            adapt_state=adapt_state,
            score=point.score,
            potential=point.potential,
            gradient=point.gradient,
            rng_key=next_key,
        )

    def anew(self, state: ScoreHMCState) -> ScoreHMCState:
        """The state evaluated again, where the model has other arguments than before."""
        point = self.evaluate(state.z)
        return state._replace(score=point.score, potential=point.potential, gradient=point.gradient)

    def at(self, state: ScoreHMCState, moved: Leaves) -> ScoreHMCState:
        """The state where some latents have other values, or for other arguments; scores are evaluated where
        they moved.

        What priors without an energy contribute to `relative_potential_energy` is the trapezoid rule between
        both ends: exact for Gaussian priors.
        """
        point = self.evaluate(state.z | moved, None if moved else state.score)  # pyright: ignore[reportCallIssue]
        difference = point.potential - state.potential
        for name, score in point.score.items():
            difference -= 0.5 * dot(state.score[name] + score, point.position[name] - state.z[name])
        return state._replace(
            z=point.position,
            score=point.score,
            potential=point.potential,
            gradient=point.gradient,
            relative_potential_energy=state.relative_potential_energy + difference,
        )
