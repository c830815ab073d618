"""Posteriors of mixture priors in closed form, and `Posterior` objects for them, for tests of particle
Gibbs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from scipy import stats

import numpyro_rtk as rtk
from numpyro_rtk._noising._grid import noise_grid
from numpyro_rtk._noising._terminal import standard_terminal
from numpyro_rtk._noising._times import segment_times
from numpyro_rtk._reverse._base import AbstractInnerKernel, SegmentResult
from numpyro_rtk._reverse._pilot import run_pilot
from numpyro_rtk._score._model import resolve_score, ScoreModel
from numpyro_rtk._smc._point import SiteLaw
from numpyro_rtk._smc._posterior import Floor, Likelihoods, Posterior
from numpyro_rtk._smc._twist import Terms


class Mixture(NamedTuple):
    """A Gaussian mixture."""

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray

    def at(self, alpha, sigma):
        """The law noised to a level."""
        eye = np.eye(self.means.shape[1])
        return Mixture(self.weights, alpha * self.means, alpha**2 * self.covariances + sigma**2 * eye)

    def given(self, operator, sd, y):
        """Posterior given `y ~ N(operator x, sd^2)`, and the log evidence."""
        operator, y = np.atleast_2d(operator), np.atleast_1d(y)
        noise = np.eye(y.size) * sd**2
        log_weights, means, covariances = [], [], []
        for w, m, c in zip(*self, strict=True):
            s = operator @ c @ operator.T + noise
            gain = c @ operator.T @ np.linalg.inv(s)
            log_weights.append(np.log(w) + stats.multivariate_normal.logpdf(y, operator @ m, s))
            means.append(m + gain @ (y - operator @ m))
            covariances.append(c - gain @ operator @ c)
        log_weights = np.array(log_weights)
        log_evidence = np.logaddexp.reduce(log_weights)
        return Mixture(
            np.exp(log_weights - log_evidence), np.array(means), np.array(covariances)
        ), log_evidence

    def draw(self, rng, size):
        """Exact draws."""
        component = rng.choice(self.weights.size, size, p=self.weights / self.weights.sum())
        roots = np.linalg.cholesky(self.covariances)
        return self.means[component] + np.einsum(
            "nij,nj->ni", roots[component], rng.standard_normal((size, self.means.shape[1]))
        )

    def cdf(self, direction, values):
        """Distribution function of `direction @ x`."""
        sd = np.sqrt(np.einsum("i,kij,j->k", direction, self.covariances, direction))
        return stats.norm.cdf((np.asarray(values)[..., None] - self.means @ direction) / sd) @ self.weights

    def mean(self):
        return self.weights @ self.means

    def variance(self):
        """By coordinate."""
        second = np.einsum("kii->ki", self.covariances) + self.means**2
        return self.weights @ second - self.mean() ** 2

    def score(self, schedule):
        return rtk.GaussianMixtureScore(*self, schedule)


DIRECTIONS = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]]) / np.array(
    [[1.0], [1.0], [np.sqrt(2)], [np.sqrt(2)]]
)


def p_values(draws, law, cut):
    """P-values of independent draws in the plane against a mixture.

    Kolmogorov-Smirnov in four directions, squared normal scores in each (KS is blind to small errors of
    scale), and the binomial test of the half plane `x_0 > cut`, which is a mode indicator.
    """
    draws = np.asarray(draws, np.float64)
    assert np.all(np.isfinite(draws))
    result = []
    for direction in DIRECTIONS:
        u = law.cdf(direction, draws @ direction)
        result.append(stats.kstest(u, "uniform").pvalue)
        squares = stats.norm.ppf(np.clip(u, 1e-12, 1 - 1e-12)) ** 2
        result.append(2 * stats.norm.sf(abs(squares.mean() - 1) / np.sqrt(2 / len(u))))
    above = int((draws[:, 0] > cut).sum())
    share = 1 - float(law.cdf(DIRECTIONS[0], np.array([cut]))[0])
    result.append(stats.binomtest(above, len(draws), share).pvalue)
    return np.array(result)


def make_law(
    score,
    schedule,
    shape,
    *,
    times=None,
    segments=8,
    batch_size=1,
    num_draws=256,
    draws=None,
):
    """A site's law, its levels measured from exact draws where given."""
    times = segment_times(schedule, segments) if times is None else times
    grid = noise_grid(schedule, times, jnp.result_type(float))
    if draws is None:
        draws = score.sample(jr.key(100), num_draws, grid.t[-1])
    model = resolve_score(score)
    pilot = jax.jit(lambda draws: run_pilot(jr.key(101), model, grid, draws))(draws)
    return SiteLaw(model, grid, standard_terminal(grid, shape), pilot, shape, batch_size)


