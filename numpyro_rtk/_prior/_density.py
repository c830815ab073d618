r"""Log densities of a diffusion prior: values whose differences agree with the score.

NUTS selects points by the *value* of the log density, so the value matters even where only the gradient looks
expensive. Every choice here gives the value at the noise level of the data, `t_min`; the gradient is
always the score at `t_min`, one evaluation, by a custom derivative: the value is never differentiated.
"""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from numpyro_rtk._custom_types import Event, Scalar, ScoreFn
from numpyro_rtk._noising._base import AbstractNoiseSchedule
from numpyro_rtk._noising._terminal import Terminal
from numpyro_rtk._noising._times import NoiseRange
from numpyro_rtk._score._model import has_energy
from numpyro_rtk._thresholds import MAX_EXACT_TRACE_DIM


def _check_count(owner: str, name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"`{owner}({name}=...)` must be an integer of at least {least}, got {value!r}.")


class AbstractLogDensity(eqx.Module):
    """How the log density of `p_{t_min}` is computed. Concrete subclasses are final and are values."""

    @abc.abstractmethod
    def check(self, score_fn: Any, schedule: AbstractNoiseSchedule, event_shape: tuple[int, ...]) -> None:
        """Raise, naming what to use instead, unless this score, schedule and event can be served."""

    @abc.abstractmethod
    def normalized(self, score_fn: Any) -> bool:
        """Whether values are those of a density that integrates to 1, rather than up to a constant."""

    needs_terminal: ClassVar[bool] = False
    """Whether values depend on the law of the data noised to `t_max`."""

    forward_mode: ClassVar[bool] = False
    """Whether values are differentiated in a condition by forward mode."""

    def ending_in(self, terminal: Terminal) -> Self:
        """The same, with that law."""
        del terminal
        return self

    @abc.abstractmethod
    def log_density(self, score_fn: ScoreFn, noise: NoiseRange, x: Event) -> Scalar:
        """Log density at `t_min` of one event."""

    @abc.abstractmethod
    def shares_evaluation(self, score_fn: Any) -> bool:
        """Whether `log_density_and_score` is cheaper than the two apart."""

    @abc.abstractmethod
    def log_density_and_score(self, score_fn: ScoreFn, noise: NoiseRange, x: Event) -> tuple[Scalar, Event]:
        """Both, for one event."""


class EnergyDensity(AbstractLogDensity):
    """The network's own energy: `log_prob = -score_fn.energy(x, t_min)`.

    *Law.* Exact, and normalised if the score says that its energy is, by an attribute `normalized` that is
    true: `GaussianMixtureScore` has it, `EnergyScore(energy_fn, normalized=True)` sets it.

    *Cost.* One evaluation of the energy for the value. With the gradient, one of `energy_and_score` where the
    score has that method, else one of each.
    """

    def check(self, score_fn: Any, schedule: AbstractNoiseSchedule, event_shape: tuple[int, ...]) -> None:
        del schedule
        if not has_energy(score_fn):
            raise TypeError(
                "`density=EnergyDensity()` needs a score with a method `energy(x, t)`, but `score_fn` "
                f"({type(score_fn).__name__}) has none. Wrap an energy network as `EnergyScore(energy_fn)`, "
                f"or use "
                "`density=ProbabilityFlow()` or `density=LineIntegral()`, which need scores only."
            )
        dtype = jnp.result_type(float)
        x, t = jax.ShapeDtypeStruct(event_shape, dtype), jax.ShapeDtypeStruct((), dtype)
        shape = getattr(eqx.filter_eval_shape(score_fn.energy, x, t), "shape", None)
        if shape != ():
            raise ValueError(f"`score_fn.energy` must return a scalar for one event, got shape {shape}.")

    def normalized(self, score_fn: Any) -> bool:
        return bool(getattr(score_fn, "normalized", False))

    def log_density(self, score_fn: ScoreFn, noise: NoiseRange, x: Event) -> Scalar:
        return -score_fn.energy(x, jnp.asarray(noise.t_min, x.dtype))  # pyright: ignore[reportFunctionMemberAccess]

    def shares_evaluation(self, score_fn: Any) -> bool:
        return callable(getattr(score_fn, "energy_and_score", None))

    def log_density_and_score(self, score_fn: ScoreFn, noise: NoiseRange, x: Event) -> tuple[Scalar, Event]:
        energy, score = score_fn.energy_and_score(x, jnp.asarray(noise.t_min, x.dtype))  # pyright: ignore[reportFunctionMemberAccess]
        return -energy, score


