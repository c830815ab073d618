"""Trajectories that know part of the log density only by its score."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from numpyro_rtk._moves._leapfrog import (
    evaluation,
    leapfrog,
    PathPoint,
    unit_velocity,
)
from tests.helpers import Counter


MATRIX = np.array([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]])


def anharmonic(position):
    """Potential that is neither even nor quadratic; couples the two leaves."""
    x, y = position["x"], position["y"]
    return jnp.sum(x**4 / 4) + x[0] * x[1] ** 2 + jnp.sum(jnp.exp(x)) + 0.5 * y**2 + 0.3 * y * x[0]


def rest(position):
    return jnp.log1p(position["y"] ** 2) + 0.1 * position["x"][1] * position["y"]


def score_of(potential, names):
    def score(position):
        gradient = jax.grad(potential)(position)
        return {name: -gradient[name] for name in names}

    return score


def own_potential(position):
    """A potential of the scored leaf only, as the prior of a diffusion site is."""
    x = position["x"]
    return jnp.sum(x**4 / 4) + x[0] * x[1] ** 2 + jnp.sum(jnp.exp(x))


def total(position):
    return own_potential(position) + rest(position)


EVALUATE = evaluation(score_of(own_potential, ["x"]), rest)
START = {"x": np.array([0.3, -0.8]), "y": np.array(0.5)}
MOMENTUM = {"x": np.array([0.9, 0.4]), "y": np.array(-1.1)}


def dense_velocity(momentum):
    flat = jnp.concatenate([momentum["x"], momentum["y"][None]])
    out = jnp.asarray(MATRIX, flat.dtype) @ flat
    return {"x": out[:2], "y": out[2]}


def as_arrays(values):
    return {name: jnp.asarray(value) for name, value in values.items()}


@functools.partial(jax.jit, static_argnames=("velocity", "order"))
def run_from(start, momentum, step_size, num_steps, *, velocity=unit_velocity, order=4):
    return leapfrog(EVALUATE, velocity, EVALUATE(start), momentum, step_size, num_steps, order=order)


def run(step_size, num_steps, **options):
    return run_from(as_arrays(START), as_arrays(MOMENTUM), step_size, num_steps, **options)


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("velocity", [unit_velocity, dense_velocity])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 11])
def test_the_way_back_undoes_the_way_there(x64, order, velocity, num_steps):
    there = run(0.15, num_steps, velocity=velocity, order=order)
    flipped = jax.tree.map(jnp.negative, there.momentum)
    back = run_from(there.point.position, flipped, 0.15, num_steps, velocity=velocity, order=order)
    for name, value in START.items():
        np.testing.assert_allclose(back.point.position[name], value, atol=1e-12)
        np.testing.assert_allclose(back.momentum[name], -MOMENTUM[name], atol=1e-12)
    assert abs(float(there.energy_error)) > 1e-4
    np.testing.assert_allclose(back.energy_error, -there.energy_error, atol=1e-12)
    np.testing.assert_allclose(back.potential_difference, -there.potential_difference, atol=1e-12)


def test_the_map_preserves_volume(x64):
    def phase(flat):
        position, momentum = {"x": flat[:2], "y": flat[2]}, {"x": flat[3:5], "y": flat[5]}
        end = run_from(position, momentum, 0.2, 5, velocity=dense_velocity)
        return jnp.concatenate(
            [jnp.ravel(value) for part in (end.point.position, end.momentum) for value in part.values()]
        )

    flat = jnp.concatenate(
        [jnp.ravel(jnp.asarray(value)) for part in (START, MOMENTUM) for value in part.values()]
    )
    jacobian = jax.jacfwd(phase)(flat)  # forward mode: the number of steps is dynamic
    np.testing.assert_allclose(abs(jnp.linalg.det(jacobian)), 1, rtol=1e-10)


@pytest.mark.parametrize(("order", "slope"), [(2, 2), (4, 4)])
def test_order_of_the_energy_error(x64, order, slope):
    errors = []
    for num_steps in (32, 64, 128):
        end = run(1.6 / num_steps, num_steps, order=order)
        errors.append(
            abs(float(end.potential_difference - (total(end.point.position) - total(as_arrays(START)))))
        )
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(slopes - slope) < 0.25)


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
def test_exact_for_gaussian_scores(x64, order, num_steps):
    def gaussian(position):
        x = position["x"]
        return 0.5 * x @ jnp.asarray(MATRIX) @ x - x[0]

    evaluate = evaluation(score_of(gaussian, ["x"]), lambda position: jnp.sum(jnp.cosh(position["x"])))
    start = {"x": jnp.array([1.0, -0.5, 2.0])}
    end = leapfrog(
        evaluate,
        unit_velocity,
        evaluate(start),
        {"x": jnp.array([0.3, 1.0, -1.0])},
        0.3,
        num_steps,
        order=order,
    )
    exact = evaluate(end.point.position).potential - evaluate(start).potential
    exact += gaussian(end.point.position) - gaussian(start)
    np.testing.assert_allclose(end.potential_difference, exact, atol=1e-12)


def test_chords_correct_no_more_than_the_gaussian_part(x64):
    # The identity of the module's docstring, which is why the plain trapezoid rule is not the default.
    evaluate = evaluation(score_of(own_potential, ["x"]), lambda position: 0.0 * jnp.sum(position["x"]))
    start, momentum = {"x": jnp.asarray(START["x"])}, {"x": jnp.asarray(MOMENTUM["x"])}
    end = leapfrog(evaluate, unit_velocity, evaluate(start), momentum, 0.2, 7, order=2)
    squares = [float(jnp.sum(score["x"] ** 2)) for score in (evaluate(start).score, end.point.score)]
    np.testing.assert_allclose(end.energy_error, 0.2**2 / 8 * (squares[1] - squares[0]), atol=1e-12)


def test_a_known_energy_is_exact(x64):
    evaluate = evaluation(lambda position: {}, total)
    start = as_arrays(START)
    end = leapfrog(evaluate, dense_velocity, evaluate(start), as_arrays(MOMENTUM), 0.1, 9)
    np.testing.assert_allclose(end.potential_difference, total(end.point.position) - total(start), atol=1e-12)


def test_the_end_point_is_evaluated():
    end = run(0.1, 4)
    again = EVALUATE(end.point.position)
    for got, expected in zip(jax.tree.leaves(end.point), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_step_size_zero_is_the_identity():
    end = run(0.0, 5)
    assert float(end.energy_error) == 0
    assert not end.diverging
    for name, value in START.items():
        np.testing.assert_array_equal(end.point.position[name], np.float32(value))


@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_one_evaluation_per_step(num_steps):
    counter = Counter(lambda x, t: -x)
    evaluate = evaluation(lambda p: {"x": counter(p["x"], 0.0)}, lambda p: jnp.sum(p["x"]))
    start = PathPoint({"x": jnp.ones(3)}, {"x": -jnp.ones(3)}, jnp.array(3.0), {"x": jnp.ones(3)})
    step = jax.jit(lambda n: leapfrog(evaluate, unit_velocity, start, {"x": jnp.ones(3)}, 0.1, n))
    end = step(num_steps)
    assert counter.count == num_steps == end.num_evaluations
    assert counter.num_traces == 1


def test_divergence_stops_and_is_flagged():
    end = run(5.0, 1000)
    assert end.diverging
    assert np.isinf(end.energy_error)
    assert end.num_evaluations < 20


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["score", "potential"])
def test_non_finite_values_diverge(bad, where):
    def broken(position):
        value = jnp.where(position["x"][0] > 0.5, bad, 0.0)
        score = {"x": -position["x"] + (value if where == "score" else 0.0)}
        return PathPoint(
            position, score, value if where == "potential" else jnp.zeros(()), {"x": jnp.zeros(2)}
        )

    start = {"x": jnp.zeros(2)}
    end = leapfrog(broken, unit_velocity, broken(start), {"x": jnp.ones(2)}, 0.2, 10)
    assert end.diverging
    assert np.isinf(end.energy_error)
    assert end.num_evaluations == 3


def test_coarse_paths_are_unresolved():
    # From a steep flank leapfrog overshoots far into the flat tail, where the chords claim a gain of density.
    def flank(position):
        return PathPoint(
            position, {"x": 1 - jnp.exp(position["x"])}, jnp.zeros(()), {"x": jnp.zeros_like(position["x"])}
        )

    def go(momentum, step_size):
        start = {"x": jnp.array([3.0])}
        return leapfrog(flank, unit_velocity, flank(start), {"x": jnp.array([momentum])}, step_size, 4)

    coarse = go(0.5, 0.9)
    assert coarse.unresolved
    assert np.isinf(coarse.energy_error)
    fine = go(0.5, 0.05)
    assert not fine.unresolved
    assert abs(fine.energy_error) < 0.2


def test_unresolved_either_way(x64):
    def flank(position):
        return PathPoint(
            position, {"x": 1 - jnp.exp(position["x"])}, jnp.zeros(()), {"x": jnp.zeros_like(position["x"])}
        )

    @jax.jit
    def there_and_back(x, momentum):
        there = leapfrog(flank, unit_velocity, flank({"x": x}), {"x": momentum}, 0.5, 4)
        flipped = jax.tree.map(jnp.negative, there.momentum)
        back = leapfrog(flank, unit_velocity, there.point, flipped, 0.5, 4)
        return there.unresolved, back.unresolved, there.num_evaluations

    rng = np.random.default_rng(0)
    x, momentum = np.log(rng.exponential(size=(2000, 30))), rng.standard_normal((2000, 30))
    there, back, num_steps = jax.vmap(there_and_back)(x, momentum)
    complete = num_steps == 4
    np.testing.assert_array_equal(there[complete], back[complete])
    assert np.sum(there & complete) >= 10


def test_lanes_of_different_length():
    lengths = jnp.array([1, 4, 7])
    batch = jax.vmap(lambda n: run(jnp.float32(0.1), n))(lengths)
    for lane, n in enumerate([1, 4, 7]):
        single = run(0.1, n)
        assert batch.num_evaluations[lane] == n
        np.testing.assert_allclose(batch.energy_error[lane], single.energy_error, atol=1e-5)
        np.testing.assert_allclose(batch.point.position["x"][lane], single.point.position["x"], rtol=1e-5)


def test_float32_under_x64(x64):
    start = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), START)
    momentum = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), MOMENTUM)
    end = run_from(start, momentum, jnp.asarray(0.1, jnp.float64), 3)
    assert all(leaf.dtype == jnp.float32 for leaf in end.point.position.values())


def test_unknown_order():
    with pytest.raises(ValueError, match="`order` must be 2 or 4, got 3"):
        run(0.1, 3, order=3)


# Exact draws of a skewed law stay exact: log Exp(1) in every coordinate, of density exp(x - exp(x)).
# The false-alarm level is that of the suite's other law tests.
P_MIN = 2.5e-5


def skewed_evaluate(position, *, sign=1.0):
    x = position["x"]
    return PathPoint(position, {"x": sign * (1 - jnp.exp(x))}, jnp.zeros(()), {"x": jnp.zeros_like(x)})


@functools.partial(jax.jit, static_argnames=("order", "accept", "num_steps", "flip"))
def skewed_chains(key, x, step_size, *, num_steps, order=4, accept=True, flip=False):
    """Iterations of HMC on independent chains from `x`; broken on purpose where asked."""

    def iteration(x, key):
        momentum_key, accept_key = jr.split(key)
        momentum = {"x": jr.normal(momentum_key, x.shape)}
        end = leapfrog(
            skewed_evaluate,
            unit_velocity,
            skewed_evaluate({"x": x}),
            momentum,
            step_size,
            num_steps,
            order=order,
        )
        error = -end.energy_error if flip else end.energy_error
        accepted = ~end.diverging & ((jnp.log(jr.uniform(accept_key)) < -error) | (not accept))
        return jnp.where(accepted, end.point.position["x"], x), jnp.minimum(1, jnp.exp(-error))

    def chain(key, x):
        return jax.lax.scan(iteration, x, jr.split(key, 8))

    x, accept_prob = jax.vmap(chain)(jr.split(key, x.shape[0]), x)
    return x, jnp.mean(accept_prob)


def p_values(draws):
    """KS of the first coordinate, and z tests of the mean and the mean square over all."""
    draws = np.asarray(draws, np.float64)
    exact = stats.gumbel_l
    values = [stats.kstest(draws[:, 0], exact.cdf).pvalue]
    for power in (1, 2):
        mean, variance = exact.moment(power), exact.moment(2 * power) - exact.moment(power) ** 2
        z = (np.mean(draws**power) - mean) / np.sqrt(variance / draws.size)
        values.append(2 * stats.norm.sf(abs(z)))
    return values


def exact_draws(chains):
    return jnp.asarray(np.log(np.random.default_rng(0).exponential(size=(chains, 10))), jnp.float32)


@pytest.fixture(scope="module")
def start():
    return exact_draws(16_000)


SETTINGS = {"step_size": 0.375, "num_steps": 4}


def test_exact_draws_stay_exact(start):
    draws, accept_prob = skewed_chains(jr.key(1), start, **SETTINGS)
    assert 0.95 < accept_prob < 0.97
    assert min(p_values(draws)) > P_MIN


# The plain trapezoid rule is no better than no accept step on this law: the reason for the higher order.
@pytest.mark.parametrize("broken", [{"accept": False}, {"flip": True}, {"order": 2}], ids=str)
def test_what_is_wrong_is_caught(start, broken):
    draws, _ = skewed_chains(jr.key(1), start, **SETTINGS, **broken)
    assert min(p_values(draws)) < P_MIN


def test_what_tuning_sees_of_a_trajectory_that_met_a_wall(x64):
    """Its acceptance probability one step before the wall."""

    def walled(position):
        return rest(position) + jnp.where(position["x"][0] > 0.45, jnp.inf, 0.0)

    evaluate = evaluation(score_of(own_potential, ["x"]), walled)
    start, momentum = evaluate(as_arrays(START)), as_arrays(MOMENTUM)
    seen = []
    for sign in (1.0, -1.0):  # the energy error of one is positive, of the other negative
        kick = {name: sign * value if name == "y" else value for name, value in momentum.items()}
        whole = leapfrog(evaluate, unit_velocity, start, kick, 0.05, 20)
        assert 2 < whole.num_evaluations < 20
        before = leapfrog(evaluate, unit_velocity, start, kick, 0.05, whole.num_evaluations - 1, order=2)
        assert jnp.isfinite(before.energy_error)
        np.testing.assert_allclose(whole.error_inside, before.energy_error, rtol=1e-10)
        seen.append(float(before.energy_error))
        prob = whole.tuning_prob(jnp.zeros(()), jnp.ones((), bool))
        np.testing.assert_allclose(prob, min(1.0, np.exp(-seen[-1])), rtol=1e-10)
        assert whole.tuning_prob(jnp.asarray(0.3), jnp.zeros((), bool)) == 0.3
    fast = {name: 10 * value for name, value in momentum.items()}
    at_once = leapfrog(evaluate, unit_velocity, start, fast, 0.05, 20)
    assert at_once.num_evaluations == 1
    assert at_once.tuning_prob(jnp.zeros(()), jnp.ones((), bool)) == 0.0
    assert min(seen) < 0 < max(seen), seen
