import decimal
import inspect
from decimal import Decimal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

from numpyro_rtk import (
    EnergyScore,
    ExactEnergy,
    GaussianMixtureScore,
    GaussianTransition,
    GaussLegendre,
    MALA,
    OU,
    PreconditionedMALA,
    segment_times,
    Simpson,
    Trapezoid,
    ULA,
    ULD,
    VP,
)
from numpyro_rtk._moves._line_integral import AbstractEnergyDifference
from numpyro_rtk._noising._base import AbstractNoiseSchedule
from numpyro_rtk._noising._grid import noise_grid
from numpyro_rtk._noising._terminal import standard_terminal, terminal
from numpyro_rtk._reverse._base import AbstractInnerKernel, first_entry, SegmentEntry, SegmentTuning
from numpyro_rtk._reverse._pass import default_tuning, num_score_evaluations, reverse_pass
from numpyro_rtk._reverse._uld import force_weight, position_noise_scale, velocity_weight
from numpyro_rtk._score._adapters import AbstractNetworkScore
from numpyro_rtk._score._model import resolve_score
from tests.helpers import Counter, make_target


pytestmark = pytest.mark.usefixtures("strict_dtypes")

SCHEDULE = OU()
MARKOV_KERNELS = [MALA(), PreconditionedMALA(), ULA(), ULD()]
METROPOLIS_KERNELS = [MALA, PreconditionedMALA]
every_markov_kernel = pytest.mark.parametrize(
    "kernel", MARKOV_KERNELS, ids=lambda kernel: type(kernel).__name__
)
every_metropolis_kernel = pytest.mark.parametrize("make", METROPOLIS_KERNELS)
CURVATURE = np.array([1.7, 0.6])  # by coordinate
TUNING = SegmentTuning(0.07, CURVATURE)
S, T = 0.3, 0.6


def mixture(schedule=SCHEDULE):
    """Skewed and anisotropic, so that a wrong sign shows."""
    weights, means = [0.3, 0.7], [[1.0, -0.5], [-0.8, 0.4]]
    return GaussianMixtureScore(
        weights, means, [[[0.3, 0.1], [0.1, 0.2]], [[0.1, -0.05], [-0.05, 0.6]]], schedule
    )


def gaussian(schedule=SCHEDULE):
    return GaussianMixtureScore([1.0], [[1.0, -0.5]], [[[0.3, 0.1], [0.1, 0.2]]], schedule)


def segment(score_fn, dtype=None):
    return make_target(score_fn, SCHEDULE, S, T, jnp.asarray([0.4, -0.9], dtype or float))


def as_dtype(tuning, dtype=float):
    return SegmentTuning(*(jnp.asarray(value, dtype) for value in tuning))


def random_points(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 2))


# Metropolis-Hastings ratios.


def log_target(target, log_prior):
    return lambda z: log_prior(z) - jnp.sum((target.x_t - target.segment.a * z) ** 2) / (2 * target.segment.v)


def log_gaussian(z, mean, variance):
    return -jnp.sum((z - mean) ** 2 / (2 * variance))


def log_proposal(kernel, target, tuning, density):
    """`log q(z' | z)` up to a constant, written as in the docstrings, with gradients by differentiation."""
    h = tuning.step_size
    if isinstance(kernel, MALA):
        return lambda new, z: log_gaussian(new, z + h * jax.grad(density)(z), 2 * h)
    # The reference N(m, c I), of which the proposal without the gradient is the Ornstein-Uhlenbeck process.
    m, c, e = target.mean, 1 / (target.segment.a**2 / target.segment.v + tuning.curvature), jnp.exp(-h)
    gradient = jax.grad(lambda z: density(z) - log_gaussian(z, m, c))
    return lambda new, z: log_gaussian(new, m + e * (z - m) + (1 - e) * c * gradient(z), (1 - e**2) * c)


def brute_force_log_ratio(kernel, target, tuning, log_prior):
    density = log_target(target, log_prior)
    proposal = log_proposal(kernel, target, tuning, density)
    return lambda z, new: density(new) - density(z) + proposal(z, new) - proposal(new, z)


def log_ratio(kernel, target, tuning):
    def function(z, new):
        current, proposal = (target.evaluate(point, with_energy=kernel.needs_energy) for point in (z, new))
        return kernel.log_accept_ratio(target, current, proposal, tuning)

    return function


@pytest.mark.parametrize("step_size", [1e-4, 0.07, 1.5])
@pytest.mark.parametrize(
    ("make_score", "rule"),
    [(mixture, ExactEnergy()), (gaussian, ExactEnergy()), (gaussian, Trapezoid()), (gaussian, Simpson())],
    ids=["mixture-exact", "gaussian-exact", "gaussian-trapezoid", "gaussian-simpson"],
)
@every_metropolis_kernel
def test_log_accept_ratio_is_that_of_metropolis_hastings(make, make_score, rule, step_size, x64):
    score_fn = make_score()
    target, tuning = segment(score_fn), as_dtype((step_size, CURVATURE))
    kernel = make(energy_difference=rule)
    z, new = jnp.asarray(random_points(50)), jnp.asarray(random_points(50, seed=1))
    brute_force = brute_force_log_ratio(
        kernel, target, tuning, lambda z: score_fn.log_density(z, target.segment.s)
    )
    expected = jax.jit(jax.vmap(brute_force))(z, new)
    # The brute force subtracts squares over the step size from each other.
    np.testing.assert_allclose(
        jax.jit(jax.vmap(log_ratio(kernel, target, tuning)))(z, new),
        expected,
        rtol=1e-11,
        atol=1e-14 / step_size,
    )


