"""What the warmup of particle Gibbs learns, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer.hmc_util import dual_averaging

import numpyro_rtk as rtk
from numpyro_rtk._smc._conditional import no_sweep, SweepTuning, visits
from numpyro_rtk._smc._point import MoveInfo
from numpyro_rtk._smc._unconditional import StartInfo
from numpyro_rtk._tuning._step_size import StepSizeTuner
from numpyro_rtk._tuning._sweeps import Iteration, SweepTuner, WORTH_SWEEPING
from tests.particles import linear_terms, make_law, make_posterior, Mixture, without_energy


SCHEDULE = rtk.OU()
DATA = Mixture(np.ones(1), np.array([[0.3, -0.5]]), np.array([[[0.5, 0.3], [0.3, 0.4]]]))
NUM_SEGMENTS, NUM_WARMUP = 4, 6
REVERSE = jnp.array([[0.2], [0.4], [0.6], [0.8]])
GUIDED = jnp.array([0.01, 0.03, 0.02, 0.07])


def tuner_of(energy=False):
    law = make_law(DATA.score(SCHEDULE), SCHEDULE, (2,), segments=NUM_SEGMENTS)
    law = law if energy else without_energy(law)
    posterior = make_posterior(law, linear_terms(np.eye(2), 0.5, np.zeros(2)), rtk.MALA(2))
    return SweepTuner(posterior, rtk.LocalHMC(), 0.7, 8, StepSizeTuner(*dual_averaging()), None, 0.1)


def start_of(tuner):
    levels = tuner.posterior.num_levels
    return tuner.init(SweepTuning(REVERSE, GUIDED), jnp.zeros(levels), 2, NUM_WARMUP)


def iterations(tuner, state, depth, swept=0.99, **local):
    """The state after a warmup of sweeps of one depth."""
    half, no = jnp.asarray(0.5), jnp.zeros((), bool)
    move = MoveInfo(half, half, no, no, jnp.asarray(1))
    move = move._replace(**{name: jnp.asarray(value) for name, value in local.items()})
    weighted, visited = visits(tuner.posterior, jnp.asarray(depth))
    sweep = no_sweep(tuner.posterior)._replace(
        weighted=weighted,
        visited=visited,
        accept_prob=jnp.where(visited, swept, 0.0),
        guided_accept_prob=jnp.where(visited, swept, 0.0),
    )
    update = jax.jit(tuner.update)
    for i in range(NUM_WARMUP):
        seen = (jnp.asarray(i), sweep, move, jnp.asarray(0), jnp.asarray(depth > 0), jnp.asarray(1.0))
        state = update(state, Iteration(*seen))
    return state


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_levels_that_no_sweep_visited_keep_their_step_sizes(depth):
    tuner = tuner_of()
    state = iterations(tuner, start_of(tuner), depth)
    visited = np.asarray(visits(tuner.posterior, jnp.asarray(depth))[1])
    assert visited.sum() == depth
    np.testing.assert_array_equal((state.guided_step_size == GUIDED)[~visited], True)
    np.testing.assert_array_equal((state.step_size == REVERSE)[~visited], True)
    assert np.all(np.asarray(state.guided_step_size > GUIDED)[visited])
    assert np.all(np.asarray(state.step_size > REVERSE)[visited])


@pytest.mark.slow
def test_annealed_step_sizes_survive_a_restart():
    """A restart finds guided step sizes; the averaging goes on from them, and from nothing older."""
    tuner = tuner_of()
    annealed, levels = 2 * GUIDED, tuner.posterior.num_levels
    info = StartInfo(jnp.zeros(()), jnp.ones(levels), annealed, jnp.full(levels, -0.5))
    before = iterations(tuner, start_of(tuner), NUM_SEGMENTS + 1, swept=0.0)
    assert np.all(np.asarray(before.guided_step_size < GUIDED))
    state = tuner.restart(before, info)
    np.testing.assert_array_equal(state.guided_step_size, annealed)
    np.testing.assert_array_equal(state.log_beta, info.log_beta)
    np.testing.assert_array_equal(state.step_size, before.step_size)
    # At the end of the warmup too, where no sweep came by since.
    kept = iterations(tuner, state, 0)
    np.testing.assert_array_equal(kept.guided_step_size, annealed)
    # Where sweeps come by, as from a start at these.
    fresh = start_of(tuner)._replace(averaging=state.averaging, guided_step_size=annealed)
    np.testing.assert_array_equal(
        iterations(tuner, state, 2).guided_step_size, iterations(tuner, fresh, 2).guided_step_size
    )


@pytest.mark.parametrize(
    ("local", "energy", "target"),
    [
        (rtk.LocalMALA(), False, 0.9),
        (rtk.LocalHMC(), False, 0.98),
        (rtk.LocalMALA(), True, 0.8),
        (rtk.LocalHMC(), True, 0.8),
    ],
)
def test_local_moves_aim_at_the_acceptance_at_which_their_energies_are_known(local, energy, target):
    tuner = tuner_of(energy)._replace(local=local)
    assert tuner.local_target == target
    start = start_of(tuner)
    above, below = (
        iterations(tuner, start, 0, tuning_prob=p).local_step_size
        for p in (jnp.asarray(target + 0.015), jnp.asarray(target - 0.015))
    )
    assert below < start.local_step_size < above


def test_sweeps_are_as_frequent_as_they_succeed():
    tuner = tuner_of()
    at = lambda changed, sweeps: float(tuner._sweep_prob(jnp.asarray(0.7), jnp.asarray(changed), sweeps))
    assert at(0.0, 0.0) == 1.0
    assert at(5.0, 100.0) == 1.0
    np.testing.assert_allclose(at(2.0, 99.0), 2.5 / 100 / WORTH_SWEEPING, rtol=1e-6)
    np.testing.assert_allclose(at(0.0, 500.0), 0.1, rtol=1e-6)  # the least
    assert at(1.0, 20.0) > at(0.0, 20.0)
    # What is given is kept.
    given = tuner._replace(sweep_prob=0.7)
    assert float(given._sweep_prob(jnp.asarray(0.7), jnp.asarray(0.0), 500.0)) == pytest.approx(0.7)
