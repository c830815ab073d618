"""Nodes of `LineIntegral` that do not resolve a score are named, with a number that does."""

import re

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import numpyro_rtk as rtk
from numpyro_rtk._diagnosis._line_integral import check_line_integral
from tests.helpers import Counter


def two_sharp_modes(dim=12, sd=0.1):
    """On rays from the origin, where the score changes over a fraction of the way."""
    first, second = np.zeros(dim), np.zeros(dim)
    first[0], second[1] = 2.0, -2.5
    mixture = rtk.GaussianMixtureScore([0.3, 0.7], [first, second], [sd**2 * np.eye(dim)] * 2, rtk.OU())
    t = jnp.asarray(1e-3)
    return lambda x: mixture(x, t), mixture.sample(jr.key(0), 16), lambda x: mixture.log_density(x, t)


# The score is that of the data at every time, so that it is not the score of noised data.
@pytest.mark.filterwarnings("ignore:.*is not the score of its own draws:UserWarning")
@pytest.mark.slow
def test_too_few_nodes_are_named_with_a_number_that_does():
    score, draws, log_density = two_sharp_modes()
    (finding,) = check_line_integral(score, jnp.zeros(12), draws, 8, "`score_fn` of site 'x'")
    assert finding.kind == "line_integral"
    assert "`LineIntegral(num_nodes=8)`" in finding.message
    assert "site 'x'" in finding.message
    enough = int(re.search(r"(\d+) nodes would do", finding.message).group(1))
    assert enough >= 64
    assert check_line_integral(score, jnp.zeros(12), draws, enough, "`score_fn`") == []

    prior = rtk.DiffusionPrior(lambda x, t: score(x), (12,), density=rtk.LineIntegral(num_nodes=enough))
    got = np.asarray(prior.log_prob(draws))
    right = np.array([log_density(x) for x in draws])
    assert np.ptp(got - right) < 0.2
    # The control: with eight nodes the same comparison fails.
    few = rtk.DiffusionPrior(lambda x, t: score(x), (12,), density=rtk.LineIntegral(num_nodes=8))
    assert np.ptp(np.asarray(few.log_prob(draws)) - right) > 1


def test_what_all_draws_have_in_common_is_no_error():
    # Far from the reference the score has a step that no draw is near.
    def score(x):
        return -x - 40 * jnp.exp(-(((x - 3.0) / 0.02) ** 2))

    draws = 10 + 1e-5 * jr.normal(jr.key(0), (8, 1))
    assert check_line_integral(score, jnp.zeros(1), draws, 64, "`score_fn`") == []
    # The control: the same error, and draws on both sides of it.
    assert check_line_integral(score, jnp.zeros(1), draws * jnp.array([[1.0], [-1.0]] * 4), 64, "`score_fn`")


def test_a_smooth_score_needs_few_nodes_and_costs_what_is_said():
    score = Counter(lambda x, t: -(x**3) - x)
    draws = jr.normal(jr.key(0), (16, 3))
    assert check_line_integral(lambda x: score(x, 0.0), jnp.zeros(3), draws, 8, "`score_fn`") == []
    assert 16 * (3 * 8 + 1) <= score.count < 16 * (3 * 8 + 1) + 2 * 128


def test_a_score_that_no_number_resolves_is_said_to_be_so():
    def score(x):
        return 1e4 * jnp.sign(jnp.sin(1e5 * x))

    (finding,) = check_line_integral(score, jnp.zeros(2), jr.normal(jr.key(0), (4, 2)), 300, "`score_fn`")
    assert "would not do" in finding.message
    assert "reference" in finding.message
    assert check_line_integral(lambda x: jnp.nan * x, jnp.zeros(2), jnp.ones((6, 2)), 16, "`score_fn`") == []
