import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_rtk import Cosine, DiscreteVP, EDM, FlowMatching, OU, paper_segment_times, segment_times, VE, VP
from numpyro_rtk._noising._grid import noise_grid
from numpyro_rtk._noising._times import check_times
from numpyro_rtk._noising._variance_preserving import AbstractVariancePreserving
from tests.helpers import DDPM_ALPHAS_CUMPROD, SCHEDULES


pytestmark = pytest.mark.usefixtures("strict_dtypes")

EPS32, EPS64 = (float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64))

all_schedules = pytest.mark.parametrize("schedule", [pytest.param(v, id=k) for k, v in SCHEDULES.items()])
# Between its steps a discrete schedule has no closed form, and across them its derivative jumps.
CONTINUOUS = {k: v for k, v in SCHEDULES.items() if k != "DiscreteVP"}
continuous_schedules = pytest.mark.parametrize(
    "schedule", [pytest.param(v, id=k) for k, v in CONTINUOUS.items()]
)
VARIANCE_PRESERVING = (AbstractVariancePreserving, Cosine, DiscreteVP)


def float32_times(schedule):
    """Times that float32 represents exactly, dense at both ends, where formulas cancel.

    Always of one shape, so that JAX compiles an elementary operation once for all schedules.
    """
    low, high = schedule.t_min, schedule.t_max
    if isinstance(schedule, DiscreteVP):
        steps = [0, 1, 2, 10, 300, 500, 900, 998, 999]
        return np.sort(np.concatenate([steps, np.linspace(20, 880, 21)]).round()).astype(np.float32)
    offsets = np.geomspace(1e-4, 0.5, 12) * (high - low)
    near_low = low * (1 + np.geomspace(1e-4, 10, 8))
    times = np.concatenate([[low, high], low + offsets, high - offsets, near_low]).astype(np.float32)
    return np.sort(np.clip(times, np.float32(low), np.float32(high)))


def time_pairs(schedule):
    """All `s < t` of the times above, and pairs that are close to each other."""
    times = np.unique(float32_times(schedule))
    i, j = np.triu_indices(times.size, 1)
    s, t = times[i], times[j]
    if not isinstance(schedule, DiscreteVP):
        close = times[:-1] + np.float32(1e-3) * np.diff(times)
        s, t = np.concatenate([s, times[:-1]]), np.concatenate([t, close])
    return np.resize(s[t > s], 600), np.resize(t[t > s], 600)


def in_float64(function, *values):
    with jax.enable_x64(True):
        result = function(*(jnp.asarray(np.asarray(value, np.float64)) for value in values))
        return jax.tree.map(np.asarray, result)


def log_snr_size(schedule, t):
    """Size of the terms that a log signal-to-noise ratio is the sum of: what its rounding is relative to."""
    alpha, sigma = in_float64(schedule.alpha, t), in_float64(schedule.sigma, t)
    return 1 + np.abs(2 * np.log(alpha)) + np.abs(2 * np.log(sigma))


@all_schedules
def test_log_snr_is_that_of_alpha_and_sigma(schedule, x64):
    t = float32_times(schedule).astype(np.float64)
    expected = 2 * (np.log(schedule.alpha(t)) - np.log(schedule.sigma(t)))
    np.testing.assert_allclose(
        schedule.log_snr(t), expected, rtol=0, atol=8 * EPS64 * log_snr_size(schedule, t).max()
    )


@all_schedules
def test_variance_preserving_means_what_it_says(schedule, x64):
    t = float32_times(schedule).astype(np.float64)
    total = schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
    if isinstance(schedule, VARIANCE_PRESERVING):
        np.testing.assert_allclose(total, 1.0, rtol=8 * EPS64)
    else:
        assert np.abs(total - 1).max() > 0.1


