"""Log densities: exact relations, closed forms, cost, derivatives, bad input."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import numpyro_rtk as rtk
from tests.helpers import Counter, SCHEDULES


CONTINUOUS = {name: schedule for name, schedule in SCHEDULES.items() if name != "DiscreteVP"}
MEANS = np.array([[0.5, -1.0, 0.2], [-0.5, 1.0, -0.2]])
COVARIANCES = np.array([np.diag([0.5, 0.3, 1.0]) + 0.2, 0.3 * np.eye(3)])


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def mixture(schedule):
    return rtk.GaussianMixtureScore([0.4, 0.6], MEANS, COVARIANCES, schedule)


def plain(score):
    """The same score without its energy."""
    return lambda x, t: score(x, t)


def prior(density, schedule=None, score=None):
    schedule = rtk.OU() if schedule is None else schedule
    return rtk.DiffusionPrior(
        plain(mixture(schedule)) if score is None else score, (3,), schedule, density=density
    )


DENSITIES = {
    "energy": rtk.EnergyDensity(),
    "flow": rtk.ProbabilityFlow(),
    "hutchinson": rtk.ProbabilityFlow(max_exact_dim=0, num_probes=2),
    "line": rtk.LineIntegral(num_nodes=8),
}
# Compiling the solver takes seconds.
QUICK = ["energy", "line", *slow("flow", "hutchinson")]


def make(label, score=None):
    score = mixture(rtk.OU()) if score is None else score
    return rtk.DiffusionPrior(score, (3,), density=DENSITIES[label])


# NumPy arrays, so that they follow the precision mode.
POINT = np.array([0.3, -0.6, 0.1])
DIRECTION = np.array([0.7, -0.2, 1.1])


# Values


@pytest.mark.parametrize("name", ["EDM", *slow(*sorted(CONTINUOUS.keys() - {"EDM"}))])
def test_probability_flow_is_the_normalised_density(name):
    schedule = CONTINUOUS[name]
    score = mixture(schedule)
    t = jnp.asarray(schedule.t_min)
    x = score.sample(jr.key(0), 32, t)
    expected = jax.vmap(lambda x: score.log_density(x, t))(x)
    # Without what is left of the data at t_max, the error is the solver's; it is left in here.
    np.testing.assert_allclose(prior(rtk.ProbabilityFlow(), schedule).log_prob(x), expected, atol=0.02)


@pytest.mark.slow
def test_probability_flow_of_a_gaussian_in_float64(x64):
    # The terminal law is exact for N(0, I) under a process that preserves the variance, and the flow stands
    # still.
    flow = rtk.DiffusionPrior(lambda x, t: -x, (2, 2), density=rtk.ProbabilityFlow())
    x = jr.normal(jr.key(0), (5, 2, 2))
    np.testing.assert_allclose(
        flow.log_prob(x), -0.5 * jnp.sum(x**2, (1, 2)) - 2 * math.log(2 * math.pi), rtol=1e-12
    )
    # Another variance and mean: what is left at t_max = 14 is below the tolerance.
    schedule = rtk.OU(t_max=14.0)
    narrow = rtk.GaussianMixtureScore([1.0], MEANS[:1], 0.01 * np.eye(3)[None], schedule)
    tight = prior(rtk.ProbabilityFlow(rtol=1e-9, atol=1e-9, max_steps=4096), schedule, plain(narrow))
    t = jnp.asarray(schedule.t_min)
    x = narrow.sample(jr.key(1), 3, t)
    np.testing.assert_allclose(tight.log_prob(x), jax.vmap(lambda x: narrow.log_density(x, t))(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OU", "EDM"])
def test_probability_flow_of_data_that_are_not_standardised(name):
    """The flow ends where the data are, at `t_max`."""
    schedule = rtk.OU(t_max=3.0) if name == "OU" else rtk.EDM(sigma_max=20.0)
    data = rtk.GaussianMixtureScore([1.0], [[9.0, -4.0, 30.0]], np.diag([0.2, 4.0, 50.0])[None], schedule)
    t = jnp.asarray(schedule.t_min)
    x = data.sample(jr.key(0), 16, t)
    flow = prior(rtk.ProbabilityFlow(), schedule, plain(data))
    expected = jax.vmap(lambda x: data.log_density(x, t))(x)
    np.testing.assert_allclose(flow.log_prob(x), expected, atol=0.02)
    # Control: ending in the standard normal.
    standard = jax.vmap(lambda x: flow.density.log_density(flow.score_fn, flow.noise, x))(x)
    assert np.mean(np.abs(standard - expected)) > 1


@pytest.mark.slow
def test_tolerance_controls_the_error(x64):
    schedule = rtk.OU(t_max=14.0)
    score, t = mixture(schedule), jnp.asarray(schedule.t_min)
    x = score.sample(jr.key(0), 16, t)
    expected = jax.vmap(lambda x: score.log_density(x, t))(x)
    errors = [
        float(
            jnp.max(jnp.abs(prior(rtk.ProbabilityFlow(rtol=tol, atol=tol), schedule).log_prob(x) - expected))
        )
        for tol in (1e-2, 1e-4, 1e-7)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2], errors
    assert errors[2] < 1e-5, errors


@pytest.mark.slow
def test_hutchinson_is_within_its_error_and_is_a_function():
    schedule = rtk.OU()
    x = mixture(schedule).sample(jr.key(0), 32)
    exact = prior(rtk.ProbabilityFlow()).log_prob(x)
    estimates = [prior(rtk.ProbabilityFlow(max_exact_dim=2, num_probes=n)) for n in (2, 1024)]
    errors = [np.sqrt(np.mean((p.log_prob(x) - exact) ** 2)) for p in estimates]
    # The error falls like the root of the number of probes: 23 times here, up to the luck of two probes.
    assert errors[1] < errors[0] / 5, errors
    assert errors[0] > 0.02, errors
    np.testing.assert_array_equal(estimates[0].log_prob(x), estimates[0].log_prob(x))
    # A diagonal Jacobian leaves no error.
    diagonal = plain(rtk.GaussianMixtureScore([1.0], MEANS[:1], np.diag([0.1, 0.5, 2.0])[None], schedule))
    pair = [
        prior(density, schedule, diagonal).log_prob(x)
        for density in (rtk.ProbabilityFlow(), estimates[0].density)
    ]
    np.testing.assert_allclose(*pair, atol=5e-3)


def test_energy_is_the_density_of_the_mixture():
    score = mixture(rtk.OU())
    assert isinstance(rtk.DiffusionPrior(score, (3,)).density, rtk.EnergyDensity)
    assert isinstance(rtk.DiffusionPrior(plain(score), (3,)).density, rtk.ProbabilityFlow)
    t = jnp.asarray(rtk.OU().t_min)
    np.testing.assert_allclose(
        rtk.DiffusionPrior(score, (3,)).log_prob(POINT), score.log_density(POINT, t), rtol=1e-6
    )


@pytest.mark.slow
def test_line_integral(x64):
    score, t = mixture(rtk.OU()), jnp.asarray(rtk.OU().t_min)
    x = score.sample(jr.key(0), 8, t)
    value = jax.vmap(lambda x: score.log_density(x, t))(x)
    for reference in (None, np.array([0.4, -0.9, 0.0])):
        line = prior(rtk.LineIntegral(reference, num_nodes=64))
        origin = jnp.zeros(3) if reference is None else jnp.asarray(reference)
        np.testing.assert_allclose(line.log_prob(x), value - score.log_density(origin, t), atol=1e-6)
        assert line.log_prob(origin) == 0
    # One node is exact for a Gaussian, whose score is linear.
    one = rtk.DiffusionPrior(lambda x, t: -x, (3,), density=rtk.LineIntegral(num_nodes=1))
    np.testing.assert_allclose(one.log_prob(x), -0.5 * jnp.sum(x**2, 1), rtol=1e-12)


@pytest.mark.parametrize("label", ["energy", *slow("flow", "hutchinson")])
def test_differences_agree_with_the_integral_of_the_gradient(label, x64):
    # Hutchinson's differences do not: its error moves with x.
    p = make(label)
    x, y = POINT, POINT + 0.5 * DIRECTION
    nodes, weights = np.polynomial.legendre.leggauss(32)
    points = jnp.asarray(x[None] + 0.5 * np.multiply.outer(1 + nodes, y - x))
    gradients = jax.vmap(jax.grad(lambda x: make("line").log_prob(x)))(points)
    integral = float(0.5 * weights @ gradients @ (y - x))
    difference = float(p.log_prob(y) - p.log_prob(x))
    assert abs(difference - integral) < (0.5 if label == "hutchinson" else 5e-3), (difference, integral)
    assert label != "hutchinson" or abs(difference - integral) > 5e-3


# The gradient


@pytest.mark.parametrize("label", QUICK)
def test_gradient_is_the_score_in_both_modes(label):
    p = make(label)
    score = mixture(rtk.OU())(POINT, jnp.asarray(rtk.OU().t_min))
    transforms = {
        "grad": lambda x: jax.grad(p.log_prob)(x),
        "grad of jit": lambda x: jax.grad(jax.jit(p.log_prob))(x),
        "jacfwd": lambda x: jax.jacfwd(p.log_prob)(x),
        "vmap": lambda x: jax.vmap(jax.grad(p.log_prob))(jnp.stack([x, x + 1]))[0],
        "grad of vmap": lambda x: jax.grad(
            lambda x: jnp.sum(p.log_prob(jnp.stack([x, jax.lax.stop_gradient(x)])))
        )(x),
        "checkpoint": lambda x: jax.grad(jax.checkpoint(p.log_prob))(x),
        "scan": lambda x: jax.grad(
            lambda x: jax.lax.scan(lambda c, _: (c, p.log_prob(c)), x, None, length=2)[1][0]
        )(x),
    }
    for name, transform in transforms.items():
        np.testing.assert_allclose(transform(POINT), score, rtol=2e-5, err_msg=name)
    value, tangent = jax.jvp(p.log_prob, (POINT,), (DIRECTION,))
    np.testing.assert_allclose(tangent, score @ DIRECTION, rtol=2e-5)
    np.testing.assert_allclose(value, p.log_prob(POINT), rtol=1e-6)
    _, pull_back = jax.vjp(p.log_prob, POINT)
    np.testing.assert_allclose(pull_back(jnp.ones(()))[0] @ DIRECTION, tangent, rtol=1e-5)


@pytest.mark.parametrize("label", [*slow("flow"), "line"])
def test_second_derivatives_are_those_of_the_score(label, x64):
    p = make(label)
    score, t = mixture(rtk.OU()), jnp.asarray(rtk.OU().t_min)
    expected = jax.jacfwd(lambda x: score(x, t))(POINT)
    np.testing.assert_allclose(jax.hessian(p.log_prob)(POINT), expected, rtol=1e-6)


def evaluations(counter, function, *args):
    before = counter.count
    jax.block_until_ready(function(*args))
    return counter.count - before


@pytest.mark.slow
def test_evaluations():
    counter = Counter(mixture(rtk.OU()))
    for density, batch in (
        (rtk.LineIntegral(num_nodes=5), ()),
        (rtk.LineIntegral(num_nodes=5), (4,)),
        (rtk.ProbabilityFlow(), ()),
    ):
        p = prior(density, score=counter)
        x = jnp.broadcast_to(POINT, (*batch, 3))
        total = lambda x: jnp.sum(p.log_prob(x))
        total(x)  # checks the nodes of a line integral at pilot draws, once for a score object
        value = evaluations(counter, total, x)
        if isinstance(density, rtk.LineIntegral):
            assert value == 5 * math.prod(batch)
        else:
            assert 30 < value < 150, value
        events = math.prod(batch)
        for name, transform in {
            "grad": jax.grad(total),
            "jit": jax.jit(jax.value_and_grad(total)),
        }.items():
            assert evaluations(counter, transform, x) == value + events, (name, density)


def test_a_gradient_whose_value_is_not_used_costs_one_evaluation():
    # As in a compiled program that only needs the gradient. Callbacks would keep the value alive, so look at
    # the program.
    p = prior(rtk.ProbabilityFlow())
    program = jax.jit(jax.grad(p.log_prob)).lower(POINT).compile().as_text()
    assert "while" not in program
    assert "while" in jax.jit(jax.value_and_grad(p.log_prob)).lower(POINT).compile().as_text()


def test_energy_and_score_are_evaluated_together():
    counter = Counter(lambda x, t: 0.5 * jnp.sum(x**2))
    p = rtk.DiffusionPrior(rtk.EnergyScore(counter), (3,))
    assert evaluations(counter, p.log_prob, POINT) == 1
    assert evaluations(counter, jax.jit(jax.value_and_grad(p.log_prob)), POINT) == 1

    class Apart:
        """An energy and a score, without `energy_and_score`."""

        def __call__(self, x, t):
            return -x

        def energy(self, x, t):
            return 0.5 * jnp.sum(x**2)

    value, gradient = jax.value_and_grad(rtk.DiffusionPrior(Apart(), (3,)).log_prob)(POINT)
    np.testing.assert_allclose(value, -0.5 * jnp.sum(POINT**2), rtol=1e-6)
    np.testing.assert_allclose(gradient, -POINT)


# What the score closes over


def shifted(shift, label="flow"):
    """A prior whose mean is `shift`."""
    score = rtk.EnergyScore(lambda x, t: 0.5 * jnp.sum((x - jnp.exp(-t) * shift) ** 2))
    return rtk.DiffusionPrior(score if label == "energy" else plain(score), (3,), density=DENSITIES[label])


@pytest.mark.parametrize("label", ["energy", *slow("flow", "hutchinson", "line")])
def test_derivatives_in_what_the_score_closes_over_are_refused(label):
    def total(shift, x):
        return shifted(shift, label).log_prob(x)

    for name, derivative in {
        "grad": lambda: jax.grad(total)(1.0, POINT),
        "jit of grad": lambda: jax.jit(jax.grad(total))(1.0, POINT),
        "grad of jit": lambda: jax.grad(jax.jit(total))(1.0, POINT),
        "both": lambda: jax.grad(total, argnums=(0, 1))(1.0, POINT),
        "vmap": lambda: jax.vmap(jax.grad(total), (0, None))(jnp.arange(2.0), POINT),
        "batch": lambda: jax.grad(lambda s: jnp.sum(total(s, jnp.stack([POINT, POINT]))))(1.0),
        "jvp": lambda: jax.jvp(lambda s: total(s, POINT), (1.0,), (1.0,)),
        "scan": lambda: jax.grad(
            lambda s: jax.lax.scan(lambda c, _: (c, total(s, c)), POINT, None, length=2)[1][0]
        )(1.0),
    }.items():
        with pytest.raises(ValueError, match="differentiated with respect to something that its `score_fn`"):
            pytest.fail(f"{name} gave {derivative()}")


@pytest.mark.parametrize("label", QUICK)
@pytest.mark.slow
def test_tracers_that_are_not_differentiated_are_welcome(label):
    gradient = lambda shift, x: jax.grad(lambda x: shifted(shift, label).log_prob(x))(x)
    shifts = jnp.array([0.0, 1.0])
    expected = np.exp(-1e-3) * np.asarray(shifts)[:, None] - np.asarray(POINT)
    np.testing.assert_allclose(jax.jit(gradient)(1.0, POINT), expected[1], rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(gradient, (0, None))(shifts, POINT), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient, (0, None)))(shifts, POINT), expected, rtol=1e-5)
    values = jax.vmap(lambda shift: shifted(shift, label).log_prob(POINT))(shifts)
    np.testing.assert_allclose(values, [shifted(shift, label).log_prob(POINT) for shift in shifts], rtol=1e-4)
    stopped = jax.grad(lambda shift: shifted(jax.lax.stop_gradient(shift), label).log_prob(shift * POINT))(
        1.0
    )
    np.testing.assert_allclose(stopped, expected[1] @ POINT, rtol=1e-4)


# Failures, dtypes, shapes


@pytest.mark.slow
def test_failures_give_nan_and_no_exception():
    assert jnp.isnan(prior(rtk.ProbabilityFlow(max_steps=3)).log_prob(POINT))
    nowhere = lambda x, t: jnp.where((t > 0.1) & (t < 4.9), jnp.nan, -x)
    p = rtk.DiffusionPrior(nowhere, (3,))
    with pytest.warns(UserWarning, match="NaN or infinity in 16 of 16 draws"):
        values = jax.jit(p.log_prob)(jnp.stack([POINT, POINT]))
    assert jnp.all(jnp.isnan(values))
    # One bad event of a batch does not touch the others.
    p = rtk.DiffusionPrior(lambda x, t: jnp.where(x[0] > 100, jnp.nan, -x), (3,))
    values = p.log_prob(jnp.stack([POINT, POINT + 1000]))
    np.testing.assert_allclose(values[0], p.log_prob(POINT), rtol=1e-5)
    assert jnp.isnan(values[1])


@pytest.mark.parametrize("label", QUICK)
def test_dtypes(label):
    p = make(label)
    assert p.log_prob(POINT).dtype == jnp.float32
    np.testing.assert_allclose(
        p.log_prob(jnp.array([1, 0, -1])), p.log_prob(jnp.array([1.0, 0.0, -1.0])), rtol=1e-6
    )
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(make(label).log_prob)(jnp.asarray(POINT))
        assert value.dtype == gradient.dtype == jnp.float64
        normal = rtk.DiffusionPrior(
            lambda x, t: -x, (3,), density=DENSITIES[label if label != "energy" else "flow"]
        )
        assert normal.log_prob(jnp.asarray(POINT, jnp.float32)).dtype == jnp.float32
        # A score of one precision only says so.
        with pytest.raises(
            TypeError, match="`score_fn` returned dtype float64 for an event of dtype float32"
        ):
            make(label).log_prob(jnp.asarray(POINT, jnp.float32))
    np.testing.assert_allclose(p.log_prob(POINT), value, atol=2e-3)


@pytest.mark.parametrize("shape", [(), (1,), (1, 4, 4)])
@pytest.mark.parametrize(
    "density", [rtk.LineIntegral(), *slow(rtk.ProbabilityFlow(), rtk.ProbabilityFlow(max_exact_dim=0))]
)
def test_shapes(shape, density):
    p = rtk.DiffusionPrior(lambda x, t: -x, shape, density=density)
    for batch in ((), (2, 1)):
        x = jr.normal(jr.key(0), (*batch, *shape))
        # The gradient of a sum is that of each term.
        value, pull_back = jax.vjp(p.log_prob, x)
        (gradient,) = pull_back(jnp.ones(batch))
        assert (value.shape, gradient.shape) == (batch, x.shape)
        axes = tuple(range(len(batch), x.ndim))
        constant = (
            0 if isinstance(density, rtk.LineIntegral) else 0.5 * math.prod(shape) * math.log(2 * math.pi)
        )
        np.testing.assert_allclose(value, -0.5 * jnp.sum(x**2, axes) - constant, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(gradient, -x, rtol=1e-6)


def test_the_grid_sets_the_noise_level():
    score = mixture(rtk.OU())
    times = np.array([4.0, 1.0, 0.2])
    for density in (rtk.EnergyDensity(), rtk.ProbabilityFlow()):
        p = rtk.DiffusionPrior(score, (3,), segments=times, density=density)
        np.testing.assert_allclose(p.log_prob(POINT), score.log_density(POINT, jnp.asarray(0.2)), atol=2e-2)
        np.testing.assert_allclose(jax.grad(p.log_prob)(POINT), score(POINT, jnp.asarray(0.2)), rtol=1e-5)


# Bad input


@pytest.mark.parametrize(
    ("make_density", "match"),
    [
        (lambda: rtk.ProbabilityFlow(rtol=0), r"`ProbabilityFlow\(rtol=...\)` must be positive"),
        (lambda: rtk.ProbabilityFlow(atol=math.nan), r"`ProbabilityFlow\(atol=...\)` must be positive"),
        (
            lambda: rtk.ProbabilityFlow(num_probes=0),
            r"`ProbabilityFlow\(num_probes=...\)` must be an integer of at least 1",
        ),
        (lambda: rtk.ProbabilityFlow(max_exact_dim=-1), r"`ProbabilityFlow\(max_exact_dim=...\)`"),
        (lambda: rtk.ProbabilityFlow(max_steps=True), r"`ProbabilityFlow\(max_steps=...\)`"),
        (lambda: rtk.LineIntegral(num_nodes=0), r"`LineIntegral\(num_nodes=...\)`"),
        (lambda: rtk.LineIntegral(np.array([np.nan])), r"`LineIntegral\(reference=...\)` contains NaN"),
        (lambda: prior(rtk.LineIntegral(np.zeros(2))), r"`LineIntegral\(reference=...\)` has shape \(2,\)"),
        (
            lambda: prior(rtk.ProbabilityFlow(), SCHEDULES["DiscreteVP"]),
            r"continuous time.*`density=LineIntegral\(\)`",
        ),
    ],
)
def test_bad_values(make_density, match):
    with pytest.raises(ValueError, match=match):
        make_density()


@pytest.mark.parametrize(
    ("make_density", "match"),
    [
        (
            lambda: rtk.LineIntegral(np.array([1])),
            r"`LineIntegral\(reference=...\)` must be real floating point",
        ),
        (
            lambda: prior(rtk.EnergyDensity()),
            r"`density=EnergyDensity\(\)` needs a score with a method `energy",
        ),
        (lambda: prior(rtk.ProbabilityFlow), r"Did you mean `ProbabilityFlow\(\)`"),
        (lambda: prior("flow"), "`density` must be a log density"),
    ],
)
def test_bad_types(make_density, match):
    with pytest.raises(TypeError, match=match):
        make_density()


def test_energy_must_be_scalar():
    class Wrong:
        def __call__(self, x, t):
            return -x

        def energy(self, x, t):
            return 0.5 * x**2

    with pytest.raises(ValueError, match=r"`score_fn\.energy` must return a scalar"):
        rtk.DiffusionPrior(Wrong(), (3,))


def test_discrete_schedules_by_line_integral():
    schedule = SCHEDULES["DiscreteVP"]
    score = mixture(schedule)
    p = rtk.DiffusionPrior(plain(score), (3,), schedule, density=rtk.LineIntegral(num_nodes=64))
    expected = score.log_density(POINT, 0.0) - score.log_density(jnp.zeros(3), 0.0)
    np.testing.assert_allclose(p.log_prob(POINT), expected, atol=1e-3)
