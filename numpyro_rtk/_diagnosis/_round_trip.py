r"""Round trip: draws at `s`, noised to `t` and brought back by the reverse kernel, must keep their law.

Acceptance does not show a segment that is too long for its inner steps. Where kernel and draws are right, a
draw `x_s` and the one brought back, `x_s'`, are exchangeable: given `x_t` both follow `p(x_s | x_t)`,
independently. So every difference `h(x_s') - h(x_s)` is symmetric about 0, whatever `h`, also if `h` was
chosen by looking at the pairs without their order. A sum of such differences over the root of their sum of
squares exceeds `z` with a probability of at most `exp(-z^2 / 2)`, for any law and any number of pairs: the
rate of false alarms needs no approximation.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from numpyro_rtk._custom_types import RandomKey
from numpyro_rtk._diagnosis._report import Finding
from numpyro_rtk._diagnosis._significance import symmetric_limit
from numpyro_rtk._noising._grid import NoiseGrid
from numpyro_rtk._reverse._base import AbstractInnerKernel, SegmentEntry, SegmentTuning
from numpyro_rtk._reverse._segment import ReverseTransition
from numpyro_rtk._score._model import ScoreModel
from numpyro_rtk._thresholds import MANY_DIMENSIONS


BATCH, NUM_BATCHES = 96, 11
"""Draws that travel together, and batches of them: the first surveys every segment, the others are for those
that are looked at closely."""
BATCH_IN_MANY, NUM_BATCHES_IN_MANY = 16, 9
"""The same in many dimensions."""
NUM_CHOSEN = 4
"""Segments that are looked at closely."""
MIN_CHANGE, MIN_TOTAL_CHANGE = 0.15, 0.08
"""Change in one direction, of the mean in sds or of the variance relatively, and of the variance in all
directions, from which it is said. That of the galaxy network from 20 segments of four MALA steps is 0.04."""
NUM_RANDOM, NUM_PRINCIPAL = 4, 4
"""Directions that draws are projected on: random ones, and those of largest variance."""


class Travellers(NamedTuple):
    """Draws before and after a round trip through one segment."""

    before: Array | np.ndarray
    """Shape `(draws, *event)`."""
    after: Array | np.ndarray
    """The same shape."""
    usable: Array | np.ndarray
    """Shape `(draws,)`: neither failed nor diverging."""


class Trip(NamedTuple):
    """All that round trips need, as arrays and static values."""

    score_fn: ScoreModel
    grid: NoiseGrid
    inner: AbstractInnerKernel
    tuning: SegmentTuning
    """Step sizes, shape `(segments,)`, and curvatures, shape `(segments, *event)` or `(segments,)`."""


def travel(key: RandomKey, trip: Trip, draws: Array, index: Array) -> Travellers:
    """Take prior draws through one segment and back.

    *Cost.* `evaluations_per_segment + 2` score evaluations a draw.

    Args:
        key: Random key.
        trip: The kernel and its grid.
        draws: Draws of the prior at `t_min`, shape `(draws, *event)`.
        index: Of the segment, from noise to data, scalar.
    """
    score_fn, grid, inner, tuning = trip
    scores_of = jax.vmap(score_fn, in_axes=(0, None))
    down_key, up_key, above_key, back_key = jr.split(key, 4)
    segment, above = grid.segment(index), grid.segment(jnp.maximum(index - 1, 0))
    x_s = _noised(down_key, draws, grid.total_a[index + 1], grid.total_v[index + 1])
    x_t = _noised(up_key, x_s, segment.a, segment.v)
    # What the segment before would have handed on.
    x_above = _noised(above_key, x_t, above.a, above.v)
    variance = (above.a * above.sigma_s) ** 2 + above.v
    data = (x_above + variance * scores_of(x_above, above.t)) / above.alpha_t
    length = jnp.where(index == 0, 0.0, 0.5 * jnp.log1p(above.v / (above.a * above.sigma_s) ** 2))

    def back(key: RandomKey, x_t: Array, score_t: Array, data: Array) -> Any:
        target = ReverseTransition(score_fn, x_t, score_t, segment)
        here = SegmentTuning(tuning.step_size[index], tuning.curvature[index])
        result = inner.run_segment(key, target, SegmentEntry(data, length), here)
        return result.x, ~(result.failed | result.diverging)

    keys = jr.split(back_key, draws.shape[0])
    x_back, usable = jax.vmap(back)(keys, x_t, scores_of(x_t, segment.t), data)
    return Travellers(x_s, x_back, usable)


def _noised(key: RandomKey, x: Array, a: Array, v: Array) -> Array:
    return a * x + jnp.sqrt(v) * jr.normal(key, x.shape, x.dtype)


class Changes(NamedTuple):
    """How draws differ after a round trip; mean and variance in each direction, then the variance in all."""

    change: np.ndarray
    """Shape `(statistics,)`: of a mean in sds, of a variance relatively."""
    z: np.ndarray
    """Shape `(statistics,)`: sum of the differences over the root of their sum of squares."""

    @property
    def floor(self) -> np.ndarray:
        """Change of each from which it is said."""
        return np.append(np.full(self.z.size - 1, MIN_CHANGE), MIN_TOTAL_CHANGE)


def compare(travellers: Travellers, seed: int = 0) -> Changes:
    """The statistics of pairs. All that enters but the sign of a difference is symmetric in a pair."""
    before, after = (np.asarray(x, np.float64) for x in (travellers.before, travellers.after))
    before, after = before.reshape(before.shape[0], -1), after.reshape(after.shape[0], -1)
    usable = np.asarray(travellers.usable) & np.all(np.isfinite(before) & np.isfinite(after), axis=1)
    before, after = before[usable], after[usable]
    mean = 0.5 * (before.mean(axis=0) + after.mean(axis=0)) if before.size else 0.0
    before, after = before - mean, after - mean
    directions = _directions(np.concatenate([before, after]), seed)
    values = []
    for x in (before, after):
        projected = x @ directions
        values.append(np.column_stack([projected, projected**2, np.mean(x**2, axis=1)]))
    num = directions.shape[1]
    difference, both = values[1] - values[0], np.concatenate(values)
    if not difference.size:
        return Changes(np.zeros(2 * num + 1), np.zeros(2 * num + 1))
    tiny = np.finfo(np.float64).tiny
    scale = np.append(np.sqrt(np.mean(both[:, :num] ** 2, axis=0)), np.mean(both[:, num:], axis=0))
    size = np.sqrt(np.sum(difference**2, axis=0))
    return Changes(
        difference.mean(axis=0) / np.maximum(scale, tiny), difference.sum(axis=0) / np.maximum(size, tiny)
    )


def _directions(x: np.ndarray, seed: int) -> np.ndarray:
    """Unit vectors, shape `(dim, directions)`: those of most variance, and random ones."""
    num, dim = x.shape
    if dim <= NUM_PRINCIPAL:
        return np.linalg.eigh(x.T @ x)[1]
    if dim <= num:
        principal = np.linalg.eigh(x.T @ x)[1][:, -NUM_PRINCIPAL:]
    else:
        principal = x.T @ np.linalg.eigh(x @ x.T)[1][:, -NUM_PRINCIPAL:]
    random = np.random.default_rng(seed).standard_normal((dim, NUM_RANDOM))
    directions = np.concatenate([principal, random], axis=1)
    return directions / np.maximum(np.linalg.norm(directions, axis=0), np.finfo(np.float64).tiny)


def _batches(dim: int) -> tuple[int, int]:
    return (BATCH, NUM_BATCHES) if dim <= MANY_DIMENSIONS else (BATCH_IN_MANY, NUM_BATCHES_IN_MANY)


def num_round_trip_draws(dim: int) -> int:
    """Number of prior draws that `check_round_trip` asks for: 1,056, or 144 above 256 dimensions."""
    return math.prod(_batches(dim))


def check_round_trip(
    key: RandomKey,
    fly: Callable[[RandomKey, Array, Array], Travellers],
    times: np.ndarray,
    draws: Array,
    kernel: AbstractInnerKernel,
    owner: str,
) -> list[Finding]:
    """Which segment changes the law of draws that pass through it.

    The first draws survey all segments; the segments that look worst are tested with the others.

    *Law.* Right segments are spoken of at `FALSE_ALARM_RATE`, all together.

    *Cost.* At most `(BATCH * segments + NUM_CHOSEN * draws) * (evaluations_per_segment + 2)` evaluations, a
    batch at a time.

    Args:
        key: Random key.
        fly: `travel` of a batch of draws through a segment, compiled: `fly(key, draws, index)`.
        times: The time grid, shape `(segments + 1,)`.
        draws: Draws of the prior at `t_min`, shape `(draws, *event)`; `num_round_trip_draws` of them.
        kernel: The reverse kernel.
        owner: What the user sets `segments` of, such as `RTKKernel`.

    Returns:
        No finding, or one: the worst segment.
    """
    size, _ = _batches(math.prod(draws.shape[1:]))
    batches = [draws[first : first + size] for first in range(0, draws.shape[0] - size + 1, size)]
    num_segments = times.size - 1
    survey_key, test_key = jr.split(key)

    def trip_of(key: RandomKey, index: int, batches: list[Array]) -> Changes:
        keys = jr.split(key, len(batches))
        parts = [
            jax.device_get(fly(key, batch, jnp.asarray(index)))
            for key, batch in zip(keys, batches, strict=True)
        ]
        return compare(Travellers(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True))), index)

    if len(batches) < 2:
        return []
    surveyed = [
        trip_of(key, index, batches[:1]) for index, key in enumerate(jr.split(survey_key, num_segments))
    ]
    suspicion = [np.max(np.abs(found.z) * (np.abs(found.change) > found.floor)) for found in surveyed]
    chosen = [int(index) for index in np.argsort(suspicion)[::-1][:NUM_CHOSEN]]
    tested = [
        trip_of(key, index, batches[1:])
        for index, key in zip(chosen, jr.split(test_key, len(chosen)), strict=True)
    ]
    limit = symmetric_limit(len(chosen) * tested[0].z.size)
    excess = [
        np.where((np.abs(found.z) > limit) & (np.abs(found.change) > found.floor), np.abs(found.z), 0.0)
        for found in tested
    ]
    worst = int(np.argmax([np.max(values) for values in excess]))
    statistic = int(np.argmax(excess[worst]))
    if not excess[worst][statistic]:
        return []
    change = float(tested[worst].change[statistic])
    return [_too_long(chosen[worst], change, _words(statistic, tested[worst]), times, kernel, owner)]


def _words(statistic: int, found: Changes) -> str:
    change, num = found.change[statistic], found.z.size // 2
    if statistic < num:
        return f"their mean moves by {abs(change):.2f} sd in one direction"
    where = "in one direction" if statistic < 2 * num else "over all coordinates"
    return f"their variance {where} becomes {1 + change / (1 - 0.5 * change):.2f} times what it was"


def _too_long(
    index: int, change: float, words: str, times: np.ndarray, inner: AbstractInnerKernel, owner: str
) -> Finding:
    num_segments = times.size - 1
    num_steps = getattr(inner, "num_steps", None)
    steps = "" if num_steps is None else f", or more steps (`num_steps={2 * num_steps}`, now {num_steps})"
    message = (
        f"Segment {index} of {num_segments} of `{owner}` (t={times[index]:.3g} to {times[index + 1]:.3g}) is "
        f"too long for `{type(inner).__name__}`: prior draws at its end that are noised to its start and "
        f"brought back have another law, {words}. Draws follow another law than the network's. Give more "
        f"segments (`segments={2 * num_segments}`, now {num_segments}){steps}."
    )
    return Finding("round_trip", index, change, message)
