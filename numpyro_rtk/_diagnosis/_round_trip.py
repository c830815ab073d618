r"""Round trip: draws at `s`, noised to `t` and brought back by the reverse kernel, must keep their law.

Acceptance does not show a segment that is too long for its inner steps. Where kernel and draws are right, a
draw `x_s` and the one brought back, `x_s'`, are exchangeable: given `x_t` both follow `p(x_s | x_t)`,
independently. So every difference `h(x_s') - h(x_s)` is symmetric about 0, whatever `h`, also if `h` was
chosen by looking at the pairs without their order. A sum of such differences over the root of their sum of
squares exceeds `z` with a probability of at most `exp(-z^2 / 2)`, for any law and any number of pairs: the
rate of false alarms needs no approximation.

The draws of the pilot survey all segments, neighbours together, at the cost of a few passes. Only where that
looks suspicious are fresh draws made, and what looked suspicious, and nothing else, is tested with them.
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
from numpyro_rtk._diagnosis._significance import normal_score, symmetric_limit
from numpyro_rtk._noising._grid import NoiseGrid
from numpyro_rtk._noising._times import NoiseRange
from numpyro_rtk._reverse._base import AbstractInnerKernel, first_entry, SegmentEntry, SegmentTuning
from numpyro_rtk._reverse._calibration import or_zero
from numpyro_rtk._reverse._pass import rule_step_size
from numpyro_rtk._reverse._pilot import prior_draws
from numpyro_rtk._reverse._segment import ReverseTransition
from numpyro_rtk._score._model import ScoreModel
from numpyro_rtk._thresholds import MANY_DIMENSIONS


SURVEY_EVALUATIONS, SURVEY_EVALUATIONS_IN_MANY = 16384, 1024
"""Score evaluations of the survey, about; in many dimensions each draw tells more and costs more."""
SURVEY_PAIRS, SURVEY_PAIRS_IN_MANY = 1024, 32
"""Pairs that the survey looks at together, from one segment or from neighbours."""
MIN_PAIRS = 4
"""Fewest pairs of a segment in the survey."""
FRESH_DRAWS, FRESH_DRAWS_IN_MANY = 3072, 160
"""Draws of the test that follows a suspicion."""
NUM_CHOSEN = 2
"""Suspicious groups of which the worst segment is tested."""
SUSPICIOUS = 2.5
"""Normal score of the survey that is looked into."""
MIN_SHIFT, MIN_SPREAD, MIN_TOTAL_SPREAD = 0.15, 0.075, 0.04
"""Change from which it is said: of a mean in sds, of the spread in one direction and over all coordinates
relatively. The last of the galaxy network from 20 segments of four MALA steps is 0.015."""
NUM_RANDOM, NUM_PRINCIPAL = 4, 4
"""Directions that draws are projected on: random ones, and those of largest variance."""


class Travellers(NamedTuple):
    """Draws before and after a round trip through one segment, or through several."""

    before: Array | np.ndarray
    """Shape `(draws, *event)`, or `(segments, draws, *event)`."""
    after: Array | np.ndarray
    """The same shape."""
    usable: Array | np.ndarray
    """Shape `(draws,)`, or `(segments, draws)`: neither failed nor diverging."""


class Trip(NamedTuple):
    """All that round trips need, as arrays and static values."""

    score_fn: ScoreModel
    grid: NoiseGrid
    inner: AbstractInnerKernel
    tuning: SegmentTuning
    """Step sizes, shape `(segments,)`, and curvatures, shape `(segments, *event)` or `(segments,)`."""


def plan_trip(score_fn: ScoreModel, grid: NoiseGrid, inner: AbstractInnerKernel, curvature: Array) -> Trip:
    """The trip with the step sizes that warmup ends with where steps are accepted, as they nearly always are.

    Args:
        score_fn: The score.
        grid: Segments.
        inner: The reverse kernel.
        curvature: Of each segment's end by coordinate, from a pilot, shape `(segments, *event)`.
    """
    flat = curvature.reshape(grid.num_segments, -1)
    step_size = rule_step_size(inner, grid, jnp.mean(flat, axis=1), flat.shape[1])
    if inner.given_step_size is None and math.isfinite(inner.largest_step_size):
        step_size = jnp.full_like(step_size, inner.largest_step_size)
    return Trip(score_fn, grid, inner, SegmentTuning(step_size, curvature))


def travel(
    key: RandomKey, trip: Trip, draws: Array, index: Array, members: Array | None = None
) -> Travellers:
    """Take prior draws through one segment and back.

    *Cost.* `evaluations_per_segment + 1` score evaluations a draw, and one more for each segment
    before that the kernel remembers.

    Args:
        key: Random key.
        trip: The kernel and its grid.
        draws: Draws of the prior at `t_min`, shape `(draws, *event)`.
        index: Of the segment, from noise to data, scalar.
        members: Which member of a family each draw is of, shape `(draws,)`; in turn unless given.
    """
    score_fn, grid, inner, tuning = trip
    members = jnp.arange(draws.shape[0]) if members is None else members

    def scores_of(x: Array, t: Array) -> Array:
        return score_fn.each(x, t, members)

    down_key, up_key, above_key, back_key = jr.split(key, 4)
    segment = grid.segment(index)
    x_s = _noised(down_key, draws, grid.total_a[index + 1], grid.total_v[index + 1])
    x_t = _noised(up_key, x_s, segment.a, segment.v)
    # What the segments before would have handed on.
    data, lengths, x_above = [], [], x_t
    for i, key_above in enumerate(jr.split(above_key, inner.history)):
        above = grid.segment(jnp.maximum(index - 1 - i, 0))
        x_above = _noised(key_above, x_above, above.a, above.v)
        variance = (above.a * above.sigma_s) ** 2 + above.v
        data.append((x_above + variance * scores_of(x_above, above.t)) / above.alpha_t)
        length = 0.5 * jnp.log1p(above.v / (above.a * above.sigma_s) ** 2)
        lengths.append(jnp.where(index <= i, 0.0, length))

    def back(key: RandomKey, member: Array, x_t: Array, score_t: Array, data: list[Array]) -> Any:
        target = ReverseTransition(score_fn.member(member), x_t, score_t, segment)
        here = SegmentTuning(tuning.step_size[index], tuning.curvature[index])
        entry = SegmentEntry(jnp.stack(data), jnp.stack(lengths)) if data else first_entry(x_t)
        result = inner.run_segment(key, target, entry, here)
        return result.x, ~(result.failed | result.diverging)

    keys = jr.split(back_key, draws.shape[0])
    x_back, usable = jax.vmap(back)(keys, members, x_t, scores_of(x_t, segment.t), data)
    return Travellers(x_s, x_back, usable)


def _noised(key: RandomKey, x: Array, a: Array, v: Array) -> Array:
    return a * x + jnp.sqrt(v) * jr.normal(key, x.shape, x.dtype)


def travel_all(
    key: RandomKey, trip: Trip, noise: NoiseRange, draws: Array | None, taken: Array, index: Array
) -> Travellers:
    """`travel` through several segments, one after the other.

    Args:
        key: Random key.
        trip: The kernel and its grid.
        noise: The ends of the grid.
        draws: Draws of the prior at `t_min`, shape `(draws, *event)`, of the members of a family in turn;
            `None` makes fresh ones.
        taken: Indices of the draws that each segment takes, shape `(segments, pairs)`.
        index: Of the segments, shape `(segments,)`.
    """
    draw_key, key = jr.split(key)
    if draws is None:
        shape = trip.tuning.curvature.shape[1:]
        num_draws = num_fresh_draws(math.prod(shape))
        fresh, _ = prior_draws(draw_key, trip.score_fn, noise, shape, trip.grid.t.dtype, num_draws)
        draws = or_zero(fresh)

    def one(inputs: tuple[RandomKey, Array, Array]) -> Travellers:
        key, taken, index = inputs
        return travel(key, trip, draws[taken], index, taken)

    return jax.lax.map(one, (jr.split(key, index.shape[0]), taken, index))


def num_fresh_draws(dim: int) -> int:
    """Fresh draws of the test that follows a suspicion."""
    return FRESH_DRAWS if dim <= MANY_DIMENSIONS else FRESH_DRAWS_IN_MANY


def num_survey_pairs(kernel: AbstractInnerKernel, num_segments: int, dim: int) -> tuple[int, int]:
    """Pairs of each segment in the survey, and neighbouring segments that are looked at together."""
    few = dim <= MANY_DIMENSIONS
    evaluations, together = (
        (SURVEY_EVALUATIONS, SURVEY_PAIRS) if few else (SURVEY_EVALUATIONS_IN_MANY, SURVEY_PAIRS_IN_MANY)
    )
    cost = num_segments * (kernel.evaluations_per_segment + 1 + kernel.history)
    num_pairs = max(min(evaluations // cost, together), MIN_PAIRS)
    return num_pairs, max(together // num_pairs, 1)


class View(NamedTuple):
    """How pairs are looked at: what must not depend on their order."""

    mean: np.ndarray
    """By segment, shape `(segments, 1, dim)`."""
    scale: np.ndarray
    """Root mean square deviation of a coordinate, by segment, shape `(segments, 1, 1)`."""
    directions: np.ndarray
    """Unit vectors, shape `(dim, directions)`."""
    spread: np.ndarray
    """Mean absolute deviation in each direction, in units of the scale, shape `(directions,)`."""


class Changes(NamedTuple):
    """How draws differ after a round trip; mean and spread in each direction, then the spread in all."""

    change: np.ndarray
    """Shape `(statistics,)`: of a mean in sds, of a spread relatively."""
    score: np.ndarray
    """Shape `(statistics,)`: of the differences, as `normal_score`."""
    z: np.ndarray
    """Shape `(statistics,)`: sum of the differences over the root of their sum of squares."""

    @property
    def floor(self) -> np.ndarray:
        """Change of each from which it is said."""
        num = self.z.size // 2
        return np.repeat([MIN_SHIFT, MIN_SPREAD, MIN_TOTAL_SPREAD], [num, num, 1])

    @property
    def large(self) -> np.ndarray:
        """Which changes would be said if they were certain."""
        return np.abs(self.change) > self.floor


def view(pairs: Travellers, seed: int = 0) -> View:
    """The mean, the scale and the directions of pairs, shape `(segments, draws, *event)`."""
    both = np.concatenate(_flat(pairs)[:2], axis=1)
    known = np.isfinite(both)
    count = np.maximum(np.sum(known, axis=1, keepdims=True), 1)
    mean = np.sum(np.where(known, both, 0.0), axis=1, keepdims=True) / count
    both = np.where(known, both - mean, 0.0)
    scale = np.maximum(np.sqrt(np.mean(both**2, axis=(1, 2), keepdims=True)), np.finfo(np.float32).tiny)
    both = (both / scale).reshape(-1, both.shape[-1])
    directions = _directions(both, seed)
    spread = np.maximum(np.mean(np.abs(both @ directions), axis=0), np.finfo(np.float32).tiny)
    return View(mean, scale, directions, spread)


def compare(pairs: Travellers, seen: View) -> Changes:
    """The statistics of pairs, all segments together. All that enters but the sign of a difference is
    symmetric in a pair.
    """
    before, after, usable = _flat(pairs)
    before, after = ((x - seen.mean) / seen.scale for x in (before, after))
    before, after = before[usable], after[usable]
    if before.shape[0] < MIN_PAIRS:
        nothing = np.zeros(2 * seen.spread.size + 1)
        return Changes(nothing, nothing, nothing)
    low, high = before @ seen.directions, after @ seen.directions
    sizes = [np.sqrt(np.mean(x**2, axis=1)) for x in (before, after)]
    total = 2 * (sizes[1] - sizes[0]) / np.maximum(sizes[1] + sizes[0], np.finfo(np.float64).tiny)
    # The sd of a normal variable of this mean absolute deviation.
    shift = (high - low) / (math.sqrt(math.pi / 2) * seen.spread)
    difference = np.column_stack([shift, (np.abs(high) - np.abs(low)) / seen.spread, total])
    size = np.sqrt(np.sum(difference**2, axis=0))
    return Changes(
        difference.mean(axis=0),
        normal_score(difference.T),
        difference.sum(axis=0) / np.maximum(size, np.finfo(np.float64).tiny),
    )


def _flat(pairs: Travellers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Events as vectors in float64, NaN where unusable, and which pairs are usable."""
    before, after = (np.asarray(x, np.float64) for x in (pairs.before, pairs.after))
    before, after = before.reshape(*before.shape[:2], -1), after.reshape(*after.shape[:2], -1)
    usable = np.asarray(pairs.usable) & np.all(np.isfinite(before) & np.isfinite(after), axis=2)
    mask = usable[..., None]
    return np.where(mask, before, np.nan), np.where(mask, after, np.nan), usable


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


