"""Exact draws of the segment target stay exact; and broken kernels are caught.

A pair `z ~ p_s`, `x_t ~ N(a z, v I)` is an exact draw of the joint law, so `z` is an exact draw of the
segment target given `x_t`. A kernel that leaves every segment target invariant leaves the joint law
invariant. Chains are independent, so the Kolmogorov-Smirnov and z tests have their textbook null, for two
pivots: the marginal law of `z` and `(x_t - a z) / sqrt(v)`, which is standard normal.
"""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

import numpyro_rtk as rtk
from numpyro_rtk._noising._grid import Segment
from numpyro_rtk._reverse._base import SegmentTuning
from numpyro_rtk._reverse._markov import AbstractMarkovKernel
from numpyro_rtk._reverse._segment import Evaluation, ReverseTransition
from numpyro_rtk._score._model import resolve_score, ScoreModel


# Probability that a right library fails any check in this file, and the number of p-values it takes.
FALSE_ALARM_RATE = 1e-4
NUM_P_VALUES = 1000
P_MIN = FALSE_ALARM_RATE / NUM_P_VALUES
NUM_CHAINS = 40_000
NUM_STEPS = 8


class Problem(NamedTuple):
    energy: object  # energy(x, t), one event
    sample: object  # (key, n) -> exact draws of p_s, shape (n, 2)
    cdf: object  # marginal distribution functions, one per coordinate
    v: float  # variance of the noising step, with a = 0.9
    curvature: float  # of the reference


def _skewed_energy(x, t):
    del t
    return jnp.sum(jnp.exp(x) - x)  # log of a unit exponential, per coordinate


def _anisotropic_energy(x, t):
    del t
    return 0.5 * jnp.sum((x / jnp.asarray([0.3, 2.0], x.dtype)) ** 2)


_MODES = np.array([[-1.0, 0.0], [1.2, 0.4]])
_MODE_SD = np.array([0.5, 0.4])
_MODE_WEIGHT = np.array([0.3, 0.7])


def _bimodal_energy(x, t):
    del t
    modes, sd = jnp.asarray(_MODES, x.dtype), jnp.asarray(_MODE_SD, x.dtype)
    log_weight = jnp.asarray(np.log(_MODE_WEIGHT) - 2 * np.log(_MODE_SD), x.dtype)
    return -jax.nn.logsumexp(log_weight - 0.5 * jnp.sum((x[None] - modes) ** 2, -1) / sd**2)


def _bimodal_sample(key, n):
    pick_key, noise_key = jr.split(key)
    pick = jr.categorical(pick_key, jnp.log(jnp.asarray(_MODE_WEIGHT)), shape=(n,))
    return jnp.asarray(_MODES)[pick] + jnp.asarray(_MODE_SD)[pick][:, None] * jr.normal(noise_key, (n, 2))


def _bimodal_cdf(coordinate, x):
    scaled = (x[:, None] - _MODES[:, coordinate]) / _MODE_SD
    return scipy.stats.norm.cdf(scaled) @ _MODE_WEIGHT


PROBLEMS = {
    "skewed": Problem(
        _skewed_energy,
        lambda key, n: jnp.log(jr.exponential(key, (n, 2))),
        [lambda x: -np.expm1(-np.exp(x))] * 2,
        0.5,
        1.0,
    ),
    "anisotropic": Problem(
        _anisotropic_energy,
        lambda key, n: jnp.asarray([[0.3, 2.0]]) * jr.normal(key, (n, 2)),
        [lambda x: scipy.stats.norm.cdf(x / 0.3), lambda x: scipy.stats.norm.cdf(x / 2.0)],
        0.5,
        2.0,
    ),
    "bimodal": Problem(
        _bimodal_energy,
        _bimodal_sample,
        [functools.partial(_bimodal_cdf, 0), functools.partial(_bimodal_cdf, 1)],
        1.0,
        1.5,
    ),
}


def make_segment(a, v):
    a, v, t, s, alpha_t, sigma_s = (jnp.asarray(value) for value in (a, v, 0.2, 0.1, 0.8, 0.3))
    return Segment(t, s, a, v, alpha_t, sigma_s)


