"""The reverse driver: `x_T -> x_0` over the segments, in pure JAX, for one event."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float

from numpyro_rtk._custom_types import Event, Flag, PerSegment, RandomKey, ScoreFn
from numpyro_rtk._noising._grid import SegmentGrid, terminal_variance
from numpyro_rtk._reverse._base import AbstractInnerKernel, SegmentEntry, SegmentTuning
from numpyro_rtk._reverse._segment import ReverseTransition


class Tuning(NamedTuple):
    """What warmup learns about a whole pass; memory `num_segments` plus one event."""

    step_size: PerSegment
    """Step size of each segment, in the inner kernel's own unit."""
    curvature: PerSegment
    """Curvature of `-log p_s`, mean over coordinates, for each segment."""
    profile: Event
    """Curvature times `sigma_s^2` by coordinate, averaged over segments, in (0, 1]."""

    def by_coordinate(self, curvature: Array, sigma_s: Array) -> Event:
        """Curvature of one segment by coordinate: its mean, spread over coordinates as the profile says.

        The curvature of every segment times `sigma_s^2` is taken as a power of the profile, the power that
        matches the mean on the log scale. Exact where all coordinates are alike.
        """
        log_mean_profile = jnp.minimum(jnp.log(jnp.mean(self.profile)), -1e-3)
        power = jnp.clip(jnp.log(curvature * sigma_s**2) / log_mean_profile, 0.0, 10.0)
        shape = self.profile**power
        return jnp.minimum(curvature * shape / jnp.mean(shape), 1 / sigma_s**2)


def default_tuning(inner: AbstractInnerKernel, grid: SegmentGrid, shape: tuple[int, ...]) -> Tuning:
    """Tuning before anything is learnt: safe for any `p_s`.

    The curvature of `-log p_s` is at most `1 / sigma_s^2`, whatever the data (its Hessian is
    `I / sigma_s^2 - alpha_s^2 Cov(x_0 | x_s) / sigma_s^4`). Step sizes given by the user are used as they
    are.
    """
    curvature = 1 / grid.sigma_s**2
    return Tuning(
        rule_step_size(inner, grid, curvature, math.prod(shape)), curvature, jnp.ones(shape, grid.t.dtype)
    )


def rule_step_size(
    inner: AbstractInnerKernel, grid: SegmentGrid, curvature: PerSegment, dim: int
) -> PerSegment:
    """Step sizes by the inner kernel's rule, or its own `step_size` where it has one."""
    given = getattr(inner, "step_size", None)
    if given is None:
        return inner.default_step_size(grid.a**2 / grid.v + curvature, dim)
    return jnp.broadcast_to(jnp.asarray(given, grid.t.dtype), grid.t.shape)


class ReverseResult(NamedTuple):
    """What a reverse pass gives."""

    x: Event
    """The draw at `t_min`; meaningless where `failed`."""
    accept_prob: PerSegment
    """Mean acceptance probability of each segment's inner steps."""
    mean_square_score: PerSegment
    """`|score|^2 / dim` at each segment's end."""
    profile: Event
    """`sigma_s^2 score^2` by coordinate at the segments' ends, averaged over segments with more weight
    where the curvature is below its bound `1 / sigma_s^2`."""
    diverging: Bool[Array, " segments"]
    """Segments that met something non-finite or exploding."""
    failed: Flag
    """Whether the draw is unusable."""
    path: Float[Array, "..."] | None
    """The draws at all segment ends, shape `(num_segments, *event)`, or `None` unless asked for."""


def num_score_evaluations(inner: AbstractInnerKernel, num_segments: int) -> int:
    """Score evaluations of one pass: segments times evaluations per segment."""
    return num_segments * inner.evaluations_per_segment


def reverse_pass(
    key: RandomKey,
    score_fn: ScoreFn,
    grid: SegmentGrid,
    inner: AbstractInnerKernel,
    tuning: Tuning,
    x: Event,
    *,
    keep_path: bool = False,
) -> ReverseResult:
    """Run the reverse pass from `x` at the top of the grid to `t_min`, for one event.

    A scan over segments, in which each segment hands its last score to the next; memory does not grow
    with the number of segments unless the path is kept. `num_segments * (num_steps + 1)`
    evaluations for MALA and its relatives with the trapezoid rule.

    Args:
        key: Random key.
        score_fn: `score_fn(x, t)`.
        grid: From `segment_grid`.
        inner: The inner kernel.
        tuning: Step sizes and curvatures of the segments.
        x: Terminal noise, any shape, from `terminal_sample`.
        keep_path: Whether to return the draws at all segment ends.

    Returns:
        The draw and what each segment reports.
    """
    # The score at the top only centres the start of the first segment: the score of the law that x
    # was drawn from, which costs no evaluation.
    score = -x / terminal_variance(grid)

    # Segments where the curvature is below its bound tell coordinates apart; the others hardly do.
    weights = 1 - tuning.curvature * grid.sigma_s**2 + 1e-2
    weights = weights / jnp.sum(weights)

    def body(carry: Any, inputs: tuple[RandomKey, SegmentGrid, Array, Array, Array]) -> Any:
        x, score, entry, profile, failed = carry
        key, segment, step_size, curvature, weight = inputs
        segment_tuning = SegmentTuning(step_size, tuning.by_coordinate(curvature, segment.sigma_s))
        target = ReverseTransition(
            score_fn=score_fn,
            x_t=x,
            score_t=score,
            s=segment.s,
            t=segment.t,
            a=segment.a,
            v=segment.v,
            sigma_s=segment.sigma_s,
            alpha_t=segment.alpha_t,
        )
        result = inner.run_segment(key, target, entry, segment_tuning)
        profile = profile + weight * segment.sigma_s**2 * result.square_score
        carry = (result.x, result.score, result.entry, profile, failed | result.failed)
        reported = (result.accept_prob, jnp.mean(result.square_score), result.diverging)
        return carry, (reported, result.x if keep_path else None)

    keys = jr.split(key, grid.t.shape[0])
    entry = SegmentEntry(jnp.zeros_like(x), jnp.zeros((), x.dtype))
    carry = (x, score, entry, jnp.zeros_like(x), jnp.zeros((), bool))
    inputs = (keys, grid, tuning.step_size, tuning.curvature, weights)
    (x, _, _, profile, failed), (reported, path) = jax.lax.scan(body, carry, inputs)
    accept_prob, mean_square_score, diverging = reported
    return ReverseResult(x, accept_prob, mean_square_score, profile, diverging, failed, path)
