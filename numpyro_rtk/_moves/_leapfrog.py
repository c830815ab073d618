r"""Hamiltonian trajectories where part of the log density is known only by its score.

A position is a dict of arrays. The log density of some of its leaves, those with an entry in
`PathPoint.score`, is known only through its gradient; all the rest is a potential whose value is known, too.
A trajectory has one evaluation of both per leapfrog step, and its energy error needs no more: the score is
known along the path.

**Energy error.** Write `g_k` for the scores at the points `x_0, ..., x_L` of the path,
`dx_k = x_{k+1} - x_k`, `dg_k = g_{k+1} - g_k`. The trapezoid rule `sum_k (g_k + g_{k+1}) . dx_k / 2` follows
the chords of the path. Where the path bends it misses the line integral by `(1/12) sum (d2g . dx - dg . d2x)`
to leading order, in total `O(h^2)` for steps of size `h`, the order of the energy error itself. In fact,
where everything is scored, leapfrog has exactly
`kinetic difference - trapezoid = (h^2 / 8) (|g_L|^2 - |g_0|^2)` (norms by the inverse mass matrix): the
`O(h^2)` bias of the integrator is corrected only as far as the target is Gaussian. Second differences along
the path give the missing term for nothing. With `w_k = dg_{k+1} . dx_k - dg_k . dx_{k+1}`,

    sum_k (g_k + g_{k+1}) . dx_k / 2 - (1/12) sum_k w_k - (1/24) (w_0 + w_{L-2})

is the line integral up to `O(h^4)`: the default, `order=4`. Both rules are exact for a linear score with a
symmetric matrix (every `w_k` vanishes), so for Gaussian targets. With one step only, both are the trapezoid
rule.

**Paths too coarse.** Where the score changes too much within a step, no rule through the points knows the
energy error, and what it says is dangerous: a path that leapfrog throws out of a steep flank into a flat tail
seems to have gained density on its chords, and would be accepted (a chain of an `exp(x) - x` potential was
seen to go to -900 so). The size of the correction tells: `sum_k |w_k| / 12` is the same on the way back and
zero for Gaussians, so trajectories where it exceeds `MAX_CORRECTION` are rejected, without harm to the law.
At the step sizes where acceptance is good these are few, in any dimension: 0 to 4 in 100 at an acceptance
above 0.9 (skewed, quartic and bimodal laws, 10 and 100 dimensions), while wrongly accepted trajectories (true
error above 3, estimate below 1) went from 1.2 in 100 to 0.3 and less at the coarsest steps.

**What is exact and what is not.** The map from start to end, momentum flipped, is its own inverse and
preserves volume; the energy error changes its sign under it. Were it also a difference of one function of the
two ends, accepting with probability `min(1, exp(-error))` would be exact. The potential and the kinetic
energy are such differences. An integral along a path of finitely many points is one only up to its quadrature
error, so the invariant law has a relative error of `O(h^2)` per trajectory with `order=2` and `O(h^4)` with
`order=4`, none for Gaussian targets. A score that is not a gradient (a network's is only nearly one) has no
density; the law then depends on paths by as much as its curl. Where an energy is known, put it into the
potential: the result is plain, exact HMC.

References:
    Neal (2011), *MCMC using Hamiltonian dynamics*, for HMC. The correction is derived here: it is the
    bilinear form of Gregory's end corrections, written so that it vanishes for Gaussians.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_rtk._custom_types import Count, Flag, Scalar
from numpyro_rtk._moves._line_integral import dot


Leaves: TypeAlias = dict[str, Array]
Order: TypeAlias = Literal[2, 4]
MAX_ENERGY_RANGE = 1000.0
"""Spread of the energy error along one trajectory beyond which it counts as diverging, as in NumPyro and
Stan.
"""
MIN_STEPS = 2
"""Fewest steps of a trajectory whose line integral can be trusted. One step has nothing but its chord, so
that an error of second order goes unseen; a sampler that takes only such steps accepts nearly all of them,
and its step size runs away."""

MAX_CORRECTION = 2.0
"""Size of the corrections of the line integral along one trajectory beyond which its energy error is
unknown.
"""


class PathPoint(NamedTuple):
    """A position and what one evaluation there gives."""

    position: Leaves
    """All leaves."""
    score: Leaves
    """Scores of the leaves whose log density is known only by its gradient; same shapes, perhaps fewer
    keys.
    """
    potential: Array
    """The rest of the negative log density: a scalar, or by element where `leapfrog` is given their inner
    product.
    """
    gradient: Leaves
    """Its gradient by all leaves."""
    extra: Any = ()
    """Whatever else `evaluate` found there; handed through."""

    @property
    def force(self) -> Leaves:
        """Gradient of the whole log density."""
        return {
            name: self.score[name] - grad if name in self.score else -grad
            for name, grad in self.gradient.items()
        }


Evaluate: TypeAlias = Callable[[Leaves], PathPoint]
Velocity: TypeAlias = Callable[[Leaves], Leaves]


class Trajectory(NamedTuple):
    """The end of a trajectory."""

    point: PathPoint
    """Where it ended; not finite, perhaps, if it diverged."""
    momentum: Leaves
    """The momentum there (not flipped)."""
    potential_difference: Scalar
    """Negative log density at the end minus that at the start, scored leaves included."""
    kinetic_start: Scalar
    """Kinetic energy at the start."""
    energy_error: Scalar
    """Potential and kinetic difference; infinite if the trajectory diverged or is unresolved."""
    error_inside: Scalar
    """The same by the trapezoid rule, at the last point with a density: before a wall, where one was met."""
    diverging: Flag
    """Whether it met something non-finite, or the energy error spread over more than `MAX_ENERGY_RANGE`."""
    unresolved: Flag
    """Whether the path was too coarse to know its energy error: the corrections reached `MAX_CORRECTION`."""
    num_evaluations: Count
    """Evaluations made: the number of steps, fewer if the trajectory diverged or is unresolved."""
    num_steps: Count
    """Steps until it ended, diverged or was unresolved: by element, where there are several."""

    def tuning_prob(self, accept_prob: Scalar, impossible: Flag) -> Scalar:
        """Acceptance probability as the adaptation of step sizes sees it.

        No step is short enough for a wall of the likelihood, and an adaptation that counts rejections there
        shortens steps for ever. Of a trajectory that met one after its first step, the part before counts.

        Args:
            accept_prob: Acceptance probability of the whole.
            impossible: Whether it ended where the likelihood is zero and the network finite.
        """
        inside = jnp.exp(jnp.minimum(-self.error_inside, 0.0))
        return jnp.where(impossible & (self.num_steps > 1), inside, accept_prob)


def evaluation(score_fn: Callable[[Leaves], Leaves], potential_fn: Callable[[Leaves], Scalar]) -> Evaluate:
    """The function that evaluates a point from the scores of some leaves and a potential of all."""

    def evaluate(position: Leaves) -> PathPoint:
        potential, gradient = jax.value_and_grad(potential_fn)(position)
        return PathPoint(position, score_fn(position), potential, gradient)

    return evaluate


def unit_velocity(momentum: Leaves) -> Leaves:
    """Velocity for the identity mass matrix."""
    return momentum


def leapfrog(
    evaluate: Evaluate,
    velocity: Velocity,
    point: PathPoint,
    momentum: Leaves,
    step_size: Any,
    num_steps: Any,
    *,
    order: Order = 4,
    inner: Callable[[Array, Array], Array] = dot,
) -> Trajectory:
    """Follow Hamiltonian dynamics by leapfrog steps, one evaluation each; stops early only where it will be
    rejected.

    Args:
        evaluate: Evaluates a position.
        velocity: Inverse mass matrix times a momentum; linear, symmetric, positive definite.
        point: The start, evaluated.
        momentum: Momentum at the start, leaves as the position.
        step_size: Scalar, positive. At 0 the trajectory stays where it is and its error is 0.
        num_steps: Number of steps, at least 1; may be traced. Under `vmap` all lanes run as long as the
            longest.
        order: Order of the line integral of the scores: 4, or 2 for the plain trapezoid rule; see the module.
        inner: Inner product of two leaves. One by element makes every element a trajectory of its own, with
            an energy error of its own, where potential and velocity are of elements, too; all take as many
            steps as the longest.

    Returns:
        The end point with all that the next trajectory needs. Its energy error is antisymmetric, to rounding,
        under following the path back.
    """
    if order not in (2, 4):
        raise ValueError(f"`order` must be 2 or 4, got {order!r}.")
    scored = tuple(point.score)
    dtype = jnp.result_type(point.potential, *point.position.values())
    start, kinetic_start = point, _half_dot(momentum, velocity(momentum), inner).astype(dtype)
    zero = jnp.zeros(kinetic_start.shape, dtype)
    no_step = {name: jnp.zeros_like(point.position[name]) for name in scored}

    def step(carry: _Path) -> _Path:
        old = carry.point
        middle = _add(carry.momentum, 0.5 * step_size, old.force)
        new = evaluate(_add(old.position, step_size, velocity(middle)))
        momentum = _add(middle, 0.5 * step_size, new.force)
        active = _active(carry)
        kinetic = _half_dot(momentum, velocity(momentum), inner).astype(dtype)
        dx = {name: new.position[name] - old.position[name] for name in scored}
        dg = {name: new.score[name] - old.score[name] for name in scored}
        chord = sum(
            (inner(0.5 * (new.score[name] + old.score[name]), dx[name]) for name in scored), start=zero
        )
        chords = carry.chords + chord
        # The wedge with the step before; there is none before the first step.
        wedge = sum(
            (inner(dg[name], carry.dx[name]) - inner(carry.dg[name], dx[name]) for name in scored), start=zero
        )
        error = (kinetic - kinetic_start) + (new.potential - start.potential) - chords
        # The spread, not the largest error: it is the same on the way back, so that stopping is reversible.
        low, high = jnp.minimum(carry.low, error), jnp.maximum(carry.high, error)
        return _Path(
            num_steps=carry.num_steps + 1,
            point=new,
            momentum=momentum,
            kinetic=kinetic,
            chords=chords,
            wedges=carry.wedges + wedge,
            first_wedge=jnp.where(carry.num_steps == 1, wedge, carry.first_wedge),
            last_wedge=wedge,
            correction=carry.correction + jnp.where(active, jnp.abs(wedge) / 12, 0.0),
            error_inside=jnp.where(active & jnp.isfinite(error), error, carry.error_inside),
            dx=dx,
            dg=dg,
            low=low,
            high=high,
            diverging=carry.diverging | (active & ~(high - low <= MAX_ENERGY_RANGE)),  # NaN diverges
            num_inside=carry.num_inside + active,
        )

    path = jax.lax.while_loop(
        lambda carry: (carry.num_steps < num_steps) & jnp.any(_active(carry)),
        step,
        _Path(
            num_steps=jnp.zeros((), int),
            point=point,
            momentum=momentum,
            kinetic=kinetic_start,
            chords=zero,
            wedges=zero,
            first_wedge=zero,
            last_wedge=zero,
            correction=zero,
            error_inside=zero,
            dx=no_step,
            dg=no_step,
            low=zero,
            high=zero,
            diverging=jnp.zeros(zero.shape, bool),
            num_inside=jnp.zeros(zero.shape, int),
        ),
    )
    line_integral = path.chords
    if order == 4:
        line_integral = line_integral - path.wedges / 12 - (path.first_wedge + path.last_wedge) / 24
    potential_difference = (path.point.potential - start.potential) - line_integral
    energy_error = potential_difference + (path.kinetic - kinetic_start)
    diverging = path.diverging | ~jnp.isfinite(energy_error)
    unresolved = path.correction > MAX_CORRECTION
    return Trajectory(
        point=path.point,
        momentum=path.momentum,
        potential_difference=potential_difference,
        kinetic_start=kinetic_start,
        energy_error=jnp.where(diverging | unresolved, jnp.inf, energy_error),
        error_inside=path.error_inside,
        diverging=diverging,
        unresolved=unresolved,
        num_evaluations=path.num_steps,
        num_steps=path.num_inside,
    )


class _Path(NamedTuple):
    """What is carried along a trajectory."""

    num_steps: Count
    point: PathPoint
    momentum: Leaves
    kinetic: Scalar
    chords: Scalar
    wedges: Scalar
    first_wedge: Scalar
    last_wedge: Scalar
    correction: Scalar
    error_inside: Scalar
    dx: Leaves
    dg: Leaves
    low: Scalar
    high: Scalar
    diverging: Flag
    num_inside: Count


def _active(path: _Path) -> Flag:
    """Whether the trajectory may still be accepted."""
    return ~path.diverging & (path.correction <= MAX_CORRECTION)


def _add(x: Leaves, scale: Any, y: Leaves) -> Leaves:
    return {name: x[name] + jnp.asarray(scale, x[name].dtype) * y[name] for name in x}


def _half_dot(x: Leaves, y: Leaves, inner: Callable[[Array, Array], Array]) -> Array:
    return 0.5 * jax.tree.reduce(jnp.add, {name: inner(x[name], y[name]) for name in x})
