r"""The reverse-transition target of one segment, for which every inner kernel is written.

For a segment from time `t` down to `s < t` the exact reversal of the noising step is
`p(x_s = z | x_t)`, proportional to `p_s(z) exp(-|x_t - a z|^2 / (2 v))`. Its Gaussian part is known exactly;
`p_s` is known through its score, and perhaps an energy.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp

from numpyro_rtk._custom_types import Event, Scalar, ScoreFn
from numpyro_rtk._moves._line_integral import dot


class Evaluation(NamedTuple):
    """What one evaluation of the network at a point gives."""

    x: Event
    """The point."""
    score: Event
    """Score of `p_s` there (not of the segment target)."""
    energy: Scalar
    """`-log p_s` there up to a constant, or 0 where the inner kernel does not need it."""


class ReverseTransition(eqx.Module):
    """The law of `x_s` given `x_t`, up to a constant.

    Args:
        score_fn: `score_fn(x, t)` for one event.
        x_t: The noised point the segment starts from, any shape.
        score_t: Score of `p_t` at `x_t`, the same shape; used for starts and proposals only, never in
            the target.
        s: Time of the target, lower noise, scalar.
        t: Time of `x_t`, scalar.
        a: `alpha(t) / alpha(s)`.
        v: Variance of the noising step from `s` to `t`.
        sigma_s: Noise scale at `s`.
        alpha_t: Signal scale at `t`.
    """

    score_fn: ScoreFn
    x_t: Event
    score_t: Event
    s: Scalar
    t: Scalar
    a: Scalar
    v: Scalar
    sigma_s: Scalar
    alpha_t: Scalar

    def evaluate(self, z: Event, *, with_energy: bool = False) -> Evaluation:
        """One evaluation of the network at `z`, with its energy if asked for."""
        if not with_energy:
            return Evaluation(z, self.score_fn(z, self.s), jnp.zeros((), z.dtype))
        both = getattr(self.score_fn, "energy_and_score", None)
        if both is not None:
            energy, score = both(z, self.s)
        else:
            energy, score = self.score_fn.energy(z, self.s), self.score_fn(z, self.s)  # pyright: ignore
        return Evaluation(z, score, energy)

    def prior_score(self, z: Event) -> Event:
        """Score of `p_s` alone; one evaluation."""
        return self.score_fn(z, self.s)

    @property
    def precision(self) -> Scalar:
        """Curvature `a^2 / v` of the Gaussian part."""
        return self.a**2 / self.v

    def gaussian_score(self, z: Event) -> Event:
        """Gradient of the Gaussian part, `a (x_t - a z) / v`."""
        return (self.a / self.v) * (self.x_t - self.a * z)

    def score(self, z: Event, prior_score: Event) -> Event:
        """Gradient of the log target, given the score of `p_s` at `z`."""
        return prior_score + self.gaussian_score(z)

    def gaussian_difference(self, x: Event, y: Event) -> Scalar:
        """Exact log difference of the Gaussian part from `x` to `y`, antisymmetric to the last bit.

        Written as a product, not as a difference of squares, which would cancel in float32.
        """
        return (self.a / self.v) * dot(y - x, self.x_t - 0.5 * self.a * (x + y))

    @property
    def mean(self) -> Event:
        """`E[x_s | x_t] = (x_t + v score_t) / a`, exact (Tweedie's formula for the segment)."""
        return (self.x_t + self.v * self.score_t) / self.a
