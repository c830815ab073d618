"""Bad inputs are refused before anything is compiled, by a message that names the argument."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from numpyro.infer import MCMC

import numpyro_rtk as rtk
from numpyro_rtk._numpyro import _rtk_kernel


SCHEDULES = {
    "OU": rtk.OU(),
    "VP": rtk.VP(),
    "VP-constant": rtk.VP(1.0, 1.0, t_max=10.0),
    "Cosine": rtk.Cosine(),
    "VE": rtk.VE(),
    "EDM": rtk.EDM(),
    "FlowMatching": rtk.FlowMatching(),
    "DiscreteVP": rtk.DiscreteVP(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))),
}


def score(x, t):
    """Score of N(0, 1/4) under OU."""
    alpha_squared = jnp.exp(-2 * t)
    return -x / (0.25 * alpha_squared + 1 - alpha_squared)


@pytest.fixture(autouse=True)
def no_sampling(monkeypatch):
    """Tracing the sampling program is the first thing compilation does: here it is a failure."""

    def refuse(*args, **kwargs):
        raise AssertionError("the sampling program was traced")

    monkeypatch.setattr(_rtk_kernel, "reverse_pass", refuse)


def run(kernel, *args, num_chains=1, init_params=None, key=None):
    mcmc = MCMC(
        kernel,
        num_warmup=1,
        num_samples=1,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jr.key(0) if key is None else key, *args, init_params=init_params)


def test_the_fixture_sees_sampling():
    with pytest.raises(AssertionError, match="the sampling program was traced"):
        run(rtk.RTKKernel(score, event_shape=(2,)))


@pytest.mark.parametrize("bad", [None, 3.0, "score", np.zeros(2)])
def test_score_fn_not_callable(bad):
    with pytest.raises(TypeError, match=r"`score_fn` must be callable"):
        rtk.RTKKernel(bad, event_shape=(2,))


def test_score_fn_given_as_class():
    with pytest.raises(
        TypeError, match=r"`score_fn` must be callable.*class GaussianMixtureScore, not an instance"
    ):
        rtk.RTKKernel(rtk.GaussianMixtureScore, event_shape=(2,))


# Event shape and initial values


@pytest.mark.parametrize("num_chains", [1, 2])
def test_missing_event_shape(num_chains):
    with pytest.raises(ValueError, match=r"`event_shape` is missing.*`init_params="):
        run(rtk.RTKKernel(score), num_chains=num_chains)


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        (3, TypeError),
        ((2.0,), TypeError),
        ((True,), TypeError),
        ("ab", TypeError),
        ((0,), ValueError),
        ((2, -1), ValueError),
    ],
)
def test_bad_event_shape(shape, error):
    with pytest.raises(error, match=r"`event_shape` must"):
        rtk.RTKKernel(score, event_shape=shape)


@pytest.mark.parametrize(
    ("num_chains", "shape"),
    [(1, (3,)), (1, (2, 2)), (1, ()), (2, (2, 3)), (2, (2,)), (3, (3, 2, 2))],
)
def test_contradictory_event_shape(num_chains, shape):
    kernel = rtk.RTKKernel(score, event_shape=(2,))
    with pytest.raises(
        ValueError, match=r"`init_params\['x'\]` has event shape.*`event_shape=\(2,\)`"
    ) as info:
        run(kernel, num_chains=num_chains, init_params={"x": jnp.zeros(shape)})
    assert ("chain axis" in str(info.value)) == (num_chains > 1)


@pytest.mark.parametrize("num_chains", [1, 2])
def test_agreeing_event_shape(num_chains):
    shape = (2,) if num_chains == 1 else (num_chains, 2)
    key = jr.key(0) if num_chains == 1 else jr.split(jr.key(0), num_chains)
    for kernel in (rtk.RTKKernel(score, event_shape=(2,)), rtk.RTKKernel(score)):
        for init_params in ({"x": jnp.ones(shape)}, jnp.ones(shape)):
            state = kernel.init(key, 1, init_params, (), {})
            np.testing.assert_array_equal(state.z["x"], jnp.ones(shape))


@pytest.mark.parametrize("wrap", [lambda value: {"x": value}, lambda value: value])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            np.zeros(2, np.int32),
            TypeError,
            r"`init_params\['x'\]` must be real floating point, got dtype int32",
        ),
        (np.zeros(2, bool), TypeError, r"`init_params\['x'\]` must be real floating point, got dtype bool"),
        (
            np.zeros(2, np.complex64),
            TypeError,
            r"`init_params\['x'\]` must be real.*complex64.*real and imaginary",
        ),
        (np.zeros((0,), np.float32), ValueError, r"`init_params\['x'\]` is empty"),
        (np.array([0.0, np.nan], np.float32), ValueError, r"`init_params\['x'\]` contains NaN or infinity"),
        (np.array([0.0, np.inf], np.float32), ValueError, r"`init_params\['x'\]` contains NaN or infinity"),
    ],
)
def test_bad_init_params(wrap, value, error, message):
    with pytest.raises(error, match=message):
        run(rtk.RTKKernel(score), init_params=wrap(value))


@pytest.mark.parametrize("init_params", [{"y": jnp.zeros(2)}, {"x": jnp.zeros(2), "y": jnp.zeros(2)}, {}])
def test_wrong_init_params_key(init_params):
    with pytest.raises(ValueError, match=r"`init_params` must have the single key 'x'"):
        rtk.RTKKernel(score, event_shape=(2,)).init(jr.key(0), 1, init_params, (), {})


def test_init_params_key_follows_the_site():
    with pytest.raises(ValueError, match=r"`init_params` must have the single key 'galaxy'.*\['x'\]"):
        run(rtk.RTKKernel(score, site="galaxy"), init_params={"x": jnp.zeros(2)})


# The score


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda x, t: jnp.zeros(3),
            ValueError,
            r"`score_fn` returned shape \(3,\) for an event of shape \(2,\)",
        ),
        (lambda x, t: jnp.sum(x), ValueError, r"`score_fn` returned shape \(\)"),
        (lambda x, t: -x[None], ValueError, r"`score_fn` returned shape \(1, 2\)"),
        (
            lambda x, t: (-x).astype(jnp.bfloat16),
            TypeError,
            r"`score_fn` returned dtype bfloat16.*astype\(x.dtype\)",
        ),
        (lambda x, t: x > 0, TypeError, r"`score_fn` returned dtype bool"),
        (lambda x, t: (-x, t), TypeError, r"`score_fn` must return one array, got tuple"),
        (lambda x, t: {"score": -x}, TypeError, r"`score_fn` must return one array, got dict"),
        (lambda x, t: None, TypeError, r"`score_fn` must return one array, got NoneType"),
        (lambda x: -x, ValueError, r"`score_fn` failed on one event of shape \(2,\)"),
        (
            lambda x, t: -x * jnp.where(t > 4, jnp.nan, 1.0),
            ValueError,
            r"`score_fn` returned NaN.*t=5 \(2 of 2 values\)",
        ),
        (lambda x, t: -x * jnp.where(t < 0.1, jnp.inf, 1.0), ValueError, r"`score_fn` returned NaN.*t=0.001"),
        (lambda x, t: (-x).at[0].set(jnp.nan), ValueError, r"`score_fn` returned NaN.*\(1 of 2 values\)"),
    ],
)
@pytest.mark.parametrize("num_chains", [1, 2])
def test_bad_score(function, error, message, num_chains):
    with pytest.raises(error, match=message):
        run(rtk.RTKKernel(function, event_shape=(2,)), num_chains=num_chains)


def test_score_that_needs_arguments_it_does_not_get():
    def conditional(x, t, shift):
        return score(x - shift, t)

    with pytest.raises(ValueError, match=r"`score_fn` failed on one event.*shift"):
        run(rtk.RTKKernel(conditional, event_shape=(2,)))


def test_nan_is_seen_under_vmap_over_keys():
    # `chain_method=jax.vmap` maps `init`; the check involves no chain, so it has values to look at.
    kernel = rtk.RTKKernel(lambda x, t: x * jnp.nan, event_shape=(2,))
    mcmc = MCMC(kernel, num_warmup=1, num_samples=1, num_chains=2, chain_method=jax.vmap, progress_bar=False)
    with pytest.raises(ValueError, match=r"`score_fn` returned NaN"):
        mcmc.run(jr.key(0))


class Batched(eqx.Module):
    """An image-style network: batches of flattened events and a vector of times."""

    linear: eqx.nn.Linear

    def __call__(self, x, t):
        assert x.ndim == 2
        features = jnp.concatenate([x, t[:, None]], axis=1)
        return jax.vmap(self.linear)(features)


def test_batched_network():
    # It predicts noise: the point itself.
    linear = eqx.tree_at(lambda n: n.weight, eqx.nn.Linear(3, 2, False, key=jr.key(0)), jnp.eye(2, 3))
    network = Batched(linear)
    schedule = rtk.OU()
    message = r"(?s)`score_fn` failed on one event.*`BatchedNetwork\(network\)`"
    for bad in (network, rtk.NoisePrediction(network, schedule)):
        with pytest.raises(ValueError, match=message):
            run(rtk.RTKKernel(bad, event_shape=(2,)))
    wrapped = rtk.NoisePrediction(rtk.BatchedNetwork(network), schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # but for its scale
        state = rtk.RTKKernel(wrapped, event_shape=(2,)).init(jr.key(0), 1, None, (), {})
    assert state.z["x"].shape == (2,)


def test_batched_network_that_broadcasts():
    # It runs on one event, but returns a batch.
    with pytest.raises(ValueError, match=r"`score_fn` returned shape \(1, 2\).*`BatchedNetwork\(network\)`"):
        run(rtk.RTKKernel(lambda x, t: -jnp.atleast_2d(x), event_shape=(2,)))


# Segments


@pytest.mark.parametrize(
    ("segments", "error", "message"),
    [
        (0, ValueError, r"`segments` must be at least 1, got 0"),
        (-3, ValueError, r"`segments` must be at least 1, got -3"),
        (4.0, TypeError, r"`segments` must be a number of segments or a decreasing time grid, got 4.0"),
        (True, TypeError, r"`segments` must be a number of segments"),
        ("8", TypeError, r"`segments` must be a number of segments"),
        ([0.001, 1.0, 5.0], ValueError, r"`segments` as a time grid must decrease strictly.*Reverse it"),
        ([5.0, 1.0, 1.0, 0.1], ValueError, r"`segments` as a time grid must decrease strictly"),
        ([6.0, 1.0, 0.1], ValueError, r"`segments` runs from 6 to 0.1, outside.*\[0.001, 5\]"),
        ([5.0, 1.0, 1e-4], ValueError, r"`segments` runs from 5 to 0.0001, outside"),
        ([5.0, 1.0, 0.0], ValueError, r"`segments` runs from 5 to 0, outside"),
        ([5.0, 1.0, -1.0], ValueError, r"`segments` runs from 5 to -1, outside"),
        ([5.0], ValueError, r"`segments` as a time grid.*at least two times"),
        ([], ValueError, r"`segments` as a time grid.*at least two times"),
        (np.ones((2, 2)), ValueError, r"`segments` as a time grid must have shape"),
        ([5.0, np.nan, 0.1], ValueError, r"`segments` as a time grid must be finite"),
        ([np.inf, 1.0, 0.1], ValueError, r"`segments` as a time grid must be finite"),
    ],
)
def test_bad_segments(segments, error, message):
    with pytest.raises(error, match=message):
        rtk.RTKKernel(score, event_shape=(2,), segments=segments)


def test_times_that_coincide_in_float32():
    kernel = rtk.RTKKernel(score, event_shape=(2,), segments=[5.0, 5.0 - 1e-9, 0.1])
    with pytest.raises(ValueError, match=r"`segments` has times that coincide in float32"):
        run(kernel)


def test_too_many_or_broken_discrete_steps():
    schedule = rtk.DiscreteVP([0.9, 0.5, 0.2, 0.1])
    with pytest.raises(ValueError, match=r"`segments=9` is more than the 3 steps"):
        rtk.RTKKernel(score, event_shape=(2,), schedule=schedule, segments=9)
    with pytest.raises(ValueError, match=r"`segments` must be integer steps"):
        rtk.RTKKernel(score, event_shape=(2,), schedule=schedule, segments=[3.0, 1.5, 0.0])


def test_good_grids_are_kept():
    times = np.array([4.0, 1.0, 0.01])
    kernel = rtk.RTKKernel(score, event_shape=(2,), segments=times)
    np.testing.assert_array_equal(kernel.segment_times, times)
    assert kernel.num_segments == 2
    adjusted = {"event_shape": (2,), "inner": rtk.MALA(4)}
    assert rtk.RTKKernel(score, **adjusted).num_segments == _rtk_kernel.DEFAULT_SEGMENTS
    few = rtk.DiscreteVP([0.9, 0.5, 0.2, 0.1])
    assert rtk.RTKKernel(score, schedule=few, **adjusted).num_segments == 3
    assert rtk.RTKKernel(score, event_shape=(2,), schedule=few).num_segments == 3
    kernel.segment_times[0] = -1.0  # a copy
    np.testing.assert_array_equal(kernel.segment_times, times)


# Inner kernel


KERNELS_WITH_STEPS = [rtk.MALA, rtk.PreconditionedMALA, rtk.ULA, rtk.ULD]


@pytest.mark.parametrize("inner", KERNELS_WITH_STEPS)
@pytest.mark.parametrize("value", [0.0, -0.1, np.nan, np.inf, [0.1, -0.1], [0.1, np.nan]])
def test_bad_step_size(inner, value):
    with pytest.raises(
        ValueError, match=rf"`{inner.__name__}\(step_size=\.\.\.\)` must be positive and finite"
    ):
        inner(step_size=value)


@pytest.mark.parametrize("inner", KERNELS_WITH_STEPS)
def test_step_size_of_wrong_kind(inner):
    with pytest.raises(TypeError, match=rf"`{inner.__name__}\(step_size=\.\.\.\)` must be a positive number"):
        inner(step_size="large")
    with pytest.raises(
        ValueError, match=rf"`{inner.__name__}\(step_size=\.\.\.\)` must be a scalar or one value per"
    ):
        inner(step_size=np.ones((2, 2)))


@pytest.mark.parametrize("inner", KERNELS_WITH_STEPS)
@pytest.mark.parametrize("length", [1, 3, 5])
def test_step_size_of_wrong_length(inner, length):
    with pytest.raises(
        ValueError, match=rf"`{inner.__name__}\(step_size=\.\.\.\)` has {length} values for 4 segments"
    ):
        rtk.RTKKernel(score, event_shape=(2,), segments=4, inner=inner(step_size=jnp.full(length, 0.1)))


@pytest.mark.parametrize("inner", KERNELS_WITH_STEPS)
@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, None])
def test_bad_num_steps(inner, num_steps):
    with pytest.raises(
        ValueError, match=rf"`{inner.__name__}\(num_steps=\.\.\.\)` must be an integer of at least 1"
    ):
        inner(num_steps=num_steps)


@pytest.mark.parametrize("inner", [rtk.MALA, rtk.PreconditionedMALA])
def test_inner_that_needs_an_energy(inner):
    exact = inner(energy_difference=rtk.ExactEnergy())
    message = (
        rf"`inner={inner.__name__}\(energy_difference=ExactEnergy\(\)\)` needs a score with a method `energy"
    )
    for bad in (score, rtk.NoisePrediction(score, rtk.OU())):
        with pytest.raises(TypeError, match=message):
            rtk.RTKKernel(bad, event_shape=(2,), inner=exact)
    rtk.RTKKernel(rtk.EnergyScore(lambda x, t: 0.5 * jnp.sum(x**2)), event_shape=(2,), inner=exact)


def test_classes_instead_of_instances():
    with pytest.raises(TypeError, match=r"`inner` must be an inner kernel.*Did you mean `MALA\(\)`"):
        rtk.RTKKernel(score, event_shape=(2,), inner=rtk.MALA)
    with pytest.raises(TypeError, match=r"`schedule` must be a noise schedule.*Did you mean `VP\(\)`"):
        rtk.RTKKernel(score, event_shape=(2,), schedule=rtk.VP)
    with pytest.raises(
        TypeError, match=r"`MALA\(energy_difference=\.\.\.\)` must be.*forget the parentheses"
    ):
        rtk.MALA(energy_difference=rtk.Simpson)
    with pytest.raises(
        TypeError, match=r"`PreconditionedMALA\(energy_difference=\.\.\.\)` must be.*forget the parentheses"
    ):
        rtk.PreconditionedMALA(energy_difference=rtk.Trapezoid)
    with pytest.raises(TypeError, match=r"`NoisePrediction\(schedule=\.\.\.\)` must be a noise schedule"):
        rtk.NoisePrediction(score, rtk.OU)


@pytest.mark.parametrize(
    ("name", "value"), [("inner", "MALA"), ("inner", 8), ("schedule", "OU"), ("schedule", 5.0)]
)
def test_inner_or_schedule_of_another_type(name, value):
    with pytest.raises(TypeError, match=rf"`{name}` must be an? (inner kernel|noise schedule)"):
        rtk.RTKKernel(score, event_shape=(2,), **{name: value})


# Schedule


def test_schedule_contradicting_the_adapter():
    adapter = rtk.NoisePrediction(score, rtk.VP())
    for schedule in (rtk.OU(), rtk.VP(beta_max=10.0), rtk.EDM(), rtk.Cosine()):
        with pytest.raises(
            ValueError, match=r"(?s)`schedule=.*is another noising process.*Leave `schedule` out"
        ):
            rtk.RTKKernel(adapter, event_shape=(2,), schedule=schedule)


def test_discrete_and_continuous_time_are_not_confused():
    discrete = SCHEDULES["DiscreteVP"]
    with pytest.raises(ValueError, match=r"(?s)`schedule=.*is another noising process"):
        rtk.RTKKernel(rtk.NoisePrediction(score, discrete), event_shape=(2,), schedule=rtk.VP())


def test_schedule_of_the_adapter_is_taken():
    schedule = rtk.VP(beta_max=10.0)
    adapter = rtk.NoisePrediction(score, schedule)
    assert rtk.RTKKernel(adapter, event_shape=(2,)).schedule is schedule
    narrower = rtk.VP(beta_max=10.0, t_min=0.01)  # the same process, another grid
    assert rtk.RTKKernel(adapter, event_shape=(2,), schedule=narrower).schedule is narrower
    assert rtk.RTKKernel(score, event_shape=(2,)).schedule == rtk.OU()


# The other arguments


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 1.5, np.nan, "0.7"])
def test_target_accept_prob(value):
    with pytest.raises(ValueError, match=r"`target_accept_prob` must be strictly between 0 and 1"):
        rtk.RTKKernel(score, event_shape=(2,), target_accept_prob=value)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"evaluations": 0}, ValueError, r"`evaluations` must be at least 1, got 0"),
        ({"evaluations": 1, "denoise": True}, ValueError, r"at least 2, one of them for `denoise=True`"),
        ({"evaluations": True}, TypeError, r"`evaluations` must be a number of score evaluations, got True"),
        ({"evaluations": 35.0}, TypeError, r"`evaluations` must be a number of score evaluations, got 35.0"),
        ({"evaluations": 35, "segments": 9}, ValueError, r"`evaluations=35` chooses `segments` itself"),
        ({"evaluations": 35, "inner": rtk.ULA()}, ValueError, r"`evaluations=35` chooses `inner` itself"),
        ({"evaluations": 35, "target_accept_prob": 0.8}, ValueError, "chooses `target_accept_prob` itself"),
    ],
)
def test_evaluations(options, error, match):
    with pytest.raises(error, match=match):
        rtk.RTKKernel(score, event_shape=(2,), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_evaluations_are_third_order_segments_placed_when_a_run_starts(name):
    schedule, denoise = SCHEDULES[name], name == "OU"
    options = {"event_shape": (2,), "schedule": schedule}
    kernel = rtk.RTKKernel(score, evaluations=np.int64(35), denoise=denoise, **options)
    assert kernel.num_score_evals == 35 == kernel.num_segments + denoise
    assert kernel.inner == rtk.GaussianTransition(order=3)
    assert kernel.segment_times is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `score` is that of OU
        times = np.asarray(kernel.init(jr.key(0), 0, None, (), {}).shared.grid.t)
    np.testing.assert_allclose((times[0], times[-1]), (schedule.t_max, schedule.t_min), rtol=1e-6)
    # They can be given to another kernel.
    other = rtk.RTKKernel(score, segments=times, inner=kernel.inner, **options)
    np.testing.assert_array_equal(other.segment_times, times)


def test_nothing_given_is_fifty_evaluations():
    kernel = rtk.RTKKernel(score, event_shape=(2,))
    assert (kernel.num_score_evals, kernel.inner) == (50, rtk.GaussianTransition(order=3))
    clean = rtk.RTKKernel(score, event_shape=(2,), denoise=True)
    assert (clean.num_score_evals, clean.num_segments) == (50, 49)


@pytest.mark.parametrize(
    "options", [{"segments": 32}, {"inner": rtk.PreconditionedMALA()}, {"target_accept_prob": 0.7}]
)
def test_anything_given_is_the_kernel_with_an_accept_step(options):
    kernel = rtk.RTKKernel(score, event_shape=(2,), **options)
    assert (kernel.num_segments, kernel.inner) == (32, rtk.PreconditionedMALA())
    assert kernel.target_accept_prob == 0.7


def test_evaluations_beyond_the_steps_of_a_discrete_schedule():
    kernel = rtk.RTKKernel(
        score, event_shape=(2,), schedule=rtk.DiscreteVP(np.array([0.9, 0.5, 0.1])), evaluations=35
    )
    assert kernel.num_score_evals == kernel.num_segments <= 3


def test_a_state_of_other_noise_is_refused_where_levels_are_placed():
    options = {"event_shape": (2,), "evaluations": 6}
    state = rtk.RTKKernel(score, schedule=rtk.OU(), **options).init(jr.key(0), 0, None, (), {})
    for schedule in (rtk.OU(t_min=0.3), rtk.VP()):
        with pytest.raises(ValueError, match="another inner kernel or other segments"):
            rtk.RTKKernel(score, schedule=schedule, **options).sample(state, (), {})


@pytest.mark.parametrize("site", ["", None, 3, ("x",)])
def test_site(site):
    with pytest.raises(TypeError, match=r"`site` must be a non-empty string"):
        rtk.RTKKernel(score, event_shape=(2,), site=site)


@pytest.mark.parametrize("factory", [rtk.RTKMALA, rtk.RTKULD])
def test_factories_check_too(factory):
    with pytest.raises(ValueError, match=r"\(num_steps=\.\.\.\)` must be an integer"):
        factory(score, event_shape=(2,), num_steps=0)
    with pytest.raises(ValueError, match=r"`segments` must be at least 1"):
        factory(score, event_shape=(2,), segments=0)


# Convention of the score


def mixture(schedule):
    weights, means = np.array([0.3, 0.7]), np.stack([np.full(10, 0.9), np.full(10, -0.5)])
    return rtk.GaussianMixtureScore(weights, means, np.stack([0.3 * np.eye(10), 0.6 * np.eye(10)]), schedule)


@pytest.mark.parametrize(
    "name",
    [name if name in ("VP", "EDM") else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES],
)
def test_convention(name):
    schedule = SCHEDULES[name]
    right = mixture(schedule)

    def noise(x, t):
        return -schedule.sigma(t) * right(x, t)

    def flipped(x, t):
        return -right(x, t)

    for wrong in (noise, flipped):
        with pytest.raises(ValueError, match=r"`score_fn` has the wrong sign.*`NoisePrediction"):
            rtk.RTKKernel(wrong, event_shape=(10,), schedule=schedule, segments=3).init(
                jr.key(0), 1, None, (), {}
            )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for good in (
            right,
            rtk.NoisePrediction(lambda x, t: -schedule.sigma(_time(t)) * right(x, _time(t)), schedule),
        ):
            rtk.RTKKernel(good, event_shape=(10,), segments=3).init(jr.key(0), 1, None, (), {})


def _time(t):
    return jnp.asarray(t, float)


def test_a_score_of_the_wrong_scale_is_warned_of_with_the_factor():
    with pytest.warns(UserWarning, match=r"level \d+ of 48 .* is 1.43 times the noise that the score"):
        rtk.RTKKernel(lambda x, t: -0.7 * x, event_shape=(30,)).init(jr.key(0), 1, None, (), {})


# No check needs a traced value


def conditional(x, t, shift):
    return score(x - jnp.exp(-t) * shift, t)


@pytest.mark.slow
def test_init_under_vmap():
    keys = jr.split(jr.key(0), 3)
    kernel = rtk.RTKKernel(conditional, event_shape=(2,), segments=3)
    single = [kernel.init(key, 4, None, (0.1,), {}) for key in keys]
    over_keys = jax.vmap(lambda key: kernel.init(key, 4, None, (0.1,), {}))(keys)
    for i, state in enumerate(single):
        np.testing.assert_allclose(over_keys.z["x"][i], state.z["x"], rtol=1e-6)
        np.testing.assert_array_equal(jr.key_data(over_keys.rng_key[i]), jr.key_data(state.rng_key))
    value = jr.normal(jr.key(1), (3, 2))
    over_values = jax.vmap(lambda value: kernel.init(keys[0], 4, {"x": value}, (0.1,), {}))(value)
    np.testing.assert_array_equal(over_values.z["x"], value)
    over_data = jax.vmap(lambda shift: kernel.init(keys[0], 4, None, (shift,), {}))(jnp.arange(3.0))
    for i in range(3):
        # The terminal Gaussian, where a chain starts, is measured from the score, and so depends on the data.
        state = kernel.init(keys[0], 4, None, (float(i),), {})
        np.testing.assert_allclose(over_data.z["x"][i], state.z["x"], rtol=1e-5)


@pytest.mark.parametrize("old_style", [False, True])
def test_init_under_jit(old_style):
    key = jr.PRNGKey(0) if old_style else jr.key(0)
    kernel = rtk.RTKKernel(conditional, event_shape=(2,), segments=3)
    value = jnp.array([0.3, -0.2])
    expected = kernel.init(key, 4, {"x": value}, (0.1,), {})
    # Every combination of traced and concrete arguments.
    states = [
        jax.jit(lambda key, value, shift: kernel.init(key, 4, {"x": value}, (shift,), {}))(key, value, 0.1),
        jax.jit(lambda shift: kernel.init(key, 4, {"x": value}, (shift,), {}))(0.1),
        jax.jit(lambda value: kernel.init(key, 4, {"x": value}, (0.1,), {}))(value),
        jax.jit(lambda: kernel.init(key, 4, {"x": value}, (0.1,), {}))(),
        jax.jit(lambda key: kernel.init(key, 4, {"x": np.asarray(value)}, (0.1,), {}))(key),
    ]
    for state in states:
        assert jax.tree.structure(state) == jax.tree.structure(expected)
        leaves, expected_leaves = jax.tree.leaves(state), jax.tree.leaves(expected)
        for leaf, expected_leaf in zip(leaves, expected_leaves, strict=True):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf, expected_leaf = jr.key_data(leaf), jr.key_data(expected_leaf)
            np.testing.assert_allclose(leaf, expected_leaf, rtol=1e-6)


def test_init_under_pmap():
    kernel = rtk.RTKKernel(conditional, event_shape=(2,), segments=3)
    state = jax.pmap(lambda key: kernel.init(key, 4, None, (0.1,), {}))(jr.split(jr.key(0), 1))
    expected = kernel.init(jr.split(jr.key(0), 1)[0], 4, None, (0.1,), {})
    np.testing.assert_allclose(state.z["x"][0], expected.z["x"], rtol=1e-6)


def test_shapes_are_checked_under_a_trace():
    kernel = rtk.RTKKernel(score, event_shape=(2,))
    with pytest.raises(ValueError, match=r"`init_params\['x'\]` has event shape"):
        jax.jit(lambda value: kernel.init(jr.key(0), 1, {"x": value}, (), {}))(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"`score_fn` returned shape"):
        jax.jit(lambda key: rtk.RTKKernel(lambda x, t: x[:1], event_shape=(2,)).init(key, 1, None, (), {}))(
            jr.key(0)
        )