@eqx.filter_jit
def _move(kernel, score_fn, z, x_t, keys, v, tuning, num_steps):
    def one(z, x_t, key):
        # The proposals of PreconditionedMALA may depend on x_t in any way: here a rough guess of the score.
        target = ReverseTransition(resolve_score(score_fn), x_t, -0.5 * x_t, make_segment(0.9, v))
        aux_key, steps_key = jr.split(key)
        current = target.evaluate(z, with_energy=kernel.needs_energy)

        def body(carry, key):
            current, auxiliary, info = kernel.step(key, target, *carry, tuning)
            return (current, auxiliary), info.accept_prob

        carry = (current, kernel.init_auxiliary(aux_key, z))
        (last, _), accept_prob = jax.lax.scan(body, carry, jr.split(steps_key, num_steps))
        return last.x, jnp.mean(accept_prob)

    return jax.vmap(one)(z, x_t, keys)


def p_values(kernel, name, step_size, *, num_chains=NUM_CHAINS, seed=0):
    """P-values of all pivots after `NUM_STEPS` steps from exact draws, and the mean acceptance
    probability.
    """
    problem = PROBLEMS[name]
    sample_key, noise_key, move_key = jr.split(jr.key(seed), 3)
    z = problem.sample(sample_key, num_chains)
    x_t = 0.9 * z + np.sqrt(problem.v) * jr.normal(noise_key, z.shape)
    tuning = SegmentTuning(jnp.asarray(step_size), jnp.asarray(problem.curvature))
    score = rtk.EnergyScore(problem.energy)
    moved, accept_prob = _move(
        kernel, score, z, x_t, jr.split(move_key, num_chains), jnp.asarray(problem.v), tuning, NUM_STEPS
    )
    moved, x_t = np.asarray(moved, np.float64), np.asarray(x_t, np.float64)
    residual = (x_t - 0.9 * moved) / np.sqrt(problem.v)
    result = []
    for i, cdf in enumerate(problem.cdf):
        result += [
            scipy.stats.kstest(moved[:, i], cdf).pvalue,
            scipy.stats.kstest(residual[:, i], "norm").pvalue,
        ]
        # KS is blind to small errors of scale: second moments see them.
        for moments in (
            residual[:, i] ** 2,
            scipy.stats.norm.ppf(np.clip(cdf(moved[:, i]), 1e-12, 1 - 1e-12)) ** 2,
        ):
            z_score = (moments.mean() - 1) / (np.sqrt(2 / num_chains))
            result.append(2 * scipy.stats.norm.sf(abs(z_score)))
    return np.array(result), float(np.mean(accept_prob))


STEP_SIZE = {  # large enough that the accept step matters, and small enough that a rule can be accurate
    ("MALA", "skewed"): 0.15,
    ("MALA", "anisotropic"): 0.08,
    ("MALA", "bimodal"): 0.15,
    ("PreconditionedMALA", "skewed"): 0.4,
    ("PreconditionedMALA", "anisotropic"): 0.4,
    ("PreconditionedMALA", "bimodal"): 0.4,
}

EXACT = {
    "MALA exact": rtk.MALA(1, energy_difference=rtk.ExactEnergy()),
    "MALA trapezoid": rtk.MALA(1, energy_difference=rtk.Trapezoid()),
    "MALA Simpson": rtk.MALA(1, energy_difference=rtk.Simpson()),
    "MALA Gauss-Legendre": rtk.MALA(1, energy_difference=rtk.GaussLegendre(3)),
    "MALA projected": rtk.MALA(1, energy_difference=rtk.ExactEnergy(), max_move=50.0, max_radius=200.0),
    "PreconditionedMALA exact": rtk.PreconditionedMALA(1, energy_difference=rtk.ExactEnergy()),
    "PreconditionedMALA trapezoid": rtk.PreconditionedMALA(1, energy_difference=rtk.Trapezoid()),
    "PreconditionedMALA Simpson": rtk.PreconditionedMALA(1, energy_difference=rtk.Simpson()),
}


