"""What a conditional prior is conditioned on: one condition for each element of its batch."""

import math
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array


AT_PLACEHOLDERS: ContextVar[bool] = ContextVar("AT_PLACEHOLDERS", default=False)
"""Whether a model is traced at placeholders of diffusion sites: what depends on them may be no number."""


def check_condition(condition: Any, condition_ndims: Any) -> tuple[Array | None, tuple[int, ...]]:
    """A condition as an array, and the batch shape that it gives.

    Raises:
        TypeError, ValueError: for what is no array of numbers, has NaN, or fewer axes than one condition.
    """
    what = (
        "`condition_ndims` must be the number of axes of one condition (0 for a scalar or a label, 1 for a "
        "vector)"
    )
    if isinstance(condition_ndims, bool) or not isinstance(condition_ndims, int | np.integer):
        raise TypeError(f"{what}, got {condition_ndims!r}.")
    if condition_ndims < 0:
        raise ValueError(f"{what}, got {condition_ndims}.")
    if condition is None:
        if condition_ndims:
            raise ValueError(
                f"`condition_ndims={condition_ndims}` says how many axes one condition has, and there is no "
                "`condition`."
            )
        return None, ()
    try:
        array = jnp.asarray(condition)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`condition` must be an array, one condition for each element of a batch, got "
            f"{type(condition).__name__}. A score that takes more than one array takes them from a function: "
            "`lambda x, t, c: network(x, t, c, rest)`."
        ) from error
    if array.ndim < condition_ndims:
        raise ValueError(
            f"`condition` has shape {array.shape}, and one condition has `condition_ndims={condition_ndims}` "
            "axes. Axes before those are the batch shape."
        )
    if array.size == 0:
        raise ValueError(f"`condition` has shape {array.shape}: there is no condition in it.")
    if not AT_PLACEHOLDERS.get():
        refuse_not_finite("`condition`", array)
    return array, array.shape[: array.ndim - condition_ndims]


def refuse_not_finite(what: str, condition: Array) -> None:
    """Raise for a condition with NaN or infinity; silent under a trace.

    Args:
        what: What it is called in the message.
        condition: Of one event or of many.
    """
    if not isinstance(condition, Tracer) and jnp.issubdtype(condition.dtype, jnp.inexact):
        bad = int(np.sum(~np.isfinite(np.asarray(condition))))
        if bad:
            raise ValueError(f"{what} has NaN or infinity ({bad} of {condition.size} values).")


def one_condition(condition: Array | None, num_batch: int) -> tuple[Any, ...]:
    """Shape and dtype of one condition, as further arguments of a score: none where there is none."""
    if condition is None:
        return ()
    return (jax.ShapeDtypeStruct(condition.shape[num_batch:], condition.dtype),)


def members(condition: Array | None, own: tuple[int, ...], batch_shape: tuple[int, ...]) -> Array | None:
    """Conditions of all events of a batch, shape `(events, *condition)`.

    Args:
        condition: Of a prior, with its batch shape `own` in front.
        own: Batch shape of the prior.
        batch_shape: Of the events, to which `own` is broadcast.
    """
    if condition is None:
        return None
    one = condition.shape[len(own) :]
    full = condition.reshape((1,) * (len(batch_shape) - len(own)) + condition.shape)
    return jnp.broadcast_to(full, batch_shape + one).reshape(math.prod(batch_shape), *one)
