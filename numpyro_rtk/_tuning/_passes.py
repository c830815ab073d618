"""What warmup learns: one step size and one curvature per segment. Pure JAX."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from numpyro_rtk._custom_types import Count, Event, PerSegment
from numpyro_rtk._noising._grid import SegmentGrid
from numpyro_rtk._reverse._base import AbstractInnerKernel
from numpyro_rtk._reverse._pass import ReverseResult, rule_step_size, Tuning


MAX_LOG_STEP_SIZE = 30.0
"""Bound on adapted log step sizes, so that a target that accepts everything cannot overflow them."""
PROFILE_PRIOR_PASSES = 5.0
"""Weight of the mean over coordinates in the profile, in passes."""
MIN_PROFILE = 1e-2
"""Least curvature of a coordinate, as a fraction of its bound."""


class AdaptState(NamedTuple):
    """Tuning of every segment, and the statistics it is learnt from; frozen after warmup."""

    step_size: PerSegment
    """Step size in use, in the inner kernel's own unit."""
    curvature: PerSegment
    """Curvature of `-log p_s` in use, mean over coordinates, `1 / x^2`."""
    profile: Event
    """Curvature times `sigma_s^2` by coordinate in use, averaged over segments."""
    mean_square_score: PerSegment
    """Weighted mean of `|score_s|^2 / dim` over the warmup so far."""
    mean_profile: Event
    """Weighted mean of `sigma_s^2 score_s^2` by coordinate over the warmup so far."""
    num_passes: PerSegment
    """Number of passes in the mean of each segment."""
    step_size_state: Any
    """State of the dual averaging of the log step sizes, a tuple of arrays."""
    iteration: Count
    """Passes so far, warmup included."""
    num_warmup: Count
    """Length of the warmup."""

    @property
    def tuning(self) -> Tuning:
        """What the reverse pass takes."""
        return Tuning(self.step_size, self.curvature, self.profile)


class DualAveraging(NamedTuple):
    """The `(init, update)` pair of NumPyro's `dual_averaging`, handed in by the NumPyro side."""

    init: Any
    update: Any


def adapt_init(tuning: Tuning, num_warmup: int, averaging: DualAveraging) -> AdaptState:
    """State before the first pass: the default tuning, nothing learnt."""
    zeros = jnp.zeros_like(tuning.step_size)
    return AdaptState(
        step_size=tuning.step_size,
        curvature=tuning.curvature,
        profile=tuning.profile,
        mean_square_score=zeros,
        mean_profile=jnp.zeros_like(tuning.profile),
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
    tuned passes are forgotten. It is never more than its bound `1 / sigma_s^2`. How curvature is spread over
    coordinates (a galaxy's centre is less certain than its background) is learnt as one profile for all
    segments, from the same identity by coordinate: `E score_i^2 = -E[d score_i / d x_i]`. Step sizes of
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

    # The profile is learnt from whole passes, shrunk towards its mean by a few passes' worth of prior: one
    # squared score a pass and coordinate is noisy.
    whole = jnp.all(usable)
    passes = jnp.max(num_passes)
    mean_profile = state.mean_profile + jnp.where(whole, 2 / (passes + 1), 0.0) * (
        result.profile - state.mean_profile
    )
    shrunk = (passes * mean_profile + PROFILE_PRIOR_PASSES * jnp.mean(mean_profile)) / (
        passes + PROFILE_PRIOR_PASSES
    )
    learnt_any = (passes > 0) & (jnp.mean(mean_profile) > 0)
    profile = jnp.where(warming & learnt_any, jnp.clip(shrunk, MIN_PROFILE, 1.0), state.profile)

    averaging_state, step_size = state.step_size_state, state.step_size
    if getattr(inner, "step_size", None) is None:
        if inner.adapts_step_size:
            new = jax.vmap(averaging.update)(target_accept_prob - result.accept_prob, averaging_state)
            averaging_state = jax.tree.map(lambda x, y: jnp.where(warming, x, y), new, averaging_state)
            log_step_size = jnp.where(is_last, averaging_state[1], averaging_state[0])
            limit = jnp.log(jnp.asarray(getattr(inner, "max_step_size", jnp.exp(MAX_LOG_STEP_SIZE))))
            adapted = jnp.exp(jnp.clip(log_step_size, -MAX_LOG_STEP_SIZE, limit))
        else:
            adapted = rule_step_size(inner, grid, curvature, dim)
        step_size = jnp.where(warming, adapted.astype(step_size.dtype), step_size)
    return state._replace(
        step_size=step_size,
        curvature=curvature,
        profile=profile,
        mean_square_score=mean_square,
        mean_profile=mean_profile,
        num_passes=num_passes,
        step_size_state=averaging_state,
        iteration=iteration,
    )
