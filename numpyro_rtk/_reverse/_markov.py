"""The loop that all Markov reverse kernels share: a start, and steps on the target of the segment."""

import abc
from typing import Any, get_args, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from numpyro_rtk._custom_types import Event, Flag, RandomKey, Scalar
from numpyro_rtk._moves._accept import all_finite, MAX_ENERGY_DROP, metropolis, select
from numpyro_rtk._moves._line_integral import dot
from numpyro_rtk._reverse._base import AbstractInnerKernel, SegmentEntry, SegmentResult, SegmentTuning
from numpyro_rtk._reverse._segment import Evaluation, ReverseTransition


Start: TypeAlias = Literal["gaussian", "paper", "noise"]


class StepInfo(NamedTuple):
    """What one inner step reports."""

    accept_prob: Scalar
    """Acceptance probability of the proposal, in [0, 1]; 1 for kernels without an accept step."""
    diverging: Flag
    """Whether the proposal was non-finite, or an unadjusted step exploded."""
    failed: Flag
    """Whether the new state is unusable (only kernels without an accept step can fail)."""


class AbstractMarkovKernel(AbstractInnerKernel):
    """Inner kernels that start somewhere and take `num_steps` Markov steps on the segment target.

    A step proposes, the network is evaluated once at the proposal, and the proposal is accepted or
    not. The start of a segment is a proposal that is always accepted, so that start and steps share
    one evaluation in the compiled program: a segment costs `num_steps + 1` evaluations plus
    what the energy difference asks for, and the network is compiled once.
    """

    num_steps: eqx.AbstractVar[int]
    step_size: eqx.AbstractVar[Any]
    start: eqx.AbstractVar[Start]

    @property
    def evaluations_per_segment(self) -> int:
        return self.num_steps + 1 + self.num_steps * self.extra_evaluations_per_step

    @property
    def extra_evaluations_per_step(self) -> int:
        """Score evaluations of one step besides the one at the proposal."""
        return 0

    @abc.abstractmethod
    def init_auxiliary(self, key: RandomKey, x: Event) -> Any:
        """Whatever the chain carries besides its position, drawn afresh at the start of a segment."""

    @abc.abstractmethod
    def propose(
        self,
        key: RandomKey,
        target: ReverseTransition,
        current: Evaluation,
        auxiliary: Any,
        tuning: SegmentTuning,
    ) -> tuple[Event, Any]:
        """The proposed point and the auxiliary variable that would go with it."""

    @abc.abstractmethod
    def log_accept_ratio(
        self, target: ReverseTransition, current: Evaluation, proposal: Evaluation, tuning: SegmentTuning
    ) -> Scalar | None:
        """Log Metropolis-Hastings ratio, exactly antisymmetric; `None` for kernels without an accept step."""

    def step(
        self,
        key: RandomKey,
        target: ReverseTransition,
        current: Evaluation,
        auxiliary: Any,
        tuning: SegmentTuning,
    ) -> tuple[Evaluation, Any, StepInfo]:
        """One Markov step on the segment target.

        Args:
            key: Random key.
            target: The segment.
            current: The current point with its score, from `target.evaluate`.
            auxiliary: From `init_auxiliary` or the step before.
            tuning: Step size and curvature of this segment.

        Returns:
            The new point, auxiliary variable, and what happened.
        """
        propose_key, accept_key = jr.split(key)
        point, new_auxiliary = self.propose(propose_key, target, current, auxiliary, tuning)
        proposal = target.evaluate(point, with_energy=self.needs_energy)
        return self._accept(accept_key, target, current, auxiliary, proposal, new_auxiliary, tuning)

    def _accept(
        self,
        key: RandomKey,
        target: ReverseTransition,
        current: Evaluation,
        auxiliary: Any,
        proposal: Evaluation,
        new_auxiliary: Any,
        tuning: SegmentTuning,
    ) -> tuple[Evaluation, Any, StepInfo]:
        finite = all_finite(proposal.x, proposal.score, proposal.energy)
        log_ratio = self.log_accept_ratio(target, current, proposal, tuning)
        if log_ratio is None:
            chord = 0.5 * dot(proposal.score + current.score, proposal.x - current.x)
            change = target.gaussian_difference(current.x, proposal.x) + chord
            usable = finite & (change > -MAX_ENERGY_DROP)
            accept, accept_prob = usable, usable.astype(proposal.x.dtype)
            diverging = failed = ~usable
        else:
            accept, accept_prob, diverging = metropolis(key, log_ratio, finite)
            failed = jnp.zeros((), bool)
        new, new_auxiliary = select(accept, (proposal, new_auxiliary), (current, auxiliary))
        return new, new_auxiliary, StepInfo(accept_prob, diverging, failed)

    def draw_start(self, key: RandomKey, target: ReverseTransition, tuning: SegmentTuning) -> Event:
        """Where the segment starts (see `start` in the kernels' docstrings)."""
        if self.start == "gaussian":
            mean, variance = target.mean, 1 / (target.precision + tuning.curvature)
        elif self.start == "paper":
            # exp(-L |z|^2 - |x_t - a z|^2 / (2 v)): precision 2 L + a^2 / v.
            variance = 1 / (target.precision + 2 * tuning.curvature)
            mean = variance * (target.segment.a / target.segment.v) * target.x_t
        else:
            mean, variance = target.x_t / target.segment.a, 1 / target.precision
        return mean + jnp.sqrt(variance) * jr.normal(key, target.x_t.shape, target.x_t.dtype)

    def run_segment(
        self, key: RandomKey, target: ReverseTransition, entry: SegmentEntry, tuning: SegmentTuning
    ) -> SegmentResult:
        start_key, auxiliary_key, steps_key = jr.split(key, 3)
        start = self.draw_start(start_key, target, tuning)
        placeholder = Evaluation(target.x_t, target.score_t, jnp.zeros((), start.dtype))
        auxiliary = self.init_auxiliary(auxiliary_key, start)

        def body(carry: Any, inputs: Any) -> Any:
            (current, auxiliary), (key, is_start) = carry, inputs
            propose_key, accept_key = jr.split(key)
            # At the start there is no proposal and no ratio, and what it would evaluate must not be
            # evaluated. The flag is not batched, so under `vmap` this still branches.
            point, new_auxiliary = jax.lax.cond(
                is_start,
                lambda: (start, auxiliary),
                lambda: self.propose(propose_key, target, current, auxiliary, tuning),
            )
            proposal = target.evaluate(point, with_energy=self.needs_energy)
            no_step = StepInfo(jnp.ones((), start.dtype), jnp.zeros((), bool), jnp.zeros((), bool))
            new, stepped, info = jax.lax.cond(
                is_start,
                lambda: (proposal, auxiliary, no_step),
                lambda: self._accept(accept_key, target, current, auxiliary, proposal, new_auxiliary, tuning),
            )
            start_ok = all_finite(*proposal)
            safe = select(start_ok, proposal, placeholder)
            new, auxiliary = select(is_start, (safe, auxiliary), (new, stepped))
            failed = is_start & ~start_ok | ~is_start & info.failed
            diverging = failed | ~is_start & info.diverging
            return (new, auxiliary), (info.accept_prob, diverging, failed)

        # Iteration 0 is the start, then the steps.
        inputs = (jr.split(steps_key, self.num_steps + 1), jnp.arange(self.num_steps + 1) == 0)
        (last, _), (accept_prob, diverging, failed) = jax.lax.scan(body, (placeholder, auxiliary), inputs)
        return SegmentResult(
            x=last.x,
            score=last.score,
            entry=entry,
            accept_prob=jnp.mean(accept_prob[1:]) if self.num_steps else jnp.ones((), last.x.dtype),
            square_score=last.score**2,
            diverging=jnp.any(diverging),
            failed=jnp.any(failed),
        )


def check_start(owner: str, start: Any) -> None:
    """Raise unless `start` is one of the starts."""
    if start not in get_args(Start):
        options = ", ".join(repr(option) for option in get_args(Start))
        raise ValueError(f"`{owner}(start=...)` must be one of {options}, got {start!r}.")