@pytest.mark.parametrize(
    ("schedule", "alpha", "sigma"),
    [
        (OU(), lambda t: np.exp(-t), lambda t: np.sqrt(1 - np.exp(-2 * t))),
        (VP(), lambda t: np.exp(-(0.1 * t + 19.9 * t**2 / 2) / 2), None),
        (VP(1, 1, t_max=10), lambda t: np.exp(-t / 2), None),
        (VP(0.2, 3, t_max=4), lambda t: np.exp(-(0.2 * t + 2.8 * t**2 / 8) / 2), None),
        (Cosine(offset=0), lambda t: np.cos(np.pi * t / 2), lambda t: np.sin(np.pi * t / 2)),
        (
            Cosine(),
            lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2),
            None,
        ),
        (VE(), lambda t: np.ones_like(t), lambda t: 0.01 ** (1 - t) * 50.0**t),
        (EDM(), lambda t: np.ones_like(t), lambda t: t),
        (FlowMatching(), lambda t: 1 - t, lambda t: t),
    ],
)
def test_textbook_formulas(schedule, alpha, sigma, x64):
    # Away from the ends, where the textbook formulas are accurate in float64.
    t = np.linspace(schedule.t_min + 0.1 * (schedule.t_max - schedule.t_min), 0.99 * schedule.t_max, 20)
    sigma = sigma or (lambda t: np.sqrt(1 - alpha(t) ** 2))
    np.testing.assert_allclose(schedule.alpha(t), alpha(t), rtol=1e-13)
    np.testing.assert_allclose(schedule.sigma(t), sigma(t), rtol=1e-13)


@pytest.mark.parametrize(
    "t", [0.3, np.float32(0.3), np.array([0.2, 0.3], np.float32), np.full((2, 1, 3), 0.3, np.float32)]
)
@continuous_schedules
def test_shapes_and_dtypes_follow_time(schedule, t):
    t = jnp.asarray(t)
    results = [
        jax.eval_shape(f, t)
        for f in (schedule.alpha, schedule.sigma, schedule.log_snr, schedule.inverse_log_snr)
    ]
    results += jax.eval_shape(schedule.transition, t, t)
    for result in results:
        assert result.shape == t.shape
        assert result.dtype == jnp.float32


@all_schedules
def test_float64_stays_float64(schedule, x64):
    t = jnp.asarray([1.0, 0.5])
    functions = schedule.alpha, schedule.sigma, schedule.log_snr, schedule.inverse_log_snr
    results = [jax.eval_shape(f, t) for f in functions] + [*jax.eval_shape(schedule.transition, t, t)]
    assert {result.dtype for result in results} == {jnp.dtype(jnp.float64)}


# No cancellation: with the rounding of the time itself out of the way, float32 differs from
# float64 by the rounding of a few elementary functions and of their arguments.


def rounding_of_exponent(schedule, s, t):
    """Relative error of `exp(x)` in units of eps is the size of `x`; this is the largest exponent in use."""
    if isinstance(schedule, VE):
        return 2 * math.log(schedule.sigma_max / schedule.sigma_min) * np.maximum(1.0, t)
    return np.abs(in_float64(lambda s, t: 2 * jnp.log(schedule.alpha(t) / schedule.alpha(s)), s, t))


@all_schedules
def test_float32_is_accurate_at_every_time(schedule):
    t = float32_times(schedule)
    zero = np.zeros_like(t)
    size = 1 + (
        rounding_of_exponent(schedule, zero, t)
        if isinstance(schedule, VE)
        else -2 * np.log(in_float64(schedule.alpha, t))
    )
    if isinstance(schedule, DiscreteVP):
        size = size + np.abs(in_float64(schedule.log_snr, t))  # the table holds log_snr
    for function in (schedule.alpha, schedule.sigma):
        error = np.abs(np.asarray(function(jnp.asarray(t)), np.float64) / in_float64(function, t) - 1)
        assert np.all(error < 4 * EPS32 * size), (function, error / EPS32)
    error = np.abs(np.asarray(schedule.log_snr(jnp.asarray(t)), np.float64) - in_float64(schedule.log_snr, t))
    assert np.all(error < 4 * EPS32 * log_snr_size(schedule, t)), error / EPS32


