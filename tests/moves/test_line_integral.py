import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_rtk import ExactEnergy, GaussLegendre, Simpson, Trapezoid
from numpyro_rtk._moves._line_integral import dot
from tests.helpers import Counter


pytestmark = pytest.mark.usefixtures("strict_dtypes")

RULES = [Trapezoid(), Simpson(), *(GaussLegendre(n) for n in range(1, 7))]
# Order of the local error in |y - x|, and the degree of the log density along the line up to which it is
# exact.
ORDERS = [
    (Trapezoid(), 3, 2),
    (Simpson(), 5, 4),
    *((GaussLegendre(n), 2 * n + 1, 2 * n) for n in range(1, 7)),
]
with_rule = pytest.mark.parametrize("rule", RULES, ids=repr)
with_order = pytest.mark.parametrize(("rule", "order", "degree"), ORDERS, ids=lambda value: repr(value))


def estimate(rule, score_fn, x, y, energy_fn=None):
    """`log p(y) - log p(x)` by a rule; the ends are evaluated as a kernel would."""
    energies = (energy_fn(x), energy_fn(y)) if energy_fn else (jnp.zeros((), x.dtype),) * 2
    return rule(score_fn, x, y, score_fn(x), score_fn(y), *energies)


def skewed_score(x):
    """Non-linear, coupled, of no symmetry."""
    return jnp.sin(3 * x) - x + jnp.exp(-jnp.sum(x**2)) * jnp.cos(x + 1)


def random_pairs(num_pairs, shape):
    x, y = np.random.default_rng(0).normal(size=(2, num_pairs, *shape)).astype(np.float32)
    return jnp.asarray(3 * x), jnp.asarray(y - 1)


@pytest.mark.parametrize(
    ("shape", "compiled"), [((7,), True), ((2, 3, 2), True), ((7,), False)], ids=["jit", "jit-3d", "eager"]
)
@with_rule
def test_exchanging_the_ends_negates_every_bit(rule, shape, compiled):
    function = lambda x, y: estimate(rule, skewed_score, x, y)
    if compiled:
        function = jax.jit(function)
    pairs = list(zip(*random_pairs(100 if compiled else 3, shape), strict=True))
    forward = np.array([function(x, y) for x, y in pairs])
    backward = np.array([function(y, x) for x, y in pairs])
    assert forward.dtype == np.float32
    assert np.all(np.abs(forward) > 0)
    np.testing.assert_array_equal(forward, -backward)


@with_rule
def test_antisymmetry_survives_vmap(rule):
    x, y = random_pairs(100, (5,))
    function = jax.jit(jax.vmap(lambda x, y: estimate(rule, skewed_score, x, y)))
    np.testing.assert_array_equal(function(x, y), -function(y, x))


@with_rule
def test_no_move_no_difference(rule):
    x = jnp.asarray([0.3, -2.0, 7.0])
    assert estimate(rule, skewed_score, x, x) == 0


def exponential_log_density(x):
    # All derivatives are of one size, so that the leading error term is what its order says.
    return jnp.sum(jnp.asarray([1.0, 0.5, -0.7]) * jnp.exp(jnp.asarray([1.0, -0.8, 0.6]) * x))


@with_order
def test_order_of_the_error(rule, order, degree, x64):
    del degree
    # About a fixed midpoint the error is C h^order (1 + O(h^2)). The higher the order, the longer the moves
    # that keep the error above rounding.
    lengths = {3: 0.05, 5: 0.2, 7: 0.6, 9: 1.0, 11: 1.6, 13: 3.0}[order] * np.array([1.0, 0.7])
    middle, direction = jnp.asarray([0.1, -0.3, 0.2]), jnp.asarray([1.0, -0.5, 0.8])
    errors = []
    score_fn = jax.jit(jax.grad(exponential_log_density))
    for length in lengths:
        x, y = middle - 0.5 * length * direction, middle + 0.5 * length * direction
        exact = exponential_log_density(y) - exponential_log_density(x)
        errors.append(abs(estimate(rule, score_fn, x, y) - exact))
    assert errors[1] > 1e-13
    slope = np.log(errors[0] / errors[1]) / np.log(1 / 0.7)
    assert slope == pytest.approx(order, abs=0.1)


@with_order
def test_exact_for_polynomials_up_to_its_degree(rule, order, degree, x64):
    del order
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(2, 4)))
    for power in range(1, degree + 2):
        directions = jnp.asarray(rng.normal(size=(3, 4)))
        log_density = lambda z: jnp.sum((directions @ z) ** power)
        exact = log_density(y) - log_density(x)
        error = abs(estimate(rule, jax.grad(log_density), x, y) - exact)
        size = jnp.sum(jnp.maximum(jnp.abs(directions @ x), jnp.abs(directions @ y)) ** power)
        if power <= degree:
            assert error < 1e-13 * size
        else:
            assert error > 1e-9 * size  # and no further


def test_trapezoid_and_midpoint_err_by_minus_two_to_one(x64):
    # The classical pair: Simpson is the combination in which the leading errors cancel.
    x, y = jnp.asarray([0.2, 0.4, -1.0]), jnp.asarray([0.9, -0.2, 0.3])
    score = jax.grad(exponential_log_density)
    trapezoid, midpoint, simpson = (
        estimate(rule, score, x, y) for rule in (Trapezoid(), GaussLegendre(1), Simpson())
    )
    np.testing.assert_allclose(simpson, (trapezoid + 2 * midpoint) / 3, rtol=1e-14)


@with_rule
def test_evaluations_at_run_time(rule):
    counter = Counter(lambda x, t: skewed_score(x))
    function = lambda x, y: rule(lambda z: counter(z, 0.0), x, y, x, y, x[0], y[0])
    x, y = random_pairs(5, (3,))
    jax.jit(function)(x[0], y[0])
    assert counter.count == rule.num_extra_evaluations
    jax.jit(jax.vmap(function))(x, y)
    assert counter.count == 6 * rule.num_extra_evaluations
    expected = {Trapezoid: 0, Simpson: 1}.get(type(rule), getattr(rule, "num_nodes", None))
    assert rule.num_extra_evaluations == expected
    assert not rule.needs_energy


def test_exact_energy_is_the_difference_of_energies():
    energy = lambda x: -exponential_log_density(x)
    x, y = jnp.asarray([0.2, 0.4, -1.0]), jnp.asarray([0.9, -0.2, 0.3])

    def score_fn(x):
        raise AssertionError("ExactEnergy evaluates no score")

    zeros = jnp.zeros(3)
    forward = ExactEnergy()(score_fn, x, y, zeros, zeros, energy(x), energy(y))
    backward = ExactEnergy()(score_fn, y, x, zeros, zeros, energy(y), energy(x))
    assert forward == energy(x) - energy(y) == -backward
    assert ExactEnergy().needs_energy
    assert ExactEnergy().num_extra_evaluations == 0


@pytest.mark.parametrize("num_nodes", [0, -1, 2.0, True, "3", None])
def test_gauss_legendre_refuses(num_nodes):
    with pytest.raises(
        ValueError, match=r"`GaussLegendre\(num_nodes=...\)` must be an integer of at least 1, got"
    ):
        GaussLegendre(num_nodes)


def test_rules_are_values():
    assert Trapezoid() == Trapezoid()
    assert GaussLegendre(2) == GaussLegendre(2) != GaussLegendre(3)
    assert hash(Simpson()) == hash(Simpson())


def test_dot_takes_any_shape():
    x = jnp.arange(6.0).reshape(2, 3)
    assert dot(x, x) == 55
