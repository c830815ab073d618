r"""Energy differences along a segment: `log p_s(z') - log p_s(z)` from scores or from an energy.

A network gives a score, not an energy. The accept step of a Metropolis kernel needs only the
*difference* of two log densities, which is the line integral of the score from `z` to `z'`. All
rules here are exactly antisymmetric in floating point: exchanging the two ends negates every bit,
because a wrong sign in one direction of a Metropolis ratio would break detailed balance.
"""

import abc
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from numpyro_rtk._custom_types import Event, Scalar


def dot(x: Event, y: Event) -> Scalar:
    """Inner product of two events of any shape, in full precision on every device.

    A contraction, and not the sum of a product: XLA may reduce a batch of short rows on CPUs far more slowly.
    """
    return jnp.vdot(x, y, precision=jax.lax.Precision.HIGHEST)


class AbstractEnergyDifference(eqx.Module):
    """A rule for `log p_s(z') - log p_s(z)`."""

    needs_energy: eqx.AbstractClassVar[bool]
    """Whether the score must also provide an energy."""
    num_extra_evaluations: eqx.AbstractVar[int]
    """Score evaluations per difference, besides those at the two ends."""

    @abc.abstractmethod
    def __call__(
        self,
        score_fn: Callable[[Event], Event],
        x: Event,
        y: Event,
        score_x: Event,
        score_y: Event,
        energy_x: Scalar,
        energy_y: Scalar,
    ) -> Scalar:
        """Estimate `log p(y) - log p(x)`.

        Args:
            score_fn: Score at the segment's time, one event to one event.
            x: Start, any shape.
            y: End, the same shape.
            score_x: Score at `x`, already known.
            score_y: Score at `y`, already known.
            energy_x: `-log p(x)` up to a constant, used only where `needs_energy`.
            energy_y: The same at `y`.

        Returns:
            A scalar, exactly antisymmetric under exchange of the two ends.
        """


class Trapezoid(AbstractEnergyDifference):
    """Trapezoid rule on the scores at both ends: no extra evaluation, error `O(|y - x|^3)`.

    Exact for a quadratic log density. Where moves are long compared with the features of `p_s`, as between
    close modes, the error biases the law: use `Simpson` there.
    """

    needs_energy: ClassVar[bool] = False
    num_extra_evaluations: int = eqx.field(static=True, init=False, default=0)

    def __call__(self, score_fn, x, y, score_x, score_y, energy_x, energy_y):
        del score_fn, energy_x, energy_y
        return 0.5 * dot(score_x + score_y, y - x)


class Simpson(AbstractEnergyDifference):
    """Simpson's rule: one extra evaluation at the midpoint, error `O(|y - x|^5)`.

    Exact for a quartic log density along the line.
    """

    needs_energy: ClassVar[bool] = False
    num_extra_evaluations: int = eqx.field(static=True, init=False, default=1)

    def __call__(self, score_fn, x, y, score_x, score_y, energy_x, energy_y):
        del energy_x, energy_y
        middle = score_fn(0.5 * (x + y))
        return dot((score_x + score_y) + 4 * middle, y - x) / 6


class GaussLegendre(AbstractEnergyDifference):
    """Gauss-Legendre quadrature: `num_nodes` extra evaluations, error `O(|y - x|^(2 num_nodes + 1))`.

    Args:
        num_nodes: Number of nodes, at least 1. The scores at the ends are not used.

    Raises:
        ValueError: if `num_nodes` is not a positive integer.
    """

    num_nodes: int = eqx.field(static=True)
    needs_energy: ClassVar[bool] = False

    def __check_init__(self) -> None:
        if not isinstance(self.num_nodes, int) or isinstance(self.num_nodes, bool) or self.num_nodes < 1:
            raise ValueError(
                f"`GaussLegendre(num_nodes=...)` must be an integer of at least 1, got {self.num_nodes!r}."
            )

    @property
    def num_extra_evaluations(self) -> int:
        return self.num_nodes

    def __call__(self, score_fn, x, y, score_x, score_y, energy_x, energy_y):
        del score_x, score_y, energy_x, energy_y
        nodes, weights = np.polynomial.legendre.leggauss(self.num_nodes)
        # Nodes as midpoint +- offset: exchanging the ends visits bitwise the same points, and
        # adding each symmetric pair first makes the sum independent of the direction.
        middle, half = 0.5 * (x + y), 0.5 * (y - x)
        num_pairs = self.num_nodes // 2
        offsets = jnp.asarray(nodes[self.num_nodes - num_pairs :], x.dtype)
        pair_weights = jnp.asarray(weights[self.num_nodes - num_pairs :], x.dtype)
        total = jnp.zeros_like(x)
        if self.num_nodes % 2:
            total = jnp.asarray(weights[num_pairs], x.dtype) * score_fn(middle)
        if num_pairs:
            # One expression for both signs: a compiler that fuses multiply and add in one but not in the
            # other would break it.
            shifts = jnp.multiply.outer(jnp.concatenate([offsets, -offsets]), half)
            scores = jax.vmap(score_fn)(middle[None] + shifts)
            pairs = scores[:num_pairs] + scores[num_pairs:]
            total = total + jnp.tensordot(pair_weights, pairs, axes=1)
        return dot(total, half)


class ExactEnergy(AbstractEnergyDifference):
    """Difference of the network's own energies; needs a score with a method `energy(x, t)`.

    No extra evaluation: where the score also has `energy_and_score(x, t)`, as `EnergyScore` has, the
    energy comes with the score.
    """

    needs_energy: ClassVar[bool] = True
    num_extra_evaluations: int = eqx.field(static=True, init=False, default=0)

    def __call__(self, score_fn, x, y, score_x, score_y, energy_x, energy_y):
        del score_fn, x, y, score_x, score_y
        return energy_x - energy_y
