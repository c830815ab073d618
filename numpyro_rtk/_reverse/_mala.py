"""MALA: Langevin proposals on the segment target with an accept step."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp

from numpyro_rtk._custom_types import Event, RandomKey, Scalar
from numpyro_rtk._moves._langevin import langevin_move, log_langevin_ratio
from numpyro_rtk._moves._line_integral import AbstractEnergyDifference, dot, Trapezoid
from numpyro_rtk._reverse._base import check_num_steps, check_positive, SegmentTuning
from numpyro_rtk._reverse._markov import AbstractMarkovKernel, check_start, Start
from numpyro_rtk._reverse._segment import Evaluation, ReverseTransition


def check_energy_difference(owner: str, value: Any) -> None:
    """Raise unless `value` is an energy difference."""
    if not isinstance(value, AbstractEnergyDifference):
        hint = " Did you forget the parentheses?" if isinstance(value, type) else ""
        raise TypeError(
            f"`{owner}(energy_difference=...)` must be one of Trapezoid(), Simpson(), "
            f"GaussLegendre(num_nodes), "
            f"ExactEnergy(); got {value!r}.{hint}"
        )


class MALA(AbstractMarkovKernel):
    r"""RTK-MALA: `z' ~ N(z + h grad, 2 h I)`, Metropolis-Hastings accepted.

    *Law.* Leaves the segment target invariant exactly with `ExactEnergy`; with an energy difference
    estimated from scores, up to the error of that rule (`Trapezoid`: third order in the size of a move,
    and none for a Gaussian `p_s`).

    *Cost.* `num_steps + 1` score evaluations a segment, plus `num_steps` times the extra evaluations of
    the energy difference.

    Args:
        num_steps: Steps per segment.
        step_size: `h`, in units of `x^2`: a scalar, or one value per segment in the order of the grid.
            `None`: adapted in warmup; until then `dim^(-1/3) / (a^2/v + curvature)`.
        energy_difference: How the accept step gets its energy difference.
        start: `"gaussian"`: the Gaussian approximation of the segment, with the exact conditional mean and
            the variance `1 / (a^2/v + curvature)` (DDPM's variance until warmup has learnt the curvature).
            `"paper"`: proportional to `exp(-L |z|^2 - |x_t - a z|^2 / (2 v))` with `L` the
            curvature. `"noise"`: `N(x_t / a, v / a^2 I)`.
        max_move: `r`: a proposal farther than this from the current point is rejected; no limit if `None`.
        max_radius: `R`: a proposal outside this ball around the origin is rejected; no limit if `None`.

    Raises:
        ValueError: for a non-positive step size, radius or number of steps, or an unknown start.
        TypeError: if `energy_difference` is not an energy difference.

    References:
        Huang et al. (2024), arXiv 2405.16387, Algorithms 1 and 2 (projection radii `r`, `R`).
        Roberts and Rosenthal (1998) for the scaling `dim^(-1/3)`.
    """

    num_steps: int = eqx.field(static=True, default=8)
    step_size: Any = None
    energy_difference: AbstractEnergyDifference = eqx.field(default_factory=Trapezoid)
    start: Start = eqx.field(static=True, default="gaussian")
    max_move: float | None = None
    max_radius: float | None = None
    adapts_step_size: ClassVar[bool] = True

    def __check_init__(self) -> None:
        check_num_steps("MALA", self.num_steps)
        check_positive("MALA", "step_size", self.step_size)
        check_positive("MALA", "max_move", self.max_move, scalar=True)
        check_positive("MALA", "max_radius", self.max_radius, scalar=True)
        check_energy_difference("MALA", self.energy_difference)
        check_start("MALA", self.start)

    @property
    def needs_energy(self) -> bool:
        return self.energy_difference.needs_energy

    @property
    def extra_evaluations_per_step(self) -> int:
        return self.energy_difference.num_extra_evaluations

    def default_step_size(self, precision: Scalar, dim: int) -> Scalar:
        return dim ** (-1 / 3) / precision

    def init_auxiliary(self, key: RandomKey, x: Event) -> Any:
        del key, x
        return ()

    def propose(
        self,
        key: RandomKey,
        target: ReverseTransition,
        current: Evaluation,
        auxiliary: Any,
        tuning: SegmentTuning,
    ) -> tuple[Event, Any]:
        force = target.score(current.x, current.score)
        return current.x + langevin_move(key, force, tuning.step_size), auxiliary

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
        move = proposal.x - current.x
        forces = target.score(current.x, current.score), target.score(proposal.x, proposal.score)
        log_proposals = log_langevin_ratio(move, *forces, tuning.step_size)
        log_ratio = prior_difference + target.gaussian_difference(current.x, proposal.x) + log_proposals
        # Inside the ball the chain is reversible for the target restricted to the ball.
        if self.max_move is not None:
            log_ratio = jnp.where(dot(move, move) > self.max_move**2, -jnp.inf, log_ratio)
        if self.max_radius is not None:
            log_ratio = jnp.where(dot(proposal.x, proposal.x) > self.max_radius**2, -jnp.inf, log_ratio)
        return log_ratio