class ProbabilityFlow(AbstractLogDensity):
    r"""Normalised log density from the probability-flow ODE (instantaneous change of variables).

    With `c^2 = alpha^2 + sigma^2`, `z = x / c` and `lambda = log(sigma / alpha)` as time, the flow that
    carries `p_t` from data to noise is `dz / dlambda = -(sigma / c)^2 (z + c score(c z, t))`. Both factors
    fade where the law is noise, and the first one where it is data, so that the equation is smooth down to
    `t_min` under every schedule. The log density is that of a Gaussian at the end, plus the divergence along
    the way, minus `log c` per coordinate at the start. The Gaussian has the mean and variance, by coordinate,
    of the data noised to `t_max`, measured where `sample` measures them: data need not be standardised.

    *Law.* With the exact score, the density of `p_{t_min}`, up to the tolerance and to what is left of the
    data at `t_max` beyond its mean and variance. With a network, the density of the flow, whose gradient
    differs from the score as much as the network differs from a score. NUTS and HMC follow the value: the
    gradient only decides how well they move. The exact trace is exact. Hutchinson's replaces `trace J` by
    the mean of `v^T J v` over `num_probes` fixed random sign vectors `v`: a smooth function of `x`, not
    noise, but with an error of standard deviation `sqrt(2 / num_probes) |off-diagonal of J|` at every step
    that changes with `x`, and NUTS follows it. Normalising constants and comparisons of models can live
    with that; for NUTS in high dimension use `LineIntegral` or an energy.

    *Cost.* Per value, as many score evaluations as the solver needs (see `docs/priors.md`: about 60 to 200),
    each with `size of the event` Jacobian-vector products (exact) or `num_probes` (Hutchinson). Under `vmap`
    the slowest event decides. With the gradient, one score evaluation more. The pilot of `sample`, once for a
    score object; a score that depends on latents of the model has its end measured in each call, by 96
    evaluations.

    *Failures.* Where the solver fails, `log_prob` is NaN, which NUTS counts as a divergence.

    Args:
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance, of standardised coordinates and of the log density.
        max_exact_dim: Largest size of an event whose trace is exact; above it Hutchinson's estimate is used.
            0 always estimates.
        num_probes: Number of random sign vectors.
        seed: Seed of the sign vectors, which are the same at every call, so that the log density is a
            function.
        max_steps: Largest number of solver steps, accepted and rejected.

    Raises:
        ValueError: for a tolerance that is not positive, or a count that is too small; and, in
            `DiffusionPrior`, for a schedule without continuous time.

    References:
        Song et al. (2021), arXiv 2011.13456, section 4.3 and appendix D.2. Grathwohl et al. (2019), arXiv
        1810.01367, for Hutchinson's trace with fixed probes.
    """

    rtol: float = eqx.field(static=True, converter=float, default=1e-4)
    atol: float = eqx.field(static=True, converter=float, default=1e-4)
    max_exact_dim: int = eqx.field(static=True, default=MAX_EXACT_TRACE_DIM)
    num_probes: int = eqx.field(static=True, default=8)
    seed: int = eqx.field(static=True, default=0)
    max_steps: int = eqx.field(static=True, default=512)
    terminal: Terminal | None = eqx.field(init=False, repr=False)
    needs_terminal: ClassVar[bool] = True
    forward_mode: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.terminal = None

    def __check_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"`ProbabilityFlow({name}=...)` must be positive and finite, got {value!r}.")
        for name, least in (("max_exact_dim", 0), ("num_probes", 1), ("seed", 0), ("max_steps", 1)):
            _check_count("ProbabilityFlow", name, getattr(self, name), least)

    def check(self, score_fn: Any, schedule: AbstractNoiseSchedule, event_shape: tuple[int, ...]) -> None:
        del score_fn, event_shape
        if schedule.snap(np.array([0.5]))[0] != 0.5:
            raise ValueError(
                f"`density=ProbabilityFlow()` needs a schedule with continuous time; "
                f"`{type(schedule).__name__}` has steps. "
                "Use `density=LineIntegral()`, which evaluates the score at t_min only."
            )

    def normalized(self, score_fn: Any) -> bool:
        del score_fn
        return True

    def ending_in(self, terminal: Terminal) -> Self:
        return eqx.tree_at(lambda flow: flow.terminal, self, terminal, is_leaf=lambda leaf: leaf is None)

    def log_density(self, score_fn: ScoreFn, noise: NoiseRange, x: Event) -> Scalar:
        schedule = noise.schedule
        # From Python floats, in float64: the ends of the integration are constants.
        with jax.enable_x64(True), jax.ensure_compile_time_eval():
            ends = jnp.asarray([noise.t_min, noise.t_max], jnp.float64)
            start, end = (float(value) for value in -0.5 * schedule.log_snr(ends))
            scales = 0.5 * jnp.log(schedule.alpha(ends) ** 2 + schedule.sigma(ends) ** 2)
            log_scale, log_end_scale = (float(scale) for scale in scales)
        probes = None if x.size <= self.max_exact_dim else self._probes(x)

        def flow(log_ratio: Any, state: tuple[Event, Scalar], args: None) -> tuple[Event, Scalar]:
            del args
            t = jnp.clip(schedule.inverse_log_snr(-2 * log_ratio), noise.t_min, noise.t_max).astype(x.dtype)
            scale = jnp.sqrt(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2).astype(x.dtype)
            rate = jax.nn.sigmoid(2 * log_ratio)  # (sigma / c)^2
            z = state[0]
            score, pushforward = jax.linearize(lambda z: scale * score_fn(scale * z, t), z)
            return -rate * (z + score), -rate * (z.size + _trace(pushforward, z, probes))

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(flow),
            diffrax.Tsit5(),
            t0=jnp.asarray(start, x.dtype),
            t1=jnp.asarray(end, x.dtype),
            dt0=jnp.asarray(0.02 * (end - start), x.dtype),
            y0=(jnp.exp(-log_scale).astype(x.dtype) * x, jnp.zeros((), x.dtype)),
            stepsize_controller=diffrax.PIDController(
                self.rtol, self.atol, norm=_flow_norm, dtmin=1e-5 * (end - start)
            ),
            # The value is never differentiated: no checkpoints.
            adjoint=diffrax.ForwardMode(),
            max_steps=self.max_steps,
            throw=False,
        )
        assert solution.ys is not None
        z, divergence = solution.ys[0][-1], solution.ys[1][-1]
        if self.terminal is not None:
            # In the unit of `z`.
            sd = jnp.sqrt(self.terminal.variance.astype(x.dtype)) * math.exp(-log_end_scale)
            z = (z - self.terminal.mean.astype(x.dtype) * math.exp(-log_end_scale)) / sd
            divergence -= jnp.sum(jnp.log(sd))
        value = -0.5 * jnp.sum(z**2) + divergence - x.size * (0.5 * math.log(2 * math.pi) + log_scale)
        return jnp.where(solution.result == diffrax.RESULTS.successful, value, jnp.nan)

    def shares_evaluation(self, score_fn: Any) -> bool:
        del score_fn
        return False

    def log_density_and_score(self, score_fn: ScoreFn, noise: NoiseRange, x: Event) -> tuple[Scalar, Event]:
        return self.log_density(score_fn, noise, x), score_fn(x, jnp.asarray(noise.t_min, x.dtype))

    def _probes(self, x: Event) -> Array:
        # From bits, so that both precisions have the same probes.
        bits = jr.bits(jr.key(self.seed), (self.num_probes, *x.shape), jnp.uint32)
        return 2 * (bits & 1).astype(x.dtype) - 1