def without_energy(law):
    """The same law, known by its score alone."""
    return law._replace(score_fn=ScoreModel(law.score_fn.score))


def linear_terms(operator, sd, y):
    """Terms of `y ~ N(operator x, sd^2)`."""
    operator, y, sd = jnp.asarray(operator), jnp.asarray(y), jnp.broadcast_to(jnp.asarray(sd), jnp.shape(y))

    def terms(x):
        log_normalizer = -jnp.sum(jnp.log(sd) + 0.5 * jnp.log(2 * jnp.pi))
        return Terms((y - operator @ x) / sd, log_normalizer, jnp.zeros(()))

    return terms


def tempered(terms):
    """The same likelihood, nothing of which is taken for Gaussian."""

    def all_other(x):
        whitened, log_normalizer, other, _ = terms(x)
        return Terms(jnp.zeros(0), jnp.zeros(()), log_normalizer + other - 0.5 * jnp.sum(whitened**2))

    return all_other


def constant_terms(x):
    """A likelihood that knows nothing."""
    return Terms(jnp.zeros(0), jnp.zeros(()), 0.0 * jnp.sum(x))


FLOOR, GAUSSIAN_FLOOR = -40.0, -7.0


def likelihoods_of(terms, dim, center=None):
    """A likelihood given by its terms; twists are linearised at 0 by default."""
    center = jnp.zeros(dim) if center is None else jnp.asarray(center, jnp.result_type(float))
    return Likelihoods(terms, Floor(jnp.asarray(FLOOR), jnp.asarray(GAUSSIAN_FLOOR)), center)


def with_own(terms, log_prob):
    """The same terms of a model whose own log likelihood is another one."""
    return lambda x: terms(x)._replace(log_prob=log_prob(x))


def make_posterior(law, terms, inner, log_beta=None, cls=Posterior, center=None):
    log_beta = jnp.zeros(law.grid.num_levels) if log_beta is None else jnp.asarray(log_beta)
    return cls((law,), likelihoods_of(terms, law.size, center), inner, log_beta)


class ExactReverse(AbstractInnerKernel):
    """Draws the reverse transition of a mixture prior from its closed form: an inner kernel without any
    error.
    """

    mixture: Mixture
    schedule: rtk.AbstractNoiseSchedule
    adapts_step_size = False
    needs_energy = False
    evaluations_per_segment = 0

    def default_step_size(self, precision, dim):
        del dim
        return jnp.ones_like(precision)

    def run_segment(self, key, target, entry, tuning):
        del tuning
        pick_key, noise_key = jr.split(key)
        a, v = target.segment.a, target.segment.v
        alpha, sigma = self.schedule.alpha(target.segment.s), self.schedule.sigma(target.segment.s)
        weights, means, covariances = (jnp.asarray(part, target.x_t.dtype) for part in self.mixture)
        eye = jnp.eye(means.shape[1])[None]
        means, covariances = alpha * means, alpha**2 * covariances + sigma**2 * eye
        noised = a**2 * covariances + v * eye
        residual = target.x_t[None] - a * means
        whitened = jnp.linalg.solve(noised, residual[..., None])[..., 0]
        log_weights = jnp.log(weights) - 0.5 * (
            jnp.sum(residual * whitened, -1) + jnp.linalg.slogdet(noised)[1]
        )
        k = jr.categorical(pick_key, log_weights)
        mean = means[k] + a * covariances[k] @ whitened[k]
        root = jnp.linalg.cholesky(
            covariances[k] - a**2 * covariances[k] @ jnp.linalg.solve(noised[k], covariances[k])
        )
        x = mean + root @ jr.normal(noise_key, mean.shape)
        no, zero = jnp.zeros((), bool), jnp.zeros_like(x)
        return SegmentResult(x, zero, entry, jnp.ones(()), zero, no, no)
