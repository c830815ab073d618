"""Unadjusted Langevin: MALA's proposal without the accept step."""

from typing import Any, ClassVar

import equinox as eqx

from numpyro_rtk._custom_types import Event, RandomKey, Scalar
from numpyro_rtk._moves._langevin import langevin_move
from numpyro_rtk._reverse._base import check_num_steps, check_positive, SegmentTuning
from numpyro_rtk._reverse._markov import AbstractMarkovKernel, check_start, Start
from numpyro_rtk._reverse._segment import Evaluation, ReverseTransition


class ULA(AbstractMarkovKernel):
    r"""Unadjusted Langevin algorithm: `z' = z + h grad + sqrt(2 h) xi`.

    *Law.* Biased, first order in `h`: for a Gaussian target of precision `P` the stationary variance is
    `1 / (P (1 - h P / 2))` instead of `1 / P`. Unstable for `h P >= 2`; a step that
    lowers the log target by more than 1000 is reported as `diverging`.

    *Cost.* `num_steps + 1` score evaluations a segment.

    Args:
        num_steps: Steps per segment.
        step_size: `h`, in units of `x^2`: a scalar, or one value per segment. `None`: the rule
            `0.1 / (a^2/v + curvature)`, which makes the variance 5 % too large, with the mean curvature
            `E |score_s|^2 / dim` of `-log p_s` learnt in warmup (before: its bound `1 / sigma_s^2`).
        start: As in `MALA`.

    Raises:
        ValueError: for a non-positive step size or number of steps, or an unknown start.

    References:
        Roberts and Tweedie (1996), *Exponential convergence of Langevin distributions and their
        discrete approximations*. Huang et al. (2024), arXiv 2405.16387, for its use in a segment.
    """

    num_steps: int = eqx.field(static=True, default=16)
    step_size: Any = None
    start: Start = eqx.field(static=True, default="gaussian")
    adapts_step_size: ClassVar[bool] = False
    needs_energy: ClassVar[bool] = False

    def __check_init__(self) -> None:
        check_num_steps("ULA", self.num_steps)
        check_positive("ULA", "step_size", self.step_size)
        check_start("ULA", self.start)

    def default_step_size(self, precision: Scalar, dim: int) -> Scalar:
        del dim
        return 0.1 / precision

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
    ) -> None:
        del target, current, proposal, tuning
        return