def _trace(pushforward: Callable[[Event], Event], z: Event, probes: Array | None) -> Scalar:
    """Trace of a Jacobian from its products with vectors: all unit vectors, or the mean over probes."""
    if probes is None:
        columns = jax.vmap(pushforward)(jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape))
        return jnp.trace(columns.reshape(z.size, z.size))
    return jnp.sum(probes * jax.vmap(pushforward)(probes)) / probes.shape[0]


def _flow_norm(error: tuple[Event, Scalar]) -> Scalar:
    """The larger of the two errors: among many coordinates the root mean square would hide the log
    density's.
    """
    return jnp.maximum(jnp.sqrt(jnp.mean(error[0] ** 2)), jnp.abs(error[1]))


class LineIntegral(AbstractLogDensity):
    r"""Integral of the score at `t_min` along the straight line from a reference point.

    `log_prob(x) = integral over u in [0, 1] of <score(r + u (x - r), t_min), x - r>`, by Gauss-Legendre
    quadrature: 0 at the reference point `r`, so unnormalised.

    *Law.* With an exact score, the log density up to a constant and the error of the quadrature. The nodes
    must resolve the score along the line: it varies over lengths of the narrowest feature at `t_min`, at
    least `sigma(t_min)`. A network whose score is not quite a gradient has no density; then this is one
    function of `x` among others (another path, another function), whose gradient is the score along the line
    from `r` only.

    *Cost.* `num_nodes` score evaluations per value, evaluated together, no Jacobian; one more with the
    gradient.

    Args:
        reference: The point `r`, in the shape of an event; `None` is the origin. Best in the bulk of the
            posterior.
        num_nodes: Number of nodes; `n` nodes integrate polynomials up to degree `2 n - 1` exactly.

    Raises:
        ValueError: if `num_nodes` is not a positive integer, or the reference is not finite; and, in
            `DiffusionPrior`, unless it has the shape of an event.
    """

    reference: Array | None
    num_nodes: int = eqx.field(static=True)

    def __init__(self, reference: ArrayLike | None = None, num_nodes: int = 32) -> None:
        self.reference = None if reference is None else jnp.asarray(reference)
        self.num_nodes = num_nodes

    def __repr__(self) -> str:
        origin = "the origin" if self.reference is None else f"shape {self.reference.shape}"
        return f"LineIntegral(num_nodes={self.num_nodes}, reference={origin})"

    def __check_init__(self) -> None:
        _check_count("LineIntegral", "num_nodes", self.num_nodes, 1)
        if self.reference is None:
            return
        if not jnp.issubdtype(self.reference.dtype, jnp.floating):
            raise TypeError(
                f"`LineIntegral(reference=...)` must be real floating point, got dtype "
                f"{self.reference.dtype}."
            )
        if not isinstance(self.reference, Tracer) and not np.all(np.isfinite(self.reference)):
            raise ValueError("`LineIntegral(reference=...)` contains NaN or infinity.")

    def check(self, score_fn: Any, schedule: AbstractNoiseSchedule, event_shape: tuple[int, ...]) -> None:
        del score_fn, schedule
        if self.reference is not None and self.reference.shape != event_shape:
            raise ValueError(
                f"`LineIntegral(reference=...)` has shape {self.reference.shape}, but `event_shape` is "
                f"{event_shape}."
            )

    def normalized(self, score_fn: Any) -> bool:
        del score_fn
        return False

    def log_density(self, score_fn: ScoreFn, noise: NoiseRange, x: Event) -> Scalar:
        t = jnp.asarray(noise.t_min, x.dtype)
        reference = jnp.zeros_like(x) if self.reference is None else self.reference.astype(x.dtype)
        nodes, weights = np.polynomial.legendre.leggauss(self.num_nodes)
        fractions, weights = jnp.asarray(0.5 * (1 + nodes), x.dtype), jnp.asarray(0.5 * weights, x.dtype)
        line = x - reference
        scores = jax.vmap(lambda fraction: score_fn(reference + fraction * line, t))(fractions)
        return jnp.sum(jnp.tensordot(weights, scores, axes=1) * line)

    def shares_evaluation(self, score_fn: Any) -> bool:
        del score_fn
        return False

    def log_density_and_score(self, score_fn: ScoreFn, noise: NoiseRange, x: Event) -> tuple[Scalar, Event]:
        return self.log_density(score_fn, noise, x), score_fn(x, jnp.asarray(noise.t_min, x.dtype))
