r"""The posterior of all diffusion sites of a model at every noise level, as one flat vector. Pure JAX.

Level targets are `pi_t`, proportional to `p_t(x) G_t(x)`, with `G = L` at `t_min`, the last level.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_rtk._custom_types import Count, Scalar
from numpyro_rtk._moves._elements import Elements, ONE
from numpyro_rtk._reverse._base import AbstractInnerKernel
from numpyro_rtk._smc._point import Point, SiteLaw
from numpyro_rtk._smc._twist import evaluate_twist, LevelError, log_likelihood, sum_observations, Terms


class Floor(NamedTuple):
    """What stands for parts of the likelihood at a denoised point where they are impossible."""

    other: Scalar
    """For the log probability of what is tempered: the least that was met at a possible prior draw, of any
    element.
    """
    gaussian: Scalar
    """For the twist of what is integrated as Gaussian, where its mean or scale is not a number: the log of
    its mean density at prior draws, the least of any element.
    """

    @classmethod
    def of(cls, terms: Terms, elements: Elements = ONE) -> "Floor":
        """From the terms of prior draws, each with an axis of draws."""
        gaussian = terms.log_normalizer - 0.5 * sum_observations(elements, terms.whitened**2)
        gaussian = jnp.where(jnp.isfinite(gaussian), gaussian, -jnp.inf)
        mean = jax.scipy.special.logsumexp(gaussian, axis=0) - jnp.log(float(gaussian.shape[0]))
        return cls(jnp.min(jnp.where(jnp.isfinite(terms.other), terms.other, jnp.inf)), jnp.min(mean))


class Likelihoods(NamedTuple):
    """The likelihood of a flat vector of all sites, and what its twists need besides."""

    terms: Callable[[Array], Terms]
    """The log likelihood, split as twists above `t_min` need it."""
    floor: Floor
    """What stands for it above `t_min` where a denoised point is impossible."""
    center: Array
    """Where twists are linearised for the mass of gradient moves: a point of the prior's bulk, shape
    `(dim,)`. It must not depend on the draw."""
    elements: Elements = ONE
    """Coordinates whose likelihoods are independent of all others'."""