@all_schedules
def test_float32_transition_is_accurate_for_short_and_for_long_steps(schedule):
    s, t = time_pairs(schedule)
    a, v = (np.asarray(value, np.float64) for value in schedule.transition(jnp.asarray(s), jnp.asarray(t)))
    exact_a, exact_v = in_float64(schedule.transition, s, t)
    size = 1 + rounding_of_exponent(schedule, s, t)
    assert np.all(np.abs(a / exact_a - 1) < 4 * EPS32 * size)
    if isinstance(schedule, DiscreteVP):
        # The rate between two steps is a difference of two table look-ups; drivers evaluate it in float64.
        rate = lambda t: -2 * np.log(in_float64(schedule.alpha, t))
        size = size * (
            1 + (np.abs(in_float64(schedule.log_snr, s)) + 1) * (rate(s) + rate(t)) / (rate(t) - rate(s))
        )
    assert np.all(np.abs(v / exact_v - 1) < 4 * EPS32 * size)


@all_schedules
def test_inverse_of_log_snr_round_trip(schedule):
    for dtype, eps in ((np.float32, EPS32), (np.float64, EPS64)):
        with jax.enable_x64(dtype == np.float64):
            t = float32_times(schedule).astype(dtype)
            back = np.asarray(schedule.inverse_log_snr(schedule.log_snr(jnp.asarray(t))), np.float64)
        # A rounding of log_snr moves the time by itself over the slope, plus the rounding of the time.
        inner = np.clip(
            t, schedule.t_min + 1e-3 * isinstance(schedule, DiscreteVP), schedule.t_max * (1 - 1e-6)
        )
        slope = np.abs(in_float64(jax.vmap(jax.grad(schedule.log_snr)), inner))
        tolerance = 8 * eps * (np.abs(t) + log_snr_size(schedule, t) / slope)
        assert np.all(np.abs(back - t) <= tolerance), np.abs(back - t) / tolerance


@all_schedules
def test_log_snr_decreases_and_spans_noise_levels(schedule, x64):
    t = np.linspace(schedule.t_min, schedule.t_max, 1000)
    assert np.all(np.diff(schedule.log_snr(t)) < 0)
    assert np.all(np.diff(schedule.alpha(t)) <= 0)
    assert schedule.log_snr(schedule.t_min) > 4
    assert schedule.log_snr(schedule.t_max) < -5


@all_schedules
def test_transition_is_defined_by_alpha_and_sigma(schedule, x64):
    s, t = (times.astype(np.float64) for times in time_pairs(schedule))
    a, v = schedule.transition(s, t)
    np.testing.assert_allclose(a, schedule.alpha(t) / schedule.alpha(s), rtol=64 * EPS64)
    # The definition cancels: it is good to a rounding of sigma(t)^2 only.
    expected = schedule.sigma(t) ** 2 - a**2 * schedule.sigma(s) ** 2
    size = schedule.sigma(t) ** 2 * (1 + rounding_of_exponent(schedule, s, t))
    assert np.all(np.abs(v - expected) < 16 * EPS64 * size)
    assert np.all(v > 0)


@all_schedules
def test_transition_is_a_semigroup(schedule, x64):
    times = float32_times(schedule).astype(np.float64)
    indices = np.random.default_rng(0).integers(0, times.size, (3, 300))
    r, s, t = times[np.sort(indices, axis=0)]
    a_rs, v_rs = schedule.transition(r, s)
    a_st, v_st = schedule.transition(s, t)
    a_rt, v_rt = schedule.transition(r, t)
    np.testing.assert_allclose(a_rt, a_rs * a_st, rtol=64 * EPS64)
    # Rounding of a rate near the top of a table is absolute, hence a floor for short steps there.
    atol = 1e-13 if isinstance(schedule, DiscreteVP) else 0
    np.testing.assert_allclose(v_rt, a_st**2 * v_rs + v_st, rtol=256 * EPS64, atol=atol)