def check_round_trip(
    key: RandomKey,
    fly: Callable[[RandomKey, Array | None, Array, Array], Travellers],
    times: np.ndarray,
    draws: Array,
    kernel: AbstractInnerKernel,
    owner: str,
    remedy: str = "",
) -> list[Finding]:
    """Which segment changes the law of draws that pass through it: of groups that look suspicious, the worst.

    *Law.* Right segments are spoken of at `FALSE_ALARM_RATE`, all together.

    *Cost.* `SURVEY_EVALUATIONS`, or `MIN_PAIRS` round trips of every segment if that is more. Where something
    is suspicious, `FRESH_DRAWS` prior draws and up to `NUM_CHOSEN` round trips of each in addition.

    Args:
        key: Random key.
        fly: `travel_all` of draws through segments, compiled: `fly(key, draws, taken, index)`.
        times: The time grid, shape `(segments + 1,)`.
        draws: Draws of the prior at `t_min`, shape `(draws, *event)`.
        kernel: The reverse kernel.
        owner: What the user sets `segments` of, such as `RTKKernel`.
        remedy: What to write, where that is not more of `segments`.

    Returns:
        No finding, or one: the worst segment.
    """
    num_segments, dim = times.size - 1, math.prod(draws.shape[1:])
    survey_key, test_key = jr.split(key)
    num_pairs, together = num_survey_pairs(kernel, num_segments, dim)
    groups = np.array_split(np.arange(num_segments), -(-num_segments // together))
    place = np.concatenate([np.arange(group.size) for group in groups])
    # Neighbours in a group take different draws, as far as they last.
    taken = (place[:, None] * num_pairs + np.arange(num_pairs)) % draws.shape[0]
    flown = jax.device_get(fly(survey_key, draws, jnp.asarray(taken), jnp.arange(num_segments)))
    suspicions = []
    for group in groups:
        pairs = Travellers(*(np.asarray(leaf)[group] for leaf in flown))
        seen = view(pairs, int(group[0]))
        changes = compare(pairs, seen)
        score = np.abs(changes.score) * changes.large
        statistics = np.flatnonzero(score > SUSPICIOUS)
        if statistics.size:
            worst = int(group[_worst_segment(pairs, seen, statistics)])
            suspicions.append((float(np.max(score)), worst, seen, statistics))
    if not suspicions:
        return []
    chosen = sorted(suspicions, key=lambda one: -one[0])[:NUM_CHOSEN]
    segments = jnp.asarray([segment for _, segment, *_ in chosen])
    taken = jnp.broadcast_to(jnp.arange(num_fresh_draws(dim)), (len(chosen), num_fresh_draws(dim)))
    flown = jax.device_get(fly(test_key, None, taken, segments))
    most, finding = symmetric_limit(sum(statistics.size for *_, statistics in chosen)), []
    for i, (_, segment, seen, statistics) in enumerate(chosen):
        pairs = Travellers(*(np.asarray(leaf)[i : i + 1] for leaf in flown))
        found = compare(pairs, view(pairs)._replace(directions=seen.directions, spread=seen.spread))
        for k in statistics:
            if found.large[k] and abs(found.z[k]) > most:
                most, finding = abs(found.z[k]), [_too_long(segment, k, found, times, kernel, owner, remedy)]
    return finding


def _worst_segment(pairs: Travellers, seen: View, statistics: np.ndarray) -> int:
    """Where in a group something is suspicious, by the statistics that are."""
    worst = []
    for k in range(seen.mean.shape[0]):
        one = Travellers(*(leaf[k : k + 1] for leaf in pairs))
        own = seen._replace(mean=seen.mean[k : k + 1], scale=seen.scale[k : k + 1])
        worst.append(np.max(np.abs(compare(one, own).score[statistics])))
    return int(np.argmax(worst))


def _words(statistic: int, found: Changes) -> str:
    change, num = found.change[statistic], found.z.size // 2
    if statistic < num:
        return f"their mean moves by {abs(change):.2f} sd in one direction"
    where = "in one direction" if statistic < 2 * num else "over all coordinates"
    return f"their spread {where} becomes {(1 + 0.5 * change) / (1 - 0.5 * change):.2f} times what it was"


def _too_long(
    index: int,
    statistic: int,
    found: Changes,
    times: np.ndarray,
    inner: AbstractInnerKernel,
    owner: str,
    remedy: str,
) -> Finding:
    num_segments = times.size - 1
    num_steps = getattr(inner, "num_steps", None)
    steps = "" if num_steps is None else f", or more steps (`num_steps={2 * num_steps}`, now {num_steps})"
    remedy = remedy or f"Give more segments (`segments={2 * num_segments}`, now {num_segments}){steps}."
    message = (
        f"Segment {index} of {num_segments} of `{owner}` (t={times[index]:.3g} to {times[index + 1]:.3g}) is "
        f"too long for `{type(inner).__name__}`: prior draws at its end that are noised to its start and "
        f"brought back have another law, {_words(statistic, found)}. Draws follow another law than the "
        f"network's. {remedy}"
    )
    return Finding("round_trip", index, float(found.change[statistic]), message)
