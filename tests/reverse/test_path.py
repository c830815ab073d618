"""Noising paths and what they tell of a condition: exact for Gaussian data, where reverse transitions are."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

import numpyro_rtk as rtk
from numpyro_rtk._noising._grid import noise_grid
from numpyro_rtk._noising._times import NoiseRange
from numpyro_rtk._reverse._path import noise_path, path_grid, path_log_density
from numpyro_rtk._score._model import resolve_score


SD = np.array([0.5, 1.0, 2.0])
Z_MAX = stats.norm.isf(2.5e-5 / 2)
SCHEDULES = {"OU": rtk.OU(), "VE": rtk.VE(sigma_min=0.02, sigma_max=40.0), "VP": rtk.VP()}


def grids(schedule, num_segments=7):
    """Levels of a path, and the same levels with the closed-form error of denoising data at `t_min`."""
    times = rtk.segment_times(schedule, num_segments)
    grid = noise_grid(schedule, times, jnp.float32)
    level = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), grid)
    prior = at_data(schedule, grid)[1]
    noise = level.total_v[:-1] / level.total_a[:-1] ** 2
    error = 1 / (1 / prior[None] + 1 / noise[:, None])
    return grid, jnp.asarray(np.concatenate([error, np.zeros((1, 3))]), jnp.float32)


def at_data(schedule, grid):
    """Signal scale, and variance of `N(c, SD^2)` noised to `t_min`."""
    alpha, sigma = float(grid.alpha[-1]), float(grid.sigma[-1])
    return alpha, alpha**2 * SD**2 + sigma**2


def family(schedule):
    def score(x, t, c):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return -(x - alpha * c) / (alpha**2 * jnp.asarray(SD, x.dtype) ** 2 + sigma**2)

    return resolve_score(score)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("fault", ["none", "sign", "scale", "variance"])
def test_a_path_of_gaussian_data_tells_all_but_its_noisy_end(name, fault):
    """`sum_k log p(x_(k-1) | x_k, c) = log p(x_0 | c) - log p(x_K | c)` up to a constant, for any path."""
    schedule = SCHEDULES[name]
    grid, error = grids(schedule)
    model = family(schedule)
    if fault == "sign":
        model = resolve_score(lambda x, t, c: -family(schedule)(x, t, c))
    elif fault == "scale":
        model = resolve_score(lambda x, t, c: 1.1 * family(schedule)(x, t, c))
    paths = path_grid(grid, grid, error)
    if fault == "variance":
        paths = paths._replace(variance=1.1 * paths.variance)
    path = noise_path(jr.key(1), grid, jnp.array([0.3, -1.0, 2.5]))
    conditions = np.array([-1.0, 0.2, 1.5])
    got = np.asarray([path_log_density(model.given(jnp.float32(c)), paths, path) for c in conditions], float)

    def log_density(x, alpha, sigma):
        variance = alpha**2 * SD**2 + sigma**2
        residuals = np.asarray(x, np.float64)[None] - alpha * conditions[:, None]
        return -0.5 * np.sum(residuals**2 / variance, axis=1)

    ends = [log_density(path[i], float(grid.alpha[i]), float(grid.sigma[i])) for i in (-1, 0)]
    right = ends[0] - ends[1]
    difference = np.abs((got - got[0]) - (right - right[0])).max()
    assert (difference < 2e-2) == (fault == "none"), difference


@pytest.mark.parametrize("name", SCHEDULES)
def test_paths_are_noised_draws(name):
    schedule = SCHEDULES[name]
    grid, _ = grids(schedule)
    x = jnp.array([1.0, -2.0])
    paths = jax.vmap(lambda key: noise_path(key, grid, x))(jr.split(jr.key(0), 4000))
    assert paths.shape == (4000, 8, 2)
    np.testing.assert_array_equal(paths[:, -1], jnp.broadcast_to(x, (4000, 2)))
    paths, level = np.asarray(paths, np.float64), jax.tree.map(np.asarray, grid)
    for i in range(7):
        standard = (paths[:, i] - level.total_a[i] * np.asarray(x)) / np.sqrt(level.total_v[i])
        assert np.all(np.abs(standard.mean(axis=0)) * np.sqrt(4000) < Z_MAX)
        assert np.all(np.abs(standard.std(axis=0) - 1) * np.sqrt(2 * 4000) < Z_MAX)
    # Neighbours are one step of the noising process apart.
    steps = (paths[:, :-1] - level.a[:, None] * paths[:, 1:]) / np.sqrt(level.v)[:, None]
    assert np.all(np.abs((steps[:, 1:] * steps[:, :-1]).mean(axis=0)) * np.sqrt(4000) < Z_MAX)


def test_errors_are_interpolated_between_levels_that_were_measured():
    """Twice as many levels, measured at half of them: within 2 % of the closed form."""
    schedule = rtk.OU()
    noise = NoiseRange(schedule, t_min=schedule.t_min, t_max=schedule.t_max)
    coarse = noise_grid(schedule, np.asarray(noise.times(24, rho=np.inf)), jnp.float32)
    fine = noise_grid(schedule, np.asarray(noise.times(48, rho=np.inf)), jnp.float32)

    def error(grid):
        relative = np.asarray(grid.total_v[:-1] / grid.total_a[:-1] ** 2, np.float64)[:, None]
        prior = at_data(schedule, grid)[1]
        found = 1 / (1 / prior[None] + 1 / relative)
        return jnp.asarray(np.concatenate([found, np.zeros((1, 3))]), jnp.float32)

    got = path_grid(fine, coarse, error(coarse)).variance
    np.testing.assert_allclose(got, path_grid(fine, fine, error(fine)).variance, rtol=0.02)