@all_schedules
def test_transition_over_no_time_is_the_identity(schedule):
    t = jnp.asarray(float32_times(schedule))
    a, v = schedule.transition(t, t)
    np.testing.assert_array_equal(a, 1.0)
    np.testing.assert_array_equal(v, 0.0)


def scalar_functions(schedule):
    reference = 0.5 * (schedule.t_min + schedule.t_max)
    return {
        "alpha": schedule.alpha,
        "sigma": schedule.sigma,
        "log_snr": schedule.log_snr,
        "a": lambda t: schedule.transition(reference, t)[0],
        "v": lambda t: schedule.transition(reference, t)[1],
        "v by s": lambda s: schedule.transition(s, jnp.asarray(schedule.t_max, s.dtype))[1],
        "inverse of log_snr": lambda t: schedule.inverse_log_snr(3 * t / schedule.t_max - 1),
    }


@all_schedules
def test_derivatives_in_time(schedule):
    functions = scalar_functions(schedule)
    stacked = lambda t: jnp.stack([function(t) for function in functions.values()])
    derivative = jax.jit(jax.vmap(jax.jacfwd(stacked)))

    ends = jnp.asarray([schedule.t_min, schedule.t_max], jnp.float32)
    assert np.all(np.isfinite(derivative(ends)))

    if isinstance(schedule, DiscreteVP):
        t = np.array([0.5, 5.5, 300.25, 700.5, 998.5])
        step = 1e-3
    else:
        t = np.clip(float32_times(schedule), schedule.t_min * 1.01 + 1e-4, 0.9999 * schedule.t_max).astype(
            np.float32
        )
        t = t.astype(np.float64)
        step = 1e-4 * np.minimum(t, schedule.t_max - t)
    exact = in_float64(derivative, t)
    # A finite difference of fourth order: relative truncation (1e-4)^4, rounding 1e-16 of the value over the
    # step.
    values = jax.jit(jax.vmap(stacked))
    f = lambda k: in_float64(values, t + k * step)
    finite = (8 * (f(1) - f(-1)) - (f(2) - f(-2))) / (12 * np.reshape(step, (-1, 1)))
    size = np.abs(f(0)) / np.reshape(step, (-1, 1))
    for k, name in enumerate(functions):
        error = np.abs(finite - exact)[:, k]
        assert np.all(error <= 1e-7 * np.abs(exact[:, k]) + 1e-12 * size[:, k]), (name, error)

    # In float32 a table's slope is a difference of its entries, so a discrete schedule is left out.
    if not isinstance(schedule, DiscreteVP):
        error = np.abs(derivative(jnp.asarray(t, jnp.float32)) - exact)
        for k, name in enumerate(functions):
            # JAX differentiates expm1(x) as expm1(x) + 1, which keeps an absolute accuracy only.
            floor = 0.0 if "snr" in name else 0.1 * np.max(np.abs(exact[:, k]))
            scale = np.abs(exact[:, k]) * log_snr_size(schedule, t) + floor
            assert np.all(error[:, k] <= 16 * EPS32 * scale), (name, error[:, k] / scale)


def test_ou_is_the_constant_rate_process():
    ou, vp = OU(t_max=4.0), VP(2.0, 2.0, t_max=4.0)
    t = np.geomspace(1e-3, 4.0, 20, dtype=np.float32)
    for name in ("alpha", "sigma", "log_snr"):
        np.testing.assert_allclose(getattr(ou, name)(t), getattr(vp, name)(t), rtol=2 * EPS32)
    log_snr = np.linspace(-8, 6, 20, dtype=np.float32)
    np.testing.assert_allclose(ou.inverse_log_snr(log_snr), vp.inverse_log_snr(log_snr), rtol=4 * EPS32)


def test_schedules_are_hashable_values():
    assert OU() == OU()
    assert hash(VP()) == hash(VP())
    assert OU() != OU(t_max=4)
    assert isinstance(OU(t_max=4).t_max, float)


# Discrete steps.