def _step_size(kernel, problem, label):
    # The trapezoid rule is third order in the move: on the curved targets it gets a smaller step.
    scale = 0.25 if "trapezoid" in label and problem != "anisotropic" else 1.0
    return scale * STEP_SIZE[type(kernel).__name__, problem]


QUICK = ("MALA exact", "MALA trapezoid", "PreconditionedMALA exact", "PreconditionedMALA trapezoid")


def slow_unless(quick, values):
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("label", slow_unless(QUICK, EXACT))
def test_exact_draws_stay_exact(label, problem):
    p, accept_prob = p_values(EXACT[label], problem, _step_size(EXACT[label], problem, label))
    assert p.min() > P_MIN, p
    assert 0.3 < accept_prob < 0.999, accept_prob  # proposals are rejected, but not all


class Tampered(AbstractMarkovKernel):
    """An adjusted kernel with a changed accept ratio or drift: what the checks above must catch."""

    kernel: AbstractMarkovKernel
    change: str = eqx.field(static=True)
    num_steps: int = eqx.field(static=True, default=1)
    step_size: object = None
    start: str = eqx.field(static=True, default="gaussian")
    adapts_step_size = True
    needs_energy = True

    def default_step_size(self, precision, dim):
        return self.kernel.default_step_size(precision, dim)

    def init_auxiliary(self, key, x):
        return self.kernel.init_auxiliary(key, x)

    def propose(self, key, target, current, auxiliary, tuning):
        if self.change == "proposal of another step size":
            tuning = tuning._replace(step_size=1.3 * tuning.step_size)
        return self.kernel.propose(key, target, current, auxiliary, tuning)

    def log_accept_ratio(self, target, current, proposal, tuning):
        if self.change == "accept step removed":
            return jnp.zeros(())
        if self.change == "sign of the score in the ratio":
            current, proposal = (Evaluation(e.x, -e.score, e.energy) for e in (current, proposal))
        if self.change == "energy difference dropped":
            current, proposal = (Evaluation(e.x, e.score, 0 * e.energy) for e in (current, proposal))
        ratio = self.kernel.log_accept_ratio(target, current, proposal, tuning)
        if self.change == "ratio inverted":
            return -ratio
        if self.change == "ratio halved":
            return 0.5 * ratio
        return ratio


CHANGES = [
    "accept step removed",
    "sign of the score in the ratio",
    "energy difference dropped",
    "ratio inverted",
    "ratio halved",
    "proposal of another step size",
]


@pytest.mark.parametrize("change", slow_unless(("accept step removed", "ratio inverted"), CHANGES))
@pytest.mark.parametrize("label", ["MALA exact", "PreconditionedMALA exact"])
def test_broken_kernels_are_caught(label, change):
    kernel = EXACT[label]
    p, _ = p_values(Tampered(kernel, change), "bimodal", _step_size(kernel, "bimodal", label))
    assert p.min() < P_MIN, p


def test_a_binding_projection_is_not_exact_and_is_seen():
    # Radii that bind restrict the law to the ball: the same check must notice.
    p, _ = p_values(rtk.MALA(1, energy_difference=rtk.ExactEnergy(), max_radius=1.5), "bimodal", 0.15)
    assert p.min() < P_MIN


def test_trapezoid_with_large_moves_between_modes_is_seen():
    # What the documentation of Trapezoid warns of, and why Simpson exists.
    assert p_values(rtk.MALA(1, energy_difference=rtk.Trapezoid()), "bimodal", 0.15)[0].min() < P_MIN
    assert p_values(rtk.MALA(1, energy_difference=rtk.Simpson()), "bimodal", 0.15)[0].min() > P_MIN


@pytest.mark.parametrize(("kernel", "step_size"), [(rtk.ULA(1), 0.08), (rtk.ULD(1), 0.5)])
def test_unadjusted_kernels_are_caught(kernel, step_size):
    assert p_values(kernel, "anisotropic", step_size)[0].min() < P_MIN


