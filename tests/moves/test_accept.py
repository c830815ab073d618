"""The accept rule of all kernels, and the ratio of Langevin proposals."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from numpyro_rtk._moves._accept import all_finite, metropolis, select
from numpyro_rtk._moves._langevin import langevin_move, log_langevin_ratio


# Probability that a right library fails any check in this file, and the number of p-values it takes.
P_MIN = 1e-4 / 20
NUM_DRAWS = 40_000
YES, NO = jnp.ones((), bool), jnp.zeros((), bool)


def decisions(log_ratio, finite=True, **options):
    """Many decisions about the same proposal."""
    decide = jax.vmap(lambda key: metropolis(key, jnp.asarray(log_ratio), jnp.asarray(finite), **options))
    return decide(jr.split(jr.key(0), NUM_DRAWS))


@pytest.mark.parametrize("log_ratio", [-2.0, -0.7, -0.05])
def test_accepts_with_the_metropolis_probability(log_ratio):
    result = decisions(log_ratio)
    accepted = int(np.sum(result.accept))
    assert stats.binomtest(accepted, NUM_DRAWS, np.exp(log_ratio)).pvalue > P_MIN
    # The control: Barker's rule, which is reversible, too.
    barker = np.exp(log_ratio) / (1 + np.exp(log_ratio))
    assert stats.binomtest(accepted, NUM_DRAWS, barker).pvalue < P_MIN
    np.testing.assert_allclose(result.accept_prob, np.exp(log_ratio), rtol=1e-6)
    assert not np.any(result.diverging)


@pytest.mark.parametrize("log_ratio", [0.0, 1e-3, 2.0, 1e9])
def test_accepts_what_gains(log_ratio):
    result = decisions(log_ratio)
    assert np.all(result.accept)
    np.testing.assert_array_equal(result.accept_prob, 1.0)
    assert not np.any(result.diverging)


@pytest.mark.parametrize("log_ratio", [-4.0, -1.0, -0.2, 0.0, 0.6, 3.0])
def test_decisions_there_and_back_balance(log_ratio):
    # alpha(r) = e^r alpha(-r): detailed balance, for a ratio that changes its sign on the way back.
    there, back = (metropolis(jr.key(0), jnp.asarray(sign * log_ratio), YES) for sign in (1.0, -1.0))
    np.testing.assert_allclose(there.accept_prob, np.exp(log_ratio) * back.accept_prob, rtol=1e-5)
    accepted = [int(np.sum(decisions(sign * log_ratio).accept)) for sign in (1.0, -1.0)]
    gains, losses = max(accepted), min(accepted)
    assert gains == NUM_DRAWS
    assert stats.binomtest(losses, NUM_DRAWS, np.exp(-abs(log_ratio))).pvalue > P_MIN


OUTCOMES = [
    # log ratio, finite, possible, resolved: diverging
    (-np.inf, True, True, True, False),  # outside the support, or a projected step
    (-np.inf, True, False, True, False),
    (np.nan, True, True, True, True),
    (np.inf, True, True, True, True),
    (np.nan, True, False, True, False),  # no likelihood to speak of: its gradient may overflow
    (np.inf, True, False, True, False),
    (np.nan, True, True, False, False),  # too coarse a path to know
    (np.inf, True, True, False, False),
    (5.0, True, True, False, False),
    (-0.1, True, True, False, False),
    (5.0, False, True, True, True),  # the network's own values are not finite
    (np.nan, False, True, True, True),
    (5.0, False, False, True, True),
    (5.0, False, True, False, True),
    (-np.inf, False, True, True, True),
]


@pytest.mark.parametrize(("log_ratio", "finite", "possible", "resolved", "diverging"), OUTCOMES)
def test_what_is_unusable_is_rejected_and_reported(log_ratio, finite, possible, resolved, diverging):
    for key in jr.split(jr.key(1), 20):
        result = metropolis(
            key,
            jnp.asarray(log_ratio),
            jnp.asarray(finite),
            possible=jnp.asarray(possible),
            resolved=jnp.asarray(resolved),
        )
        assert not result.accept
        assert result.accept_prob == 0
        assert result.diverging == diverging


def test_an_impossible_proposal_of_known_ratio_is_decided_by_it():
    result = decisions(-0.7, possible=False)
    assert stats.binomtest(int(np.sum(result.accept)), NUM_DRAWS, np.exp(-0.7)).pvalue > P_MIN
    assert not np.any(result.diverging)


def test_every_outcome_is_a_number():
    values = [-np.inf, -1e30, -1.0, 0.0, 1.0, np.inf, np.nan]
    for log_ratio, finite, possible, resolved in itertools.product(values, *[[False, True]] * 3):
        result = metropolis(
            jr.key(2), jnp.asarray(log_ratio), jnp.asarray(finite), possible=possible, resolved=resolved
        )
        assert 0 <= result.accept_prob <= 1
        assert not result.accept or result.accept_prob > 0
        assert not (result.accept and result.diverging)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtypes(dtype, x64, strict_dtypes):
    result = metropolis(jr.key(0), jnp.asarray(-0.3, dtype), YES, possible=NO, resolved=YES)
    assert result.accept_prob.dtype == dtype
    assert result.accept.dtype == result.diverging.dtype == jnp.bool_


def test_all_finite_and_select():
    assert all_finite(jnp.ones(3), jnp.zeros(()))
    assert not all_finite(jnp.ones(3), jnp.array([0.0, jnp.nan]))
    assert not all_finite(jnp.array(jnp.inf), jnp.ones(3))
    for flag, expected in ((YES, 1.0), (NO, 2.0)):
        np.testing.assert_array_equal(select(flag, {"a": jnp.ones(2)}, {"a": 2 * jnp.ones(2)})["a"], expected)


# Langevin proposals.


def draw_pair(seed, dtype=float):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(4, 3)), dtype)


@pytest.mark.parametrize("step_size", [1e-4, 0.3, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_langevin_ratio_is_that_of_the_gaussian_densities(step_size, seed, x64):
    x, y, force, new_force = draw_pair(seed)
    log_q = lambda new, old, force: stats.multivariate_normal.logpdf(
        new, old + step_size * force, 2 * step_size * np.eye(3)
    )
    exact = log_q(x, y, np.asarray(new_force)) - log_q(y, x, np.asarray(force))
    h = jnp.asarray(step_size)
    # The densities subtract squares over the step size from each other.
    np.testing.assert_allclose(
        log_langevin_ratio(y - x, force, new_force, h), exact, rtol=1e-11, atol=1e-13 / step_size
    )


def test_langevin_ratio_is_antisymmetric():
    for seed in range(50):
        x, y, force, new_force = draw_pair(seed, jnp.float32)
        there = float(log_langevin_ratio(y - x, force, new_force, jnp.float32(0.3)))
        back = float(log_langevin_ratio(x - y, new_force, force, jnp.float32(0.3)))
        assert there == -back != 0


def test_langevin_moves_have_the_law_of_the_ratio():
    force, step_size = jnp.array([0.7, -1.2]), jnp.asarray(0.3)
    moves = jax.vmap(lambda key: langevin_move(key, force, step_size))(jr.split(jr.key(4), NUM_DRAWS))
    for i in range(2):
        exact = stats.norm(0.3 * float(force[i]), np.sqrt(0.6))
        assert stats.kstest(np.asarray(moves[:, i], np.float64), exact.cdf).pvalue > P_MIN
        wrong = stats.norm(-0.3 * float(force[i]), np.sqrt(0.6))
        assert stats.kstest(np.asarray(moves[:, i], np.float64), wrong.cdf).pvalue < P_MIN
