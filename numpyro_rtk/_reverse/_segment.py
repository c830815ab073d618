r"""The reverse-transition target of one segment, for which every reverse kernel is written.

For a segment from time `t` down to `s < t` the exact reversal of the noising step is
`p(x_s = z | x_t)`, proportional to `p_s(z) exp(-|x_t - a z|^2 / (2 v))`. Its Gaussian part is known exactly;
`p_s` is known through its score, and perhaps an energy.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp

from numpyro_rtk._custom_types import Event, Scalar
from numpyro_rtk._moves._line_integral import dot
from numpyro_rtk._noising._grid import Segment
from numpyro_rtk._score._model import ScoreModel


class Evaluation(NamedTuple):
    """What one evaluation of the network at a point gives."""

    x: Event
    """The point."""
    score: Event
    """Score of `p_s` there (not of the segment target)."""
    energy: Scalar
    """`-log p_s` there up to a constant, or 0 where the kernel does not need it."""


class ReverseTransition(eqx.Module):
    """The law of `x_s` given `x_t`, up to a constant.

    Args:
        score_fn: The score, with energies for kernels that need them.
        x_t: The noised point the segment starts from, any shape.
        score_t: Score of `p_t` at `x_t`, the same shape; used for starts and proposals only, never in
            the target.
        segment: Times and coefficients of the segment.
    """

    score_fn: ScoreModel
    x_t: Event
    score_t: Event
    segment: Segment

    def evaluate(self, z: Event, *, with_energy: bool = False) -> Evaluation:
        """One evaluation of the network at `z`, with its energy if asked for."""
        if not with_energy:
            return Evaluation(z, self.score_fn(z, self.segment.s), jnp.zeros((), z.dtype))
        assert self.score_fn.energy_and_score is not None
        energy, score = self.score_fn.energy_and_score(z, self.segment.s)
        return Evaluation(z, score, energy)

    def prior_score(self, z: Event) -> Event:
        """Score of `p_s` alone; one evaluation."""
        return self.score_fn(z, self.segment.s)

    @property
    def precision(self) -> Scalar:
        """Curvature `a^2 / v` of the Gaussian part."""
        return self.segment.a**2 / self.segment.v

    def gaussian_score(self, z: Event) -> Event:
        """Gradient of the Gaussian part, `a (x_t - a z) / v`."""
        return (self.segment.a / self.segment.v) * (self.x_t - self.segment.a * z)

    def score(self, z: Event, prior_score: Event) -> Event:
        """Gradient of the log target, given the score of `p_s` at `z`."""
        return prior_score + self.gaussian_score(z)

    def gaussian_difference(self, x: Event, y: Event) -> Scalar:
        """Exact log difference of the Gaussian part from `x` to `y`, antisymmetric to the last bit.

        Written as a product, not as a difference of squares, which would cancel in float32.
        """
        return (self.segment.a / self.segment.v) * dot(y - x, self.x_t - 0.5 * self.segment.a * (x + y))

    @property
    def mean(self) -> Event:
        """`E[x_s | x_t] = (x_t + v score_t) / a`, exact (Tweedie's formula for the segment)."""
        return (self.x_t + self.segment.v * self.score_t) / self.segment.a
