"""What draws a segment: the contract of all reverse kernels."""

import abc
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from numpyro_rtk._custom_types import Event, Flag, RandomKey, Scalar
from numpyro_rtk._reverse._segment import ReverseTransition
from numpyro_rtk._score._model import has_energy


class SegmentTuning(NamedTuple):
    """What warmup learns about one segment."""

    step_size: Scalar
    """Step size in the inner kernel's own unit."""
    curvature: Event | Scalar
    """Curvature of `-log p_s` by coordinate, `E score_s^2`, at most `1 / sigma_s^2`."""


class SegmentEntry(NamedTuple):
    """What a kernel with a memory knows about the segments before, the last one first."""

    data_predictions: Float[Array, "history ..."]
    """`E[x_0 | x]` at their starts, shape `(history, *event)`."""
    half_log_snr_steps: Float[Array, " history"]
    """Their lengths in `log(alpha / sigma)`; 0 where there was none."""

    def after(self, data_prediction: Event, half_log_snr_step: Scalar) -> "SegmentEntry":
        """That of the next segment."""
        history = self.half_log_snr_steps.shape[0]
        predictions = jnp.concatenate([data_prediction[None], self.data_predictions])
        steps = jnp.append(half_log_snr_step, self.half_log_snr_steps)
        return SegmentEntry(predictions[:history], steps[:history])


def first_entry(x: Event, history: int = 0) -> SegmentEntry:
    """That of a segment with none before it."""
    return SegmentEntry(jnp.zeros((history, *x.shape), x.dtype), jnp.zeros(history, x.dtype))


class SegmentResult(NamedTuple):
    """What one segment gives."""

    x: Event
    """The draw at time `s`."""
    score: Event
    """Score of `p_s` at the draw, where the inner kernel knows it; zeros otherwise."""
    entry: SegmentEntry
    """For the next segment."""
    accept_prob: Scalar
    """Mean acceptance probability over the inner steps; 1 for kernels without an accept step."""
    square_score: Event
    """Squared score of `p_s` at the draw, whose expectation is the curvature of `-log p_s` by coordinate."""
    diverging: Flag
    """Whether something non-finite, or an exploding unadjusted step, was met."""
    failed: Flag
    """Whether the draw itself is unusable, so that the pass must be discarded."""


class AbstractInnerKernel(eqx.Module):
    """A reverse kernel: how one segment is drawn. The paper's *inner kernel*, to which it gives the name.

    Concrete subclasses are final and are values: all state is passed.
    """

    adapts_step_size: eqx.AbstractClassVar[bool]
    """Whether warmup tunes the step size towards a target acceptance probability."""

    @property
    def given_step_size(self) -> Any:
        """The step size that the user fixed, or `None` where it is tuned."""
        return getattr(self, "step_size", None)

    @property
    def largest_step_size(self) -> float:
        """Bound on tuned step sizes."""
        return getattr(self, "max_step_size", math.inf)

    @property
    def history(self) -> int:
        """Number of segments before that a segment depends on by more than `x_t`, as no particle's may."""
        return 0

    @property
    @abc.abstractmethod
    def needs_energy(self) -> bool:
        """Whether the score must also provide `energy(x, t)`."""

    @property
    @abc.abstractmethod
    def evaluations_per_segment(self) -> int:
        """Score evaluations one segment costs."""

    @abc.abstractmethod
    def default_step_size(self, precision: Scalar, dim: int) -> Scalar:
        """A safe step size for a target of curvature `precision` in `dim` dimensions."""

    @abc.abstractmethod
    def run_segment(
        self, key: RandomKey, target: ReverseTransition, entry: SegmentEntry, tuning: SegmentTuning
    ) -> SegmentResult:
        """Draw `x_s` given `x_t`: one segment of the reverse pass, for one event."""


def check_num_steps(owner: str, num_steps: Any, minimum: int = 1) -> None:
    """Raise unless `num_steps` is an integer of at least `minimum`."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or num_steps < minimum:
        raise ValueError(
            f"`{owner}(num_steps=...)` must be an integer of at least {minimum}, got {num_steps!r}."
        )


def check_positive(owner: str, name: str, value: Any, *, scalar: bool = False) -> None:
    """Raise unless `value` is `None` or positive and finite: a scalar, or one value per segment."""
    if value is None or isinstance(value, Tracer):
        return
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"`{owner}({name}=...)` must be a positive number, got {value!r}.") from None
    if array.ndim > (0 if scalar else 1):
        shape = "a scalar" if scalar else "a scalar or one value per segment"
        raise ValueError(f"`{owner}({name}=...)` must be {shape}, got shape {array.shape}.")
    if not np.all(np.isfinite(array) & (array > 0)):
        raise ValueError(f"`{owner}({name}=...)` must be positive and finite, got {value!r}.")


def check_reverse_kernel(name: str, kernel: Any) -> None:
    """Raise unless the argument `name` is a reverse kernel."""
    if not isinstance(kernel, AbstractInnerKernel):
        hint = f" Did you mean `{kernel.__name__}()`?" if isinstance(kernel, type) else ""
        what = "an inner kernel" if name == "inner" else "a reverse kernel"
        raise TypeError(f"`{name}` must be {what} such as `MALA(num_steps=8)`, got {kernel!r}.{hint}")


def check_kernel(name: str, kernel: Any, score_fn: Any, num_segments: int) -> None:
    """Raise unless the argument `name` is a reverse kernel that this score and grid can serve."""
    check_reverse_kernel(name, kernel)
    if kernel.needs_energy and not has_energy(score_fn):
        raise TypeError(
            f"`{name}={type(kernel).__name__}(energy_difference=ExactEnergy())` needs a score with a method "
            f"`energy(x, t)`, but `score_fn` ({type(score_fn).__name__}) has none. Wrap an energy network as "
            "`EnergyScore(energy_fn)`, or use `energy_difference=Trapezoid()`, which needs scores only."
        )
    step_size = kernel.given_step_size
    if step_size is not None and np.ndim(step_size) == 1 and np.shape(step_size)[0] != num_segments:
        raise ValueError(
            f"`{type(kernel).__name__}(step_size=...)` has {np.shape(step_size)[0]} values for "
            f"{num_segments} "
            f"segments. "
            "Give a scalar or one value per segment."
        )
