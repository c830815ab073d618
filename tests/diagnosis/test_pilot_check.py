"""Stein's identity and the slope of the noise: planted faults are named, right scores are not spoken of."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import numpyro_rtk as rtk
from benchmarks.problems import ring_mixture
from numpyro_rtk._diagnosis._pilot import check_pilot, Subject
from numpyro_rtk._diagnosis._significance import normal_limit, normal_score, symmetric_limit
from numpyro_rtk._noising._grid import noise_grid
from numpyro_rtk._noising._times import noise_range, segment_times
from numpyro_rtk._reverse._calibration import calibrate, Calibration
from numpyro_rtk._reverse._pilot import prior_draws, run_pilot
from numpyro_rtk._score._model import resolve_score


NUM_LEVELS = 24
BETAS = np.linspace(1e-4, 0.02, 1000)
DISCRETE = rtk.DiscreteVP(np.cumprod(1 - BETAS))
SCHEDULES = {
    "OU": rtk.OU(),
    "VP": rtk.VP(),
    "Cosine": rtk.Cosine(),
    "VE": rtk.VE(),
    "EDM": rtk.EDM(),
    "FlowMatching": rtk.FlowMatching(),
    "DiscreteVP": DISCRETE,
}


def found(score_fn, schedule, shape, num_draws=128, seed=0):
    draw_key, pilot_key = jr.split(jr.key(seed))
    times = segment_times(schedule, NUM_LEVELS)

    def measure():
        noise = noise_range(schedule)
        model = resolve_score(score_fn)
        draws, _ = prior_draws(draw_key, model, noise, shape, jnp.float32, num_draws)
        return run_pilot(pilot_key, model, noise_grid(schedule, times, jnp.float32), draws).calibration

    subject = Subject("`score_fn`", str(schedule))
    return check_pilot(jax.jit(measure)(), times, int(np.prod(shape)), subject), times


def gaussian(schedule, mean, sd):
    return lambda x, t: (
        -(x - schedule.alpha(t) * mean) / (schedule.alpha(t) ** 2 * sd**2 + schedule.sigma(t) ** 2)
    )


def skewed(schedule):
    mixture = rtk.GaussianMixtureScore(
        [0.1, 0.3, 0.6], [[4.0, 0.0], [1.0, 0.2], [-0.5, -0.1]], [np.diag([0.3, 1.0])] * 3, schedule
    )
    return lambda x, t: mixture(x, t)


@pytest.mark.parametrize("name", SCHEDULES)
def test_right_scores_are_not_spoken_of(name):
    schedule = SCHEDULES[name]
    assert found(ring_mixture(schedule), schedule, (10,))[0] == []
    assert found(skewed(schedule), schedule, (2,), num_draws=16)[0] == []


@pytest.mark.parametrize("sd", [0.02, 0.3, 5.0])
def test_gaussians_of_any_scale_are_not_spoken_of(sd):
    for num_draws in (8, 128):
        assert found(gaussian(rtk.OU(), 0.0, sd), rtk.OU(), (1,), num_draws)[0] == []


def at_step_off_by(steps):
    ring = ring_mixture(DISCRETE)

    def score(x, t):
        # A noise prediction of the wrong step, made a score at the right one.
        wrong = jnp.clip(t + steps, 0, 999)
        return ring(x, wrong) * DISCRETE.sigma(wrong) / DISCRETE.sigma(t)

    return score


OU, VP = rtk.OU(), rtk.VP(beta_min=0.1, beta_max=20.0)
RING, RING_OF_VP = ring_mixture(OU), ring_mixture(VP)
FAULTS = {
    "twice the time": (lambda x, t: RING(x, 2 * t), OU),
    "half the time": (lambda x, t: RING(x, t / 2), OU),
    "VP taken for OU": (lambda x, t: RING_OF_VP(x, t), OU),
    "scale": (lambda x, t: 0.8 * RING(x, t), OU),
    "50 steps late": (at_step_off_by(50), DISCRETE),
    "50 steps early": (at_step_off_by(-50), DISCRETE),
    "two modes of VP taken for OU": (
        lambda x, t: rtk.GaussianMixtureScore([0.4, 0.6], [[-1.2], [0.8]], [[[0.04]], [[0.04]]], VP)(x, t),
        OU,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_named(fault):
    score_fn, schedule = FAULTS[fault]
    (finding,), times = found(score_fn, schedule, (1,) if "two modes" in fault else (10,))
    assert finding.kind == "score"
    assert f"level {finding.index} of {NUM_LEVELS} (t={times[finding.index]:.3g})" in finding.message
    for word in ("schedule", "time", "NoisePrediction"):
        assert word in finding.message


@pytest.mark.parametrize(
    "score_fn",
    [
        lambda x, t: -RING(x, t),
        lambda x, t: -OU.sigma(t) * RING(x, t),
        # A velocity.
        lambda x, t: -OU.sigma(t) * RING(x, t) - (x + OU.sigma(t) ** 2 * RING(x, t)) / OU.alpha(t),
    ],
)
def test_a_wrong_sign_is_told_apart(score_fn):
    (finding,), _ = found(score_fn, OU, (10,))
    assert finding.kind == "sign"
    for word in ("sign", "NoisePrediction", "level 0"):
        assert word in finding.message


def test_a_scale_at_one_level_is_found_there():
    # The other levels are right: the draws are made by the right score.
    schedule, times = rtk.VE(), segment_times(rtk.VE(), 10)
    levels = noise_grid(schedule, times, jnp.float32)
    score = gaussian(schedule, 1.0, 2.0)
    draws = 1.0 + jnp.sqrt(4.0 + schedule.sigma(times[-1]) ** 2) * jr.normal(jr.key(0), (64, 20))

    def wrong(x, t):
        return jnp.where(t == levels.t[3], 1.3, 1.0) * score(x, t)

    calibration = run_pilot(jr.key(1), resolve_score(wrong), levels, draws).calibration
    (finding,) = check_pilot(calibration, times, 20, Subject("`score_fn`", "VE()"))
    assert finding.index == 3
    assert finding.number == pytest.approx(1 / 1.3, abs=0.05)
    right = run_pilot(jr.key(1), resolve_score(score), levels, draws).calibration
    assert check_pilot(right, times, 20, Subject("`score_fn`", "VE()")) == []


def test_the_statistics_are_what_they_say():
    noise, x0 = jr.normal(jr.key(0), (2, 5, 3, 2))
    x = 0.5 * x0 + 0.7 * noise
    scores = jnp.sin(x)
    got = calibrate(noise, x, scores, jnp.asarray(0.49))
    centred = np.asarray(x - x.mean(0, keepdims=True), np.float64) * 5 / 4
    np.testing.assert_allclose(got.stein, -(centred * scores).mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(got.product, -0.7 * (noise * scores).mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(got.square, 0.49 * (scores**2).mean((1, 2)), rtol=1e-5)


def test_draws_that_are_not_finite_are_said_and_left_out():
    values = 1 + 0.1 * np.random.default_rng(0).standard_normal((3, 4, 50))
    calibration = Calibration(values[0], values[1], values[1] + 0.1 * values[2] - 0.1)
    subject = Subject("`score_fn`", "OU()", assumed=True)
    times = np.array([3.0, 2.0, 1.0, 0.1])
    assert check_pilot(calibration, times, 5, subject) == []
    calibration.stein[:, 7] = np.nan
    assert check_pilot(calibration, times, 5, subject) == []
    (finding,) = check_pilot(calibration, times, 5, subject, num_failed=1)
    assert finding.kind == "failed"
    assert "assumed" in finding.message
    (finding,) = check_pilot(Calibration(*(np.nan * leaf for leaf in calibration)), times, 5, subject)
    assert "50 of 50" in finding.message


def test_traced_statistics_are_left_alone():
    def check(values):
        assert check_pilot(Calibration(*values), np.ones(4), 5, Subject("`score_fn`", "OU()")) == []
        return values

    jax.jit(check)(jnp.zeros((3, 4, 50)))


def test_rates_of_false_alarms():
    rng = np.random.default_rng(1)
    # Normal scores of few normal draws are normal.
    scores = normal_score(rng.standard_normal((20_000, 6)))
    for limit, rate in ((1.96, 0.05), (3.29, 0.001)):
        assert np.mean(np.abs(scores) > limit) == pytest.approx(
            rate, abs=5 * np.sqrt(rate / 20_000) + 0.1 * rate
        )
    assert 4.7 < normal_limit(60) < 4.9
    assert symmetric_limit(60) > normal_limit(60)
    # The bound for symmetric differences holds where the law has no mean.
    values = rng.standard_cauchy((20_000, 30))
    z = np.sum(values, axis=1) / np.sqrt(np.sum(values**2, axis=1))
    assert np.mean(np.abs(z) > 3) < 2 * np.exp(-4.5)
