"""The state of `RTKGibbs`."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from numpyro_rtk._numpyro._states import lists_fields


@lists_fields
class RTKGibbsState(NamedTuple):
    """State of `RTKGibbs`: NumPyro's `GibbsState`, what belongs to both blocks, and by name what is worth
    looking at in one of them.
    """

    z: dict[str, Any]
    """The draws, as each block keeps them."""
    block_states: tuple[Any, ...]
    """State of the particle Gibbs block, and of the inner kernel."""
    rng_key: Any
    """Random key of the next iteration."""
    diverging: Any = False
    """Whether either block diverged."""
    num_score_evals: Any = 0
    """Score evaluations of the iteration."""

    @property
    def unresolved(self) -> Array:
        """Whether either block rejected a path that was too coarse to know its energy error from scores."""
        return any_flag(self.block_states, "unresolved")

    @property
    def accept_prob(self) -> Array:
        """As `ParticleGibbsState` has it: of the reverse kernel. That of the inner kernel is
        `block_states.1.accept_prob`.
        """
        return self.block_states[0].accept_prob

    @property
    def local_accept_prob(self) -> Array:
        """As `ParticleGibbsState` has it."""
        return self.block_states[0].local_accept_prob

    @property
    def particle_ess(self) -> Array:
        """As `ParticleGibbsState` has it."""
        return self.block_states[0].particle_ess

    @property
    def changed(self) -> Array:
        """As `ParticleGibbsState` has it."""
        return self.block_states[0].changed

    @property
    def depth(self) -> Array:
        """As `ParticleGibbsState` has it."""
        return self.block_states[0].depth

    @property
    def energy(self) -> Array:
        """Of the inner kernel, where it is a Hamiltonian one."""
        return self.block_states[1].energy


def any_flag(states: tuple[Any, ...], name: str) -> Array:
    """Whether a flag is set in any block, at any depth of blocks within blocks."""
    flags = [jnp.zeros((), bool)]
    for state in states:
        if hasattr(state, name):
            flags.append(jnp.asarray(getattr(state, name)))
        elif hasattr(state, "block_states"):
            flags.append(any_flag(state.block_states, name))
    return functools.reduce(jnp.logical_or, flags)


def with_shared(state: RTKGibbsState, shared: Any) -> RTKGibbsState:
    """The state with another value of what chains share."""
    block: Any = state.block_states[0]
    return state._replace(block_states=(block._replace(shared=shared), *state.block_states[1:]))


def axes_without(state: Any, shared: tuple[str, ...]) -> Any:
    """Chain axes of all fields of a state but some."""
    return state(*(None if name in shared else 0 for name in state._fields))