def test_discrete_steps_are_the_checkpoint():
    schedule = SCHEDULES["DiscreteVP"]
    steps = np.arange(1000)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            schedule.alpha(steps.astype(np.float64)) ** 2, DDPM_ALPHAS_CUMPROD, rtol=32 * EPS64
        )
        np.testing.assert_allclose(
            schedule.sigma(steps.astype(np.float64)) ** 2, 1 - DDPM_ALPHAS_CUMPROD, rtol=1e-12
        )
    # Integer times as a network gets them are taken, too. The table holds log_snr, whose rounding is the
    # error.
    with jax.numpy_dtype_promotion("standard"):
        squared = schedule.alpha(jnp.asarray(steps, jnp.int32)) ** 2
    np.testing.assert_allclose(
        squared, DDPM_ALPHAS_CUMPROD, rtol=4 * EPS32 * log_snr_size(schedule, steps).max()
    )
    assert (schedule.t_min, schedule.t_max) == (0.0, 999.0)


def test_discrete_network_time_is_the_nearest_integer():
    network_time = SCHEDULES["DiscreteVP"].network_time(jnp.asarray([0.0, 998.9999, 12.0001]))
    assert network_time.dtype == jnp.int32
    np.testing.assert_array_equal(network_time, [0, 999, 12])
    assert OU().network_time(0.25) == 0.25


def test_discrete_agrees_with_linear_rate_exactly_at_the_steps(x64):
    # The cumulative products of the continuous process itself, not of its Euler steps.
    vp, n = VP(), 500
    t = (np.arange(n) + 1) / n
    discrete = DiscreteVP(np.exp(-np.asarray(vp.integrated_rate(t))))
    steps = np.arange(n, dtype=np.float64)
    for name in ("alpha", "sigma"):
        np.testing.assert_allclose(getattr(discrete, name)(steps), getattr(vp, name)(t), rtol=1e-12)
    a, v = discrete.transition(steps[:-1], steps[1:])
    exact_a, exact_v = vp.transition(t[:-1], t[1:])
    np.testing.assert_allclose(a, exact_a, rtol=1e-12)
    np.testing.assert_allclose(v, exact_v, rtol=1e-10)


def test_discrete_agrees_with_linear_rate_to_discretisation_accuracy(x64):
    # DDPM's alphas are prod(1 - beta_i / n) with -log(1 - x) = x + x^2/2 + ...; rates at midpoints integrate
    # a linear rate exactly, so that the integrated rate is too large by the integral of beta^2 / (2 n), no
    # more.
    vp = VP()
    errors = []
    for n in (1000, 2000):
        edges = np.arange(1, n + 1) / n
        midpoints = edges - 0.5 / n
        beta = vp.beta_min + (vp.beta_max - vp.beta_min) * midpoints
        discrete = DiscreteVP(np.cumprod(1 - beta / n))
        error = -2 * np.log(discrete.alpha(np.arange(n) * 1.0)) - vp.integrated_rate(edges)
        bias = np.cumsum(beta**2) / (2 * n**2)
        np.testing.assert_allclose(error, bias, rtol=0.02)  # the next term is 2 beta_max / (3 n) of it
        errors.append(error[-1])
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.01)


# Grids.


@pytest.mark.parametrize("rho", [1.0, 7.0, math.inf])
@pytest.mark.parametrize("num_segments", [1, 30])
@all_schedules
def test_segment_times(schedule, num_segments, rho):
    times = segment_times(schedule, num_segments, rho=rho)
    assert times.dtype == np.float64
    assert times.shape == (num_segments + 1,)
    assert times[0] == schedule.t_max
    assert times[-1] == schedule.t_min
    assert np.all(np.diff(times) < 0)
    np.testing.assert_array_equal(check_times(schedule, times), times)
    if not isinstance(schedule, DiscreteVP):
        log_ratio = -0.5 * in_float64(schedule.log_snr, times)
        levels = log_ratio if math.isinf(rho) else np.exp(log_ratio / rho)
        np.testing.assert_allclose(np.diff(levels), np.mean(np.diff(levels)), rtol=1e-9)


