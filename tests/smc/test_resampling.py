"""Resampling: expected offspring, the law given a pinned particle, and the last move, against brute force."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from numpyro_rtk._smc._resampling import (
    _ancestors,
    conditional_systematic,
    forced_move,
    normalized_weights,
    particle_ess,
    pinned_weights,
    systematic,
)


# Probability that a right library fails any check in this file, and the number of p-values it takes.
P_MIN = 1e-4 / 50
NUM_DRAWS = 40_000

WEIGHTS = {
    "uneven": [0.37, 0.05, 0.21, 0.37],
    "pinned light": [0.02, 0.49, 0.09, 0.4],
    "pinned heavy": [0.9, 0.04, 0.05, 0.01],
    "whole numbers": [0.5, 0.25, 0.25, 0.0],
    "two": [0.35, 0.65],
}


def offsets_and_laws(weights):
    """Law of the ancestors of systematic resampling shifted by a uniform number of slots, by brute force."""
    n = len(weights)
    # Ancestors change only where a point (i + u) / n meets a partial sum.
    breaks = np.unique(np.concatenate([[0.0, 1.0], np.mod(n * np.cumsum(weights), 1.0)]))
    law = collections.Counter()
    for low, high in itertools.pairwise(breaks):
        if high - low < 1e-7:  # rounding of the partial sums
            continue
        middle = jnp.asarray(0.5 * (low + high), jnp.float32)
        ancestors = np.asarray(jax.jit(_ancestors)(jnp.asarray(weights, jnp.float32), middle))
        for shift in range(n):
            law[tuple(np.roll(ancestors, -shift).tolist())] += (high - low) / n
    return law


def chi_square(draws, law):
    """P-value of discrete draws against their law, rare outcomes pooled."""
    outcomes, numbers = np.unique(np.asarray(draws), axis=0, return_counts=True)
    counts = dict(zip(map(tuple, outcomes.tolist()), numbers, strict=True))
    assert set(counts) <= set(law), set(counts) - set(law)
    outcomes = list(law)
    total = sum(counts.values())
    expected = np.array([law[o] for o in outcomes]) / sum(law.values()) * total
    observed = np.array([counts.get(o, 0) for o in outcomes])
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    return stats.chisquare(observed, expected).pvalue if observed.size > 1 else 1.0


@functools.cache
def compiled(function):
    return jax.jit(jax.vmap(function, in_axes=(0, None)))


def draw(function, weights, seed=0):
    return np.asarray(compiled(function)(jr.split(jr.key(seed), NUM_DRAWS), jnp.asarray(weights)))


@pytest.mark.parametrize("name", WEIGHTS)
def test_systematic_gives_the_expected_offspring_up_to_rounding(name):
    weights = np.array(WEIGHTS[name])
    ancestors = draw(systematic, weights)
    counts = np.stack([(ancestors == j).sum(1) for j in range(weights.size)], axis=1)
    expected = weights.size * weights
    assert np.all(counts >= np.floor(expected - 1e-5))
    assert np.all(counts <= np.ceil(expected + 1e-5))
    sd = np.sqrt(np.maximum((expected % 1) * (1 - expected % 1), 1e-8) / NUM_DRAWS)
    assert np.all(np.abs(counts.mean(0) - expected) < stats.norm.isf(P_MIN / 2) * sd + 1e-4)


@pytest.mark.parametrize("name", WEIGHTS)
def test_conditional_systematic_is_systematic_given_its_first_slot(name):
    weights = WEIGHTS[name]
    ancestors = draw(conditional_systematic, weights)
    assert np.all(ancestors[:, 0] == 0)
    given = {outcome: p for outcome, p in offsets_and_laws(weights).items() if outcome[0] == 0}
    assert chi_square(ancestors, given) > P_MIN


def unconditional_with_a_pin(key, weights):
    """What must not be done: systematic resampling, with the first slot overwritten."""
    return systematic(key, weights).at[0].set(0)


def without_shift(key, weights):
    """What must not be done: the pinned particle's offspring keep their places."""
    ancestors = conditional_systematic(key, weights)
    return jnp.sort(ancestors)


