"""The reverse driver: memory, and a Gaussian case in closed form."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import numpyro_rtk as rtk
from numpyro_rtk._noising._grid import noise_grid
from numpyro_rtk._noising._terminal import standard_terminal
from numpyro_rtk._reverse._pass import default_tuning, reverse_pass


EVENT = (64, 64)


def gaussian_score(x, t):
    return -x  # N(0, I) data under OU: the score of N(0, I) at every time


def temporary_bytes(num_segments, inner, keep_path):
    grid = noise_grid(rtk.OU(), rtk.segment_times(rtk.OU(), num_segments), jnp.float32)
    tuning, terminal = default_tuning(inner, grid, EVENT), standard_terminal(grid, EVENT)

    def run(key, x):
        result = reverse_pass(key, gaussian_score, grid, inner, tuning, terminal, x=x, keep_path=keep_path)
        return result.path if keep_path else result.x

    compiled = jax.jit(run).lower(jr.key(0), jnp.zeros(EVENT)).compile().memory_analysis()
    return compiled.temp_size_in_bytes + compiled.output_size_in_bytes


OTHERS = [
    pytest.param(inner, marks=pytest.mark.slow)
    for inner in (rtk.MALA(3), rtk.ULD(3), rtk.GaussianTransition(2))
]


@pytest.mark.slow
@pytest.mark.parametrize("inner", [rtk.PreconditionedMALA(2), *OTHERS], ids=str)
def test_memory_does_not_grow_with_the_number_of_segments(inner):
    event_bytes = 4 * np.prod(EVENT)
    few, many = (temporary_bytes(k, inner, keep_path=False) for k in (4, 64))
    # 60 more segments cost a few numbers each, not an event each.
    assert many - few < event_bytes
    # The control: the path is one event per segment.
    assert (
        temporary_bytes(64, inner, keep_path=True) - temporary_bytes(4, inner, keep_path=True)
        > 50 * event_bytes
    )


def test_ddpm_has_its_own_bias_on_white_data():
    # For N(0, I) data the mean of the transition is a x, exactly, and DDPM's variance v sigma_s^2 / sigma_t^2
    # in place of v makes the variance of the pass a linear recursion.
    schedule = rtk.OU()
    grid = noise_grid(schedule, rtk.segment_times(schedule, 12), jnp.float32)
    inner = rtk.GaussianTransition()
    tuning, terminal = default_tuning(inner, grid, (1,)), standard_terminal(grid, (1,))

    def one(key):
        return reverse_pass(key, gaussian_score, grid, inner, tuning, terminal).x[0]

    draws = np.asarray(jax.jit(jax.vmap(one))(jr.split(jr.key(0), 100_000)), np.float64)
    variance = 1.0
    for a, v, sigma_s in zip(
        *(np.asarray(f, np.float64) for f in (grid.a, grid.v, grid.segments.sigma_s)), strict=True
    ):
        variance = a**2 * variance + v * sigma_s**2 / (a**2 * sigma_s**2 + v)
    assert variance < 0.98  # the bias is far larger than what the test resolves
    assert abs(np.var(draws) / variance - 1) < 4.5 * np.sqrt(2 / len(draws))


def test_the_standard_terminal_has_the_stated_variance():
    for schedule, variance in (
        (rtk.OU(), 1.0),
        (rtk.VE(sigma_min=0.1, sigma_max=3.0), 10.0),
        (rtk.FlowMatching(t_max=0.999), 0.998002),
    ):
        grid = noise_grid(schedule, rtk.segment_times(schedule, 3), jnp.float32)
        x = standard_terminal(grid, (200_000,)).sample(jr.key(0))
        assert abs(float(jnp.var(x)) / variance - 1) < 4.5 * np.sqrt(2 / x.size)