@every_metropolis_kernel
def test_log_accept_ratio_in_float32(make, x64):
    # Against float64 at the same points, and moves of the size that proposals have.
    score_fn, kernel = mixture(), make(energy_difference=Trapezoid())
    z = random_points(50).astype(np.float32)
    new = (z + 0.1 * random_points(50, seed=1)).astype(np.float32)
    exact = jax.jit(jax.vmap(log_ratio(kernel, segment(score_fn), as_dtype(TUNING))))(
        jnp.asarray(z, float), jnp.asarray(new, float)
    )
    with jax.enable_x64(False):
        target = segment(mixture(), jnp.float32)
        single = jax.jit(jax.vmap(log_ratio(kernel, target, as_dtype(TUNING, jnp.float32))))(
            jnp.asarray(z), jnp.asarray(new)
        )
        assert single.dtype == jnp.float32
    # Sums of a few terms like |move| |gradient|, of order 10, each rounded: nothing like |z|^2 / h may enter.
    assert np.max(np.abs(np.asarray(single, np.float64) - exact)) < 10 * 10 * np.finfo(np.float32).eps


@pytest.mark.parametrize("rule", [Trapezoid(), Simpson(), GaussLegendre(3), ExactEnergy()], ids=repr)
@every_metropolis_kernel
def test_log_accept_ratio_is_antisymmetric(make, rule):
    kernel, target, tuning = (
        make(energy_difference=rule),
        segment(mixture(), jnp.float32),
        as_dtype(TUNING, jnp.float32),
    )
    z, new = (jnp.asarray(random_points(100, seed), jnp.float32) for seed in (0, 1))
    function = jax.jit(jax.vmap(log_ratio(kernel, target, tuning)))
    forward, backward = function(z, new), function(new, z)
    assert np.all(np.abs(forward) > 0)
    # Two terms of `drifts` change places, and with them the order of one addition: no more than roundings.
    scale = 100 if make is PreconditionedMALA else 0
    assert np.all(np.abs(forward + backward) <= scale * np.finfo(np.float32).eps * (1 + np.abs(forward)))


@pytest.mark.parametrize("rule", [Trapezoid(), ExactEnergy()], ids=repr)
@every_metropolis_kernel
def test_no_step_is_the_identity(make, rule):
    kernel, target, tuning = (
        make(energy_difference=rule),
        segment(mixture(), jnp.float32),
        as_dtype((0.0, CURVATURE), jnp.float32),
    )
    current = target.evaluate(jnp.asarray([0.3, 0.8], jnp.float32), with_energy=kernel.needs_energy)
    new, _, info = kernel.step(jr.key(0), target, current, (), tuning)
    np.testing.assert_allclose(new.x, current.x, rtol=2e-7)
    np.testing.assert_allclose(info.accept_prob, 1.0, rtol=1e-5)
    assert not info.diverging


@pytest.mark.parametrize("kernel", [ULA(), ULD()], ids=["ULA", "ULD"])
def test_no_unadjusted_step_is_the_identity(kernel):
    target, tuning = segment(mixture(), jnp.float32), as_dtype((0.0, CURVATURE), jnp.float32)
    current = target.evaluate(jnp.asarray([0.3, 0.8], jnp.float32))
    auxiliary = kernel.init_auxiliary(jr.key(1), current.x)
    new, new_auxiliary, info = kernel.step(jr.key(0), target, current, auxiliary, tuning)
    np.testing.assert_array_equal(new.x, current.x)
    jax.tree.map(np.testing.assert_array_equal, new_auxiliary, auxiliary)
    assert info.accept_prob == 1
    assert not info.diverging | info.failed


def matched_gaussian():
    """An isotropic Gaussian `p_s` and the segment on it; its curvature is 1 / 0.4."""
    mean, variance = jnp.asarray([0.7, -0.2, 1.1]), 0.4

    def score_fn(x, t):
        # At T it is what the step from S makes of it.
        a, v = SCHEDULE.transition(jnp.asarray(S), t)
        return -(x - a * mean) / (a**2 * variance + v)

    return make_target(score_fn, SCHEDULE, S, T, jnp.asarray([0.4, -0.9, 0.1])), 1 / variance


@pytest.mark.parametrize("step_size", [0.01, 1.0, 50.0])
def test_preconditioned_mala_always_accepts_where_the_reference_is_the_target(step_size, x64):
    target, curvature = matched_gaussian()
    tuning, kernel = as_dtype((step_size, curvature)), PreconditionedMALA()
    z, new = jnp.asarray(np.random.default_rng(0).normal(size=(2, 20, 3)))
    np.testing.assert_allclose(jax.jit(jax.vmap(log_ratio(kernel, target, tuning)))(z, new), 0.0, atol=1e-12)
    _, _, info = jax.jit(jax.vmap(lambda key, z: kernel.step(key, target, target.evaluate(z), (), tuning)))(
        jr.split(jr.key(0), 20), z
    )
    np.testing.assert_allclose(info.accept_prob, 1.0, rtol=1e-12)


def test_preconditioned_mala_of_huge_step_is_an_independent_exact_draw(x64):
    target, curvature = matched_gaussian()
    tuning, kernel, key = as_dtype((50.0, curvature)), PreconditionedMALA(), jr.key(3)
    propose = lambda z: kernel.propose(key, target, target.evaluate(z), (), tuning)[0]
    here, there = propose(jnp.asarray([5.0, -3.0, 0.0])), propose(jnp.zeros(3))
    np.testing.assert_allclose(here, there, rtol=1e-12)
    # The target is N(m, 1 / (a^2/v + 1/variance)).
    scale = 1 / jnp.sqrt(target.segment.a**2 / target.segment.v + curvature)
    np.testing.assert_allclose(here, target.mean + scale * jr.normal(key, (3,)), rtol=1e-12)


def test_mala_proposal_is_langevin(x64):
    target, tuning, key = segment(mixture()), as_dtype(TUNING), jr.key(0)
    density = log_target(target, lambda z: mixture().log_density(z, target.segment.s))
    z = jnp.asarray([0.3, 0.8])
    expected = z + 0.07 * jax.grad(density)(z) + jnp.sqrt(0.14) * jr.normal(key, (2,))
    for kernel in (MALA(), ULA()):
        np.testing.assert_allclose(
            kernel.propose(key, target, target.evaluate(z), (), tuning)[0], expected, rtol=1e-12
        )


