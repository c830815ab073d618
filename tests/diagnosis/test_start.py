"""What users see when a kernel starts: errors, warnings and the first line of the log, and silence."""

import logging
import re
import warnings

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_rtk as rtk
from numpyro_rtk._noising._times import noise_range
from numpyro_rtk._numpyro._rtk_start import _more_evaluations, Settings


VP = rtk.VP(beta_min=0.1, beta_max=20.0)
MEANS = [[-1.4, 0.0, 0.3], [0.9, 0.5, 0.0]]


def two_modes(schedule, sd=0.2):
    mixture = rtk.GaussianMixtureScore([0.35, 0.65], MEANS, [sd**2 * np.eye(3)] * 2, schedule)
    return lambda x, t: mixture(x, t)


def model_of(score_fn, **options):
    prior = rtk.DiffusionPrior(score_fn, (3,), **options)

    def model():
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=jnp.ones(3))

    return model


STARTS = {
    "RTKKernel": lambda score_fn: rtk.RTKKernel(score_fn, event_shape=(3,)),
    "RTKParticleGibbs": lambda score_fn: rtk.RTKParticleGibbs(model_of(score_fn)),
    "ScoreHMC": lambda score_fn: rtk.ScoreHMC(model_of(score_fn)),
}


def start(name, score_fn):
    return STARTS[name](score_fn).init(jr.key(0), 10, None, (), {})


@pytest.mark.parametrize("name", STARTS)
def test_a_wrong_sign_is_an_error_in_every_kernel(name):
    right = two_modes(rtk.OU())
    with pytest.raises(ValueError, match=r"wrong sign.*NoisePrediction"):
        start(name, lambda x, t: -rtk.OU().sigma(t) * right(x, t))


# The prior's own pilot, which ScoreHMC asks, has 16 draws and finds larger faults only.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["RTKKernel", "RTKParticleGibbs"])
def test_the_score_of_another_schedule_is_warned_of_once(name):
    score_fn = two_modes(VP)
    message = r"noised by `schedule=OU\(\)` \(assumed.*level \d+ of \d+ \(t="
    with pytest.warns(UserWarning, match=message) as caught:
        start(name, score_fn)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(name, score_fn)


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_right_scores_start_in_silence(name, segments_are_checked):
    start(name, two_modes(rtk.OU()))


@pytest.mark.slow
def test_segments_that_are_too_long_are_warned_of(segments_are_checked):
    inner = rtk.PreconditionedMALA(num_steps=1, energy_difference=rtk.Simpson())
    kernel = rtk.RTKKernel(two_modes(rtk.OU(), 0.12), event_shape=(3,), segments=4, inner=inner)
    with pytest.warns(UserWarning, match=r"Segment [23] of 4 of `RTKKernel`.*`segments=8`.*`num_steps=2`"):
        kernel.init(jr.key(0), 10, None, (), {})


@pytest.mark.slow
def test_too_few_evaluations_are_warned_of(segments_are_checked):
    kernel = rtk.RTKKernel(two_modes(rtk.OU(), 0.12), event_shape=(3,), evaluations=6, denoise=True)
    with pytest.warns(
        UserWarning, match=r"of 5 of `RTKKernel`.*more evaluations \(`evaluations=12`, now 6\)"
    ):
        kernel.init(jr.key(0), 10, None, (), {})


def test_a_schedule_that_has_no_more_segments_is_said_to_have_none():
    few = noise_range(rtk.DiscreteVP([0.999, 0.9, 0.5, 0.1, 0.01]))
    settings = Settings(None, lambda *_: None, few, None, 3, rtk.GaussianTransition(3), True, (3,), float)
    assert _more_evaluations(settings) == "Give more evaluations (`evaluations=8`, now 4)."
    assert "has no more segments: give an `inner`" in _more_evaluations(settings._replace(num_segments=4))


