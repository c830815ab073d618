"""What warmup learns: one step size and one curvature per segment. Pure JAX."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from numpyro_rtk._custom_types import Count, PerSegment
from numpyro_rtk._inner import AbstractInnerKernel, SegmentTuning
from numpyro_rtk._reverse import ReverseResult, SegmentGrid, with_step_size_rule


MAX_LOG_STEP_SIZE = 30.0
"""Bound on adapted log step sizes, so that a target that accepts everything cannot overflow them."""


class AdaptState(NamedTuple):
    """Tuning of every segment, and the statistics it is learnt from; frozen after warmup."""

    step_size: PerSegment
    """Step size in use, in the inner kernel's own unit."""
    curvature: PerSegment
    """Mean curvature of `-log p_s` in use, `1 / x^2`."""
    mean_square_score: PerSegment
    """Weighted mean of `|score_s|^2 / dim` over the warmup so far."""
    num_passes: PerSegment
    """Number of passes in that mean."""
    step_size_state: Any
    """State of the dual averaging of the log step sizes, a tuple of arrays."""
    iteration: Count
    """Passes so far, warmup included."""
    num_warmup: Count
    """Length of the warmup."""

    @property
    def tuning(self) -> SegmentTuning:
        """What the reverse pass takes."""
        return SegmentTuning(self.step_size, self.curvature)


class DualAveraging(NamedTuple):
    """The `(init, update)` pair of NumPyro's `dual_averaging`, handed in by the NumPyro side."""

    init: Any
    update: Any


def adapt_init(tuning: SegmentTuning, num_warmup: int, averaging: DualAveraging) -> AdaptState:
    """State before the first pass: the default tuning, nothing learnt."""
    zeros = jnp.zeros_like(tuning.step_size)
    return AdaptState(
        step_size=tuning.step_size,
        curvature=tuning.curvature,
        mean_square_score=zeros,
        num_passes=zeros,
        step_size_state=jax.vmap(averaging.init)(jnp.log(tuning.step_size)),
        iteration=jnp.zeros((), int),
        num_warmup=jnp.asarray(num_warmup, int),
    )


def adapt_update(
    inner: AbstractInnerKernel,
    grid: SegmentGrid,
    state: AdaptState,
    result: ReverseResult,
    target_accept_prob: float,
    dim: int,
    averaging: DualAveraging,
) -> AdaptState:
    """One warmup update; the identity, but for the iteration count, once warmup is over.

    The curvature of a segment is the mean of `|score_s|^2 / dim` over the draws at its end, which is
    `-E[div score_s] / dim` by Stein's identity, with weights that grow linearly so that the early, badly
    tuned passes are forgotten. It is never more than its bound `1 / sigma_s^2`. Step sizes of
    kernels that adapt follow dual averaging of the mean acceptance probability of the segment's inner
    steps; those of other kernels follow the kernel's rule from the curvature. Passes that failed, and
    segments that diverged, teach nothing but an acceptance of zero.
    """
    iteration = state.iteration + 1
    warming, is_last = iteration <= state.num_warmup, iteration == state.num_warmup
    usable: Bool[Array, " segments"] = warming & ~result.failed & ~result.diverging

    num_passes = state.num_passes + usable
    weight = jnp.where(usable, 2 / (num_passes + 1), 0.0)
    mean_square = state.mean_square_score + weight * (result.mean_square_score - state.mean_square_score)
    bound = 1 / grid.sigma_s**2
    learnt = jnp.where((num_passes > 0) & (mean_square > 0), jnp.minimum(mean_square, bound), bound)
    curvature = jnp.where(warming, learnt, state.curvature)

    averaging_state, step_size = state.step_size_state, state.step_size
    if getattr(inner, "step_size", None) is None:
        if inner.adapts_step_size:
            new = jax.vmap(averaging.update)(target_accept_prob - result.accept_prob, averaging_state)
            averaging_state = jax.tree.map(lambda x, y: jnp.where(warming, x, y), new, averaging_state)
            log_step_size = jnp.where(is_last, averaging_state[1], averaging_state[0])
            limit = jnp.log(jnp.asarray(getattr(inner, "max_step_size", jnp.exp(MAX_LOG_STEP_SIZE))))
            adapted = jnp.exp(jnp.clip(log_step_size, -MAX_LOG_STEP_SIZE, limit))
        else:
            adapted = with_step_size_rule(inner, grid, curvature, dim).step_size
        step_size = jnp.where(warming, adapted.astype(step_size.dtype), step_size)
    return state._replace(
        step_size=step_size,
        curvature=curvature,
        mean_square_score=mean_square,
        num_passes=num_passes,
        step_size_state=averaging_state,
        iteration=iteration,
    )
