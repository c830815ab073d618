"""What the warmup of reverse passes learns: one step size and one curvature per segment."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool

from numpyro_rtk._custom_types import Count, Event, PerSegment
from numpyro_rtk._noising._grid import NoiseGrid
from numpyro_rtk._reverse._base import AbstractInnerKernel
from numpyro_rtk._reverse._pass import ReverseResult, rule_step_size, Tuning
from numpyro_rtk._tuning._step_size import StepSizeState, StepSizeTuner


PROFILE_PRIOR_PASSES = 5.0
"""Weight of the mean over coordinates in the profile, in passes."""

CAUTION = 10.0
"""A mean of `n` squared scores, one per coordinate and pass, is taken `1 + CAUTION / n` times too large. One
lucky pass in few dimensions would give steps so long that no later pass succeeds, and nothing is learnt from
passes that fail.
"""

MIN_PROFILE = 1e-2
"""Least curvature of a coordinate, as a fraction of its bound."""


class AdaptState(NamedTuple):
    """Tuning of every segment, and the statistics it is learnt from; frozen after warmup."""

    step_size: PerSegment
    """Step size in use, in the reverse kernel's own unit."""
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
    step_size_state: StepSizeState
    """State of the adaptation of the step sizes."""
    iteration: Count
    """Passes so far, warmup included."""
    num_warmup: Count
    """Length of the warmup."""

    @property
    def tuning(self) -> Tuning:
        """What the reverse pass takes."""
        return Tuning(self.step_size, self.curvature, self.profile)


class PassTuner(NamedTuple):
    """What the adaptation of a kernel depends on."""

    kernel: AbstractInnerKernel
    grid: NoiseGrid
    target_accept_prob: float
    step_sizes: StepSizeTuner

    def init(self, tuning: Tuning, num_warmup: int) -> AdaptState:
        """State before the first pass: the default tuning, nothing learnt."""
        zeros = jnp.zeros_like(tuning.step_size)
        return AdaptState(
            step_size=tuning.step_size,
            curvature=tuning.curvature,
            profile=tuning.profile,
            mean_square_score=zeros,
            mean_profile=jnp.zeros_like(tuning.profile),
            num_passes=zeros,
            step_size_state=self.step_sizes.init(tuning.step_size),
            iteration=jnp.zeros((), int),
            num_warmup=jnp.asarray(num_warmup, int),
        )

    def update(self, state: AdaptState, result: ReverseResult) -> AdaptState:
        """One warmup update; the identity, but for the iteration count, once warmup is over.

        The curvature of a segment is the mean of `|score_s|^2 / dim` over the draws at its end, which is
        `-E[div score_s] / dim` by Stein's identity, with weights that grow linearly so that the early, badly
        tuned passes are forgotten, taken somewhat too large while they are few. It is never more than its
        bound `1 / sigma_s^2`. How curvature is spread over coordinates (a galaxy's centre is less certain
        than its background) is learnt as one profile for all segments, from the same identity by coordinate:
        `E score_i^2 = -E[d score_i / d x_i]`. Step sizes of kernels that adapt follow dual averaging of the
        mean acceptance probability of the segment's steps; those of other kernels follow the kernel's rule
        from the curvature. Passes that failed, and segments that diverged, teach nothing but an acceptance
        of zero.
        """
        iteration = state.iteration + 1
        warming = iteration <= state.num_warmup
        usable: Bool[Array, " segments"] = warming & ~result.failed & ~result.diverging

        num_passes = state.num_passes + usable
        weight = jnp.where(usable, 2 / (num_passes + 1), 0.0)
        mean_square = state.mean_square_score + weight * (result.mean_square_score - state.mean_square_score)
        bound = 1 / self.grid.sigma[1:] ** 2
        cautious = mean_square * (1 + CAUTION / (state.profile.size * jnp.maximum(num_passes, 1)))
        learnt = jnp.where((num_passes > 0) & (mean_square > 0), jnp.minimum(cautious, bound), bound)
        curvature = jnp.where(warming, learnt, state.curvature)

        # The profile is learnt from whole passes, shrunk towards its mean by a few passes' worth of prior:
        # one squared score a pass and coordinate is noisy.
        passes = jnp.max(num_passes)
        gain = jnp.where(jnp.all(usable), 2 / (passes + 1), 0.0)
        mean_profile = state.mean_profile + gain * (result.profile - state.mean_profile)
        prior = PROFILE_PRIOR_PASSES * jnp.mean(mean_profile)
        shrunk = (passes * mean_profile + prior) / (passes + PROFILE_PRIOR_PASSES)
        learnt_any = (passes > 0) & (jnp.mean(mean_profile) > 0)
        profile = jnp.where(warming & learnt_any, jnp.clip(shrunk, MIN_PROFILE, 1.0), state.profile)

        step_size, step_size_state = self._step_size(state, result, curvature, iteration)
        return state._replace(
            step_size=jnp.where(warming, step_size.astype(state.step_size.dtype), state.step_size),
            curvature=curvature,
            profile=profile,
            mean_square_score=mean_square,
            mean_profile=mean_profile,
            num_passes=num_passes,
            step_size_state=step_size_state,
            iteration=iteration,
        )

    def _step_size(
        self, state: AdaptState, result: ReverseResult, curvature: PerSegment, iteration: Count
    ) -> tuple[PerSegment, StepSizeState]:
        if self.kernel.given_step_size is not None:
            return state.step_size, state.step_size_state
        if not self.kernel.adapts_step_size:
            adapted = rule_step_size(self.kernel, self.grid, curvature, state.profile.size)
            return adapted, state.step_size_state
        warming, is_last = iteration <= state.num_warmup, iteration == state.num_warmup
        new = self.step_sizes.update(
            state.step_size_state, result.accept_prob, self.target_accept_prob, warming
        )
        return self.step_sizes.step_size(new, 0.0, self.kernel.largest_step_size, freeze=is_last), new
