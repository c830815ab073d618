"""Draws through a segment and back: right kernels are not spoken of, segments that are too long are named."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import numpyro_rtk as rtk
from numpyro_rtk._diagnosis._round_trip import (
    check_round_trip,
    compare,
    num_survey_pairs,
    plan_trip,
    travel,
    travel_all,
    Travellers,
    view,
)
from numpyro_rtk._noising._grid import noise_grid
from numpyro_rtk._noising._times import NoiseRange, segment_times
from numpyro_rtk._score._model import resolve_score
from tests.helpers import Counter


def six_modes(schedule):
    """On a sphere in ten dimensions."""
    means = np.random.default_rng(0).standard_normal((6, 10))
    means *= 1.5 / np.linalg.norm(means, axis=1, keepdims=True)
    return rtk.GaussianMixtureScore(np.full(6, 1 / 6), means, [0.09 * np.eye(10)] * 6, schedule)


def two_modes(schedule, dim=3, gap=1.8, sd=0.15, share=0.25):
    means = np.zeros((2, dim))
    means[:, 0] = [-gap, gap]
    return rtk.GaussianMixtureScore([share, 1 - share], means, [sd**2 * np.eye(dim)] * 2, schedule)


def trip_of(mixture, inner, num_segments):
    """The trip with curvatures from exact draws, and exact draws at `t_min`."""
    schedule = mixture.schedule
    times = segment_times(schedule, num_segments)
    grid = noise_grid(schedule, times, jnp.float32)

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

    trip = plan_trip(resolve_score(lambda x, t: mixture(x, t)), grid, inner, curvatures())
    return trip, times, noised(jr.key(1), grid.t[-1], 128)


def checked(trip, times, draws, schedule=None):
    noise = NoiseRange(rtk.OU() if schedule is None else schedule, times[-1], times[0])
    fly = jax.jit(lambda key, *places: travel_all(key, trip, noise, *places))
    return check_round_trip(jr.key(2), fly, times, draws, trip.inner, "RTKKernel")


@pytest.mark.parametrize("schedule", [rtk.OU(), rtk.EDM()])
def test_enough_segments_are_not_spoken_of(schedule):
    trip, times, draws = trip_of(two_modes(schedule), rtk.PreconditionedMALA(), 32)
    assert checked(trip, times, draws, schedule) == []


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
    steps = getattr(inner, "num_steps", 0)
    assert (f"num_steps={2 * steps}" in finding.message) == hasattr(inner, "num_steps")


class Remembers(rtk.GaussianTransition):
    """Shows what it was handed: the lengths of both segments before, and the older prediction."""

    order: int = eqx.field(static=True, default=3)

    def run_segment(self, key, target, entry, tuning):
        result = super().run_segment(key, target, entry, tuning)
        older = entry.data_predictions[1, 0] - target.x_t[0]
        return result._replace(x=jnp.append(entry.half_log_snr_steps, older))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_kernel_with_a_memory_is_handed_the_two_segments_before(index):
    schedule = rtk.VE(sigma_min=0.01, sigma_max=10.0)
    times = segment_times(schedule, 4, rho=np.inf)
    grid = noise_grid(schedule, times, jnp.float32)
    trip = plan_trip(resolve_score(lambda x, t: 0.0 * x), grid, Remembers(), jnp.ones((4, 3)))
    after = np.asarray(travel(jr.key(0), trip, jnp.zeros((4000, 3)), jnp.asarray(index)).after)
    lengths = np.append(np.zeros(2), np.asarray(0.5 * grid.log_snr_steps))
    np.testing.assert_allclose(after[0, :2], [lengths[index + 1], lengths[index]], rtol=1e-4)
    if index == 2:
        # Without a score the prediction is the point itself, which has the noise of both segments.
        np.testing.assert_allclose(after[:, 2].std(), np.sqrt(grid.v[0] + grid.v[1]), rtol=0.04)


@pytest.mark.slow
def test_sharp_modes_whose_weights_four_segments_change_are_named():
    inner = rtk.PreconditionedMALA(num_steps=1, energy_difference=rtk.Simpson(), max_step_size=4.0)
    (finding,) = checked(*trip_of(two_modes(rtk.OU(), 5, 2.2, 0.13, 0.25), inner, 4))
    assert "`segments=8`" in finding.message


@pytest.mark.slow
def test_the_default_kernel_with_four_segments_is_named():
    (finding,) = checked(*trip_of(six_modes(rtk.OU()), rtk.PreconditionedMALA(), 4))
    assert "`segments=8`" in finding.message
    assert "`num_steps=4`" in finding.message


@pytest.mark.slow
def test_a_broken_reverse_kernel_is_named_also_where_segments_are_short():
    # The control of the silence above: the same kernel without the score on its way back to little noise.
    trip, times, draws = trip_of(two_modes(rtk.OU()), rtk.PreconditionedMALA(num_steps=8), 16)
    mixture, middle = trip.score_fn, float(times[10])

    def broken(x, t):
        return jnp.where(t < 0.9 * middle, 0.0, 1.0) * mixture(x, t)

    (finding,) = checked(trip._replace(score_fn=resolve_score(broken)), times, draws)
    assert finding.index >= 10


def test_travellers_of_a_family_come_back_by_their_own_score():
    """Draws of two laws that lie far apart, taken in any order: each returns to its own."""
    conditions = jnp.array([-30.0, 30.0])
    score = lambda x, t, c: -(x - jnp.exp(-t) * c) / (jnp.exp(-2 * t) + 1 - jnp.exp(-2 * t))
    grid = noise_grid(rtk.OU(), segment_times(rtk.OU(), 8), jnp.float32)
    trip = plan_trip(
        resolve_score(score, conditions=conditions), grid, rtk.GaussianTransition(), jnp.ones((8, 2))
    )
    draws = conditions[jnp.arange(6) % 2][:, None] + jr.normal(jr.key(0), (6, 2))
    taken = jnp.array([[1, 4, 3, 3, 0, 2]])
    noise = NoiseRange(rtk.OU(), t_min=rtk.OU().t_min, t_max=rtk.OU().t_max)
    flown = travel_all(jr.key(1), trip, noise, draws, taken, jnp.array([4]))
    assert np.all(np.abs(np.asarray(flown.after - flown.before)) < 6)


def test_travellers_are_noised_draws_and_cost_what_is_said():
    mixture = two_modes(rtk.OU())
    trip, _, draws = trip_of(mixture, rtk.PreconditionedMALA(), 8)
    counter = Counter(mixture)
    trip = trip._replace(score_fn=resolve_score(counter))
    got = jax.jit(lambda: travel(jr.key(0), trip, draws, jnp.asarray(3)))()
    assert counter.count == 128 * (trip.inner.evaluations_per_segment + 1)
    assert np.all(got.usable)
    s = trip.grid.t[4]
    for x in (got.before, got.after):
        alpha, sigma = float(rtk.OU().alpha(s)), float(rtk.OU().sigma(s))
        exact = alpha**2 * (1.8**2 * 4 * 0.25 * 0.75 + 0.15**2) + sigma**2
        assert np.var(x[:, 0]) == pytest.approx(exact, rel=0.3)


@pytest.mark.parametrize(("dim", "num_segments", "most"), [(3, 4, 16384), (10, 32, 16384), (1024, 32, 1024)])
def test_a_survey_costs_a_few_passes_and_takes_neighbours_together(dim, num_segments, most):
    inner = rtk.PreconditionedMALA()
    num_pairs, together = num_survey_pairs(inner, num_segments, dim)
    cost = num_segments * num_pairs * (inner.evaluations_per_segment + 1)
    assert 0.9 * most <= cost <= most
    assert num_pairs * together == (1024 if dim < 1024 else 32)


@pytest.mark.slow
def test_fresh_draws_are_made_only_where_something_is_suspicious():
    flights = []

    def fly_of(trip, times):
        noise = NoiseRange(rtk.OU(), times[-1], times[0])
        compiled = jax.jit(lambda key, *places: travel_all(key, trip, noise, *places))

        def fly(key, draws, taken, index):
            flights.append((None if draws is None else draws.shape[0], taken.shape, np.asarray(index)))
            return compiled(key, draws, taken, index)

        return fly

    few, times, draws = trip_of(two_modes(rtk.OU()), rtk.ULD(num_steps=1), 6)
    (finding,) = check_round_trip(jr.key(2), fly_of(few, times), times, draws, few.inner, "RTKKernel")
    # 16384 evaluations are 910 round trips of 6 segments at 3 each; then 3072 draws in suspicious segments.
    (first, shape, _), (second, tested, index) = flights
    assert (first, shape, second, tested[1]) == (128, (6, 910), None, 3072)
    assert finding.index in index
    assert tested[0] <= 2

    flights.clear()
    # The survey of the same segments is silent where draws do not move: nothing is suspicious.
    still = lambda key, draws, taken, index: fly_of(few, times)(key, draws, taken, index)
    unmoved = lambda *places: still(*places)._replace(after=still(*places).before)
    assert check_round_trip(jr.key(2), unmoved, times, draws, few.inner, "RTKKernel") == []
    assert all(drawn == 128 for drawn, *_ in flights)


def pairs(num=400, dim=6):
    """Exchangeable pairs of two segments."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((2, num // 2, dim)) + rng.standard_exponential((2, num // 2, 1))
    shared[1] *= 3
    before, after = (shared + 0.5 * rng.standard_normal(shared.shape) for _ in range(2))
    return before, after, np.ones(shared.shape[:2], bool)


def compared(*leaves):
    travellers = Travellers(*leaves)
    return compare(travellers, view(travellers))


def test_exchanging_the_pairs_changes_the_sign_and_nothing_else():
    before, after, usable = pairs()
    one, other = compared(before, after, usable), compared(after, before, usable)
    np.testing.assert_allclose(np.abs(one.z), np.abs(other.z), rtol=1e-9)
    np.testing.assert_allclose(one.change[-1], -other.change[-1], rtol=1e-9)
    assert np.max(np.abs(one.z)) < 4


@pytest.mark.parametrize(
    "break_", [lambda x: x + 0.4, lambda x: 1.15 * x, lambda x: np.where(x > 2, 2 * x, x)]
)
def test_a_change_of_the_law_is_seen(break_):
    before, after, usable = pairs()
    found = compared(before, break_(after), usable)
    assert np.max(np.abs(found.z) * found.large) > 6


def test_pairs_that_failed_are_left_out():
    before, after, usable = pairs()
    after[0, 3], after[1, 5], usable[1, 5] = np.nan, 1e6, False
    assert np.max(np.abs(compared(before, after, usable).z)) < 4
    nothing = compared(before, np.nan * after, usable)
    assert np.all(nothing.z == 0)
