"""Local moves: HMC is the leapfrog of all kernels, in the coordinates of the preconditioner."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import numpyro_rtk as rtk
from numpyro_rtk._moves._leapfrog import evaluation, leapfrog
from numpyro_rtk._smc import _moves
from tests.particles import ExactReverse, linear_terms, make_law, make_posterior, Mixture, without_energy


SCHEDULE = rtk.OU()
GAUSSIAN = Mixture(np.ones(1), np.array([[0.3, -0.5]]), np.array([[[0.5, 0.3], [0.3, 0.4]]]))
SKEWED = Mixture(
    np.array([0.25, 0.75]),
    np.array([[-1.2, 0.5], [1.0, -0.3]]),
    np.array([[[0.30, 0.10], [0.10, 0.08]], [[0.06, -0.04], [-0.04, 0.25]]]),
)
OPERATOR, SD, Y = np.array([[0.6, 0.9]]), 0.25, np.array([0.15])
NUM_SEGMENTS = 3


def posterior_of(data, energy):
    law = make_law(data.score(SCHEDULE), SCHEDULE, (2,), segments=NUM_SEGMENTS)
    law = law if energy else without_energy(law)
    return make_posterior(law, linear_terms(OPERATOR, SD, Y), ExactReverse(data, SCHEDULE))


class Recorder:
    """Trajectories and accept steps that `hmc` asks for."""

    def __init__(self, monkeypatch):
        self.trajectories, self.log_ratios = [], []
        monkeypatch.setattr(_moves, "leapfrog", self.leapfrog)
        monkeypatch.setattr(_moves, "metropolis", self.metropolis)

    def leapfrog(self, *args, **options):
        self.trajectories.append(leapfrog(*args, **options))
        return self.trajectories[-1]

    def metropolis(self, key, log_ratio, *args, **options):
        self.log_ratios.append(log_ratio)
        return METROPOLIS(key, jnp.full_like(log_ratio, 1e9), *args, **options)


METROPOLIS = _moves.metropolis


@pytest.mark.slow
@pytest.mark.parametrize("energy", [True, False], ids=["energy", "score only"])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_the_energy_error_of_a_gaussian_is_that_of_leapfrog(energy, num_steps, monkeypatch, x64):
    posterior, recorder = posterior_of(GAUSSIAN, energy), Recorder(monkeypatch)
    last = jnp.asarray(NUM_SEGMENTS)
    mass, key, x = _moves.preconditioner(posterior, last), jr.key(3), jnp.array([0.7, -0.1])
    new, info = _moves.hmc(key, posterior, posterior.at_data(x), mass, jnp.asarray(0.9), num_steps)

    # The whole density in closed form, in the coordinates themselves: the inverse mass matrix is B B^T.
    momentum_key, jitter_key, _ = jr.split(key, 3)
    root = jax.vmap(mass.apply, out_axes=1)(jnp.eye(2))
    momentum = jnp.linalg.solve(root.T, jr.normal(momentum_key, (2,)))
    step_size = 0.9 * jr.uniform(jitter_key, (), minval=0.6, maxval=1.2)
    score, t = GAUSSIAN.score(SCHEDULE), posterior.sites[0].grid.t[-1]
    potential = lambda p: score.energy(p["x"], t) - posterior.likelihoods.terms(p["x"]).log_likelihood
    evaluate = evaluation(lambda p: {}, potential)
    velocity = lambda p: {"x": root @ root.T @ p["x"]}
    end = leapfrog(evaluate, velocity, evaluate({"x": x}), {"x": momentum}, step_size, num_steps)
    np.testing.assert_allclose(new.x, end.point.position["x"], rtol=1e-10)
    assert abs(float(end.energy_error)) > 1e-3
    np.testing.assert_allclose(recorder.trajectories[0].energy_error, end.energy_error, rtol=1e-9)
    # It is what is accepted by; the sign counts.
    np.testing.assert_array_equal(recorder.log_ratios[0], -recorder.trajectories[0].energy_error)
    assert info.num_evaluations == num_steps
    again = posterior.at_data(new.x)
    for got, expected in zip(new[:2] + new[3:], again[:2] + again[3:], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("energy", [True, False], ids=["energy", "score only"])
@pytest.mark.parametrize("num_steps", [1, 4, 5])
def test_a_trajectory_is_reversible(energy, num_steps, monkeypatch, x64):
    posterior, recorder = posterior_of(SKEWED, energy), Recorder(monkeypatch)
    mass = _moves.preconditioner(posterior, jnp.asarray(NUM_SEGMENTS))
    momentum, x = jnp.array([0.9, -0.4]), jnp.array([0.7, -0.1])
    monkeypatch.setattr(jr, "uniform", lambda key, shape, dtype, low, high: jnp.ones(shape, dtype))
    monkeypatch.setattr(jr, "normal", lambda key, shape, dtype: momentum)
    there, info = _moves.hmc(jr.key(0), posterior, posterior.at_data(x), mass, jnp.asarray(0.4), num_steps)
    assert not info.diverging | info.unresolved
    assert float(jnp.linalg.norm(there.x - x)) > 0.05
    momentum = -recorder.trajectories[0].momentum["u"]
    back, _ = _moves.hmc(jr.key(0), posterior, there, mass, jnp.asarray(0.4), num_steps)
    np.testing.assert_allclose(back.x, x, rtol=1e-10)
    errors = [trajectory.energy_error for trajectory in recorder.trajectories]
    assert abs(float(errors[0])) > 1e-5
    np.testing.assert_allclose(errors[1], -errors[0], rtol=1e-9)


def test_a_rejected_trajectory_leaves_the_point_and_says_why(x64):
    posterior = posterior_of(SKEWED, energy=False)
    mass = _moves.preconditioner(posterior, jnp.asarray(NUM_SEGMENTS))
    point = posterior.at_data(jnp.array([0.7, -0.1]))
    step = jax.jit(lambda key, size: _moves.hmc(key, posterior, point, mass, size, 10))
    for seed in range(5):
        new, info = step(jr.key(seed), jnp.asarray(8.0))
        jax.tree.map(np.testing.assert_array_equal, new, point)
        assert info.accept_prob == 0
        assert info.num_evaluations <= 10
        assert np.isfinite(info.accept_prob)
    new, info = step(jr.key(0), jnp.asarray(0.1))
    assert info.accept_prob > 0.9
    assert info.num_evaluations == 10