@pytest.mark.slow
def test_particle_gibbs_is_asked_about_its_transitions_once_for_a_prior(segments_are_checked):
    score_fn = two_modes(rtk.OU(), 0.15)
    prior = rtk.DiffusionPrior(score_fn, (3,), rtk.OU())

    def model():
        x, z = numpyro.sample("x", prior), numpyro.sample("z", prior)
        numpyro.sample("y", dist.Normal(x + z, 0.5).to_event(1), obs=jnp.ones(3))

    kernel = rtk.RTKParticleGibbs(model, segments=4, reverse=rtk.GaussianTransition())
    with pytest.warns(UserWarning, match=r"Segment \d of 4 of `RTKParticleGibbs`.*`GaussianT") as caught:
        kernel.init(jr.key(0), 10, None, (), {})
    assert sum("Segment" in str(one.message) for one in caught) == 1


@pytest.mark.parametrize("name", ["RTKParticleGibbs", "ScoreHMC"])
@pytest.mark.parametrize("shape", [(4,), (3, 1), ()])
def test_a_shape_that_does_not_fit_the_network_is_asked_about_first_of_all(name, shape):
    score_fn = two_modes(rtk.OU())

    def model():
        # Wrong in its schedule and its likelihood, too.
        x = numpyro.sample("x", rtk.DiffusionPrior(score_fn, shape, "OU"))
        numpyro.sample("y", dist.Normal(x @ jnp.ones((7, 7)), 0.5).to_event(1), obs=jnp.full(7, jnp.nan))

    with pytest.raises(ValueError, match=rf"event of shape {re.escape(str(shape))}"):
        getattr(rtk, name)(model).init(jr.key(0), 10, None, (), {})


@pytest.mark.slow
def test_nodes_that_are_too_few_are_warned_of_at_the_first_density():
    score_fn = two_modes(rtk.OU(), 0.1)
    few = rtk.DiffusionPrior(score_fn, (3,), density=rtk.LineIntegral(num_nodes=6))
    with pytest.warns(UserWarning, match=r"`LineIntegral\(num_nodes=6\)`.*nodes would do"):
        few.log_prob(jnp.zeros(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few.log_prob(jnp.zeros(3))
        rtk.DiffusionPrior(score_fn, (3,), density=rtk.LineIntegral(num_nodes=256)).log_prob(jnp.zeros(3))


@pytest.mark.slow
def test_nodes_are_asked_about_again_for_another_reference():
    score_fn = two_modes(rtk.OU(), 0.1)

    def log_prob(reference):
        density = rtk.LineIntegral(reference, num_nodes=320)
        return rtk.DiffusionPrior(score_fn, (3,), rtk.OU(), density=density).log_prob(jnp.zeros(3))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_prob(jnp.array([0.9, 0.5, 0.0]))
    # The lines from far away are longer than these nodes resolve.
    with pytest.warns(UserWarning, match=r"`LineIntegral\(num_nodes=320\)`"):
        log_prob(jnp.array([60.0, 0.0, 0.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_prob(jnp.array([60.0, 0.0, 0.0]))


def test_an_assumed_schedule_is_said_in_the_log_once_a_line(caplog):
    def make(**options):
        return rtk.DiffusionPrior(lambda x, t: -x, (2,), **options)

    with caplog.at_level(logging.WARNING, "numpyro_rtk"):
        rtk.DiffusionPrior(lambda x, t: -x, (2,), rtk.OU())
        assert not caplog.records
        make()
        make()
        (record,) = caplog.records
    assert "assumes the noising process `OU()`" in record.getMessage()
    assert __file__ in record.getMessage()


def test_what_is_printed_says_that_a_schedule_is_assumed():
    score_fn = lambda x, t: -x
    for show in (
        lambda **o: rtk.RTKKernel(score_fn, **o),
        lambda **o: rtk.DiffusionPrior(score_fn, (2,), **o),
    ):
        assert "schedule=OU() (assumed)," in repr(show())
        assert "assumed" not in repr(show(schedule=rtk.OU()))
    mixture = rtk.GaussianMixtureScore([1.0], [[0.0, 0.0]], [np.eye(2)], rtk.OU())
    assert "assumed" not in repr(rtk.RTKKernel(mixture))
