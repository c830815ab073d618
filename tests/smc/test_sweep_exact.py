"""Exact draws stay exact under every move of particle Gibbs, and broken moves are caught.

The prior is a skewed, anisotropic mixture in the plane; its posterior given a linear observation with
Gaussian noise is a mixture in closed form. Independent exact draws of it take one move each. If the move
leaves the posterior invariant they are exact draws again, so that Kolmogorov-Smirnov and binomial tests have
their textbook null.

Reverse transitions are drawn from their closed form here, so that what is tested is particle Gibbs itself,
without the error of an inner kernel.
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

import numpyro_rtk as rtk
from numpyro_rtk._moves._accept import metropolis
from numpyro_rtk._score._model import ScoreModel
from numpyro_rtk._smc import _conditional, _moves
from numpyro_rtk._smc._conditional import conditional_sweep, SweepTuning, weight_difference
from numpyro_rtk._smc._point import MoveInfo, TransitionInfo
from numpyro_rtk._smc._posterior import Posterior
from numpyro_rtk._smc._resampling import (
    conditional_systematic,
    forced_move,
    pinned_weights,
    systematic,
)
from numpyro_rtk._smc._twist import Terms
from numpyro_rtk._smc._unconditional import choose_sweep
from tests.particles import (
    ExactReverse,
    linear_terms,
    make_law,
    make_posterior,
    Mixture,
    p_values,
    with_own,
    without_energy,
)


# Probability that a right library fails any check in this file, and the number of p-values it takes.
FALSE_ALARM_RATE = 1e-4
NUM_P_VALUES = 1000
P_MIN = FALSE_ALARM_RATE / NUM_P_VALUES
NUM_CHAINS = 20_000
NUM_SEGMENTS = 6
SCHEDULE = rtk.OU()

DATA = Mixture(
    np.array([0.25, 0.75]),
    np.array([[-1.2, 0.5], [1.0, -0.3]]),
    np.array([[[0.30, 0.10], [0.10, 0.08]], [[0.06, -0.04], [-0.04, 0.25]]]),
)


def at_level(mixture, t):
    return mixture.at(float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t)))


PRIOR = at_level(DATA, SCHEDULE.t_min)
OPERATOR, NOISE_SD, OBSERVED = np.array([[0.6, 0.9]]), 0.25, np.array([0.15])
POSTERIOR, _ = PRIOR.given(OPERATOR, NOISE_SD, OBSERVED)
CUT = 0.0
CENTER = np.array([0.3, 0.0])
GAUSSIAN = linear_terms(OPERATOR, NOISE_SD, OBSERVED)
TUNING = SweepTuning(jnp.ones((NUM_SEGMENTS, 1)), jnp.full(NUM_SEGMENTS, 0.5))


@functools.cache
def law():
    return make_law(DATA.score(SCHEDULE), SCHEDULE, (2,), segments=NUM_SEGMENTS)


def exact_draws(exact, seed=0):
    return jnp.asarray(exact.draw(np.random.default_rng(seed), NUM_CHAINS), jnp.result_type(float))


def posterior_of(informed, log_beta, twist="gaussian", cls=Posterior):
    """`informed` is 1, or 0 for a constant likelihood, with any twist."""

    def terms(x):
        whitened, log_normalizer, *_ = GAUSSIAN(x)
        if twist == "gaussian":
            return Terms(informed * whitened, informed * log_normalizer, jnp.zeros(()))
        return Terms(jnp.zeros(0), jnp.zeros(()), informed * (log_normalizer - 0.5 * jnp.sum(whitened**2)))

    return make_posterior(law(), terms, ExactReverse(DATA, SCHEDULE), log_beta, cls, center=CENTER)


# Whatever the powers of a tempered twist are, the law stays: these go up and down between levels, above 1,
# too.
SENSIBLE = np.linspace(-3.0, 0.0, NUM_SEGMENTS + 1)
BAD = np.array([0.4, -6.0, 0.3, -4.0, 0.4, -9.0, 0.0])
ROUGH = np.array([-3.0, -1.5, -1.0, -1.0, 1.5, 1.0, 0.0])
DEPTHS = {"one level": 1, "half": 3, "almost full": NUM_SEGMENTS, "full": NUM_SEGMENTS + 1}


ThroughDenoiser = functools.partial(Posterior, jacobian=True)


@functools.cache
def compiled(twist, num_particles, num_guided_steps, cls=Posterior, broken=False):
    """One sweep of a batch of chains; `broken` keeps programs with changed parts apart."""
    del broken
    law()  # not while tracing

    @jax.jit
    def run(keys, x, depth, informed, log_beta, guided_step_size, change):
        Tampering.change = change
        tuning = SweepTuning(jnp.ones((NUM_SEGMENTS, 1)), jnp.full(NUM_SEGMENTS, guided_step_size))
        posterior = posterior_of(informed, log_beta, twist, cls)

        def one(key, x):
            point = posterior.evaluate(jnp.asarray(NUM_SEGMENTS), x)
            return conditional_sweep(key, posterior, tuning, point, depth, num_particles, num_guided_steps)

        points, info = jax.vmap(one)(keys, x)
        return points.x, info

    return run


def sweep(program, depth, *, informed=1.0, log_beta=SENSIBLE, guided_step_size=0.5, change=0, seed=0):
    """Exact draws after one sweep: p-values, and what the sweeps report."""
    exact = POSTERIOR if informed else PRIOR
    x = exact_draws(exact, seed)
    keys = jr.split(jr.key(seed), NUM_CHAINS)
    moved, info = program(keys, x, depth, informed, jnp.asarray(log_beta), guided_step_size, change)
    return p_values(moved, exact, CUT), info


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("informed", [1.0, 0.0])
def test_exact_draws_stay_exact_under_sweeps(depth, informed):
    p, info = sweep(compiled("gaussian", 4, 1), DEPTHS[depth], informed=informed)
    assert p.min() > P_MIN, p
    assert np.mean(info.changed) > 0.3
    assert np.mean(info.guided_accept_prob[:, -1]) < 0.97  # guided moves do reject
    assert not np.any(info.diverging)


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["one level", "half"])
def test_the_law_at_the_data_is_the_models_own_likelihood(depth):
    """Whatever the terms say that twists above the data are made of."""
    other = linear_terms(OPERATOR, 3 * NOISE_SD, OBSERVED + 0.5)
    right = make_posterior(law(), GAUSSIAN, ExactReverse(DATA, SCHEDULE), center=CENTER)
    own = with_own(other, lambda x: GAUSSIAN(x).log_likelihood)
    likelihoods = right.likelihoods._replace(terms=own)
    posterior = Posterior(right.sites, likelihoods, right.kernel, right.log_beta)

    @jax.jit
    def run(keys, x):
        def one(key, x):
            return conditional_sweep(key, posterior, TUNING, posterior.at_data(x), DEPTHS[depth], 4, 1)

        points, info = jax.vmap(one)(keys, x)
        return points.x, info.changed

    moved, changed = run(jr.split(jr.key(0), NUM_CHAINS), exact_draws(POSTERIOR))
    p = p_values(moved, POSTERIOR, CUT)
    assert p.min() > P_MIN, p
    assert np.mean(changed) > 0.1
    # The control: the terms have another law, which the same check sees.
    wrong, _ = PRIOR.given(OPERATOR, 3 * NOISE_SD, OBSERVED + 0.5)
    assert p_values(moved, wrong, CUT).min() < 1e-3 * P_MIN


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["half", "full"])
@pytest.mark.parametrize(("powers", "informed"), [("sensible", 1.0), ("bad", 1.0), ("sensible", 0.0)])
def test_exact_draws_stay_exact_under_sweeps_with_tempered_twists(powers, informed, depth):
    log_beta = {"sensible": SENSIBLE, "bad": BAD}[powers]
    p, info = sweep(compiled("tempered", 4, 1), DEPTHS[depth], informed=informed, log_beta=log_beta)
    assert p.min() > P_MIN, p
    assert np.mean(info.changed) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["half", "full"])
def test_exact_draws_stay_exact_under_sweeps_of_two_particles(depth):
    p, info = sweep(compiled("tempered", 2, 0), DEPTHS[depth], log_beta=BAD)
    assert p.min() > P_MIN, p
    assert np.mean(info.changed) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["half", "full"])
def test_exact_draws_stay_exact_under_sweeps_guided_through_the_denoiser(depth):
    p, info = sweep(compiled("gaussian", 4, 1, ThroughDenoiser), DEPTHS[depth])
    assert p.min() > P_MIN, p
    assert np.mean(info.changed) > 0.3


@pytest.mark.slow
def test_chains_of_different_depths_do_not_disturb_each_other():
    """Batched chains walk through the levels together, from the noisiest that any of them needs; each does
    what it does alone.
    """
    depths = jnp.array([0, 1, NUM_SEGMENTS + 1, 3, NUM_SEGMENTS, 0, 1, 3])
    keys, x = jr.split(jr.key(0), depths.size), exact_draws(POSTERIOR)[: depths.size]
    posterior = posterior_of(1.0, SENSIBLE)

    @jax.jit
    def run(keys, x, depths):
        def one(key, x, depth):
            point = posterior.evaluate(jnp.asarray(NUM_SEGMENTS), x)
            point, info = conditional_sweep(key, posterior, TUNING, point, depth, 4, 1)
            return point.x, info

        return jax.vmap(one)(keys, x, depths)

    together = run(keys, x, depths)
    for depth in np.unique(depths):
        chains = np.flatnonzero(depths == depth)
        alone = run(keys, x, jnp.full_like(depths, depth))
        jax.tree.map(
            lambda a, b, i=chains: np.testing.assert_allclose(a[i], b[i], rtol=1e-5), together, alone
        )
    np.testing.assert_array_equal(together[0][depths == 0], x[depths == 0])
    assert not np.any(together[1].changed[depths == 0])
    assert np.any(together[1].changed)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_batched_chains_share_the_levels(shared, monkeypatch):
    """The network is given one time for all chains, so that what depends on it alone is computed once."""
    if not shared:  # a loop of its own for every chain
        monkeypatch.setattr(_conditional, "_least_of_batch", lambda level: level)
    times = []

    @jax.custom_batching.custom_vmap
    def watch(t):
        return t

    @watch.def_vmap
    def _(axis_size, in_batched, t):
        times.append(axis_size)
        return t, in_batched[0]

    watched = law()._replace(score_fn=ScoreModel(lambda x, t: -x * watch(t)))
    posterior = make_posterior(watched, GAUSSIAN, ExactReverse(DATA, SCHEDULE))

    def one(key, depth):
        point = posterior.evaluate(jnp.asarray(NUM_SEGMENTS), jnp.zeros(2))
        return conditional_sweep(key, posterior, TUNING, point, depth, 4, 1)[0].x

    times.clear()
    jax.eval_shape(jax.vmap(jax.vmap(one)), jr.split(jr.key(0), (2, 3)), jnp.ones((2, 3), int))
    assert bool(times) is not shared


class Scripted:
    """Every move is a known function of the point and the level, and what the pinned path is asked for is
    written down.
    """

    def __init__(self):
        self.log = []

    def noise(self, key, posterior, level, x):
        self.log.append(("noise", int(level), jr.key_data(key).tolist()))
        return 1.1 * x + 0.1 * level

    def mala_steps(self, key, posterior, level, point, mass, step_size, num_steps):
        if not isinstance(key, jax.core.Tracer):  # the pinned path
            self.log.append(("move", int(level), jr.key_data(key).tolist()))
        no = jnp.zeros((), bool)
        info = MoveInfo(jnp.ones(()), jnp.ones(()), no, no, jnp.asarray(num_steps))
        return posterior.evaluate(level, 0.8 * point.x - 0.1 * level), info

    def reverse(self, key, posterior, level, point, step_size):
        return posterior.evaluate(level + 1, 0.9 * point.x), TransitionInfo(jnp.ones(()), jnp.zeros((), bool))


@pytest.mark.parametrize(
    "depth",
    ["one level", *[pytest.param(name, marks=pytest.mark.slow) for name in DEPTHS if name != "one level"]],
)
@pytest.mark.slow
def test_weights_of_the_pinned_path_and_of_the_others(depth, monkeypatch):
    """`G_s(arrive) / G_t(leave)` of every particle, the pinned one's along its path: draws hardly show errors
    of it.
    """
    weights = []

    def record(log_weights):
        weights.append(np.asarray(log_weights))
        return pinned_weights(log_weights)

    script = Scripted()
    monkeypatch.setattr(_conditional, "pinned_weights", record)
    for name in ("noise", "mala_steps", "reverse"):
        monkeypatch.setattr(_conditional, name, getattr(script, name))
    depth, last = DEPTHS[depth], NUM_SEGMENTS
    posterior = posterior_of(1.0, ROUGH, "tempered")

    def log_twist(level, x):
        return float(posterior.evaluate(jnp.asarray(level), x).log_twist)

    x = jnp.array([0.4, -0.7])
    with jax.disable_jit():
        point = posterior.evaluate(jnp.asarray(last), x)
        conditional_sweep(jr.key(0), posterior, TUNING, point, jnp.asarray(depth), 3, 1)
    # The path, and what it asks for: noise from each level to the next noisier one and a move there, with
    # keys of their own.
    top, full, leave, arrive = max(last - depth, 0), depth > last, {}, {last: x}
    for level in range(last - 1, top - 1, -1):
        leave[level] = 1.1 * arrive[level + 1] + 0.1 * (level + 1)
        arrive[level] = 0.8 * leave[level] - 0.1 * level
    wanted = [
        (kind, level + 1 if kind == "noise" else level)
        for level in range(last - 1, top - 1, -1)
        for kind in ("noise", "move")
    ]
    assert [entry[:2] for entry in script.log] == wanted
    assert len({tuple(entry[2]) for entry in script.log}) == len(wanted)
    assert len(weights) == last - top + 1
    assert weights[0][0] == pytest.approx(log_twist(0, arrive[0]) if full else 0.0, rel=1e-4)
    for level, found in zip(range(top, last), weights[1:], strict=True):
        assert found[0] == pytest.approx(
            log_twist(level + 1, arrive[level + 1]) - log_twist(level, leave[level]), rel=1e-4
        )
    if depth == 1:  # all start at the path's point: the others move and go down
        moved = 0.8 * arrive[top] - 0.1 * top
        np.testing.assert_allclose(
            weights[1][1:], log_twist(last, 0.9 * moved) - log_twist(top, moved), rtol=1e-4
        )


@pytest.mark.slow
def test_where_no_particle_has_any_weight_the_pinned_one_stays_and_the_sweep_says_so():
    """A current draw that is impossible, and a likelihood that leaves nothing else possible."""
    nowhere = lambda x: Terms(jnp.zeros(0), jnp.zeros(()), jnp.where(jnp.sum(x) < 1e6, -jnp.inf, 0.0))
    somewhere = lambda x: Terms(jnp.zeros(0), jnp.zeros(()), jnp.where(x[0] < 1e6, 0.0, -jnp.inf))
    for terms, lost in ((nowhere, True), (somewhere, False)):
        posterior = make_posterior(law(), terms, ExactReverse(DATA, SCHEDULE))

        @jax.jit
        @jax.vmap
        def run(key, x, posterior=posterior):
            point = posterior.evaluate(jnp.asarray(NUM_SEGMENTS), x)
            moved, info = conditional_sweep(key, posterior, TUNING, point, 3, 4, 1)
            return moved.x, info

        x = exact_draws(PRIOR)[:50]
        moved, info = run(jr.split(jr.key(0), 50), x)
        assert np.all(info.diverging == lost)
        assert np.all(~info.changed) if lost else np.any(info.changed)
        if lost:
            np.testing.assert_array_equal(moved, x)
            np.testing.assert_array_equal(info.particle_ess[:, -1], 0.0)


@pytest.mark.parametrize(
    "depth",
    [
        depth if depth in (0, DEPTHS["full"]) else pytest.param(depth, marks=pytest.mark.slow)
        for depth in (0, *DEPTHS.values())
    ],
)
def test_levels_and_segments_that_a_sweep_does_not_visit_have_zeros(depth):
    posterior = posterior_of(1.0, SENSIBLE)

    @jax.jit
    def run(key, x, depth):
        point = posterior.evaluate(jnp.asarray(NUM_SEGMENTS), x)
        return conditional_sweep(key, posterior, TUNING, point, depth, 4, 1)[1]

    info = run(jr.key(0), jnp.array([0.4, -0.2]), depth)
    lowest = NUM_SEGMENTS - depth
    np.testing.assert_array_equal(info.weighted, np.arange(NUM_SEGMENTS + 1) > lowest)
    np.testing.assert_array_equal(info.visited, np.arange(NUM_SEGMENTS) >= lowest)
    np.testing.assert_array_equal(info.particle_ess > 0, info.weighted)
    assert np.all(info.particle_ess <= 4 * (1 + 1e-5))
    np.testing.assert_array_equal(info.accept_prob > 0, info.visited)
    np.testing.assert_array_equal(info.guided_accept_prob > 0, info.visited)


def test_noise_takes_a_level_to_the_next_noisier_one():
    posterior, levels = posterior_of(1.0, SENSIBLE), law().grid.levels
    for level in range(1, NUM_SEGMENTS + 1):
        start, end = (at_level(DATA, float(levels.t[i])) for i in (level, level - 1))
        x = exact_draws(start, seed=level)
        noised = jax.jit(jax.vmap(lambda key, x, i=level: _moves.noise(key, posterior, jnp.asarray(i), x)))
        assert p_values(noised(jr.split(jr.key(level), NUM_CHAINS), x), end, CUT).min() > P_MIN
        if level == NUM_SEGMENTS:  # the control: another level's noise, here where levels differ
            wrong = jax.jit(
                jax.vmap(lambda key, x, i=level - 1: _moves.noise(key, posterior, jnp.asarray(i), x))
            )
            assert p_values(wrong(jr.split(jr.key(level), NUM_CHAINS), x), end, CUT).min() < 1e-3 * P_MIN


class Tampering:
    """Parts of the sweep changed at run time, so that all controls share one program."""

    change = 0
    KINDS = ("none", "inverted", "not pinned", "pin left out of the choice", "wrong level", "always accepted")

    @classmethod
    def choose(cls, kind, broken, right):
        flag = cls.change == cls.KINDS.index(kind)
        return jax.tree.map(lambda x, y: jnp.where(flag, x, y), broken, right)

    @classmethod
    def pinned_weights(cls, log_weights):
        return cls.choose("inverted", pinned_weights(-log_weights), pinned_weights(log_weights))

    @classmethod
    def conditional_systematic(cls, key, weights):
        # Without a pinned particle, what is left is ordinary SMC started at an exact draw.
        return cls.choose(
            "not pinned", systematic(key, weights.at[0].set(0.0)), conditional_systematic(key, weights)
        )

    @classmethod
    def weight_difference(cls, new, old):
        return cls.choose("wrong level", new, weight_difference(new, old))

    @classmethod
    def forced_move(cls, key, weights):
        return cls.choose(
            "pin left out of the choice",
            1 + jr.categorical(key, jnp.log(weights[1:])),
            forced_move(key, weights),
        )

    @classmethod
    def metropolis(cls, key, log_ratio, finite, **options):
        changed = cls.choose("always accepted", jnp.full_like(log_ratio, 1e9), log_ratio)
        return metropolis(key, changed, finite, **options)


@pytest.fixture(scope="module")
def tampered():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pinned_weights", "conditional_systematic", "forced_move", "weight_difference"):
            patch.setattr(_conditional, name, getattr(Tampering, name))
        patch.setattr(_moves, "metropolis", Tampering.metropolis)
        program = compiled("tempered", 4, 1, Posterior, True)
        sweep(program, 2)  # traces it
    return program


@pytest.mark.parametrize("kind", Tampering.KINDS)
def test_broken_sweeps_are_caught(tampered, kind):
    # Where a change of weights shows depends on the twists.
    options = {"log_beta": SENSIBLE if kind == "wrong level" else ROUGH, "guided_step_size": 1.5}
    p, _ = sweep(tampered, DEPTHS["half"], change=Tampering.KINDS.index(kind), **options)
    assert (p.min() > P_MIN) if kind == "none" else (p.min() < 1e-3 * P_MIN), p


# Gradient moves, each on its own.

GAUSSIAN_PRIOR = Mixture(np.ones(1), np.array([[0.3, -0.5]]), np.array([[[0.5, 0.3], [0.3, 0.4]]]))
MIDDLE = 4
REFERENCE = np.array([0.5, 0.2])


@functools.cache
def gaussian_law():
    # Many exact draws: the covariance of the twist is the measured one, here nearly the true one.
    return make_law(GAUSSIAN_PRIOR.score(SCHEDULE), SCHEDULE, (2,), segments=NUM_SEGMENTS, num_draws=2000)


def level_target(posterior, level):
    """`p_t G_t` of a Gaussian prior in closed form: with a Gaussian twist it is Gaussian."""

    def log_density(x):
        point = posterior.evaluate(jnp.asarray(level), x)
        return point.log_twist - point.energy

    with jax.enable_x64(False):
        gradient = np.asarray(jax.grad(log_density)(jnp.zeros(2)), np.float64)
        precision = -np.asarray(jax.hessian(log_density)(jnp.zeros(2)), np.float64)
    covariance = np.linalg.inv(precision)
    return Mixture(np.ones(1), (covariance @ gradient)[None], covariance[None])


def test_guided_moves_without_an_energy_take_simpsons_rule():
    """Antisymmetric, and far closer to the exact difference than the trapezoid rule at the length of a
    move.
    """
    posterior = make_posterior(without_energy(law()), GAUSSIAN, ExactReverse(DATA, SCHEDULE))
    assert (posterior.uses_midpoints, posterior.evaluations_per_mala_step) == (True, 2)
    assert not make_posterior(law(), GAUSSIAN, ExactReverse(DATA, SCHEDULE)).uses_midpoints
    assert not make_posterior(
        without_energy(law()), GAUSSIAN, ExactReverse(DATA, SCHEDULE), cls=ThroughDenoiser
    ).uses_midpoints
    level, score = jnp.asarray(MIDDLE), law().score_fn
    t = law().grid.t[MIDDLE]
    xs = exact_draws(at_level(DATA, float(t)))[:500]
    ys = xs + 0.5 * jr.normal(jr.key(3), xs.shape, xs.dtype)

    @jax.jit
    def differences(xs, ys):
        def one(x, y):
            here, there = (posterior.evaluate(level, z) for z in (x, y))
            simpson = posterior.log_prior_difference_at_midpoint(level, here, there)
            back = posterior.log_prior_difference_at_midpoint(level, there, here)
            exact = score.energy_and_score(x, t)[0] - score.energy_and_score(y, t)[0]
            return simpson, back, posterior.log_prior_difference(here, there), exact

        return jax.vmap(one)(xs, ys)

    simpson, back, trapezoid, exact = map(np.asarray, differences(xs, ys))
    np.testing.assert_allclose(simpson, -back, rtol=1e-6, atol=1e-9)
    errors = [np.sqrt(np.mean((rule - exact) ** 2)) for rule in (simpson, trapezoid)]
    assert errors[0] < 0.2 * errors[1], errors


class Move:
    """A move on its own, started from exact draws of its level's target."""

    def __init__(self, name, level, law, terms, target, move):
        self.name, self.level, self.law, self.terms, self.target, self.move = (
            name,
            level,
            law,
            terms,
            target,
            move,
        )