# Bias of the unadjusted kernels. On a Gaussian target one step is an affine map plus Gaussian noise, so that
# its stationary variance is found exactly: the map by differentiating `propose`, the noise by its closed
# form.
PRECISION_S, V, A = 1.5, 0.4, 0.9


def _gaussian_target():
    score_fn = ScoreModel(lambda x, t: -PRECISION_S * x)
    return ReverseTransition(score_fn, jnp.zeros(1), jnp.zeros(1), make_segment(A, V))


def _stationary_variance(kernel, h, friction):
    """Variance of the position, from the affine map of one step."""
    with jax.enable_x64(True):
        target = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64) if eqx.is_array(x) else x, _gaussian_target()
        )
        tuning = SegmentTuning(jnp.asarray(h), jnp.asarray(PRECISION_S))

        def step(state):
            x, u = state[:1], state[1:]
            auxiliary = u if isinstance(kernel, rtk.ULD) else ()
            current = Evaluation(x, target.prior_score(x), jnp.zeros(()))
            y, auxiliary = kernel.propose(jr.key(0), target, current, auxiliary, tuning)
            return jnp.concatenate([y, auxiliary]) if isinstance(kernel, rtk.ULD) else y

        size = 2 if isinstance(kernel, rtk.ULD) else 1
        matrix = np.asarray(jax.jacobian(step)(jnp.zeros(size)))
    if size == 1:
        return 2 * h / (1 - matrix[0, 0] ** 2)
    a = friction * h
    covariance = h * (1 - np.exp(-a)) ** 2 / a
    position = h**2 * (2 * a - 3 + 4 * np.exp(-a) - np.exp(-2 * a)) / a**2
    noise = np.array([[position, covariance], [covariance, 1 - np.exp(-2 * a)]])
    return scipy.linalg.solve_discrete_lyapunov(matrix, noise)[0, 0]


@pytest.mark.parametrize("kernel", [rtk.ULA(1), rtk.ULD(1)])
def test_bias_of_unadjusted_kernels_is_first_order_with_the_stated_constant(kernel):
    precision = PRECISION_S + A**2 / V
    friction = 2 * np.sqrt(precision)  # the default
    steps = np.array([0.02, 0.04, 0.08]) / (precision if isinstance(kernel, rtk.ULA) else np.sqrt(precision))
    bias = np.array([_stationary_variance(kernel, h, friction) * precision - 1 for h in steps])
    slope = np.polyfit(np.log(steps), np.log(bias), 1)[0]
    assert abs(slope - 1) < 0.05, slope
    stated = steps * precision / 2 if isinstance(kernel, rtk.ULA) else steps * precision / (2 * friction)
    np.testing.assert_allclose(bias, stated, rtol=0.1)


@pytest.mark.parametrize(("kernel", "h"), [(rtk.ULA(1), 0.2), (rtk.ULD(1), 0.35)])
def test_bias_of_unadjusted_kernels_is_what_sampling_gives(kernel, h):
    # 40,000 chains of 60 steps, far beyond their relaxation time, against the exact stationary variance.
    precision = PRECISION_S + A**2 / V
    target_variance = _stationary_variance(kernel, h, 2 * np.sqrt(precision))
    num_chains = 40_000
    tuning = SegmentTuning(jnp.asarray(h), jnp.asarray(PRECISION_S))
    score = rtk.EnergyScore(_isotropic_energy)
    zeros = jnp.zeros((num_chains, 1))
    moved, _ = _move(kernel, score, zeros, zeros, jr.split(jr.key(3), num_chains), jnp.asarray(V), tuning, 60)
    z_score = (float(jnp.mean(moved**2)) / target_variance - 1) / np.sqrt(2 / num_chains)
    assert abs(z_score) < scipy.stats.norm.isf(P_MIN / 2)
    # and the bias itself is far larger than what this test can resolve
    assert target_variance * precision - 1 > 10 * np.sqrt(2 / num_chains)


def _isotropic_energy(x, t):
    del t
    return 0.5 * PRECISION_S * jnp.sum(x**2)
