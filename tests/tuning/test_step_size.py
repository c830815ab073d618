"""Step sizes by dual averaging, each entry of an array by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer.hmc_util import dual_averaging

from numpyro_rtk._tuning._step_size import MAX_STEP_SIZE, MIN_STEP_SIZE, StepSizeTuner


TUNER = StepSizeTuner(*dual_averaging())
GIVEN = jnp.array([[0.3, 2.0], [1e-4, 0.05], [7.0, 1.0]])
TARGET = 0.7


def accept_probs(count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(count, *GIVEN.shape)), jnp.float32)


def learn(accept_prob, usable, state=None):
    """States after each update."""
    state = TUNER.init(GIVEN) if state is None else state
    update = jax.jit(lambda state, accept, usable: TUNER.update(state, accept, TARGET, usable))
    for accept, use in zip(accept_prob, usable, strict=True):
        state = update(state, accept, use)
    return state


def everywhere(count):
    return jnp.ones((count, *GIVEN.shape), bool)


def test_nothing_learnt_is_the_given_step_size():
    state = TUNER.init(GIVEN)
    for freeze in (False, True):
        np.testing.assert_array_equal(TUNER.step_size(state, 1e-3, 0.5, freeze=freeze), GIVEN)


@pytest.mark.parametrize("freeze", [False, True])
def test_an_entry_that_was_never_updated_keeps_its_step_size(freeze):
    usable = everywhere(7).at[:, 1, 0].set(False)
    state = learn(accept_probs(7), usable)
    step_size = TUNER.step_size(state, 0.0, jnp.inf, freeze=freeze)
    assert step_size[1, 0] == GIVEN[1, 0]  # even out of bounds
    assert TUNER.step_size(state, 1e-2, jnp.inf, freeze=freeze)[1, 0] == GIVEN[1, 0]
    others = np.ones(GIVEN.shape, bool)
    others[1, 0] = False
    assert np.all(np.asarray(step_size != GIVEN)[others])
    np.testing.assert_array_equal(state.num_updates, np.where(others, 7, 0))


def test_entries_that_are_not_usable_are_untouched():
    before = learn(accept_probs(3), everywhere(3))
    mask = jnp.array([[True, False], [False, False], [True, True]])
    after = learn(accept_probs(1, seed=1), mask[None], before)
    flat = np.asarray(mask).ravel()
    for new, old in zip(jax.tree.leaves(after.averaging), jax.tree.leaves(before.averaging), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[~flat], np.asarray(old)[~flat])
    for freeze in (False, True):
        new, old = (TUNER.step_size(s, 0.0, jnp.inf, freeze=freeze) for s in (after, before))
        np.testing.assert_array_equal(new == old, ~mask)
    # Nor does what is reported there matter, NaN included.
    broken = jnp.where(mask, accept_probs(1, seed=1)[0], jnp.nan)
    again = learn(broken[None], mask[None], before)
    jax.tree.map(np.testing.assert_array_equal, again, after)


def test_one_entry_agrees_with_numpyro():
    count = 12
    accept, usable = accept_probs(count), np.random.default_rng(3).uniform(size=(count, *GIVEN.shape)) < 0.6
    state = learn(accept, jnp.asarray(usable))
    init, update = dual_averaging()
    for entry in np.ndindex(GIVEN.shape):
        own = init(jnp.log(GIVEN[entry]))
        for i in np.flatnonzero(usable[(slice(None), *entry)]):
            own = update(TARGET - accept[(i, *entry)], own)
        current, average = np.exp(own[0]), np.exp(own[1])
        assert abs(current / average - 1) > 1e-3
        np.testing.assert_allclose(TUNER.step_size(state, 0.0, jnp.inf)[entry], current, rtol=1e-4)
        np.testing.assert_allclose(
            TUNER.step_size(state, 0.0, jnp.inf, freeze=True)[entry], average, rtol=1e-4
        )
        assert state.num_updates[entry] == usable[(slice(None), *entry)].sum()


def test_frozen_step_sizes_are_averages_of_logs():
    # Dual averaging weighs the iterates by t^-0.75 and so forgets the first ones.
    accept, state, average = accept_probs(9), TUNER.init(GIVEN), jnp.zeros(GIVEN.shape)
    for i in range(9):
        state = learn(accept[i : i + 1], everywhere(1), state)
        weight = (i + 1) ** -0.75
        average = (1 - weight) * average + weight * jnp.log(TUNER.step_size(state, 0.0, jnp.inf))
    np.testing.assert_allclose(
        jnp.log(TUNER.step_size(state, 0.0, jnp.inf, freeze=True)), average, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(("accept", "bound"), [(1.0, 0.5), (0.0, 1e-3)])
def test_learnt_step_sizes_stay_within_their_bounds(accept, bound):
    state = learn(jnp.full((40, *GIVEN.shape), accept), everywhere(40))
    np.testing.assert_allclose(TUNER.step_size(state, 1e-3, 0.5), bound, rtol=1e-5)
    # Without bounds they are large or small, and finite.
    free = np.asarray(TUNER.step_size(state, 0.0, jnp.inf))
    assert np.all((free > 0.5) if accept else (free < 1e-3))
    assert np.all((free >= 0.99 * MIN_STEP_SIZE) & (free <= 1.01 * MAX_STEP_SIZE))


def test_step_sizes_find_the_target():
    # Acceptance exp(-h / scale), of another scale for every entry.
    scale = GIVEN[::-1]
    state = TUNER.init(GIVEN)
    step = jax.jit(
        lambda state: TUNER.update(
            state, jnp.exp(-TUNER.step_size(state, 0.0, jnp.inf) / scale), TARGET, jnp.ones((), bool)
        )
    )
    for _ in range(800):
        state = step(state)
    reached = jnp.exp(-TUNER.step_size(state, 0.0, jnp.inf, freeze=True) / scale)
    np.testing.assert_allclose(reached, TARGET, atol=0.05)


@pytest.mark.parametrize("shape", [(), (4,), (3, 2)])
def test_shapes_and_dtypes(shape, x64):
    for dtype in (jnp.float32, jnp.float64):
        state = TUNER.init(jnp.full(shape, 0.3, dtype))
        assert state.num_updates.shape == shape
        new = TUNER.update(state, jnp.full(shape, 0.5, dtype), TARGET, jnp.ones((), bool))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        step_size = TUNER.step_size(new, 0.0, jnp.inf)
        assert (step_size.shape, step_size.dtype) == (shape, dtype)