def guided(posterior, key, point, mass, level):
    step_size = jnp.asarray(0.7)
    return _moves.mala_steps(key, posterior, jnp.asarray(level), point, mass, step_size, 3)


def local(kernel, step_size):
    def move(posterior, key, point, mass, level):
        del level
        return kernel(key, posterior, point, mass, jnp.asarray(step_size))

    return move


def constant(x):
    return Terms(jnp.zeros(0), jnp.zeros(()), 0.0 * jnp.sum(x))


NO_ENERGY = "guided, middle level, prior, by Simpson's rule"


@functools.cache
def moves(name):
    times = np.asarray(law().grid.t)
    if name == "guided, middle level, prior":
        return Move(name, MIDDLE, law(), constant, at_level(DATA, times[MIDDLE]), guided)
    if name == NO_ENERGY:
        return Move(name, MIDDLE, without_energy(law()), constant, at_level(DATA, times[MIDDLE]), guided)
    if name.startswith("guided, middle level, Gaussian"):
        target = level_target(
            make_posterior(gaussian_law(), GAUSSIAN, ExactReverse(GAUSSIAN_PRIOR, SCHEDULE)), MIDDLE
        )
        return Move(name, MIDDLE, gaussian_law(), GAUSSIAN, target, guided)
    last = {
        "guided, last level": guided,
        "LocalMALA": local(rtk.LocalMALA(num_steps=3), 0.7),
        "LocalHMC": local(rtk.LocalHMC(num_steps=4, num_trajectories=2), 0.9),
    }
    return Move(name, NUM_SEGMENTS, law(), GAUSSIAN, POSTERIOR, last[name])