class Posterior:
    """The level targets.

    Args:
        sites: Laws of the sites, in the order of the flat vector.
        likelihoods: The likelihood of a flat vector.
        kernel: Reverse kernel of the reverse transitions.
        log_beta: Powers of what twists temper, shape `(levels,)`, 0 at the last level.
        jacobian: Whether gradients of twists go through the denoiser (one vector-Jacobian product an
            evaluation) rather than use the mean slope of each coordinate.
    """

    def __init__(
        self,
        sites: tuple[SiteLaw, ...],
        likelihoods: Likelihoods,
        kernel: AbstractInnerKernel,
        log_beta: Array,
        *,
        jacobian: bool = False,
    ) -> None:
        self.sites, self.likelihoods, self.kernel = sites, likelihoods, kernel
        self.log_beta, self.jacobian = log_beta, jacobian
        self.elements = likelihoods.elements
        self.num_levels = sites[0].grid.num_levels
        self.last = self.num_levels - 1
        self.dim = sum(site.size for site in sites)
        self.dtype = sites[0].grid.t.dtype
        self.blocks = tuple((site.batch_size, site.event_size) for site in sites)
        self.has_energy = all(site.score_fn.has_energy for site in sites)
        self.a = self._per_coordinate(lambda site: site.grid.total_a)
        self.v = self._per_coordinate(lambda site: site.grid.total_v)
        self.mean_square = self._by_coordinate(lambda site: site.pilot.mean_square)
        self.curvature = self._by_coordinate(lambda site: site.pilot.curvature)
        # d xhat / d x = Cov(x_0 | x_t) a / v on average; the identity at t_min.
        positive = self.v > 0
        slope = self.a * self.mean_square / jnp.where(positive, self.v, 1.0)
        self.denoiser_slope = jnp.where(positive, slope, 1.0)

    def with_powers(self, log_beta: Array) -> "Posterior":
        """The same with other powers."""
        return Posterior(self.sites, self.likelihoods, self.kernel, log_beta, jacobian=self.jacobian)

    @property
    def element_dim(self) -> float:
        """Coordinates of an element, on average."""
        return self.dim / self.elements.count

    def _per_coordinate(self, get: Callable[[SiteLaw], Array]) -> Array:
        return jnp.concatenate(
            [jnp.repeat(get(site)[:, None], site.size, axis=1) for site in self.sites], axis=1
        )

    def _by_coordinate(self, get: Callable[[SiteLaw], Array]) -> Array:
        """From `(levels, *event)` per site to `(levels, dim)`."""
        parts = [
            jnp.tile(get(site).reshape(self.num_levels, -1), (1, site.batch_size)) for site in self.sites
        ]
        return jnp.concatenate(parts, axis=1)

    def events(self, x: Array) -> list[Array]:
        """The flat vector as one array `(batch_size, *event)` per site."""
        parts, start = [], 0
        for site in self.sites:
            parts.append(x[start : start + site.size].reshape(site.batch_size, *site.event_shape))
            start += site.size
        return parts

    def flat(self, parts: list[Array]) -> Array:
        """Inverse of `events`."""
        return jnp.concatenate([jnp.ravel(part) for part in parts])

    def error(self, level: Count) -> LevelError:
        """The measured denoising error at a level."""
        residuals = [site.pilot.residuals[level] for site in self.sites]
        flat = tuple(
            r.reshape(r.shape[0], site.event_size) for r, site in zip(residuals, self.sites, strict=True)
        )
        return LevelError(flat, self.mean_square[level])

    # Evaluations.

    def scores(self, level: Count, x: Array) -> tuple[Array, Array]:
        """Scores of all sites, and their energy, by element, where all know it."""
        scores, energy = [], jnp.zeros(self.elements.shape, self.dtype)
        for i, (site, part) in enumerate(zip(self.sites, self.events(x), strict=True)):
            t, model = site.grid.t[level], site.score_fn
            if self.has_energy:
                energies, score = model.each_with_energy(part, t)
                energy += self.elements.sum_events(i, energies)
            else:
                score = model.each(part, t)
            scores.append(score)
        return self.flat(scores), energy

    def evaluate(self, level: Count, x: Array) -> Point:
        """One evaluation of every prior's score at `x`, and the twist there."""
        if not self.jacobian:
            return self.with_twist(level, x, *self.scores(level, x))
        score, pullback, energy = jax.vjp(lambda x: self.scores(level, x), x, has_aux=True)
        point = self._with_twist(level, x, score, energy)
        (through,) = pullback(self.v[level] * point.twist_score)
        return point._replace(twist_score=(point.twist_score + through) / self.a[level])

    def at_data(self, x: Array) -> Point:
        """One evaluation at the last level, where the twist is the model's own likelihood."""
        score, energy = self.scores(jnp.asarray(self.last), x)

        def likelihood(x: Array) -> tuple[Scalar, Array]:
            value = log_likelihood(self.likelihoods.terms(x), self.elements)
            return jnp.sum(value), value

        gradient, value = jax.grad(likelihood, has_aux=True)(x)
        return Point(x, score, energy, _no_nan(value), gradient, jnp.zeros_like(value))

    def with_twist(self, level: Count, x: Array, score: Array, energy: Array) -> Point:
        """The twist at a point whose score is known, with the gradient by the denoiser's mean slope.

        No evaluation.
        """
        point = self._with_twist(level, x, score, energy)
        return point._replace(twist_score=self.denoiser_slope[level] * point.twist_score)

    def _with_twist(self, level: Count, x: Array, score: Array, energy: Array) -> Point:
        """The twist, with the gradient by the denoised point."""
        prediction = (x + self.v[level] * score) / self.a[level]

        def terms(x: Array) -> Terms:
            # A twist above `t_min` must be positive, or a path whose denoised value is impossible would weigh
            # infinitely much.
            split = self.likelihoods.terms(x)
            impossible = (level < self.last) & ~(split.other > -jnp.inf)
            return split._replace(other=jnp.where(impossible, self.likelihoods.floor.other, split.other))

        power = jnp.exp(self.log_beta[level])
        error, elements = self.error(level), self.elements
        twist = evaluate_twist(terms, prediction, error, power, self.blocks, elements)
        above = (level < self.last) & elements.all_finite(prediction)
        stand_in = self.likelihoods.floor.gaussian + power * twist.other
        log_value = jnp.where(above & ~jnp.isfinite(twist.log_value), stand_in, twist.log_value)
        gradient = jnp.where(elements.spread(above) & ~jnp.isfinite(twist.gradient), 0.0, twist.gradient)
        # At `t_min` it is the model's own log likelihood, whatever stands for it above.
        log_twist = jnp.where(level == self.last, twist.log_likelihood, log_value)
        return Point(x, score, energy, _no_nan(log_twist), gradient, twist.other)

    def prepared(self, level: Count, points: Point) -> Point:
        """Points from reverse transitions with the gradient that moves need: one evaluation each through the
        denoiser.
        """
        return jax.vmap(lambda x: self.evaluate(level, x))(points.x) if self.jacobian else points

    @property
    def evaluations_to_prepare(self) -> int:
        """Score evaluations of `prepared` per particle."""
        return 1 if self.jacobian else 0

    def log_prior_difference(self, here: Point, there: Point) -> Array:
        """`log p_t(there) - log p_t(here)`: exact where energies are known, otherwise by the trapezoid
        rule.
        """
        return here.energy - there.energy if self.has_energy else self._chord(here, there)

    def log_prior_difference_at_midpoint(self, level: Count, here: Point, there: Point) -> Array:
        """The same by Simpson's rule, for one more evaluation."""
        middle, _ = self.scores(level, 0.5 * (here.x + there.x))
        inner = self.elements.dot
        return (2 * self._chord(here, there) + 4 * inner(middle, there.x - here.x)) / 6

    def _chord(self, here: Point, there: Point) -> Array:
        return 0.5 * self.elements.dot(here.score + there.score, there.x - here.x)

    @property
    def uses_midpoints(self) -> bool:
        """Whether MALA moves take Simpson's rule: in few dimensions, where levels have several modes and no
        energy is known.

        The error of the trapezoid rule is of the third order in a move, and moves at every level add up; a
        network on images was not trained at midpoints.
        """
        return not self.has_energy and not self.jacobian

    @property
    def evaluations_per_mala_step(self) -> int:
        """Score evaluations of a MALA step."""
        return 2 if self.uses_midpoints else 1


def _no_nan(value: Array) -> Array:
    return jnp.where(jnp.isnan(value), -jnp.inf, value)
