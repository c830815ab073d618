"""The reverse driver: `x_T -> x_0` over the segments, in pure JAX, for one event."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float

from numpyro_rtk._custom_types import Event, Flag, PerSegment, RandomKey
from numpyro_rtk._noising._grid import NoiseGrid, Segment
from numpyro_rtk._noising._terminal import Terminal
from numpyro_rtk._reverse._base import AbstractInnerKernel, first_entry, SegmentEntry, SegmentTuning
from numpyro_rtk._reverse._segment import ReverseTransition
from numpyro_rtk._score._model import ScoreModel


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


def default_tuning(inner: AbstractInnerKernel, grid: NoiseGrid, shape: tuple[int, ...]) -> Tuning:
    """Tuning before anything is learnt: safe for any `p_s`.

    The curvature of `-log p_s` is at most `1 / sigma_s^2`, whatever the data (its Hessian is
    `I / sigma_s^2 - alpha_s^2 Cov(x_0 | x_s) / sigma_s^4`). Step sizes given by the user are used as they
    are.
    """
    curvature = 1 / grid.sigma[1:] ** 2
    return Tuning(
        rule_step_size(inner, grid, curvature, math.prod(shape)), curvature, jnp.ones(shape, grid.t.dtype)
    )


def rule_step_size(
    inner: AbstractInnerKernel, grid: NoiseGrid, curvature: PerSegment, dim: int
) -> PerSegment:
    """Step sizes by the inner kernel's rule, or its own `step_size` where it has one."""
    given = inner.given_step_size
    if given is None:
        return inner.default_step_size(grid.a**2 / grid.v + curvature, dim)
    return jnp.broadcast_to(jnp.asarray(given, grid.t.dtype), grid.a.shape)


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


class _Pass(NamedTuple):
    """What is carried from segment to segment."""

    x: Event
    score: Event
    entry: SegmentEntry
    profile: Event
    failed: Flag


def reverse_pass(
    key: RandomKey,
    score_fn: ScoreModel,
    grid: NoiseGrid,
    kernel: AbstractInnerKernel,
    tuning: Tuning,
    terminal: Terminal,
    *,
    x: Event | None = None,
    keep_path: bool = False,
) -> ReverseResult:
    """Run the reverse pass from the top of the grid to `t_min`, for one event.

    A scan over segments, in which each segment hands its last score to the next; memory does not grow
    with the number of segments unless the path is kept. `num_segments * (num_steps + 1)`
    evaluations for MALA and its relatives with the trapezoid rule.

    Args:
        key: Random key.
        score_fn: The score, with energies for kernels that need them.
        grid: Segments.
        kernel: The reverse kernel.
        tuning: Step sizes and curvatures of the segments.
        terminal: The law at the top of the grid.
        x: The point to start from; `None` draws it from `terminal`.
        keep_path: Whether to return the draws at all segment ends.

    Returns:
        The draw and what each segment reports.
    """
    noise_key, segments_key = jr.split(key)
    x = terminal.sample(noise_key) if x is None else x
    segments = grid.segments
    # Segments where the curvature is below its bound tell coordinates apart; the others hardly do.
    weights = 1 - tuning.curvature * segments.sigma_s**2 + 1e-2
    weights = weights / jnp.sum(weights)

    def body(carry: _Pass, inputs: tuple[RandomKey, Segment, Array, Array, Array]) -> Any:
        key, segment, step_size, curvature, weight = inputs
        segment_tuning = SegmentTuning(step_size, tuning.by_coordinate(curvature, segment.sigma_s))
        target = ReverseTransition(score_fn, carry.x, carry.score, segment)
        result = kernel.run_segment(key, target, carry.entry, segment_tuning)
        profile = carry.profile + weight * segment.sigma_s**2 * result.square_score
        reported = (result.accept_prob, jnp.mean(result.square_score), result.diverging)
        carry = _Pass(result.x, result.score, result.entry, profile, carry.failed | result.failed)
        return carry, (reported, result.x if keep_path else None)

    # The score at the top only centres the start of the first segment: that of the law that x was drawn
    # from costs no evaluation.
    start = _Pass(
        x, terminal.score(x), first_entry(x, kernel.history), jnp.zeros_like(x), jnp.zeros((), bool)
    )
    keys = jr.split(segments_key, grid.num_segments)
    inputs = (keys, segments, tuning.step_size, tuning.curvature, weights)
    end, (reported, path) = jax.lax.scan(body, start, inputs)
    accept_prob, mean_square_score, diverging = reported
    return ReverseResult(end.x, accept_prob, mean_square_score, end.profile, diverging, end.failed, path)
