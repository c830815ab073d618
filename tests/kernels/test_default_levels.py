"""The levels of `RTKKernel` with no argument on schedules whose steps are far from even near data."""

import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_rtk as rtk
from benchmarks.problems import draw


SD, PLACES = 0.1, np.array([[-0.7, 0.3], [0.7, -0.3]])
DDPM = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LATENT = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def in_mode_sd(schedule, **options):
    """Of draws of two sharp modes, over the exact one; and the largest draw."""
    score = rtk.GaussianMixtureScore([0.4, 0.6], PLACES, [SD**2 * np.eye(2)] * 2, schedule)
    kernel = rtk.RTKKernel(score, event_shape=(2,), **options)
    x = np.asarray(draw(kernel, 10_000, num_warmup=0, num_chains=100).get_samples()["x"])
    alpha, sigma = (float(at(jnp.asarray(0.0))) for at in (schedule.alpha, schedule.sigma))
    which = np.argmin(((x[:, None] - alpha * PLACES) ** 2).sum(-1), axis=1)
    exact = np.hypot(alpha * SD, sigma)
    return np.sqrt(np.mean((x - alpha * PLACES[which]) ** 2)) / exact, np.abs(x).max()


@pytest.mark.slow
def test_levels_reach_the_last_steps_of_a_discrete_schedule():
    schedule = rtk.DiscreteVP(DDPM)
    assert abs(in_mode_sd(schedule)[0] - 1) < 0.03
    # The control: as many levels spread over the steps.
    every_20th = np.round(np.linspace(999, 0, 51))
    off, _ = in_mode_sd(schedule, segments=every_20th, inner=rtk.GaussianTransition(order=3))
    assert abs(off - 1) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("stride", [20, 50])
def test_few_steps_that_grow_fast_do_not_throw_draws_out(stride):
    # The last step is four times as long as the one before, and nothing can be placed. Biased, but no further
    # than a second-order predictor is; a parabola would be off by a factor of 5.
    ratio, largest = in_mode_sd(rtk.DiscreteVP(LATENT[::stride]))
    assert 0.8 < ratio < 1.4
    assert largest < 3