# Projection.


@pytest.mark.parametrize(
    ("radii", "inside", "outside"),
    [
        ({"max_move": 0.5}, [0.6, 0.3], [0.9, 0.3]),
        ({"max_radius": 1.0}, [0.9, 0.3], [0.9, 0.5]),
    ],
)
def test_projection_radii_reject(radii, inside, outside):
    target, tuning = segment(mixture(), jnp.float32), as_dtype(TUNING, jnp.float32)
    z = jnp.asarray([0.3, 0.3], jnp.float32)
    free, projected = (log_ratio(kernel, target, tuning) for kernel in (MALA(), MALA(**radii)))
    for point in (jnp.asarray(inside, jnp.float32), jnp.asarray(outside, jnp.float32)):
        assert np.isfinite(free(z, point))
    assert projected(z, jnp.asarray(inside, jnp.float32)) == free(z, jnp.asarray(inside, jnp.float32))
    assert projected(z, jnp.asarray(outside, jnp.float32)) == -np.inf


def test_a_projected_step_is_an_ordinary_rejection():
    target, tuning = segment(mixture(), jnp.float32), as_dtype(TUNING, jnp.float32)
    current = target.evaluate(jnp.asarray([0.3, 0.3], jnp.float32))
    new, _, info = MALA(max_move=1e-6).step(jr.key(0), target, current, (), tuning)
    jax.tree.map(np.testing.assert_array_equal, new, current)
    assert info.accept_prob == 0
    assert not info.diverging | info.failed


# Starts.


@pytest.mark.parametrize("start", ["gaussian", "paper", "noise"])
@every_markov_kernel
def test_starts(kernel, start, monkeypatch, x64):
    kernel = type(kernel)(start=start)
    target, tuning = segment(mixture()), as_dtype(TUNING)
    a, v, curvature = target.segment.a, target.segment.v, CURVATURE
    # Gaussians by their log densities: precision from the Hessian, mean from one Newton step.
    log_density = {
        "gaussian": lambda z: log_gaussian(z, target.mean, 1 / (a**2 / v + curvature)),
        "paper": lambda z: -jnp.sum(curvature * z**2) - jnp.sum((target.x_t - a * z) ** 2) / (2 * v),
        "noise": lambda z: log_gaussian(z, target.x_t / a, v / a**2),
    }[start]
    precision = -jnp.diag(jax.hessian(log_density)(jnp.zeros(2)))
    mean = jax.grad(log_density)(jnp.zeros(2)) / precision
    draw = lambda value: (
        monkeypatch.setattr(jr, "normal", lambda key, shape, dtype: jnp.full(shape, value, dtype)),
        kernel.draw_start(jr.key(0), target, tuning),
    )[1]
    np.testing.assert_allclose(draw(0.0), mean, rtol=1e-12)
    np.testing.assert_allclose(draw(1.0) - draw(0.0), 1 / jnp.sqrt(precision), rtol=1e-12)


@every_markov_kernel
def test_a_segment_begins_at_its_start_and_takes_its_steps(kernel):
    target, entry = segment(mixture(), jnp.float32), first_entry(jnp.zeros(2))
    for step_size in (0.0, 0.02):
        tuning = as_dtype((step_size, CURVATURE), jnp.float32)
        start_key, auxiliary_key, steps_key = jr.split(jr.key(0), 3)
        current = target.evaluate(
            kernel.draw_start(start_key, target, tuning), with_energy=kernel.needs_energy
        )
        auxiliary = kernel.init_auxiliary(auxiliary_key, current.x)
        for key in jr.split(steps_key, kernel.num_steps + 1)[1:]:
            current, auxiliary, _ = kernel.step(key, target, current, auxiliary, tuning)
        result = kernel.run_segment(jr.key(0), target, entry, tuning)
        np.testing.assert_allclose(result.x, current.x, rtol=1e-4)
        np.testing.assert_allclose(result.score, current.score, rtol=1e-4)


# Underdamped Langevin.

CONTEXT = decimal.Context(prec=60)
FRICTIONS = np.concatenate([np.geomspace(1e-8, 100, 300), np.linspace(0.5, 3, 100)])


def exact_weights(a):
    e = (-a).exp(CONTEXT)
    tanh = (1 - e) / (1 + e)
    return (1 - e) / a, (e - 1 + a) / a**2, 2 * (a / 2 - tanh).sqrt(CONTEXT) / a


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_weights_of_the_exponential_integrator_are_exact(dtype, compiled):
    eps = Decimal(float(np.finfo(dtype).eps))
    with decimal.localcontext(CONTEXT), jax.enable_x64(dtype == np.float64):
        frictions = FRICTIONS.astype(dtype)
        exact = [exact_weights(Decimal(float(a))) for a in frictions]
        for k, function in enumerate((velocity_weight, force_weight, position_noise_scale)):
            function = jax.jit(function) if compiled else function
            values = np.asarray(function(jnp.asarray(frictions)))
            assert values.dtype == dtype
            worst = max(
                abs(Decimal(float(value)) / row[k] - 1) / eps
                for value, row in zip(values, exact, strict=True)
            )
            assert worst < 2, function


@pytest.mark.parametrize("x64_mode", [False, True])
def test_weights_and_their_derivatives_at_no_friction(x64_mode):
    with jax.enable_x64(x64_mode):
        zero = jnp.zeros(())
        assert [velocity_weight(zero), force_weight(zero), position_noise_scale(zero)] == [1.0, 0.5, 0.0]
        # (1 - e^-a)/a = 1 - a/2 + ...; (e^-a - 1 + a)/a^2 = 1/2 - a/6 + ...
        np.testing.assert_allclose(jax.grad(velocity_weight)(zero), -1 / 2, rtol=1e-7)
        np.testing.assert_allclose(jax.grad(force_weight)(zero), -1 / 6, rtol=1e-7)
        # 2 sqrt(a/2 - tanh(a/2)) / a = sqrt(a / 6) (1 - a^2 / 20 + ...)
        a = jnp.asarray(1e-4)
        np.testing.assert_allclose(position_noise_scale(a), np.sqrt(1e-4 / 6), rtol=1e-6)
        np.testing.assert_allclose(jax.grad(position_noise_scale)(a), 0.5 / np.sqrt(6e-4), rtol=1e-6)


