"""The reverse driver: `x_T -> x_0` over the segments, in pure JAX, for one event."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_rtk._custom_types import Event, Flag, PerSegment, RandomKey, ScoreFn
from numpyro_rtk._inner import AbstractInnerKernel, SegmentEntry, SegmentTuning
from numpyro_rtk._schedule import AbstractNoiseSchedule
from numpyro_rtk._target import ReverseTransition


class SegmentGrid(NamedTuple):
    """The segments of a pass, from noise to data; every field has one entry per segment."""

    t: PerSegment
    """Time at the start of the segment (more noise)."""
    s: PerSegment
    """Time at its end (less noise)."""
    a: PerSegment
    """`alpha(t) / alpha(s)`."""
    v: PerSegment
    """Variance of noising from `s` to `t`."""
    alpha_t: PerSegment
    """Signal scale at `t`."""
    sigma_s: PerSegment
    """Noise scale at `s`."""
    alpha_s: PerSegment
    """Signal scale at `s`."""


def segment_grid(schedule: AbstractNoiseSchedule, times: np.ndarray, dtype: Any) -> SegmentGrid:
    """Everything the segments need from the schedule, evaluated in float64 and cast to `dtype`.

    Args:
        schedule: The noising process.
        times: A checked time grid, shape `(num_segments + 1,)`, decreasing.
        dtype: Of the draws.
    """
    # The network must see the same rounded time as the coefficients.
    times = np.asarray(times, dtype).astype(np.float64)
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        t, s = jnp.asarray(times[:-1], jnp.float64), jnp.asarray(times[1:], jnp.float64)
        a, v = schedule.transition(s, t)
        values = (t, s, a, v, schedule.alpha(t), schedule.sigma(s), schedule.alpha(s))
        values = [np.asarray(value) for value in values]
    return SegmentGrid(*(jnp.asarray(value, dtype) for value in values))


def default_tuning(inner: AbstractInnerKernel, grid: SegmentGrid, dim: int) -> SegmentTuning:
    """Tuning before anything is learnt: safe for any `p_s`.

    The curvature of `-log p_s` is at most `1 / sigma_s^2`, whatever the data (its Hessian is
    `I / sigma_s^2 - alpha_s^2 Cov(x_0 | x_s) / sigma_s^4`). Step sizes given by the user are used as they are.
    """
    return with_step_size_rule(inner, grid, 1 / grid.sigma_s**2, dim)


def with_step_size_rule(inner: AbstractInnerKernel, grid: SegmentGrid, curvature: PerSegment, dim: int) -> SegmentTuning:
    """Step sizes by the inner kernel's rule, or its own `step_size` where it has one."""
    given = getattr(inner, "step_size", None)
    if given is None:
        step_size = inner.default_step_size(grid.a**2 / grid.v + curvature, dim)
    else:
        step_size = jnp.broadcast_to(jnp.asarray(given, grid.t.dtype), grid.t.shape)
    return SegmentTuning(step_size, curvature)


class ReverseResult(NamedTuple):
    """What a reverse pass gives."""

    x: Event
    """The draw at `t_min`; meaningless where `failed`."""
    accept_prob: PerSegment
    """Mean acceptance probability of each segment's inner steps."""
    mean_square_score: PerSegment
    """`|score|^2 / dim` at each segment's end."""
    diverging: Bool[Array, " segments"]
    """Segments that met something non-finite or exploding."""
    failed: Flag
    """Whether the draw is unusable."""
    path: Float[Array, "..."] | None
    """The draws at all segment ends, shape `(num_segments, *event)`, or `None` unless asked for."""


def terminal_sample(key: RandomKey, grid: SegmentGrid, shape: tuple[int, ...], dtype: Any) -> Event:
    """`x_T ~ N(0, (alpha^2 + sigma^2) I)` at the top of the grid: the law of noised data of unit variance."""
    return jnp.sqrt(terminal_variance(grid)) * jr.normal(key, shape, dtype)


def terminal_variance(grid: SegmentGrid) -> Array:
    """`alpha^2 + sigma^2` at the top of the grid; 1 for variance-preserving schedules."""
    sigma_squared = grid.a[0] ** 2 * grid.sigma_s[0] ** 2 + grid.v[0]
    return grid.alpha_t[0] ** 2 + sigma_squared


def num_score_evaluations(inner: AbstractInnerKernel, num_segments: int) -> int:
    """Score evaluations of one pass: segments times evaluations per segment."""
    return num_segments * inner.evaluations_per_segment


def reverse_pass(
    key: RandomKey,
    score_fn: ScoreFn,
    grid: SegmentGrid,
    inner: AbstractInnerKernel,
    tuning: SegmentTuning,
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
        tuning: Step sizes and curvatures, one per segment.
        x: Terminal noise, any shape, from `terminal_sample`.
        keep_path: Whether to return the draws at all segment ends.

    Returns:
        The draw and what each segment reports.
    """
    # The score at the top only centres the start of the first segment: the score of the law that x
    # was drawn from, which costs no evaluation.
    score = -x / terminal_variance(grid)

    def body(carry: Any, inputs: tuple[RandomKey, SegmentGrid, SegmentTuning]) -> Any:
        x, score, entry, failed = carry
        key, segment, segment_tuning = inputs
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
        carry = (result.x, result.score, result.entry, failed | result.failed)
        reported = (result.accept_prob, result.mean_square_score, result.diverging)
        return carry, (reported, result.x if keep_path else None)

    keys = jr.split(key, grid.t.shape[0])
    entry = SegmentEntry(jnp.zeros_like(x), jnp.zeros((), x.dtype))
    carry = (x, score, entry, jnp.zeros((), bool))
    (x, _, _, failed), (reported, path) = jax.lax.scan(body, carry, (keys, grid, tuning))
    accept_prob, mean_square_score, diverging = reported
    return ReverseResult(x, accept_prob, mean_square_score, diverging, failed, path)