def test_segment_times_default_is_karras(x64):
    # Equation 5 of Karras et al. in its own schedule.
    i = np.arange(19) / 18
    expected = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(segment_times(EDM(), 18), expected, rtol=1e-12)


def test_larger_rho_puts_segments_at_low_noise():
    middles = [segment_times(OU(), 10, rho=rho)[5] for rho in (1, 3, 7, math.inf)]
    assert middles == sorted(middles, reverse=True)


def test_segment_times_do_not_depend_on_precision_or_on_a_trace():
    expected = segment_times(OU(), 7)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(segment_times(OU(), 7), expected)

    @jax.jit
    def traced(x):
        np.testing.assert_array_equal(segment_times(OU(), 7), expected)
        return x

    traced(1.0)


@pytest.mark.parametrize("num_segments", [1, 5, 40, 60, 62, 63])
@pytest.mark.parametrize("rho", [1.0, 7.0, math.inf])
def test_discrete_grids_are_distinct_integers(num_segments, rho):
    schedule = DiscreteVP(np.cumprod(1 - np.linspace(1e-3, 0.2, 64)))
    times = segment_times(schedule, num_segments, rho=rho)
    np.testing.assert_array_equal(times, np.round(times))
    assert times.shape == (num_segments + 1,)
    assert np.all(np.diff(times) <= -1)
    assert (times[0], times[-1]) == (63.0, 0.0)
    np.testing.assert_array_equal(check_times(schedule, times), times)


@pytest.mark.parametrize("num_segments", [0, -1, 2.0, True, "3"])
def test_segment_times_refuses_a_bad_number(num_segments):
    with pytest.raises(
        ValueError, match=r"`num_segments` \(or `segments`\) must be an integer of at least 1, got"
    ):
        segment_times(OU(), num_segments)


@pytest.mark.parametrize("rho", [0.5, -1.0, math.nan])
def test_segment_times_refuses_a_bad_rho(rho):
    with pytest.raises(ValueError, match=r"`segment_times\(rho=...\)` must be at least 1, got"):
        segment_times(OU(), 4, rho=rho)


def test_more_segments_than_steps():
    with pytest.raises(ValueError, match="`segments=64` is more than the 63 steps"):
        segment_times(DiscreteVP(np.cumprod(1 - np.linspace(1e-3, 0.2, 64))), 64)


@pytest.mark.parametrize("smoothness", [0.01, 0.5, 3.0, 1000.0])
@pytest.mark.parametrize(("t_max", "t_min"), [(5.0, 1e-3), (2.0, 0.3), (0.0011, 0.001)])
def test_paper_segments_have_constant_length(smoothness, t_max, t_min, x64):
    times = paper_segment_times(smoothness, t_max, t_min=t_min)
    eta = 0.5 * math.log(1 + 1 / (2 * smoothness))
    lengths = -np.diff(times)
    assert times.size >= 2
    assert (times[0], times[-1]) == (t_max, t_min)
    np.testing.assert_allclose(lengths[:-1], eta, rtol=1e-9)
    # The last one is what remains, up to a remainder too short to be a segment of its own.
    assert 1e-3 * eta * (1 - 1e-6) < lengths[-1] or lengths.size == 1
    assert 0 < lengths[-1] <= eta * (1 + 1.001e-3)
    # What the length is chosen for: a^2 / v = 2 L.
    a, v = OU(t_max=t_max, t_min=t_min).transition(times[1:-1], times[:-2])
    np.testing.assert_allclose(a**2 / v, 2 * smoothness, rtol=1e-8)


def test_paper_segments_that_fit_exactly_leave_no_remainder():
    smoothness = 0.5
    eta = 0.5 * math.log(2.0)
    for num_segments in (1, 3, 7, 20):
        times = paper_segment_times(smoothness, 1e-3 + num_segments * eta)
        np.testing.assert_allclose(-np.diff(times), np.full(num_segments, eta), rtol=1e-12)


