"""Underdamped Langevin by its exact exponential integrator."""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from numpyro_rtk._custom_types import Event, RandomKey, Scalar
from numpyro_rtk._reverse._base import check_num_steps, check_positive, SegmentTuning
from numpyro_rtk._reverse._markov import AbstractMarkovKernel, check_start, Start
from numpyro_rtk._reverse._segment import Evaluation, ReverseTransition


def velocity_weight(a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""`(1 - exp(-a)) / a`, the weight of velocity on position and of force on velocity.

    Args:
        a: Friction times step size, dimensionless, non-negative.

    Returns:
        The weight, in (0, 1], same shape and dtype; 1 at 0.
    """
    # 1 - a force_weight(a) is the same number, and below 1 it has the right derivative at 0 and near it.
    near, far = jnp.minimum(a, 1.0), jnp.maximum(a, 1.0)
    return jnp.where(a < 1.0, 1 - near * force_weight(near), -jnp.expm1(-far) / far)


def force_weight(a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""`(exp(-a) - 1 + a) / a^2`, the weight of a constant force on position.

    Args:
        a: Friction times step size, dimensionless, non-negative.

    Returns:
        The weight, in (0, 1/2], same shape and dtype; 1/2 at 0.
    """
    # The closed form cancels as a -> 0. Below 1 the alternating series sum (-a)^k / (k + 2)! reaches
    # float64 accuracy in 18 terms; clamping keeps the branch that is not used finite.
    near, far = jnp.minimum(a, 1.0), jnp.maximum(a, 1.0)
    series = jnp.zeros_like(a)
    for k in reversed(range(18)):
        series = series * near + (-1.0) ** k / math.factorial(k + 2)
    return jnp.where(a < 1.0, series, (jnp.expm1(-far) + far) / far**2)


def position_noise_scale(a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""Scale of the position noise that is independent of the velocity noise, per unit step.

    The noises of one step have variances `1 - e^{-2a}` (velocity) and
    `h^2 (2a - 3 + 4 e^{-a} - e^{-2a}) / a^2` (position) and covariance `h (1 - e^{-a})^2 / a`. The
    conditional variance of position given velocity reduces to `4 h^2 (a/2 - tanh(a/2)) / a^2`.

    Args:
        a: Friction times step size, dimensionless, non-negative.

    Returns:
        `2 sqrt(a/2 - tanh(a/2)) / a`, of order `sqrt(a / 6)` for small `a`.
    """
    # 2 sqrt(x - tanh x) / a = sqrt((x - tanh x) / x^2) with x = a / 2. The difference cancels as x -> 0. The
    # continued fraction tanh x = x / (1 + x^2 / q), q = 3 + x^2 / (5 + x^2 / (7 + ...)), turns it into
    # x / (q + x^2), a sum of positive terms, of float64 accuracy below 1 in 9 levels.
    x = 0.5 * a
    near, far = jnp.minimum(x, 1.0), jnp.maximum(x, 1.0)
    q = jnp.full_like(x, 21.0)
    for k in range(19, 1, -2):
        q = k + near**2 / q
    return jnp.sqrt(jnp.where(x < 1.0, near / (q + near**2), (far - jnp.tanh(far)) / far**2))


class ULD(AbstractMarkovKernel):
    r"""RTK-ULD: underdamped Langevin, unit mass, by its exact exponential integrator.

    One step of length `h` solves `dz = u dt`, `du = -friction u dt + grad dt + sqrt(2 friction) dW` exactly
    with the gradient of the log target frozen at its start; position and velocity noise have
    their exact joint covariance, stable as `friction * h -> 0`. The velocity is drawn from `N(0, I)` at
    the start of each segment.

    *Law.* Biased: with the rule below, first order in `h` (for a Gaussian target of precision `P` the
    stationary variance is larger than `1 / P` by a relative `h P / (2 friction)` to leading order). A step
    that lowers the log target by more than 1000 is reported as `diverging`.

    *Cost.* `num_steps + 1` score evaluations a segment.

    Args:
        num_steps: Steps per segment.
        step_size: `h`, in units of `x` (mass 1): a scalar, or one value per segment. `None`: the rule
            `0.3 / sqrt(L)`, where `L = a^2/v + curvature` estimates the smoothness of the segment
            target from the mean curvature `E |score_s|^2 / dim` of `-log p_s`, learnt in warmup
            (before: its bound `1 / sigma_s^2`).
        friction: In units of `1 / time`, positive: a scalar. `None`: `2 sqrt(L)`, critical damping.
        start: As in `MALA`; the paper starts from `"paper"` or `"noise"`.

    Raises:
        ValueError: for a non-positive step size, friction or number of steps, or an unknown start.

    References:
        Cheng, Chatterji, Bartlett and Jordan (2018), arXiv 1707.03663. Huang et al. (2024),
        arXiv 2405.16387, Algorithm 3.
    """

    num_steps: int = eqx.field(static=True, default=16)
    step_size: Any = None
    friction: Any = None
    start: Start = eqx.field(static=True, default="gaussian")
    adapts_step_size: ClassVar[bool] = False
    needs_energy: ClassVar[bool] = False

    def __check_init__(self) -> None:
        check_num_steps("ULD", self.num_steps)
        check_positive("ULD", "step_size", self.step_size)
        check_positive("ULD", "friction", self.friction, scalar=True)
        check_start("ULD", self.start)

    def default_step_size(self, precision: Scalar, dim: int) -> Scalar:
        del dim
        return 0.3 / jnp.sqrt(precision)

    def init_auxiliary(self, key: RandomKey, x: Event) -> Any:
        return jr.normal(key, x.shape, x.dtype)

    def propose(
        self,
        key: RandomKey,
        target: ReverseTransition,
        current: Evaluation,
        auxiliary: Any,
        tuning: SegmentTuning,
    ) -> tuple[Event, Any]:
        h, velocity, dtype = tuning.step_size, auxiliary, current.x.dtype
        smoothness = target.precision + jnp.mean(tuning.curvature)
        friction = 2 * jnp.sqrt(smoothness) if self.friction is None else jnp.asarray(self.friction, dtype)
        force = target.score(current.x, current.score)
        shared_key, position_key = jr.split(key)
        shared = jr.normal(shared_key, current.x.shape, dtype)
        own = jr.normal(position_key, current.x.shape, dtype)
        a = friction * h
        weight = velocity_weight(a)
        # Covariance over velocity scale: (1 - e^-a)^2 / (a sqrt(1 - e^-2a)) = weight sqrt(tanh(a / 2)).
        noise = weight * jnp.sqrt(jnp.tanh(0.5 * a)) * shared + position_noise_scale(a) * own
        x = current.x + h * (weight * velocity + h * force_weight(a) * force + noise)
        new_velocity = jnp.exp(-a) * velocity + h * weight * force + jnp.sqrt(-jnp.expm1(-2 * a)) * shared
        return x, new_velocity

    def log_accept_ratio(
        self, target: ReverseTransition, current: Evaluation, proposal: Evaluation, tuning: SegmentTuning
    ) -> None:
        del target, current, proposal, tuning
        return
