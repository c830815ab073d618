"""MALA whose proposals are exact for a Gaussian reference of the segment."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from numpyro_rtk._custom_types import Event, RandomKey, Scalar
from numpyro_rtk._moves._line_integral import AbstractEnergyDifference, dot, Trapezoid
from numpyro_rtk._reverse._base import check_num_steps, check_positive, SegmentTuning
from numpyro_rtk._reverse._mala import check_energy_difference
from numpyro_rtk._reverse._markov import AbstractMarkovKernel, check_start, Start
from numpyro_rtk._reverse._segment import Evaluation, ReverseTransition


class PreconditionedMALA(AbstractMarkovKernel):
    r"""MALA preconditioned by the Gaussian reference `N(m, c)` of the segment, `c` diagonal.

    `m = E[x_s | x_t] = (x_t + v score_t) / a` is the exact conditional mean (Tweedie's formula) and
    `1 / c = a^2 / v + curvature`, with the curvature `E score_s^2` of `-log p_s` by coordinate learnt in
    warmup. Neither depends on the state of the chain. With `g` the gradient of the log ratio of target
    to reference, the proposal solves the Langevin equation with `g` frozen and its linear part exact:
    `z' = m + e (z - m) + (1 - e) c g(z) + sqrt((1 - e^2) c) xi`, `e = exp(-h)`. As `h` grows it becomes an
    independent draw from the shifted reference; where `p_s` is close to Gaussian over one segment, `g` is
    close to 0 and proposals are accepted nearly always.

    *Law.* As `MALA`: exact with `ExactEnergy`, otherwise up to the error of the energy difference.

    *Cost.* `num_steps + 1` score evaluations a segment, plus `num_steps` times the extra evaluations of
    the energy difference.

    Args:
        num_steps: Steps per segment.
        step_size: `h`, dimensionless: a scalar, or one value per segment in the order of the grid. `None`:
            adapted in warmup, at most `max_step_size`; until then `dim^(-1/3)`.
        energy_difference: How the accept step gets its energy difference. With `Trapezoid` keep moves short
            (see `max_step_size`); with `ExactEnergy`, or `Simpson` in few dimensions, they may be as long as
            they like.
        start: As in `MALA`; `"gaussian"` starts from the reference itself.
        max_step_size: Largest adapted `h`. Proposals are accepted nearly always, so that it is this, and not
            the acceptance probability, that limits most segments; the longer the moves, the larger the error
            of an estimated energy difference. At 0.5 a proposal keeps 61 % of its distance to the mean; at 4
            it is an independent draw.

    Raises:
        ValueError: for a non-positive step size or number of steps, or an unknown start.
        TypeError: if `energy_difference` is not an energy difference.

    References:
        Cotter, Roberts, Stuart and White (2013), *MCMC methods for functions*, for Langevin proposals
        that are exact for a Gaussian reference; here with an exponential integrator in place of the
        Crank-Nicolson one. Bao et al. (2022), arXiv 2201.06503, for the optimal isotropic variance.
    """

    num_steps: int = eqx.field(static=True, default=2)
    step_size: Any = None
    energy_difference: AbstractEnergyDifference = eqx.field(default_factory=Trapezoid)
    start: Start = eqx.field(static=True, default="gaussian")
    max_step_size: float = eqx.field(static=True, default=0.5)
    adapts_step_size: ClassVar[bool] = True

    def __check_init__(self) -> None:
        check_num_steps("PreconditionedMALA", self.num_steps)
        check_positive("PreconditionedMALA", "step_size", self.step_size)
        check_positive("PreconditionedMALA", "max_step_size", self.max_step_size, scalar=True)
        check_energy_difference("PreconditionedMALA", self.energy_difference)
        check_start("PreconditionedMALA", self.start)

    @property
    def needs_energy(self) -> bool:
        return self.energy_difference.needs_energy

    @property
    def extra_evaluations_per_step(self) -> int:
        return self.energy_difference.num_extra_evaluations

    def default_step_size(self, precision: Scalar, dim: int) -> Scalar:
        return jnp.full_like(precision, dim ** (-1 / 3))

    def init_auxiliary(self, key: RandomKey, x: Event) -> Any:
        del key, x
        return ()

    def _residual(
        self, target: ReverseTransition, point: Evaluation, tuning: SegmentTuning
    ) -> tuple[Event, Event]:
        """`z - m` and the gradient `g` of log target minus log reference at `z`."""
        offset = point.x - target.mean
        return offset, point.score + tuning.curvature * offset + target.gaussian_score(target.mean)

    def propose(
        self,
        key: RandomKey,
        target: ReverseTransition,
        current: Evaluation,
        auxiliary: Any,
        tuning: SegmentTuning,
    ) -> tuple[Event, Any]:
        variance = 1 / (target.precision + tuning.curvature)
        offset, gradient = self._residual(target, current, tuning)
        kept = jnp.exp(-tuning.step_size)
        noise = jr.normal(key, current.x.shape, current.x.dtype)
        scale = jnp.sqrt(-jnp.expm1(-2 * tuning.step_size) * variance)
        drift = kept * offset - jnp.expm1(-tuning.step_size) * variance * gradient
        return target.mean + drift + scale * noise, auxiliary

    def log_accept_ratio(
        self, target: ReverseTransition, current: Evaluation, proposal: Evaluation, tuning: SegmentTuning
    ) -> Scalar:
        prior_difference = self.energy_difference(
            target.prior_score,
            current.x,
            proposal.x,
            current.score,
            proposal.score,
            current.energy,
            proposal.energy,
        )
        variance = 1 / (target.precision + tuning.curvature)
        kept, rest = jnp.exp(-tuning.step_size), -jnp.expm1(-tuning.step_size)
        u, g = self._residual(target, current, tuning)
        new_u, new_g = self._residual(target, proposal, tuning)
        # log target minus log reference, from z to z'; its linear part is exact.
        difference = prior_difference + dot(
            new_u - u, 0.5 * tuning.curvature * (u + new_u) + target.gaussian_score(target.mean)
        )
        # The reference and the quadratic parts of the proposals cancel: both are the same
        # Ornstein-Uhlenbeck step, reversible for the reference. This is what is left of the drifts.
        drifts = dot(new_g, u - kept * new_u) - dot(g, new_u - kept * u)
        squares = 0.5 * rest * dot(variance * (g - new_g), g + new_g)
        return difference + (drifts + squares) / (1 + kept)