def test_derivatives_of_the_weights_near_the_change_of_branch(x64):
    for function in (velocity_weight, force_weight, position_noise_scale):
        for a in (0.1, 1.0 - 1e-9, 1.0 + 1e-9, 2.0 - 1e-9, 2.0 + 1e-9, 30.0):
            finite = (function(jnp.asarray(a + 1e-5)) - function(jnp.asarray(a - 1e-5))) / 2e-5
            np.testing.assert_allclose(jax.grad(function)(jnp.asarray(a)), finite, rtol=1e-8)


def exact_covariance(a):
    """Variance of velocity, variance of position over `h^2`, covariance over `h`, from the docstring."""
    e = (-a).exp(CONTEXT)
    return 1 - e**2, (2 * a - 3 + 4 * e - e**2) / a**2, (1 - e) ** 2 / a


def uld_affine_map(monkeypatch, friction, h, force=0.0):
    """`(M, B, c)` of one step in one dimension: `(x, u)' = M (x, u) + B noise + c force`, at zero force by
    default.

    The normals are replaced by basis vectors, whichever is drawn first.
    """
    kernel = ULD(friction=friction)
    target = make_target(lambda x, t: -x, SCHEDULE, S, T, jnp.asarray([0.4]))
    tuning = as_dtype((h, 1.7))

    def step(x, u, noises):
        noises = iter(noises)
        monkeypatch.setattr(jr, "normal", lambda key, shape, dtype: jnp.full(shape, next(noises), dtype))
        x = jnp.asarray([x])
        current = target.evaluate(x)._replace(score=force - target.gaussian_score(x))
        new, velocity = kernel.propose(jr.key(0), target, current, jnp.asarray([u]), tuning)
        return np.array([new[0], velocity[0]])

    origin = step(0.0, 0.0, (0.0, 0.0))
    matrix = np.stack([step(1.0, 0.0, (0.0, 0.0)) - origin, step(0.0, 1.0, (0.0, 0.0)) - origin], axis=1)
    noise = np.stack([step(0.0, 0.0, (1.0, 0.0)) - origin, step(0.0, 0.0, (0.0, 1.0)) - origin], axis=1)
    return matrix, noise, origin


@pytest.mark.parametrize("a", [1e-6, 1e-3, 0.1, 0.9, 1.5, 20.0])
def test_uld_step_has_the_exact_mean_and_covariance(a, monkeypatch, x64):
    friction, h = 2.5, a / 2.5
    matrix, noise, origin = uld_affine_map(monkeypatch, friction, h, force=1.0)
    a_exact = Decimal(friction * h)
    with decimal.localcontext(CONTEXT):
        var_u, var_x, cov = (float(value) for value in exact_covariance(a_exact))
        weight, force, _ = (float(value) for value in exact_weights(a_exact))
        decay = float((-a_exact).exp(CONTEXT))
    np.testing.assert_allclose(matrix, [[1.0, h * weight], [0.0, decay]], rtol=1e-9, atol=1e-9 * min(h, 1))
    np.testing.assert_allclose(origin, [h**2 * force, h * weight], rtol=1e-14)
    covariance = noise @ noise.T
    np.testing.assert_allclose(covariance, [[h**2 * var_x, h * cov], [h * cov, var_u]], rtol=1e-14)
    # What is left of the position once the velocity is known cancels in the covariance, but not in its
    # factor.
    with decimal.localcontext(CONTEXT):
        var_u, var_x, cov = exact_covariance(a_exact)
        left = float(var_x - cov**2 / var_u)
    np.testing.assert_allclose(np.linalg.det(noise) ** 2 / covariance[1, 1], h**2 * left, rtol=1e-13)


@pytest.mark.parametrize("a", [1e-3, 0.1, 1.0, 10.0])
def test_two_half_steps_of_uld_without_force_are_one_step(a, monkeypatch, x64):
    friction = 1.6
    full_matrix, full_noise, _ = uld_affine_map(monkeypatch, friction, a / friction)
    half_matrix, half_noise, _ = uld_affine_map(monkeypatch, friction, 0.5 * a / friction)
    np.testing.assert_allclose(half_matrix @ half_matrix, full_matrix, rtol=1e-12, atol=1e-15)
    half_covariance = half_noise @ half_noise.T
    composed = half_matrix @ half_covariance @ half_matrix.T + half_covariance
    np.testing.assert_allclose(composed, full_noise @ full_noise.T, rtol=1e-12)


def test_uld_without_friction_is_newton(monkeypatch, x64):
    h = 0.3
    matrix, noise, origin = uld_affine_map(monkeypatch, 1e-14, h, force=1.0)
    np.testing.assert_allclose(matrix, [[1.0, h], [0.0, 1.0]], atol=1e-13)
    np.testing.assert_allclose(origin, [h**2 / 2, h], rtol=1e-13)
    np.testing.assert_allclose(noise, 0.0, atol=1e-6)  # of order sqrt(friction)


def test_uld_keeps_the_normal_law_of_velocity(monkeypatch, x64):
    matrix, noise, _ = uld_affine_map(monkeypatch, 2.0, 0.4)
    np.testing.assert_allclose(matrix[1, 1] ** 2 + (noise @ noise.T)[1, 1], 1.0, rtol=1e-14)


def test_uld_default_friction_is_critical(x64):
    target, tuning = segment(mixture()), as_dtype(TUNING)
    smoothness = float(target.segment.a**2 / target.segment.v + CURVATURE.mean())
    current, velocity = target.evaluate(jnp.asarray([0.3, 0.8])), jnp.asarray([0.1, -0.4])
    adapted = ULD().propose(jr.key(0), target, current, velocity, tuning)
    given = ULD(friction=2 * np.sqrt(smoothness)).propose(jr.key(0), target, current, velocity, tuning)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-13), adapted, given)


