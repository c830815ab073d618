"""Local moves of particle Gibbs at `t_min`: gradient moves on `p_0 L`, within a mode."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp

from numpyro_rtk._custom_types import RandomKey, Scalar
from numpyro_rtk._moves._accept import LINE_INTEGRAL_ACCEPT_PROB, MIDPOINT_ACCEPT_PROB
from numpyro_rtk._moves._leapfrog import MIN_STEPS
from numpyro_rtk._moves._preconditioner import Preconditioner
from numpyro_rtk._reverse._base import check_num_steps, check_positive
from numpyro_rtk._smc._moves import hmc_trajectories, mala_steps
from numpyro_rtk._smc._point import MoveInfo, Point
from numpyro_rtk._smc._posterior import Posterior


class AbstractLocalMove(eqx.Module):
    """A move on `p_0 L`."""

    step_size: eqx.AbstractVar[Any]
    line_integral_accept_prob: eqx.AbstractClassVar[float]
    """Acceptance that warmup aims at where the energy error is a line integral of scores: there the law is
    right to about 1 %.
    """

    @abc.abstractmethod
    def num_evaluations(self, posterior: Posterior) -> int:
        """Score evaluations per iteration, for one event of every site, at most."""

    @abc.abstractmethod
    def __call__(
        self,
        key: RandomKey,
        posterior: Posterior,
        point: Point,
        mass: Preconditioner,
        step_size: Scalar,
    ) -> tuple[Point, MoveInfo]:
        """Move a draw evaluated at the last level."""


class LocalMALA(AbstractLocalMove):
    """MALA on `p_0 L`, preconditioned by the curvature of prior and linearised likelihood.

    *Law.* Leaves `p_0 L` invariant: exactly where the score has an energy, otherwise up to the error of
    Simpson's rule, of fifth order in the length of a move, or of the trapezoid rule, of third order, where
    guided moves take the denoiser's Jacobian, as they do by default above 100 dimensions.
    `benchmarks/bias.py` measures it.

    *Cost.* `num_steps` score evaluations an iteration; twice as many with Simpson's rule.

    Args:
        num_steps: Steps per iteration.
        step_size: Relative to the preconditioner; `None`: adapted in warmup.
    """

    num_steps: int = eqx.field(static=True, default=4)
    step_size: Any = None
    line_integral_accept_prob: ClassVar[float] = MIDPOINT_ACCEPT_PROB

    def __check_init__(self) -> None:
        check_num_steps("LocalMALA", self.num_steps)
        check_positive("LocalMALA", "step_size", self.step_size, scalar=True)

    def num_evaluations(self, posterior: Posterior) -> int:
        return self.num_steps * posterior.evaluations_per_mala_step

    def __call__(
        self,
        key: RandomKey,
        posterior: Posterior,
        point: Point,
        mass: Preconditioner,
        step_size: Scalar,
    ) -> tuple[Point, MoveInfo]:
        level = jnp.asarray(posterior.last)
        return mala_steps(key, posterior, level, point, mass, step_size, self.num_steps)


class LocalHMC(AbstractLocalMove):
    """HMC on `p_0 L`, preconditioned as `LocalMALA`, whose energy error is accumulated along its own path.

    *Law.* Leaves `p_0 L` invariant: exactly where the score has an energy, otherwise up to the error of the
    path's line integral, of fourth order in the step size (third-order changes of the score along a step);
    exact for Gaussian priors.

    *Cost.* `num_steps * num_trajectories` score evaluations an iteration.

    Args:
        num_steps: Leapfrog steps per trajectory.
        num_trajectories: Trajectories per iteration, each with its own accept step.
        step_size: Relative to the preconditioner, jittered by a uniform factor from 0.6 to 1.2; `None`:
            adapted in warmup.
    """

    num_steps: int = eqx.field(static=True, default=10)
    num_trajectories: int = eqx.field(static=True, default=2)
    step_size: Any = None
    line_integral_accept_prob: ClassVar[float] = LINE_INTEGRAL_ACCEPT_PROB

    def __check_init__(self) -> None:
        check_num_steps("LocalHMC", self.num_steps, MIN_STEPS)
        if (
            isinstance(self.num_trajectories, bool)
            or not isinstance(self.num_trajectories, int)
            or self.num_trajectories < 1
        ):
            raise ValueError(
                f"`LocalHMC(num_trajectories=...)` must be an integer of at least 1, got "
                f"{self.num_trajectories!r}."
            )
        check_positive("LocalHMC", "step_size", self.step_size, scalar=True)

    def num_evaluations(self, posterior: Posterior) -> int:
        del posterior
        return self.num_steps * self.num_trajectories

    def __call__(
        self,
        key: RandomKey,
        posterior: Posterior,
        point: Point,
        mass: Preconditioner,
        step_size: Scalar,
    ) -> tuple[Point, MoveInfo]:
        return hmc_trajectories(key, posterior, point, mass, step_size, self.num_steps, self.num_trajectories)
