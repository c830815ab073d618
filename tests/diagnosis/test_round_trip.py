"""Draws through a segment and back: right kernels are not spoken of, segments that are too long are named."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import numpyro_rtk as rtk
from numpyro_rtk._diagnosis._round_trip import (
    check_round_trip,
    compare,
    num_round_trip_draws,
    travel,
    Travellers,
    Trip,
)
from numpyro_rtk._noising._grid import noise_grid
from numpyro_rtk._noising._times import segment_times
from numpyro_rtk._reverse._base import SegmentTuning
from numpyro_rtk._reverse._pass import rule_step_size
from numpyro_rtk._score._model import resolve_score
from tests.helpers import Counter


def two_modes(schedule, dim=3, gap=1.8, sd=0.15, share=0.25):
    means = np.zeros((2, dim))
    means[:, 0] = [-gap, gap]
    return rtk.GaussianMixtureScore([share, 1 - share], means, [sd**2 * np.eye(dim)] * 2, schedule)


def trip_of(mixture, inner, num_segments):
    """The trip with curvatures from exact draws, and exact draws at `t_min`."""
    schedule = mixture.schedule
    times = segment_times(schedule, num_segments)
    grid = noise_grid(schedule, times, jnp.float32)
    dim = mixture.means.shape[1]

    def noised(key, t, num):
        data_key, noise_key = jr.split(key)
        x = mixture.sample(data_key, num)
        return schedule.alpha(t) * x + schedule.sigma(t) * jr.normal(noise_key, x.shape)

    @jax.jit
    def curvatures():
        def of_level(inputs):
            key, s = inputs
            scores = jax.vmap(mixture, in_axes=(0, None))(noised(key, s, 1000), s)
            return jnp.mean(scores**2, axis=0)

        return jax.lax.map(of_level, (jr.split(jr.key(0), num_segments), grid.t[1:]))

    curvature = curvatures()
    step_size = rule_step_size(inner, grid, jnp.mean(curvature, axis=1), dim)
    trip = Trip(resolve_score(lambda x, t: mixture(x, t)), grid, inner, SegmentTuning(step_size, curvature))
    return trip, times, noised(jr.key(1), grid.t[-1], num_round_trip_draws(dim))


def checked(trip, times, draws):
    fly = jax.jit(lambda key, draws, index: travel(key, trip, draws, index))
    return check_round_trip(jr.key(2), fly, times, draws, trip.inner, "RTKKernel")


@pytest.mark.parametrize("schedule", [rtk.OU(), rtk.EDM()])
def test_enough_segments_are_not_spoken_of(schedule):
    trip, times, draws = trip_of(two_modes(schedule), rtk.PreconditionedMALA(), 32)
    assert checked(trip, times, draws) == []


@pytest.mark.parametrize(
    ("inner", "num_segments"),
    [
        (rtk.PreconditionedMALA(num_steps=1, energy_difference=rtk.Simpson()), 4),
        (rtk.GaussianTransition(order=2), 5),
        (rtk.ULD(num_steps=1), 6),
    ],
)
def test_segments_that_are_too_long_are_named(inner, num_segments):
    trip, times, draws = trip_of(two_modes(rtk.OU()), inner, num_segments)
    (finding,) = checked(trip, times, draws)
    k = finding.index
    assert finding.kind == "round_trip"
    assert (
        f"Segment {k} of {num_segments} of `RTKKernel` (t={times[k]:.3g} to {times[k + 1]:.3g})"
        in finding.message
    )
    assert f"`segments={2 * num_segments}`" in finding.message
    assert ("num_steps=2" in finding.message) == hasattr(inner, "num_steps")


def test_a_broken_reverse_kernel_is_named_also_where_segments_are_short():
    # The control of the silence above: the same kernel with a score that is 15 % too small on its way back.
    trip, times, draws = trip_of(two_modes(rtk.OU()), rtk.PreconditionedMALA(num_steps=8), 16)
    mixture, middle = trip.score_fn, float(times[10])

    def broken(x, t):
        return jnp.where(t < 0.9 * middle, 0.5, 1.0) * mixture(x, t)

    (finding,) = checked(trip._replace(score_fn=broken), times, draws)
    assert finding.index >= 10


def test_travellers_are_noised_draws_and_cost_what_is_said():
    mixture = two_modes(rtk.OU())
    trip, _, draws = trip_of(mixture, rtk.PreconditionedMALA(), 8)
    counter = Counter(mixture)
    got = jax.jit(lambda: travel(jr.key(0), trip._replace(score_fn=counter), draws[:200], jnp.asarray(3)))()
    assert counter.count == 200 * (trip.inner.evaluations_per_segment + 2)
    assert np.all(got.usable)
    s = trip.grid.t[4]
    for x in (got.before, got.after):
        alpha, sigma = float(rtk.OU().alpha(s)), float(rtk.OU().sigma(s))
        exact = alpha**2 * (1.8**2 * 4 * 0.25 * 0.75 + 0.15**2) + sigma**2
        assert np.var(x[:, 0]) == pytest.approx(exact, rel=0.3)


def pairs(num=400, dim=6):
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((num, dim)) + rng.standard_exponential((num, 1))
    before, after = (shared + 0.5 * rng.standard_normal((num, dim)) for _ in range(2))
    return before, after, np.ones(num, bool)


def test_exchanging_the_pairs_changes_the_sign_and_nothing_else():
    before, after, usable = pairs()
    one, other = compare(Travellers(before, after, usable)), compare(Travellers(after, before, usable))
    np.testing.assert_allclose(np.abs(one.z), np.abs(other.z), rtol=1e-9)
    np.testing.assert_allclose(one.change[-1], -other.change[-1], rtol=1e-9)
    assert np.max(np.abs(one.z)) < 4


@pytest.mark.parametrize(
    "break_", [lambda x: x + 0.3, lambda x: 1.15 * x, lambda x: np.where(x > 2, 2 * x, x)]
)
def test_a_change_of_the_law_is_seen(break_):
    before, after, usable = pairs()
    found = compare(Travellers(before, break_(after), usable))
    assert np.max(np.abs(found.z) * (np.abs(found.change) > found.floor)) > 6


def test_pairs_that_failed_are_left_out():
    before, after, usable = pairs()
    after[3], after[5], usable[5] = np.nan, 1e6, False
    assert np.max(np.abs(compare(Travellers(before, after, usable)).z)) < 4
    nothing = compare(Travellers(before, np.nan * after, usable))
    assert np.all(nothing.z == 0)