MOVES = [
    "guided, middle level, prior",
    NO_ENERGY,
    "guided, middle level, Gaussian",
    "guided, last level",
    "LocalMALA",
    "LocalHMC",
]


class Unadjusted(Posterior):
    """Stands for moves without an accept step."""


def always_accepted(key, log_ratio, finite, **options):
    return metropolis(key, jnp.full_like(log_ratio, 1e9), finite, **options)


class OtherLevel(Posterior):
    """Moves on the target of the level above."""

    def evaluate(self, level, x):
        return super().evaluate(level - 1, x)

    def log_prior_difference_at_midpoint(self, level, here, there):
        return super().log_prior_difference_at_midpoint(level - 1, here, there)


class WrongSign(Posterior):
    """Simpson's rule from the proposal to the point."""

    def log_prior_difference_at_midpoint(self, level, here, there):
        return super().log_prior_difference_at_midpoint(level, there, here)


BROKEN = (
    [(NO_ENERGY, WrongSign)]
    + [(name, Unadjusted) for name in MOVES]
    + [(name, OtherLevel) for name in MOVES if "HMC" not in name]
)


def after_move(name, cls=Posterior):
    move = moves(name)
    posterior = make_posterior(move.law, move.terms, ExactReverse(DATA, SCHEDULE), cls=cls, center=REFERENCE)

    @jax.jit
    def run(keys, x):
        mass = _moves.preconditioner(posterior, jnp.asarray(move.level))

        def one(key, x):
            point = posterior.evaluate(jnp.asarray(move.level), x)
            return move.move(posterior, key, point, mass, move.level)

        points, info = jax.vmap(one)(keys, x)
        return points.x, info.accept_prob

    moved, accept_prob = run(jr.split(jr.key(1), NUM_CHAINS), exact_draws(move.target))
    return p_values(moved, move.target, CUT), float(np.mean(accept_prob))


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVES)
def test_exact_draws_stay_exact_under_gradient_moves(name):
    check_move(name, Posterior)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MOVES if "guided" in name and name != NO_ENERGY])