# The reverse pass: costs, shapes, dtypes.


def run(kernel, score_fn, num_segments, *, dim=2, dtype=jnp.float32, num_chains=None, **kwargs):
    grid = noise_grid(SCHEDULE, segment_times(SCHEDULE, num_segments), dtype)
    tuning, top = default_tuning(kernel, grid, (dim,)), standard_terminal(grid, (dim,))

    def one(key):
        return reverse_pass(key, resolve_score(score_fn), grid, kernel, tuning, top, **kwargs)

    if num_chains is None:
        return jax.jit(one)(jr.key(0))
    return jax.jit(jax.vmap(one))(jr.split(jr.key(0), num_chains))


K, STEPS = 3, 4
COSTS = [
    (MALA(STEPS), K * (STEPS + 1)),
    (MALA(STEPS, energy_difference=Simpson()), K * (2 * STEPS + 1)),
    (MALA(STEPS, energy_difference=GaussLegendre(3)), K * (STEPS + 1 + 3 * STEPS)),
    (PreconditionedMALA(STEPS), K * (STEPS + 1)),
    (PreconditionedMALA(STEPS, energy_difference=Simpson()), K * (2 * STEPS + 1)),
    (ULA(STEPS), K * (STEPS + 1)),
    (ULD(STEPS), K * (STEPS + 1)),
    (GaussianTransition(), K),
    (GaussianTransition(order=3), K),
]


@pytest.mark.parametrize(("kernel", "cost"), COSTS, ids=repr)
def test_evaluations_of_a_pass_at_run_time(kernel, cost):
    counter = Counter(lambda x, t: -x)
    assert num_score_evaluations(kernel, K) == cost
    run(kernel, counter, K)
    assert counter.count == cost


@pytest.mark.parametrize("kernel", [MALA(STEPS), MALA(STEPS, energy_difference=Simpson())], ids=repr)
def test_chains_cost_one_pass_each(kernel):
    counter = Counter(lambda x, t: -x)
    run(kernel, counter, K, num_chains=5)
    assert counter.count == 5 * num_score_evaluations(kernel, K)


def test_exact_energies_come_with_the_score():
    counter = Counter(lambda x, t: 0.5 * jnp.sum(x**2))
    kernel = MALA(STEPS, energy_difference=ExactEnergy())
    run(kernel, EnergyScore(counter), K)
    assert counter.count == num_score_evaluations(kernel, K) == K * (STEPS + 1)


@pytest.mark.parametrize("make", [MALA, PreconditionedMALA, ULA, ULD])
def test_the_network_is_traced_once_however_long_the_pass(make):
    traces = []
    for num_segments, num_steps in ((2, 1), (7, 13)):
        counter = Counter(lambda x, t: -x)
        grid = noise_grid(SCHEDULE, segment_times(SCHEDULE, num_segments), jnp.float32)
        kernel = make(num_steps)
        tuning = default_tuning(kernel, grid, (2,))
        top = standard_terminal(grid, (2,))
        program = jax.make_jaxpr(lambda key: reverse_pass(key, counter, grid, kernel, tuning, top))(jr.key(0))
        traces.append(counter.num_traces)
        assert str(program).count("debug_callback[") == 1  # what the compiler gets
    # A scan may trace its body again to settle the type of its carry.
    assert traces[0] == traces[1] <= 4


def test_inner_kernels_run_in_a_trace_of_their_fields():
    # A step size per segment that is an array, as a PyTree leaf, is an argument of the compiled program.
    grid = noise_grid(SCHEDULE, segment_times(SCHEDULE, K), jnp.float32)

    @jax.jit
    def function(step_size):
        kernel = MALA(2, step_size=step_size)
        tuning, top = default_tuning(kernel, grid, (2,)), standard_terminal(grid, (2,))
        return reverse_pass(jr.key(0), lambda x, t: -x, grid, kernel, tuning, top, x=jnp.ones(2)).x

    assert np.all(function(jnp.full(K, 0.01)) != function(jnp.full(K, 0.02)))


@pytest.mark.parametrize(
    "kernel", [*MARKOV_KERNELS, GaussianTransition(), GaussianTransition(order=3)], ids=repr
)
@pytest.mark.parametrize("x64_mode", [False, True], ids=["float32", "float64"])
def test_dtypes_and_shapes_of_a_pass(kernel, x64_mode):
    with jax.enable_x64(x64_mode):
        dtype = jnp.dtype(jnp.float64 if x64_mode else jnp.float32)
        grid = noise_grid(SCHEDULE, segment_times(SCHEDULE, K), dtype)
        tuning, top = default_tuning(kernel, grid, (2, 3)), standard_terminal(grid, (2, 3))

        def function(key, x, keep_path):
            return reverse_pass(key, lambda x, t: -x, grid, kernel, tuning, top, x=x, keep_path=keep_path)

        x = jnp.ones((2, 3), dtype)
        results = [
            jax.eval_shape(lambda key, x: function(key, x, keep), jr.key(0), x) for keep in (False, True)
        ]
        for result, path_shape in zip(results, (None, (K, 2, 3)), strict=True):
            assert result.x.shape == (2, 3)
            assert (
                result.accept_prob.shape == result.mean_square_score.shape == result.diverging.shape == (K,)
            )
            assert result.failed.shape == ()
            assert {result.x.dtype, result.accept_prob.dtype, result.mean_square_score.dtype} == {dtype}
            assert result.diverging.dtype == result.failed.dtype == jnp.bool_
            assert (
                (result.path is None)
                if path_shape is None
                else (result.path.shape, result.path.dtype) == (path_shape, dtype)
            )