@pytest.mark.parametrize("smoothness", [0.0, -1.0, math.inf, math.nan])
def test_paper_segments_refuse_a_bad_smoothness(smoothness):
    with pytest.raises(
        ValueError, match=r"`paper_segment_times\(smoothness=...\)` must be positive and finite, got"
    ):
        paper_segment_times(smoothness, 5.0)


def test_paper_segments_refuse_bad_times():
    with pytest.raises(
        ValueError, match=r"`paper_segment_times\(t_max=...\)` must be positive and finite, got 0.0"
    ):
        paper_segment_times(1.0, 0.0)
    with pytest.raises(
        ValueError, match=r"`paper_segment_times\(t_min=...\)` must be positive and finite, got 0.0"
    ):
        paper_segment_times(1.0, 5.0, t_min=0.0)
    with pytest.raises(ValueError, match=r"needs `t_min` < `t_max`, got t_min=2\.0 and t_max=1\.0"):
        paper_segment_times(1.0, 1.0, t_min=2.0)


@pytest.mark.parametrize(
    ("schedule", "times", "message"),
    [
        (OU(), 3.0, r"must have shape \(num_segments \+ 1,\) with at least two times, got \(\)"),
        (OU(), [5.0], r"with at least two times, got \(1,\)"),
        (OU(), [[5.0, 0.1]], r"got \(1, 2\)"),
        (OU(), [5.0, math.nan, 0.1], "contains NaN or infinity"),
        (OU(), [math.inf, 0.1], "contains NaN or infinity"),
        (OU(), [0.1, 1.0, 5.0], "must decrease strictly.*Reverse it if it increases"),
        (OU(), [5.0, 1.0, 1.0, 0.1], "must decrease strictly"),
        (OU(), [6.0, 0.1], re.escape("runs from 6 to 0.1, outside the schedule's times [0.001, 5]")),
        (OU(), [5.0, 1e-4], "outside the schedule's times"),
        (VE(), [1.0, -1e-3], "outside the schedule's times"),
        (EDM(), [80.0, 1e-3], "outside the schedule's times"),
        (SCHEDULES["DiscreteVP"], [999.0, 10.5, 0.0], "must be integer steps"),
        (SCHEDULES["DiscreteVP"], [1000.0, 10.0, 0.0], "outside the schedule's times"),
    ],
)
def test_check_times_refuses(schedule, times, message):
    with pytest.raises(ValueError, match=message):
        check_times(schedule, times)