@pytest.mark.parametrize("broken", [unconditional_with_a_pin, without_shift])
def test_other_conditional_laws_are_seen(broken):
    given = {outcome: p for outcome, p in offsets_and_laws(WEIGHTS["uneven"]).items() if outcome[0] == 0}
    ancestors = draw(broken, WEIGHTS["uneven"])
    known = {tuple(row) for row in np.unique(ancestors, axis=0).tolist()} <= set(given)
    assert not known or chi_square(ancestors, given) < P_MIN


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_pinned_particle_drawn_by_its_weight_leaves_every_slot_with_the_weights(name):
    # Mixed over which particle is pinned, each slot follows the weights: what particle Gibbs needs. Particles
    # are renamed by a cyclic shift, under which the points on the circle of partial sums keep their law.
    weights = np.array(WEIGHTS[name])
    total = np.zeros((weights.size, weights.size))
    for pinned in np.flatnonzero(weights):
        order = np.roll(np.arange(weights.size), -pinned)
        ancestors = order[draw(conditional_systematic, weights[order], seed=int(pinned))]
        total += weights[pinned] * np.stack([(ancestors == j).mean(0) for j in range(weights.size)], axis=1)
    np.testing.assert_allclose(
        total, np.tile(weights, (weights.size, 1)), atol=5.0 * 0.5 / np.sqrt(NUM_DRAWS)
    )


@pytest.mark.parametrize("name", WEIGHTS)
def test_forced_move_leaves_the_weights_invariant(name):
    weights = np.array(WEIGHTS[name])
    size = weights.size
    transition = np.zeros((size, size))
    for current in range(size):
        order = np.r_[current, np.delete(np.arange(size), current)]
        chosen = order[draw(forced_move, weights[order], seed=current)]
        transition[current] = np.bincount(chosen, minlength=size) / NUM_DRAWS
    np.testing.assert_allclose(weights @ transition, weights, atol=5.0 * 0.5 / np.sqrt(NUM_DRAWS))
    # Liu (1996): off the diagonal no smaller than drawing by weight, hence better (Peskun).
    off = ~np.eye(size, dtype=bool)
    assert np.all(
        (transition - weights[None])[off & (weights[:, None] > 0)] > -5.0 * 0.5 / np.sqrt(NUM_DRAWS)
    )
    # Closed form: propose one of the others by weight, accept with (1 - W_0) / (1 - W_j).
    for i, j in zip(*np.nonzero(off), strict=True):
        if weights[i] > 0:
            exact = weights[j] * min(1 / (1 - weights[i]), 1 / (1 - weights[j]))
            assert abs(transition[i, j] - exact) < 5.0 * 0.5 / np.sqrt(NUM_DRAWS)


@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0], [1.0, 1e-30, 0.0]])
def test_forced_move_stays_where_nothing_else_is_possible(weights):
    keys = jr.split(jr.key(0), 1000)
    assert np.all(np.asarray(jax.vmap(lambda key: forced_move(key, jnp.asarray(weights)))(keys)) == 0)


def test_forced_move_leaves_an_impossible_particle():
    keys = jr.split(jr.key(0), 1000)
    chosen = np.asarray(jax.vmap(lambda key: forced_move(key, jnp.asarray([0.0, 0.0, 0.4, 0.6])))(keys))
    assert set(chosen.tolist()) == {2, 3}


@pytest.mark.parametrize(
    ("log_weights", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], 4.0),
        ([1000.0, 1000.0, -np.inf, -np.inf], 2.0),
        ([-np.inf, -5000.0, -np.inf, -np.inf], 1.0),
        ([-np.inf] * 4, 0.0),
        ([np.log(3.0), 0.0], 16 / 10),
    ],
)
def test_particle_ess(log_weights, expected):
    log_weights = jnp.asarray(log_weights)
    np.testing.assert_allclose(particle_ess(log_weights), expected, rtol=1e-6)
    weights = normalized_weights(log_weights)
    np.testing.assert_allclose(jnp.sum(weights), 1.0, rtol=1e-6)
    assert np.all(np.isfinite(np.asarray(weights)))
    if not np.any(np.isfinite(np.asarray(log_weights))):
        np.testing.assert_allclose(weights, 0.25)


@pytest.mark.parametrize("log_weights", [[0.0, 1.0, -3.0], [-np.inf, -5000.0, -np.inf], [-np.inf, 2.0, 2.0]])
def test_weights_with_a_pinned_particle_are_the_weights(log_weights):
    weights, lost = pinned_weights(jnp.asarray(log_weights))
    np.testing.assert_array_equal(weights, normalized_weights(jnp.asarray(log_weights)))
    assert not lost


def test_where_no_weight_is_positive_the_pinned_particle_stays():
    weights, lost = pinned_weights(jnp.full(4, -jnp.inf))
    np.testing.assert_array_equal(weights, [1.0, 0.0, 0.0, 0.0])
    assert lost
    # Whatever is done with them then: it is left, and all come from it.
    for function in (forced_move, conditional_systematic):
        assert np.all(draw(function, weights) == 0)
    # The control: uniform weights would leave it.
    assert np.any(draw(forced_move, normalized_weights(jnp.full(4, -jnp.inf))) != 0)