def test_float32_in_float64_mode_stays_float32(x64):
    kernel = PreconditionedMALA()
    grid = noise_grid(SCHEDULE, segment_times(SCHEDULE, K), jnp.float32)
    tuning, top = default_tuning(kernel, grid, (2,)), standard_terminal(grid, (2,))
    function = lambda key, x: reverse_pass(key, lambda x, t: -x, grid, kernel, tuning, top, x=x)
    for x in (jnp.ones(2, jnp.float32), None):
        result = jax.eval_shape(function, jr.key(0), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(jnp.float32), jnp.dtype(bool)}


def test_keeping_the_path_changes_nothing_and_ends_at_the_draw():
    without, kept = (run(MALA(2), lambda x, t: -x, K, keep_path=keep) for keep in (False, True))
    np.testing.assert_array_equal(without.x, kept.x)
    np.testing.assert_array_equal(kept.path[-1], kept.x)
    assert kept.path.shape == (K, 2)
    assert without.path is None


def test_network_sees_the_ends_of_the_segments():
    seen = []

    def score_fn(x, t):
        jax.debug.callback(lambda t, x: seen.append(float(t)), t, x)
        return -x

    grid = noise_grid(SCHEDULE, segment_times(SCHEDULE, K), jnp.float32)
    run(MALA(1), score_fn, K)
    jax.effects_barrier()
    assert sorted(seen) == sorted(np.repeat(np.asarray(grid.segments.s, float), 2).tolist())
    seen.clear()
    run(GaussianTransition(), score_fn, K)
    jax.effects_barrier()
    assert sorted(seen) == sorted(np.asarray(grid.segments.t, float).tolist())


def test_terminal_law():
    for schedule, variance in ((OU(), 1.0), (VP(), 1.0)):
        grid = noise_grid(schedule, segment_times(schedule, 4), jnp.float32)
        top = standard_terminal(grid, (5,))
        np.testing.assert_array_equal(top.mean, np.zeros(5))
        np.testing.assert_allclose(top.variance, np.full(5, variance), rtol=1e-6)
        noise = jr.normal(jr.key(0), (5,))
        np.testing.assert_allclose(top.sample(jr.key(0)), np.sqrt(variance) * noise, rtol=1e-6)
        np.testing.assert_allclose(top.score(noise), -noise / variance, rtol=1e-6)
        # Of data with another mean and variance: their noised law.
        mean, data_variance = jnp.array([0.3, -2.0]), jnp.array([0.5, 4.0])
        other = terminal(grid, mean, data_variance)
        alpha, sigma = (np.float64(f(schedule.t_max)) for f in (schedule.alpha, schedule.sigma))
        np.testing.assert_allclose(other.mean, alpha * np.asarray(mean), rtol=1e-5)
        np.testing.assert_allclose(other.variance, alpha**2 * np.asarray(data_variance) + sigma**2, rtol=1e-6)
        log_density = lambda x: multivariate_normal.logpdf(x, other.mean, jnp.diag(other.variance))
        x = jnp.array([0.7, -0.4])
        np.testing.assert_allclose(other.score(x), jax.grad(log_density)(x), rtol=1e-5)


@every_markov_kernel
def test_keys_are_used_once(kernel):
    target, tuning = segment(mixture(), jnp.float32), as_dtype((0.01, CURVATURE), jnp.float32)

    def one(key):
        start_key, auxiliary_key, step_key = jr.split(key, 3)
        x = kernel.draw_start(start_key, target, tuning)
        auxiliary = kernel.init_auxiliary(auxiliary_key, x)
        return kernel.step(step_key, target, target.evaluate(x), auxiliary, tuning)

    with jax.debug_key_reuse(True):
        new, _, _ = jax.jit(one)(jr.key(0))
    assert np.all(np.isfinite(new.x))


# Gaussian transitions.


