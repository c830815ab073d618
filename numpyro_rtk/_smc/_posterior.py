r"""The posterior of all diffusion sites of a model at every noise level, as one flat vector. Pure JAX.

Level targets are `pi_t`, proportional to `p_t(x) G_t(x)`, with `G = L` at `t_min`, the last level.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from numpyro_rtk._custom_types import Count, Flag, RandomKey, Scalar, ScoreFn
from numpyro_rtk._moves._accept import all_finite, MAX_ENERGY_DROP, select
from numpyro_rtk._moves._leapfrog import MAX_CORRECTION
from numpyro_rtk._moves._line_integral import dot
from numpyro_rtk._moves._preconditioner import Preconditioner
from numpyro_rtk._noising._grid import Levels, SegmentGrid
from numpyro_rtk._reverse._base import AbstractInnerKernel, SegmentEntry, SegmentTuning
from numpyro_rtk._reverse._markov import AbstractMarkovKernel
from numpyro_rtk._reverse._pilot import Pilot
from numpyro_rtk._reverse._segment import ReverseTransition
from numpyro_rtk._smc._twist import (
    evaluate_twist,
    LevelError,
    linearize_twist,
    Terms,
)


class SiteLaw(NamedTuple):
    """A diffusion site: `batch_size` independent events of one prior."""

    score_fn: ScoreFn
    has_energy: bool
    grid: SegmentGrid
    levels: Levels
    pilot: Pilot
    event_shape: tuple[int, ...]
    batch_size: int

    @property
    def event_size(self) -> int:
        """Coordinates of one event."""
        return math.prod(self.event_shape)

    @property
    def size(self) -> int:
        """Coordinates of the site."""
        return self.batch_size * self.event_size


class Point(NamedTuple):
    """A point at a level with all that moves need to know of it; costs one score evaluation."""

    x: Array
    """Shape `(dim,)`."""
    score: Array
    """Score of the prior at the level."""
    energy: Scalar
    """`-log p_t` up to a constant where all priors know it, otherwise 0."""
    log_twist: Scalar
    """`log G_t`."""
    twist_score: Array
    """Gradient of `log G_t`, exact at `t_min`; above, with the denoiser's Jacobian or its mean, so that it
    only proposes.
    """
    other: Scalar
    """Log probability of what the twist tempers, at the denoised point."""


class MoveInfo(NamedTuple):
    """What a move reports."""

    accept_prob: Scalar
    diverging: Flag


class SegmentInfo(NamedTuple):
    """What a reverse transition of all sites reports."""

    accept_prob: Scalar
    diverging: Flag
    failed: Flag


class Posterior:
    """The level targets and the moves on them.

    Args:
        sites: Laws of the sites, in the order of the flat vector.
        terms: The likelihood of a flat vector.
        inner: Inner kernel of the reverse transitions.
        log_beta: Powers of what twists temper, shape `(levels,)`, 0 at the last level.
        jacobian: Whether gradients of twists go through the denoiser (one vector-Jacobian product an
            evaluation) rather than use the mean slope of each coordinate.
    """

    def __init__(
        self,
        sites: tuple[SiteLaw, ...],
        terms: Callable[[Array], Terms],
        inner: AbstractInnerKernel,
        log_beta: Array,
        *,
        jacobian: bool = False,
    ) -> None:
        self.sites, self.terms, self.inner, self.log_beta, self.jacobian = (
            sites,
            terms,
            inner,
            log_beta,
            jacobian,
        )
        self.num_levels = sites[0].levels.t.shape[0]
        self.dim = sum(site.size for site in sites)
        self.dtype = sites[0].levels.t.dtype
        self.blocks = tuple((site.batch_size, site.event_size) for site in sites)
        self.has_energy = all(site.has_energy for site in sites)
        self.a = self._per_coordinate(lambda site: site.levels.a)
        self.v = self._per_coordinate(lambda site: site.levels.v)
        mean_square = self._by_coordinate(lambda site: site.pilot.mean_square)
        self.mean_square = mean_square
        self.curvature = self._by_coordinate(lambda site: site.pilot.curvature)
        # d xhat / d x = Cov(x_0 | x_t) a / v on average; the identity at t_min.
        positive = self.v > 0
        self.denoiser_slope = jnp.where(
            positive, self.a * mean_square / jnp.where(positive, self.v, 1.0), 1.0
        )

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

    def evaluate(self, level: Count, x: Array) -> Point:
        """One evaluation of every prior's score at `x`, and the twist there."""
        if not self.jacobian:
            return self.with_twist(level, x, *self.scores(level, x))
        score, pullback, energy = jax.vjp(lambda x: self.scores(level, x), x, has_aux=True)
        point = self._with_twist(level, x, score, energy)
        (through,) = pullback(self.v[level] * point.twist_score)
        return point._replace(twist_score=(point.twist_score + through) / self.a[level])

    def at_data(self, x: Array) -> Point:
        """One evaluation at the last level, where the twist is the likelihood and its gradient needs no
        denoiser.
        """

        def log_likelihood(x: Array) -> tuple[Scalar, Scalar]:
            terms = self.terms(x)
            return terms.log_likelihood, terms.other

        score, energy = self.scores(jnp.asarray(self.num_levels - 1), x)
        (value, other), gradient = jax.value_and_grad(log_likelihood, has_aux=True)(x)
        return Point(x, score, energy, jnp.where(jnp.isnan(value), -jnp.inf, value), gradient, other)

    def scores(self, level: Count, x: Array) -> tuple[Array, Scalar]:
        """Scores of all sites, and their energy where all know it."""
        scores, energy = [], jnp.zeros((), self.dtype)
        for site, part in zip(self.sites, self.events(x), strict=True):
            t = site.levels.t[level]
            if self.has_energy:
                energies, score = jax.vmap(lambda x, fn=site.score_fn, t=t: energy_and_score(fn, x, t))(part)
                energy += jnp.sum(energies)
            else:
                score = jax.vmap(lambda x, fn=site.score_fn, t=t: fn(x, t))(part)
            scores.append(score)
        return self.flat(scores), energy

    def with_twist(self, level: Count, x: Array, score: Array, energy: Scalar) -> Point:
        """The twist at a point whose score is known: no evaluation; its gradient by the mean slope of the
        denoiser.
        """
        point = self._with_twist(level, x, score, energy)
        return point._replace(twist_score=self.denoiser_slope[level] * point.twist_score)

    def _with_twist(self, level: Count, x: Array, score: Array, energy: Scalar) -> Point:
        """The same, with the gradient by the denoised point."""
        prediction = (x + self.v[level] * score) / self.a[level]

        def terms(x: Array) -> Terms:
            # Above `t_min` a twist must be positive, or a path whose denoised value is impossible would weigh
            # infinitely much.
            split = self.terms(x)
            impossible = (level < self.num_levels - 1) & ~(split.other > -jnp.inf)
            return split._replace(other=jnp.where(impossible, 0.0, split.other))

        twist = evaluate_twist(
            terms, prediction, self.error(level), jnp.exp(self.log_beta[level]), self.blocks
        )
        # At `t_min` it is the model's own log likelihood, whatever stands for it above.
        log_value = jnp.where(level == self.num_levels - 1, twist.log_likelihood, twist.log_value)
        log_twist = jnp.where(jnp.isnan(log_value), -jnp.inf, log_value)
        return Point(x, score, energy, log_twist, twist.gradient, twist.other)

    def prepared(self, level: Count, points: Point) -> Point:
        """Points from reverse transitions with the gradient that moves need: one evaluation each through the
        denoiser.
        """
        return jax.vmap(lambda x: self.evaluate(level, x))(points.x) if self.jacobian else points

    @property
    def evaluations_to_prepare(self) -> int:
        """Score evaluations of `prepared` per particle."""
        return 1 if self.jacobian else 0

    def log_prior_difference(self, here: Point, there: Point) -> Scalar:
        """`log p_t(there) - log p_t(here)`: exact where energies are known, otherwise by the trapezoid
        rule.
        """
        return here.energy - there.energy if self.has_energy else self._chord(here, there)

    def log_prior_difference_at_midpoint(self, level: Count, here: Point, there: Point) -> Scalar:
        """The same by Simpson's rule, for one more evaluation."""
        middle, _ = self.scores(level, 0.5 * (here.x + there.x))
        return (2 * self._chord(here, there) + 4 * dot(middle, there.x - here.x)) / 6

    @property
    def uses_midpoints(self) -> bool:
        """Whether guided moves take Simpson's rule: in few dimensions, where levels have several modes and no
        energy is known.

        The error of the trapezoid rule is of the third order in a move, and moves at every level add up; a
        network on images was not trained at midpoints.
        """
        return not self.has_energy and not self.jacobian

    @property
    def evaluations_per_guided_step(self) -> int:
        """Score evaluations of a guided MALA step."""
        return 2 if self.uses_midpoints else 1

    @staticmethod
    def _chord(here: Point, there: Point) -> Scalar:
        return 0.5 * dot(here.score + there.score, there.x - here.x)

    # Moves.

    def noise(self, key: RandomKey, level: Count, x: Array) -> Array:
        """From `level` to the next noisier one, `level - 1`."""
        keys = jr.split(key, len(self.sites))
        parts = []
        for key, site, part in zip(keys, self.sites, self.events(x), strict=True):
            a, v = site.grid.a[level - 1], site.grid.v[level - 1]
            parts.append(a * part + jnp.sqrt(v) * jr.normal(key, part.shape, part.dtype))
        return self.flat(parts)

    def terminal(self, key: RandomKey) -> Array:
        """Terminal noise at the noisiest level."""
        keys = jr.split(key, len(self.sites))
        parts = []
        for key, site in zip(keys, self.sites, strict=True):
            variance = site.grid.alpha_t[0] ** 2 + site.levels.sigma[0] ** 2
            parts.append(
                jnp.sqrt(variance) * jr.normal(key, (site.batch_size, *site.event_shape), self.dtype)
            )
        return self.flat(parts)

    def reverse(
        self, key: RandomKey, level: Count, point: Point, step_size: Array
    ) -> tuple[Point, SegmentInfo]:
        """Reverse transition from `level` to the next cleaner one, `level + 1`, by the inner kernel.

        `num_steps + 1` evaluations with the MALA family and the trapezoid rule.
        """
        keys = jr.split(key, len(self.sites))
        xs, scores = [], []
        accept, diverging, failed = jnp.zeros((), self.dtype), jnp.zeros((), bool), jnp.zeros((), bool)
        states = zip(keys, self.sites, self.events(point.x), self.events(point.score), strict=True)
        for i, (key, site, x, score) in enumerate(states):
            segment = jax.tree.map(lambda leaf: leaf[level], site.grid)
            tuning = SegmentTuning(step_size[i], site.pilot.curvature[level + 1])

            def one(
                key: RandomKey,
                x: Array,
                score: Array,
                site: SiteLaw = site,
                segment: Any = segment,
                tuning: Any = tuning,
            ) -> Any:
                target = ReverseTransition(
                    score_fn=site.score_fn,
                    x_t=x,
                    score_t=score,
                    s=segment.s,
                    t=segment.t,
                    a=segment.a,
                    v=segment.v,
                    sigma_s=segment.sigma_s,
                    alpha_t=segment.alpha_t,
                )
                entry = SegmentEntry(jnp.zeros_like(x), jnp.zeros((), x.dtype))
                return self.inner.run_segment(key, target, entry, tuning)

            result = jax.vmap(one)(jr.split(key, site.batch_size), x, score)
            xs.append(result.x)
            scores.append(result.score)
            accept += jnp.mean(result.accept_prob) / len(self.sites)
            diverging |= jnp.any(result.diverging)
            failed |= jnp.any(result.failed)
        x = self.flat(xs)
        if self.score_known_after_reverse and not self.has_energy:
            new = self.with_twist(level + 1, x, self.flat(scores), jnp.zeros((), self.dtype))
        else:
            new = self.evaluate(level + 1, x)
        failed |= ~all_finite(new.x, new.score)
        new = new._replace(log_twist=jnp.where(failed, -jnp.inf, new.log_twist))
        return new, SegmentInfo(accept, diverging, failed)

    @property
    def score_known_after_reverse(self) -> bool:
        """Whether the inner kernel hands back the score at its draw."""
        return isinstance(self.inner, AbstractMarkovKernel)

    @property
    def evaluations_per_reverse(self) -> int:
        """Score evaluations of one reverse transition."""
        known = self.score_known_after_reverse and not self.has_energy
        return self.inner.evaluations_per_segment + (0 if known else 1)

    def preconditioner(self, level: Count, reference: Array) -> Preconditioner:
        """Mass of the gradient moves at a level: curvature of the prior, and of the twist linearised at
        `reference`.
        """
        slope = self.denoiser_slope[level]
        linear = linearize_twist(self.terms, reference, self.error(level), self.blocks)
        scale = 1 / jnp.sqrt(self.curvature[level] + slope**2 * linear.diagonal)
        rows = linear.jacobian * (slope * scale)[None]
        if rows.shape[0] == 0:
            return Preconditioner(scale, rows, jnp.zeros(0, self.dtype))
        # (I + V^T V)^(-1/2) = I + sum_k ((1 + s_k^2)^(-1/2) - 1) w_k w_k^T over singular vectors of V.
        values, vectors = jnp.linalg.eigh(rows @ rows.T)
        values = jnp.maximum(values, 0.0)
        norms = jnp.sqrt(jnp.maximum(values, 1e-12))
        basis = (vectors.T @ rows) / norms[:, None]
        gain = jnp.where(values > 1e-10, 1 / jnp.sqrt(1 + values) - 1, 0.0)
        return Preconditioner(scale, basis, gain)

    def mala(
        self,
        key: RandomKey,
        level: Count,
        point: Point,
        preconditioner: Preconditioner,
        step_size: Scalar,
        *,
        guided: bool = False,
    ) -> tuple[Point, MoveInfo]:
        """One MALA step on `pi_t`: reversible for it, up to the error of the trapezoid rule, or of Simpson's
        in a `guided` move.

        One evaluation; `evaluations_per_guided_step` in a guided move.
        """
        noise_key, accept_key = jr.split(key)
        noise = jr.normal(noise_key, point.x.shape, self.dtype)
        force = preconditioner.transpose(point.score + point.twist_score)
        move = step_size * force + jnp.sqrt(2 * step_size) * noise
        proposal = self.evaluate(level, point.x + preconditioner.apply(move))
        new_force = preconditioner.transpose(proposal.score + proposal.twist_score)
        backward = (move + step_size * new_force) / jnp.sqrt(2 * step_size)
        if guided and self.uses_midpoints:
            prior_difference = self.log_prior_difference_at_midpoint(level, point, proposal)
        else:
            prior_difference = self.log_prior_difference(point, proposal)
        log_ratio = prior_difference + proposal.log_twist - point.log_twist
        log_ratio += 0.5 * dot(noise - backward, noise + backward)
        return self._accept(accept_key, point, proposal, log_ratio)

    def _accept(
        self, key: RandomKey, point: Point, proposal: Point, log_ratio: Scalar
    ) -> tuple[Point, MoveInfo]:
        finite = all_finite(proposal.x, proposal.score, proposal.energy, proposal.twist_score) & (
            log_ratio < jnp.inf
        )
        accept = finite & (-jr.exponential(key, dtype=log_ratio.dtype) < log_ratio)
        accept_prob = jnp.where(finite, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
        # A likelihood of zero, or nearly (whose gradient may overflow), is a rejection and not a divergence.
        possible = proposal.log_twist > point.log_twist - MAX_ENERGY_DROP
        return select(accept, proposal, point), MoveInfo(accept_prob, ~finite & possible)

    def mala_steps(
        self,
        key: RandomKey,
        level: Count,
        point: Point,
        preconditioner: Preconditioner,
        step_size: Scalar,
        num_steps: int,
        *,
        guided: bool = False,
    ) -> tuple[Point, MoveInfo]:
        """`num_steps` MALA steps; reversible as one move."""
        if num_steps == 0:
            return point, MoveInfo(jnp.ones((), self.dtype), jnp.zeros((), bool))

        def body(point: Point, key: RandomKey) -> tuple[Point, MoveInfo]:
            return self.mala(key, level, point, preconditioner, step_size, guided=guided)

        point, info = jax.lax.scan(body, point, jr.split(key, num_steps))
        return point, MoveInfo(jnp.mean(info.accept_prob), jnp.any(info.diverging))

    def hmc(
        self, key: RandomKey, point: Point, preconditioner: Preconditioner, step_size: Scalar, num_steps: int
    ) -> tuple[Point, MoveInfo]:
        """One HMC trajectory on `p_0 L` (the last level) of `num_steps` leapfrog steps, an even number, one
        evaluation each.

        The prior's share of the energy error is the line integral of the score through the points of the
        path, by the rule that is exact where path and score are quadratic over two steps: fourth order in the
        step size at no extra evaluation (the trapezoid rule would be of second order, as the leapfrog error
        that it should correct; see `numpyro_rtk._moves._leapfrog`).
        """
        momentum_key, jitter_key, accept_key = jr.split(key, 3)
        momentum = jr.normal(momentum_key, point.x.shape, self.dtype)
        # Resonances: periodic directions must not come back to where they were.
        epsilon = step_size * jr.uniform(jitter_key, (), self.dtype, 0.6, 1.2)

        def leapfrog(carry: Any, is_second: Flag) -> tuple[Any, None]:
            before, here, momentum, gained, corrected = carry
            momentum = momentum + 0.5 * epsilon * preconditioner.transpose(here.score + here.twist_score)
            x = here.x + epsilon * preconditioner.apply(momentum)
            new = self.at_data(x)
            momentum = momentum + 0.5 * epsilon * preconditioner.transpose(new.score + new.twist_score)
            integral = path_integral(before, here, new)
            chords = self._chord(before, here) + self._chord(here, new)
            gained += jnp.where(is_second, integral, 0.0)
            corrected += jnp.where(is_second, jnp.abs(integral - chords), 0.0)
            return (here, new, momentum, gained, corrected), None

        zero = jnp.zeros((), self.dtype)
        (_, end, end_momentum, gained, corrected), _ = jax.lax.scan(
            leapfrog, (point, point, momentum, zero, zero), jnp.arange(num_steps) % 2 == 1
        )
        # A path too coarse to know its energy error is rejected, the same in both directions.
        gained = jnp.where(corrected < MAX_CORRECTION, gained, -jnp.inf)
        log_ratio = point.energy - end.energy if self.has_energy else gained
        log_ratio += end.log_twist - point.log_twist
        log_ratio += 0.5 * dot(momentum - end_momentum, momentum + end_momentum)
        return self._accept(accept_key, point, end, log_ratio)


def energy_and_score(score_fn: Any, x: Array, t: Scalar) -> tuple[Scalar, Array]:
    """Both from a score callable with energies, in one evaluation where it offers that."""
    both = getattr(score_fn, "energy_and_score", None)
    return both(x, t) if both is not None else (score_fn.energy(x, t), score_fn(x, t))


def path_integral(start: Any, middle: Any, end: Any) -> Scalar:
    r"""Line integral of the score through three points of a path; exactly antisymmetric under its reversal.

    With `x(u) = x_m + u b + u^2 c` and `score(u) = g_m + u g_b + u^2 g_c` through the three points (`u` from
    -1 to 1), `int score . dx = 2 g_m . b + (2 g_c . b + 4 g_b . c) / 3`.
    """
    b, c = 0.5 * (end.x - start.x), 0.5 * ((end.x - middle.x) - (middle.x - start.x))
    gb = 0.5 * (end.score - start.score)
    gc = 0.5 * ((end.score - middle.score) - (middle.score - start.score))
    return 2 * dot(middle.score, b) + (2 * dot(gc, b) + 4 * dot(gb, c)) / 3
