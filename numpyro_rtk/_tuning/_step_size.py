"""Step sizes by dual averaging of acceptance probabilities: one adaptation for all kernels and moves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


MIN_STEP_SIZE, MAX_STEP_SIZE = 1e-13, 1e13
"""Bounds of adapted step sizes, so that a target that accepts everything cannot overflow them."""


class StepSizeState(NamedTuple):
    """State of the adaptation of an array of step sizes, each by itself."""

    averaging: Any
    """States of the dual averaging, flat."""
    num_updates: Array
    """How often each was updated, shape of the step sizes."""
    given: Array
    """Where each started."""


class StepSizeTuner(NamedTuple):
    """Dual averaging of log step sizes (Hoffman and Gelman 2014), each entry of an array by itself.

    The two functions are NumPyro's `dual_averaging()`, handed in by the NumPyro side.
    """

    init_one: Callable[..., Any]
    update_one: Callable[..., Any]

    def init(self, step_size: Array) -> StepSizeState:
        """Nothing learnt; `step_size` of any shape."""
        averaging = jax.vmap(self.init_one)(jnp.log(jnp.ravel(step_size)))
        return StepSizeState(averaging, jnp.zeros(step_size.shape, int), step_size)

    def update(self, state: StepSizeState, accept_prob: Array, target: float, usable: Array) -> StepSizeState:
        """Learn from acceptance probabilities, of the shape of the step sizes, where they are `usable`."""
        usable = jnp.broadcast_to(usable, state.given.shape)
        error = jnp.ravel(jnp.where(usable, target - accept_prob, 0.0)).astype(state.given.dtype)
        new = jax.vmap(self.update_one)(error, state.averaging)

        def keep(new: Array, old: Array) -> Array:
            mask = jnp.ravel(usable).reshape(-1, *[1] * (new.ndim - 1))
            return jnp.where(mask, new, old).astype(old.dtype)

        averaging = jax.tree.map(keep, new, state.averaging)
        return StepSizeState(averaging, state.num_updates + usable, state.given)

    def step_size(self, state: StepSizeState, low: Any, high: Any, *, freeze: Any = False) -> Array:
        """Step sizes to use next, or with `freeze` those to keep: averages of the log step sizes.

        An entry that was never updated stays where it started.
        """
        current, average = (jnp.reshape(leaf, state.given.shape) for leaf in state.averaging[:2])
        bounds = jnp.log(jnp.maximum(low, MIN_STEP_SIZE)), jnp.log(jnp.minimum(high, MAX_STEP_SIZE))
        learnt = jnp.exp(jnp.clip(jnp.where(freeze, average, current), *bounds))
        return jnp.where(state.num_updates > 0, learnt, state.given).astype(state.given.dtype)