def test_first_order_transition_is_ddpm(x64):
    # q(x_s | x_t, x_0) with the predicted datum, from the two Gaussians it is the product of.
    schedule, score_fn = VP(), mixture(VP())
    s, t, x = 0.3, 0.45, jnp.asarray([0.4, -0.9])
    target = make_target(score_fn, schedule, s, t, x)
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    a, v = alpha_t / alpha_s, sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
    data = (x + sigma_t**2 * score_fn(x, jnp.asarray(t))) / alpha_t
    log_posterior = lambda z: log_gaussian(z, alpha_s * data, sigma_s**2) + log_gaussian(x, a * z, v)
    variance = -1 / jax.hessian(log_posterior)(x)[0, 0]
    mean = x + variance * jax.grad(log_posterior)(x)
    result = GaussianTransition().run_segment(jr.key(5), target, first_entry(x), as_dtype(TUNING))
    np.testing.assert_allclose(result.x, mean + jnp.sqrt(variance) * jr.normal(jr.key(5), (2,)), rtol=1e-11)
    # A kernel with a memory starts with the same step, and remembers the prediction.
    with_memory = GaussianTransition(order=3)
    again = with_memory.run_segment(jr.key(5), target, first_entry(x, with_memory.history), as_dtype(TUNING))
    np.testing.assert_allclose(again.x, result.x, rtol=1e-14)
    np.testing.assert_allclose(again.entry.data_predictions, jnp.stack([data, jnp.zeros(2)]), rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_transitions_are_sde_dpm_solver_plus_plus(order, x64):
    # The update of Lu et al. (2022) in its own notation, lambda = log(alpha / sigma), with the same noise. Of
    # first order it is DDPM again.
    schedule, score_fn, key = VP(), mixture(VP()), jr.key(1)
    times = jnp.asarray([0.9, 0.5, 0.3, 0.05])
    grid = noise_grid(schedule, np.asarray(times), jnp.float64)
    kernel = GaussianTransition(order=order)
    x = jnp.asarray([0.4, -0.9])
    tuning, top = default_tuning(kernel, grid, (2,)), standard_terminal(grid, (2,))
    result = reverse_pass(key, score_fn, grid, kernel, tuning, top, x=x, keep_path=True)

    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    lam = jnp.log(alpha / sigma)
    path, data_before = [], None
    for i, noise_key in enumerate(jr.split(jr.split(key)[1], 3)):
        h = lam[i + 1] - lam[i]
        data = (x + sigma[i] ** 2 * score_fn(x, times[i])) / alpha[i]
        correction = 0.0
        if order == 2 and i > 0:
            r = (lam[i] - lam[i - 1]) / h
            correction = (data - data_before) / (2 * r)
        mean = sigma[i + 1] / sigma[i] * jnp.exp(-h) * x + alpha[i + 1] * (1 - jnp.exp(-2 * h)) * (
            data + correction
        )
        x = mean + sigma[i + 1] * jnp.sqrt(1 - jnp.exp(-2 * h)) * jr.normal(noise_key, (2,))
        path.append(x)
        data_before = data
    np.testing.assert_allclose(result.path, np.stack(path), rtol=1e-10)


def test_third_order_integrates_the_parabola_through_three_predictions(x64):
    # The exact solution for a data prediction that is known, lambda = log(alpha / sigma): the integral of
    # 2 exp(-2 (lambda_s - lambda)) D(lambda) by quadrature, D through the last two, then three points.
    schedule, score_fn, key = VP(), mixture(VP()), jr.key(1)
    times = jnp.asarray([0.9, 0.6, 0.35, 0.2, 0.09])
    grid = noise_grid(schedule, np.asarray(times), jnp.float64)
    kernel = GaussianTransition(order=3)
    x = jnp.asarray([0.4, -0.9])
    tuning, top = default_tuning(kernel, grid, (2,)), standard_terminal(grid, (2,))
    result = reverse_pass(key, score_fn, grid, kernel, tuning, top, x=x, keep_path=True)

    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    lam = np.asarray(jnp.log(alpha / sigma))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    path, data = [], []
    for i, noise_key in enumerate(jr.split(jr.split(key)[1], 4)):
        data.append((x + sigma[i] ** 2 * score_fn(x, times[i])) / alpha[i])
        last = slice(max(i - 2, 0), i + 1)
        curve = np.polyfit(lam[last], np.stack(data[last]), len(lam[last]) - 1)
        h = lam[i + 1] - lam[i]
        at = lam[i] + h * (nodes + 1) / 2
        kernel_at = 2 * np.exp(-2 * (lam[i + 1] - at)) * weights * h / 2
        mean = np.stack([np.sum(kernel_at * np.polyval(column, at)) for column in curve.T])
        x = sigma[i + 1] / sigma[i] * np.exp(-h) * x + alpha[i + 1] * mean
        x += sigma[i + 1] * np.sqrt(1 - np.exp(-2 * h)) * jr.normal(noise_key, (2,))
        path.append(x)
    np.testing.assert_allclose(result.path, np.stack(path), rtol=1e-9)


# A second segment has one before it only; the last case has its neighbours far apart.
@pytest.mark.parametrize(
    ("steps", "slope", "bend"),
    [((0.3, 0.4), 1.0, 1.0), ((0.1, 0.1), 0.375, 0.0), ((0.3, 0.0), 1.0, 0.0), ((0.3, 0.1), 1.0, 0.0)],
)
def test_third_order_extrapolates_less_beyond_its_points(steps, slope, bend, x64):
    # A segment of length 0.4 after two of these lengths: 4 times the one before, where 1.5 times is the most.
    now, before, first = (jnp.asarray([value]) for value in (1.0, 0.7, 0.1))
    entry = SegmentEntry(jnp.stack([before, first]), jnp.asarray(steps))
    length = jnp.asarray(0.4)
    found = GaussianTransition(order=3)._correction(now, length, entry)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    u = 0.2 * (nodes + 1)
    weights = weights * np.exp(2 * u) / np.sum(weights * np.exp(2 * u))
    rises = [(now - before) / steps[0], (before - first) / (steps[1] or 1.0)]
    curve = slope * rises[0] * u + bend * (rises[0] - rises[1]) / sum(steps) * u * (u + steps[0])
    np.testing.assert_allclose(found, [np.sum(weights * curve)], rtol=1e-10)


# Failures are data.


@every_markov_kernel
def test_a_network_without_sense_fails_the_pass(kernel):
    result = run(type(kernel)(2), lambda x, t: x * jnp.nan, K)
    assert result.failed
    assert np.all(result.diverging)


@pytest.mark.parametrize("make", METROPOLIS_KERNELS)
def test_a_proposal_without_sense_is_rejected_and_reported(make):
    # The score exists in the half plane of the current point only.
    score_fn = lambda x, t: jnp.where(x[0] > 0, -x, jnp.nan)
    target, tuning = segment(score_fn, jnp.float32), as_dtype((1.0, CURVATURE), jnp.float32)
    current = target.evaluate(jnp.asarray([0.01, 0.0], jnp.float32))
    kernel = make()

    @jax.jit
    @jax.vmap
    def step(key):
        proposed, _ = kernel.propose(jr.split(key)[0], target, current, (), tuning)
        return proposed, kernel.step(key, target, current, (), tuning)

    proposed, (new, _, info) = step(jr.split(jr.key(0), 40))
    outside = np.asarray(proposed[:, 0] <= 0)
    assert 0 < outside.sum() < 40
    np.testing.assert_array_equal(info.diverging, outside)
    np.testing.assert_array_equal(new.x[outside], np.broadcast_to(current.x, (outside.sum(), 2)))
    assert np.all(info.accept_prob[outside] == 0)
    assert not np.any(info.failed)


def test_unadjusted_explosions_are_reported():
    target = segment(lambda x, t: -x, jnp.float32)
    current = target.evaluate(jnp.asarray([0.3, 0.8], jnp.float32))
    new, _, info = ULA().step(jr.key(0), target, current, (), as_dtype((1e4, CURVATURE), jnp.float32))
    assert info.failed & info.diverging
    np.testing.assert_array_equal(new.x, current.x)


# Construction.


def every_class_below(*roots):
    found, queue = [], list(roots)
    while queue:
        cls = queue.pop()
        if cls not in found:
            found.append(cls)
            queue.extend(cls.__subclasses__())
    return sorted((cls for cls in found if is_ours(cls)), key=lambda cls: cls.__name__)


def is_ours(cls):
    # Tests may define classes of their own, and Equinox makes a twin of each class whose instances it
    # constructs.
    return (
        cls.__module__.startswith("numpyro_rtk.")
        and getattr(inspect.getmodule(cls), cls.__name__, None) is cls
    )


ROOTS = (AbstractInnerKernel, AbstractEnergyDifference, AbstractNoiseSchedule, AbstractNetworkScore)


@pytest.mark.parametrize("cls", every_class_below(*ROOTS))
def test_abstract_or_final(cls):
    # `inspect.isabstract` alone misses abstract variables.
    abstract = bool(inspect.isabstract(cls) or cls.__abstractvars__ or cls.__abstractclassvars__)
    assert cls.__name__.startswith("Abstract") == abstract
    assert abstract or not [child for child in cls.__subclasses__() if is_ours(child)]


def test_abstract_or_final_sees_all_kernels():
    names = {cls.__name__ for cls in every_class_below(*ROOTS)}
    assert {
        "MALA",
        "PreconditionedMALA",
        "ULA",
        "ULD",
        "GaussianTransition",
        "GaussLegendre",
        "DiscreteVP",
    } <= names
    assert "AbstractMarkovKernel" in names


@pytest.mark.parametrize("make", [MALA, PreconditionedMALA, ULA, ULD])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, r"\(num_steps=...\)` must be an integer of at least 1, got 0"),
        ({"num_steps": 2.0}, ValueError, r"\(num_steps=...\)` must be an integer of at least 1, got 2.0"),
        ({"num_steps": True}, ValueError, r"\(num_steps=...\)` must be an integer of at least 1, got True"),
        ({"step_size": 0.0}, ValueError, r"\(step_size=...\)` must be positive and finite, got 0.0"),
        ({"step_size": -1.0}, ValueError, r"\(step_size=...\)` must be positive and finite, got -1.0"),
        ({"step_size": [0.1, np.nan]}, ValueError, r"\(step_size=...\)` must be positive and finite"),
        (
            {"step_size": np.ones((2, 2))},
            ValueError,
            r"must be a scalar or one value per segment, got shape \(2, 2\)",
        ),
        ({"step_size": "small"}, TypeError, r"\(step_size=...\)` must be a positive number, got 'small'"),
        (
            {"start": "here"},
            ValueError,
            r"\(start=...\)` must be one of 'gaussian', 'paper', 'noise', got 'here'",
        ),
    ],
)
def test_kernels_refuse(make, options, error, message):
    with pytest.raises(error, match=f"`{make.__name__}{message}" if message.startswith(r"\(") else message):
        make(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MALA(max_move=-1.0), r"`MALA\(max_move=...\)` must be positive and finite, got -1.0"),
        (lambda: MALA(max_radius=0.0), r"`MALA\(max_radius=...\)` must be positive and finite, got 0.0"),
        (lambda: MALA(max_radius=np.ones(3)), r"`MALA\(max_radius=...\)` must be a scalar, got shape \(3,\)"),
        (
            lambda: PreconditionedMALA(max_step_size=np.inf),
            r"`PreconditionedMALA\(max_step_size=...\)` must be positive",
        ),
        (lambda: ULD(friction=0.0), r"`ULD\(friction=...\)` must be positive and finite, got 0.0"),
        (lambda: ULD(friction=[1.0, 2.0]), r"`ULD\(friction=...\)` must be a scalar, got shape \(2,\)"),
        (lambda: GaussianTransition(order=4), r"`GaussianTransition\(order=...\)` must be 1, 2 or 3, got 4"),
    ],
)
def test_kernels_refuse_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_metropolis_kernel
def test_energy_difference_must_be_one(make):
    message = rf"`{make.__name__}\(energy_difference=...\)` must be one of Trapezoid\(\), Simpson\(\)"
    with pytest.raises(TypeError, match=message):
        make(energy_difference="trapezoid")
    with pytest.raises(TypeError, match=r"Did you forget the parentheses\?"):
        make(energy_difference=Trapezoid)