def test_check_times_takes_float32_grids_and_inner_ends():
    times = segment_times(OU(), 5).astype(np.float32)
    assert check_times(OU(), jnp.asarray(times)).dtype == np.float64
    np.testing.assert_array_equal(check_times(OU(), [2.0, 0.5]), [2.0, 0.5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OU(t_min=0.0), r"`OU\(t_min=...\)` must be positive and finite, got 0.0"),
        (lambda: OU(t_max=math.inf), r"`OU\(t_max=...\)` must be positive and finite, got inf"),
        (lambda: OU(t_max=math.nan), r"`OU\(t_max=...\)` must be positive and finite, got nan"),
        (lambda: OU(t_max=1e-4), "`OU` needs `t_min` < `t_max`, got t_min=0.001 and t_max=0.0001"),
        (lambda: VP(beta_min=0.0), r"`VP\(beta_min=...\)` must be positive and finite"),
        (lambda: VP(beta_max=-1.0), r"`VP\(beta_max=...\)` must be positive and finite"),
        (lambda: VP(t_min=-1.0), r"`VP\(t_min=...\)` must be positive and finite"),
        (lambda: VP(t_max=1e-4), "`VP` needs `t_min` < `t_max`"),
        (lambda: VP(2.0, 1.0), "`VP` needs `beta_min` <= `beta_max`, got beta_min=2.0 and beta_max=1.0"),
        (lambda: Cosine(t_max=1.0), r"`Cosine\(t_max=...\)` must be below 1, where alpha is 0, got 1.0"),
        (lambda: Cosine(t_min=0.0), r"`Cosine\(t_min=...\)` must be positive"),
        (lambda: Cosine(t_min=0.9, t_max=0.5), "`Cosine` needs `t_min` < `t_max`"),
        (lambda: Cosine(offset=-0.1), r"`Cosine\(offset=...\)` must be non-negative, got -0.1"),
        (lambda: Cosine(offset=math.nan), r"`Cosine\(offset=...\)` must be non-negative, got nan"),
        (lambda: VE(sigma_min=0.0), r"`VE\(sigma_min=...\)` must be positive"),
        (lambda: VE(1.0, 0.5), "`VE` needs `sigma_min` < `sigma_max`"),
        (lambda: EDM(sigma_max=math.inf), r"`EDM\(sigma_max=...\)` must be positive"),
        (lambda: EDM(1.0, 1.0), "`EDM` needs `sigma_min` < `sigma_max`"),
        (lambda: FlowMatching(t_max=1.0), r"`FlowMatching\(t_max=...\)` must be below 1"),
        (lambda: FlowMatching(t_min=0.0), r"`FlowMatching\(t_min=...\)` must be positive"),
        (lambda: FlowMatching(t_min=0.5, t_max=0.2), "`FlowMatching` needs `t_min` < `t_max`"),
        (lambda: DiscreteVP([0.5]), r"shape \(num_steps,\) with at least two steps, got shape \(1,\)"),
        (lambda: DiscreteVP([[0.5, 0.4]]), r"got shape \(1, 2\)"),
        (lambda: DiscreteVP([0.5, 0.5]), r"must decrease strictly inside \(0, 1\)"),
        (lambda: DiscreteVP([1.0, 0.5]), r"got values from 1.0 to 0.5"),
        (lambda: DiscreteVP([0.5, 0.0]), r"ends at 0 .* Leave that step out: `alphas_cumprod\[:-1\]`"),
        (lambda: DiscreteVP([0.5, -0.1]), r"must decrease strictly inside \(0, 1\)"),
        (lambda: DiscreteVP(np.linspace(1e-4, 0.02, 10)), r"\(Pass `cumprod\(1 - betas\)`, not `betas`.\)"),
    ],
)
def test_constructors_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [lambda: OU(t_max="far"), lambda: DiscreteVP(["a", "b"])])
def test_constructors_refuse_what_is_no_number(make):
    with pytest.raises(ValueError, match="could not convert string to float"):
        make()


def test_the_times_of_a_schedule_are_evaluated_once(monkeypatch):
    calls = []
    inverse = OU.inverse_log_snr
    monkeypatch.setattr(OU, "inverse_log_snr", lambda self, value: calls.append(1) or inverse(self, value))
    first = segment_times(OU(t_max=4.321), 6)
    first[1] = 0.0  # of the caller's copy
    again = segment_times(OU(t_max=4.321), 6)
    assert len(calls) == 1
    assert again[1] > again[2] > 0
    other = segment_times(OU(t_max=3.21), 6)
    assert len(calls) == 2
    assert other[0] == 3.21


def test_a_schedule_of_a_user_is_evaluated_each_time():
    """It may depend on what it closes over; the coefficients of its grid, too."""
    rate = 1.0

    class Own(OU):
        def integrated_rate(self, t):
            return rate * super().integrated_rate(t)

        def integrated_rate_between(self, s, t):
            return rate * super().integrated_rate_between(s, t)

        def inverse_log_snr(self, log_snr):
            return super().inverse_log_snr(log_snr) / rate

    for rate in (1.0, 2.0):
        times = segment_times(Own(), 6)
        right = VP(2 * rate, 2 * rate, t_max=5.0, t_min=1e-3)
        np.testing.assert_allclose(times, segment_times(right, 6), rtol=1e-5)
        grids = (noise_grid(schedule, times, np.float32) for schedule in (Own(), right))
        for own, other in zip(*grids, strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-6)
