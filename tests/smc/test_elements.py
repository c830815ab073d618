"""Elements that share no observation have weights and accept steps of their own.

Three events of a mixture in the plane: the first and the third share an observation, the second has one of
its own. Everything that particle Gibbs knows of an element must be what it would know if there were nothing
else, and exact draws must stay exact.
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from numpyro_rtk._moves._elements import Elements
from numpyro_rtk._score._model import ScoreModel
from numpyro_rtk._smc import _conditional, _moves
from numpyro_rtk._smc._conditional import conditional_sweep, SweepTuning
from numpyro_rtk._smc._local import LocalHMC, LocalMALA
from numpyro_rtk._smc._moves import preconditioner
from numpyro_rtk._smc._point import MoveInfo
from numpyro_rtk._smc._posterior import Floor, Likelihoods, Posterior
from numpyro_rtk._smc._twist import Terms
from numpyro_rtk._smc._unconditional import unconditional_sweep
from tests.particles import ExactReverse, linear_terms, make_law, Mixture, p_values, without_energy
from tests.smc.test_sweep_exact import DATA, NUM_SEGMENTS, P_MIN, PRIOR, SCHEDULE


NUM_CHAINS = 10_000
SHARED, SHARED_SD, SHARED_Y = np.array([[0.6, 0.9, -0.8, 0.3]]), 0.3, np.array([0.15])
OWN, OWN_SD, OWN_Y = np.array([[1.0, -0.2]]), 0.35, np.array([-0.1])
CENTERS = np.array([[0.3, 0.0], [0.4, 0.1], [0.2, -0.1]])
CUT = 0.0
APART = Elements([[0, 1, 0]], [2], [0, 1], 2)
LAST = jnp.asarray(NUM_SEGMENTS)
LOG_BETA = np.linspace(-2.0, 0.0, NUM_SEGMENTS + 1)


def product(first, second):
    """The law of two independent draws, as a mixture."""
    weights = np.multiply.outer(first.weights, second.weights).ravel()
    means, covariances = [], []
    for m, c in zip(first.means, first.covariances, strict=True):
        for n, d in zip(second.means, second.covariances, strict=True):
            means.append(np.concatenate([m, n]))
            covariances.append(np.block([[c, np.zeros_like(c)], [np.zeros_like(d), d]]))
    return Mixture(weights, np.array(means), np.array(covariances))


PAIR, _ = product(PRIOR, PRIOR).given(SHARED, SHARED_SD, SHARED_Y)
SINGLE, _ = PRIOR.given(OWN, OWN_SD, OWN_Y)


def marginal(pair, start):
    part = slice(start, start + 2)
    return Mixture(pair.weights, pair.means[:, part], pair.covariances[:, part, part])


EXACT = (marginal(PAIR, 0), SINGLE, marginal(PAIR, 2))


@functools.cache
def law(batch_size):
    return make_law(DATA.score(SCHEDULE), SCHEDULE, (2,), segments=NUM_SEGMENTS, batch_size=batch_size)


def terms_of_both(twist):
    pair, single = linear_terms(SHARED, SHARED_SD, SHARED_Y), linear_terms(OWN, OWN_SD, OWN_Y)

    def terms(x):
        parts = pair(jnp.concatenate([x[:2], x[4:]])), single(x[2:4])
        if twist == "gaussian":
            whitened = jnp.concatenate([part.whitened for part in parts])
            return Terms(whitened, jnp.stack([part.log_normalizer for part in parts]), jnp.zeros(2))
        return Terms(jnp.zeros(0), jnp.zeros(2), jnp.stack([part.log_likelihood for part in parts]))

    return terms


def posterior_of(terms, centers, batch_size, elements=None, *, twist="gaussian", energy=True, jacobian=False):
    site = law(batch_size) if energy else without_energy(law(batch_size))
    given = () if elements is None else (elements if twist == "gaussian" else without_observations(elements),)
    floor = Floor(jnp.asarray(-40.0), jnp.asarray(-7.0))
    likelihoods = Likelihoods(terms, floor, jnp.asarray(centers.ravel(), jnp.result_type(float)), *given)
    kernel = ExactReverse(DATA, SCHEDULE)
    return Posterior((site,), likelihoods, kernel, jnp.asarray(LOG_BETA), jacobian=jacobian)


def without_observations(elements):
    return Elements([group.owner for group in elements.events], [2], (), elements.count)


def together(**options):
    twist = options.get("twist", "gaussian")
    return posterior_of(terms_of_both(twist), CENTERS, 3, APART, **options)


def alone(element, **options):
    """The posterior of one element by itself."""
    given = (SHARED, SHARED_SD, SHARED_Y) if element == 0 else (OWN, OWN_SD, OWN_Y)
    terms, twist = linear_terms(*given), options.get("twist", "gaussian")

    def tempered(x):
        return Terms(jnp.zeros(0), jnp.zeros(()), terms(x).log_likelihood)

    centers = CENTERS[[0, 2]] if element == 0 else CENTERS[[1]]
    return posterior_of(tempered if twist == "tempered" else terms, centers, len(centers), **options)


MASKS = np.array([[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]], bool)
X = np.array([0.4, -0.2, 0.9, 0.3, -0.7, 0.5])
PLACES = (np.array([0, 1, 4, 5]), np.array([2, 3]))


@pytest.mark.parametrize("options", [{}, {"energy": False}, {"twist": "tempered"}, {"jacobian": True}])
@pytest.mark.parametrize("level", [0, 3, NUM_SEGMENTS])
def test_a_point_is_of_each_element_what_it_is_alone(level, options):
    level, x = jnp.asarray(level), jnp.asarray(X, jnp.float32)
    both = together(**options)
    point, mass = jax.jit(lambda x: (both.evaluate(level, x), preconditioner(both, level)))(x)
    u = jnp.asarray(np.random.default_rng(0).normal(size=6), jnp.float32)
    for element, places in enumerate(PLACES):
        one = alone(element, **options)
        expected = jax.jit(functools.partial(one.evaluate, level))(x[places])
        for name in ("x", "score", "twist_score"):
            np.testing.assert_allclose(
                getattr(point, name)[places], getattr(expected, name), rtol=2e-4, atol=2e-5
            )
        for name in ("energy", "log_twist", "other"):
            np.testing.assert_allclose(
                getattr(point, name)[element], getattr(expected, name), rtol=2e-4, atol=2e-5
            )
        factor = preconditioner(one, level)
        np.testing.assert_allclose(mass.apply(u)[places], factor.apply(u[places]), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            mass.transpose(u)[places], factor.transpose(u[places]), rtol=1e-4, atol=1e-5
        )


def test_the_posterior_of_many_observations_is_of_each_element_what_it_is_alone():
    """Beyond 64 of one element no matrix is formed."""
    rng = np.random.default_rng(3)
    counts = (70, 66)
    operators = [rng.normal(size=(count, size)) for count, size in zip(counts, (4, 2), strict=True)]
    data = [rng.normal(size=count) for count in counts]
    parts = [linear_terms(operator, 2.0, y) for operator, y in zip(operators, data, strict=True)]
    owner = np.repeat([0, 1], counts)
    elements = Elements([[0, 1, 0]], [2], owner, 2)

    def terms(x):
        found = [part(x[places]) for part, places in zip(parts, PLACES, strict=True)]
        whitened = jnp.concatenate([one.whitened for one in found])
        return Terms(whitened, jnp.stack([one.log_normalizer for one in found]), jnp.zeros(2))

    both = posterior_of(terms, CENTERS, 3, elements)
    level, x = jnp.asarray(3), jnp.asarray(X, jnp.float32)
    point = jax.jit(functools.partial(both.evaluate, level))(x)
    for element, places in enumerate(PLACES):
        centers = CENTERS[[0, 2]] if element == 0 else CENTERS[[1]]
        one = posterior_of(parts[element], centers, len(centers))
        expected = jax.jit(functools.partial(one.evaluate, level))(x[places])
        # Half of the error is estimated with random vectors, which are others.
        np.testing.assert_allclose(point.log_twist[element], expected.log_twist, rtol=0.05)
        scale = np.abs(expected.twist_score).max()
        np.testing.assert_allclose(point.twist_score[places] / scale, expected.twist_score / scale, atol=0.2)


def exact_draws(seed=0):
    rng = np.random.default_rng(seed)
    pair, single = PAIR.draw(rng, NUM_CHAINS), SINGLE.draw(rng, NUM_CHAINS)
    return jnp.asarray(np.concatenate([pair[:, :2], single, pair[:, 2:]], axis=1), jnp.float32)


def p_of(draws):
    """Of each event, and of the independence of the second from the others."""
    draws = np.asarray(draws, np.float64)
    p = [p_values(draws[:, 2 * i : 2 * i + 2], exact, CUT) for i, exact in enumerate(EXACT)]
    independent = [stats.pearsonr(draws[:, i], draws[:, j]).pvalue for i in (2, 3) for j in (0, 1, 4, 5)]
    # What the first and the third share: its law is one Gaussian mixture, too.
    along = PAIR.means @ SHARED[0]
    sd = np.sqrt(np.einsum("i,kij,j->k", SHARED[0], PAIR.covariances, SHARED[0]))
    seen = draws[:, [0, 1, 4, 5]] @ SHARED[0]
    u = stats.norm.cdf((seen[:, None] - along) / sd) @ PAIR.weights
    return np.concatenate([*p, independent, [stats.kstest(u, "uniform").pvalue]])


def swept(depth, twist="gaussian", num_particles=4, num_guided_steps=1, energy=True):
    law(3)  # not while tracing

    @jax.jit
    def run(keys, x):
        posterior = together(twist=twist, energy=energy)
        tuning = SweepTuning(jnp.ones((NUM_SEGMENTS, 1)), jnp.full(NUM_SEGMENTS, 0.4))

        def one(key, x):
            point = posterior.evaluate(LAST, x)
            return conditional_sweep(key, posterior, tuning, point, depth, num_particles, num_guided_steps)

        points, info = jax.vmap(one)(keys, x)
        return points.x, info

    return run(jr.split(jr.key(1), NUM_CHAINS), exact_draws())


@pytest.mark.slow
@pytest.mark.parametrize("depth", [3, NUM_SEGMENTS + 1])
@pytest.mark.parametrize("twist", ["gaussian", "tempered"])
def test_exact_draws_stay_exact_under_sweeps(twist, depth):
    moved, info = swept(depth, twist)
    p = p_of(moved)
    assert p.min() > P_MIN, p
    # Each element changes by itself, more often than both do at once.
    changed = np.asarray(info.changed)
    assert changed.shape == (NUM_CHAINS, 2)
    both, either = changed.all(axis=1).mean(), changed.any(axis=1).mean()
    assert either - both > 0.1
    assert abs(both - changed[:, 0].mean() * changed[:, 1].mean()) < 0.03


class OfTheOther(Elements):
    """Decides about each element by the weights of the other."""

    def each(self, function, *arrays, key=None):
        if function is _conditional.forced_move:
            arrays = tuple(jnp.roll(array, 1, axis=-1) for array in arrays)
        return super().each(function, *arrays, key=key)


class Alike(Elements):
    """Resamples all elements by the ancestors of the first."""

    def each(self, function, *arrays, key=None):
        found = super().each(function, *arrays, key=key)
        return (
            jnp.broadcast_to(found[..., :1], found.shape) if function is _conditional.forced_move else found
        )


@pytest.mark.slow
@pytest.mark.parametrize("broken", [OfTheOther, Alike])
def test_sweeps_that_confuse_elements_are_caught(broken, monkeypatch):
    wrong = broken([group.owner for group in APART.events], [2], [0, 1], 2)
    monkeypatch.setitem(globals(), "APART", wrong)
    p = p_of(swept(NUM_SEGMENTS + 1)[0])
    assert p.min() < 1e-3 * P_MIN, p


def moved_locally(move, energy=True, step_size=0.7):
    law(3)

    @jax.jit
    def run(keys, x):
        posterior = together(energy=energy)
        mass = preconditioner(posterior, LAST)

        def one(key, x):
            return move(key, posterior, posterior.at_data(x), mass, jnp.asarray(step_size))

        points, info = jax.vmap(one)(keys, x)
        return points.x, info

    return run(jr.split(jr.key(2), NUM_CHAINS), exact_draws())


@pytest.mark.slow
@pytest.mark.parametrize("move", [LocalHMC(3, 2), LocalMALA(3)])
def test_exact_draws_stay_exact_under_local_moves(move):
    moved, info = moved_locally(move)
    p = p_of(moved)
    assert p.min() > P_MIN, p
    assert 0.3 < np.mean(info.accept_prob) < 0.97
    assert not np.any(info.diverging)


def test_elements_are_accepted_independently():
    """One uniform number for all would accept them together, and tie laws that are independent."""
    moved, _ = moved_locally(LocalMALA(1), step_size=1.3)
    changed = np.stack([np.any(moved != exact_draws(), axis=1, where=mask) for mask in MASKS], axis=1)
    shares = changed.mean(axis=0)
    assert np.all((shares > 0.2) & (shares < 0.9))
    error = np.sqrt(np.prod(shares * (1 - shares)) / NUM_CHAINS)
    assert abs(np.mean(changed[:, 0] & changed[:, 1]) - np.prod(shares)) < 5 * error


@pytest.mark.slow
@pytest.mark.parametrize("move", [LocalHMC(3, 2), LocalMALA(3)])
def test_local_moves_that_confuse_elements_are_caught(move, monkeypatch):
    select = _moves.select_point

    def of_the_other(elements, condition, if_true, if_false):
        return select(elements, jnp.roll(condition, 1, axis=-1), if_true, if_false)

    monkeypatch.setattr(_moves, "select_point", of_the_other)
    p = p_of(moved_locally(move, step_size=1.1)[0])
    assert p.min() < 1e-3 * P_MIN, p


@pytest.mark.slow
def test_the_evidence_of_each_element_is_its_own():
    law(3)

    @jax.jit
    def run(keys):
        posterior = together()
        tuning = SweepTuning(jnp.ones((NUM_SEGMENTS, 1)), jnp.full(NUM_SEGMENTS, 0.4))
        sweep = lambda key: unconditional_sweep(key, posterior, tuning, 16, 1, 0.7, jnp.zeros((), bool))
        return jax.vmap(sweep)(keys)[1]

    log_evidence = np.asarray(run(jr.split(jr.key(5), 4000)).log_evidence)
    exact = np.array(
        [product(PRIOR, PRIOR).given(SHARED, SHARED_SD, SHARED_Y)[1], PRIOR.given(OWN, OWN_SD, OWN_Y)[1]]
    )
    ratios = np.exp(log_evidence - exact)
    error = ratios.std(axis=0) / np.sqrt(len(ratios))
    assert np.all(np.abs(ratios.mean(axis=0) - 1) < 4 * error), (ratios.mean(axis=0), error)
    assert np.all(error < 0.02)


def test_an_element_without_a_possible_particle_keeps_its_path_and_the_other_moves(monkeypatch):
    impossible = jnp.array([True, False])

    def run(key):
        both = together(energy=False)
        terms = both.likelihoods.terms

        def broken(x):
            # Only the pinned path of the first element is possible.
            found = terms(x)
            far = jnp.abs(x[0] - X[0]) > 1e-6
            own = found.log_normalizer - 0.5 * found.whitened**2
            return found._replace(log_prob=jnp.where(impossible & far, -jnp.inf, own))

        likelihoods = both.likelihoods._replace(terms=broken)
        posterior = Posterior(both.sites, likelihoods, both.kernel, both.log_beta)
        tuning = SweepTuning(jnp.ones((NUM_SEGMENTS, 1)), jnp.full(NUM_SEGMENTS, 0.4))
        point = posterior.at_data(jnp.asarray(X, jnp.float32))
        return conditional_sweep(key, posterior, tuning, point, NUM_SEGMENTS + 1, 4, 0)

    points, info = jax.jit(jax.vmap(run))(jr.split(jr.key(0), 64))
    assert not np.any(info.changed[:, 0])
    assert np.mean(info.changed[:, 1]) > 0.5
    np.testing.assert_array_equal(points.x[:, PLACES[0]], np.broadcast_to(np.float32(X[PLACES[0]]), (64, 4)))


def test_a_score_that_fails_for_one_event_stops_its_element_alone():
    both = together(energy=False)
    (site,) = both.sites
    score = site.score_fn.score

    def broken(x, t):
        return jnp.where(x[0] > 0.95, jnp.nan, score(x, t))

    site = site._replace(score_fn=ScoreModel(broken))
    posterior = Posterior((site,), both.likelihoods, both.kernel, both.log_beta)
    x = jnp.array([-1.1, 0.5, 0.9, -0.2, -1.2, 0.4])
    mass = preconditioner(posterior, LAST)

    def one(key):
        return LocalHMC(4, 1)(key, posterior, posterior.at_data(x), mass, jnp.asarray(0.6))

    points, info = jax.jit(jax.vmap(one))(jr.split(jr.key(0), 64))
    met = np.asarray(info.diverging)
    assert 5 < met.sum() < 60
    still = np.all(np.asarray(points.x)[:, PLACES[1]] == np.asarray(x)[PLACES[1]], axis=1)
    assert np.all(still[met])
    # The other element moves all the same.
    assert np.mean(np.any(np.asarray(points.x)[met][:, PLACES[0]] != np.asarray(x)[PLACES[0]], axis=1)) > 0.8
    assert np.all(np.isfinite(points.x))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_path_that_was_too_coarse_counts_as_rejected_by_the_adaptation(shape):
    """Of one element, whatever its estimate says; the others count as they are."""
    tuning = jnp.stack([jnp.full(shape, 0.9), jnp.full(shape, 0.7)])
    unresolved = jnp.zeros((2, *shape), bool).at[(0, 1)[: 1 + len(shape)]].set(True)
    move = MoveInfo(tuning, tuning, unresolved, unresolved, jnp.array([3, 3]))
    _, info = _moves._together((jnp.zeros(2), move))
    assert info.unresolved
    np.testing.assert_allclose(info.accept_prob, 0.8, rtol=1e-6)
    np.testing.assert_allclose(info.tuning_prob, 0.8 * (1 - 1 / max(1, len(shape) * 3)), rtol=1e-6)
    assert info.num_evaluations == 6