@pytest.mark.parametrize("kernel", [*MARKOV_KERNELS, GaussianTransition()], ids=repr)
def test_default_step_sizes_scale_with_precision(kernel, x64):
    # h has units of x^2 for MALA and ULA, of x for ULD, and none otherwise.
    power = {MALA: -1, ULA: -1, ULD: -0.5}.get(type(kernel), 0)
    one, four = (kernel.default_step_size(jnp.asarray(value), 8) for value in (1.0, 4.0))
    np.testing.assert_allclose(four / one, 4.0**power, rtol=1e-14)
    if kernel.adapts_step_size:
        np.testing.assert_allclose(kernel.default_step_size(jnp.asarray(1.0), 64) / one, 0.5, rtol=1e-14)


def test_given_step_sizes_are_used_as_they_are():
    grid = noise_grid(SCHEDULE, segment_times(SCHEDULE, K), jnp.float32)
    np.testing.assert_array_equal(default_tuning(MALA(step_size=0.25), grid, (3, 3)).step_size, [0.25] * K)
    np.testing.assert_array_equal(
        default_tuning(ULD(step_size=[0.25, 0.5, 1.0]), grid, (3, 3)).step_size, [0.25, 0.5, 1.0]
    )
    np.testing.assert_allclose(default_tuning(MALA(), grid, (3, 3)).curvature, 1 / grid.segments.sigma_s**2)


def test_multivariate_normal_reference(x64):
    # `gaussian()` itself, against JAX's own density.
    score_fn, t, x = gaussian(), jnp.asarray(S), jnp.asarray([0.1, 0.2])
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    covariance = alpha**2 * jnp.asarray([[0.3, 0.1], [0.1, 0.2]]) + sigma**2 * jnp.eye(2)
    expected = multivariate_normal.logpdf(x, alpha * jnp.asarray([1.0, -0.5]), covariance)
    np.testing.assert_allclose(score_fn.log_density(x, t), expected, rtol=1e-13)