def test_exact_draws_stay_exact_under_moves_guided_through_the_denoiser(name):
    check_move(name, ThroughDenoiser)


def check_move(name, cls):
    p, accept_prob = after_move(name, cls)
    assert p.min() > P_MIN, p
    assert 0.4 < accept_prob < 0.98, accept_prob


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cls"), BROKEN)
def test_broken_gradient_moves_are_caught(name, cls, monkeypatch):
    if cls is Unadjusted:
        monkeypatch.setattr(_moves, "metropolis", always_accepted)
    p, _ = after_move(name, cls)
    assert p.min() < 1e-3 * P_MIN, p


def chosen_sweeps(log_twists, log_evidence, finite=(True, True, True)):
    keys = jr.split(jr.key(17), 4000)
    return jax.vmap(
        lambda key: choose_sweep(key, jnp.array(finite), jnp.array(log_twists), jnp.array(log_evidence))
    )(keys)


def test_a_sweep_is_chosen_in_proportion_to_its_evidence():
    log_evidence = np.log([0.2, 0.5, 0.3])
    # Evidence is small or large as data go: only ratios count.
    chosen = np.asarray(chosen_sweeps([0.0, -3.0, 7.0], log_evidence - 2000.0))
    counts = np.bincount(chosen, minlength=3)
    assert stats.chisquare(counts, 4000 * np.exp(log_evidence)).pvalue > P_MIN
    # Control: the density of the draw is no part of it.
    assert stats.chisquare(counts, 4000 * np.full(3, 1 / 3)).pvalue < P_MIN


@pytest.mark.parametrize("log_evidence", [[5.0, 0.0, 9.0], [np.nan, 0.0, 9.0], [-np.inf, -np.inf, 9.0]])
def test_a_sweep_without_a_usable_draw_is_not_chosen(log_evidence):
    finite = (True, True, False)
    chosen = np.asarray(chosen_sweeps([-np.inf, -1.0, 1.0], log_evidence, finite))
    np.testing.assert_array_equal(chosen, 1)
    # If none is usable some index comes out all the same.
    assert np.all(np.isin(chosen_sweeps([-np.inf] * 3, log_evidence, finite), [0, 1, 2]))
