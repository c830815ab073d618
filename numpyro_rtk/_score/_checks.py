"""Checks of a score callable; none needs the value of a traced array."""

import logging
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from numpyro_rtk._noising._base import AbstractNoiseSchedule
from numpyro_rtk._noising._grid import NoiseGrid
from numpyro_rtk._noising._terminal import standard_terminal
from numpyro_rtk._noising._variance_preserving import OU
from numpyro_rtk._score._model import ScoreModel
from numpyro_rtk._user import user_line


def check_score_fn(score_fn: Any) -> None:
    """Raise unless `score_fn` can be a score callable."""
    if isinstance(score_fn, type):
        raise TypeError(
            f"`score_fn` must be callable as score_fn(x, t); got the class {score_fn.__name__}, not an "
            f"instance."
        )
    if not callable(score_fn):
        raise TypeError(f"`score_fn` must be callable as score_fn(x, t), got {type(score_fn).__name__}.")


def check_event_shape(event_shape: Any) -> tuple[int, ...] | None:
    """Return a valid event shape as a tuple of ints, or `None`."""
    if event_shape is None:
        return None
    try:
        shape = tuple(event_shape)
    except TypeError:
        raise TypeError(
            f"`event_shape` must be a tuple of integers, got {event_shape!r}. For vectors write "
            f"`event_shape=({event_shape},)`."
        ) from None
    if not all(isinstance(size, int | np.integer) and not isinstance(size, bool) for size in shape):
        raise TypeError(f"`event_shape` must be a tuple of integers, got {event_shape!r}.")
    if any(size <= 0 for size in shape):
        raise ValueError(
            f"`event_shape` must have positive sizes (an empty event cannot be sampled), got {shape}."
        )
    return tuple(int(size) for size in shape)


def check_batch_size(batch_size: Any) -> int | None:
    """Return a valid number of draws at a time, or `None`."""
    if batch_size is None:
        return None
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
    return int(batch_size)


def resolve_schedule(score_fn: Any, schedule: Any) -> AbstractNoiseSchedule | None:
    """The kernel's schedule: the one given, which must agree with the score's own, or the score's own."""
    own = getattr(score_fn, "schedule", None)
    own = own if isinstance(own, AbstractNoiseSchedule) else None
    if schedule is None:
        return own
    if not isinstance(schedule, AbstractNoiseSchedule):
        hint = f" Did you mean `{schedule.__name__}()`?" if isinstance(schedule, type) else ""
        raise TypeError(f"`schedule` must be a noise schedule such as `OU()`, got {schedule!r}.{hint}")
    if own is not None and not _same_process(own, schedule):
        raise ValueError(
            f"`schedule={schedule}` is another noising process than the one of `score_fn`, {own}: the draws "
            "would follow the wrong law. Leave `schedule` out to use the score's own."
        )
    return schedule


ASSUMED_SCHEDULE = OU()
"""The schedule where nobody names one, known by its identity."""
_ASSUMED_AT: set[tuple[str, str, int]] = set()


def is_assumed(schedule: AbstractNoiseSchedule) -> bool:
    """Whether nobody named this schedule."""
    return schedule is ASSUMED_SCHEDULE


def shown(schedule: AbstractNoiseSchedule) -> str:
    """The schedule for a `repr`, which says if nobody named it."""
    return f"{schedule} (assumed)" if is_assumed(schedule) else str(schedule)


def schedule_or_assumed(owner: str, score_fn: Any, schedule: Any) -> AbstractNoiseSchedule:
    """As `resolve_schedule`, and `OU()` where there is none, which is said in the log, once a line of code.

    A line of the log and no warning: it is no fault, and a model is traced many times.
    """
    resolved = resolve_schedule(score_fn, schedule)
    if resolved is not None:
        return resolved
    where = (owner, *user_line())
    if where not in _ASSUMED_AT:
        _ASSUMED_AT.add(where)
        logging.getLogger("numpyro_rtk").warning(
            "`%s` assumes the noising process `%s`, as neither `score_fn` nor `schedule=` names one. Hardly "
            "any network was trained under it: write `schedule=` with the process of yours (%s:%d).",
            *(owner, ASSUMED_SCHEDULE, *where[1:]),
        )
    return ASSUMED_SCHEDULE


def _same_process(one: AbstractNoiseSchedule, other: AbstractNoiseSchedule) -> bool:
    # Grids may differ (t_min, t_max); the processes must agree wherever both are defined.
    low, high = max(one.t_min, other.t_min), min(one.t_max, other.t_max)
    if not low < high:
        return False
    with jax.ensure_compile_time_eval():
        t = jnp.asarray(np.linspace(low, high, 7))
        pairs = [(s.alpha(t), s.sigma(t), jnp.asarray(s.network_time(t), float)) for s in (one, other)]
        return all(np.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*pairs, strict=True))


def check_score_shape(
    score_fn: Any,
    x: Any,
    t: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    in_model: bool = False,
    condition: tuple[Any, ...] = (),
) -> None:
    """Raise unless the score of one event has its shape and dtype. Traces the score; computes nothing.

    A kernel passes the arguments of `MCMC.run` on to the score; a prior in a model has no further arguments
    but its condition, of which `condition` has the shape and dtype.
    """
    cast, given = "", ""
    if condition:
        given = f", and a condition of shape {condition[0].shape} and dtype {condition[0].dtype}"
        further = ", a scalar time and one condition"
        advice = (
            "If its condition has axes of its own, say how many: `condition_ndims=1` for a vector; if it "
            "wants real numbers, cast them: `condition=c.astype(float)`"
        )
    elif in_model:
        further = " and a scalar time"
        advice = (
            "If it wants a condition, give it one, `DiffusionPrior(..., condition=c)`, or bind it: "
            "`lambda x, t: network(x, t, condition)`"
        )
    else:
        further = ", a scalar time and the further arguments of `MCMC.run`"
        advice = "If it wants a condition, pass that to `MCMC.run(rng_key, condition)`"
        cast = ", or start from `init_params` of its dtype"
    hint = (
        f"It is called with one event{further}. If your network takes batches only, wrap it: "
        f"`BatchedNetwork(network)` (inside the adapter, if you use one). {advice}; if it has dropout, "
        "switch it to inference mode."
    )
    try:
        score = eqx.filter_eval_shape(
            lambda x, t, *condition: score_fn(x, t, *condition, *args, **kwargs), x, t, *condition
        )
    except Exception as error:
        raise ValueError(
            f"`score_fn` failed on one event of shape {x.shape} and scalar t{given}: {type(error).__name__}: "
            f"{error}\n{hint}"
        ) from error
    if not isinstance(score, jax.ShapeDtypeStruct):
        raise TypeError(f"`score_fn` must return one array, got {type(score).__name__}.")
    if score.shape != x.shape:
        raise ValueError(
            f"`score_fn` returned shape {score.shape} for an event of shape {x.shape}; they must agree. "
            f"{hint}"
        )
    if score.dtype != x.dtype:
        raise TypeError(
            f"`score_fn` returned dtype {score.dtype} for an event of dtype {x.dtype}; they must agree. "
            f"Cast its result with `.astype(x.dtype)`{cast}."
        )


MAX_FIRST_CALLS = 16
"""Conditions that the first call looks at."""


def first_call(model: ScoreModel, grid: NoiseGrid, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Points at both ends of the grid and the scores there, for `check_first_call`: two evaluations, or two
    for each of up to `MAX_FIRST_CALLS` members of a family, shape `(2, members, *event)`.
    """
    top = standard_terminal(grid, shape)
    noise = top.sample(jr.key(0))
    ends = jnp.stack([noise, noise / jnp.sqrt(top.variance)])
    times = jnp.stack([grid.t[0], grid.t[-1]])
    if model.conditions is None:
        return ends, jax.vmap(lambda x, t: model(x, t))(ends, times)
    some = model.thinned(MAX_FIRST_CALLS)
    repeated = jnp.repeat(ends[:, None], some.num_members, axis=1)
    return ends, jax.vmap(some.each)(repeated, times)


def check_first_call(called: tuple[Array, Array], grid: NoiseGrid) -> None:
    """Refuse NaN or infinity of the score at either end of the grid.

    Under `jit`, or `vmap` over arguments of the score, there is no value to look at.

    Args:
        called: From `first_call`.
        grid: The same as there.
    """
    _, scores = called
    if isinstance(scores, Tracer):
        return
    for score, t in zip(np.asarray(scores), (grid.t[0], grid.t[-1]), strict=True):
        if not np.all(np.isfinite(score)):
            bad = int(np.sum(~np.isfinite(score)))
            raise ValueError(
                f"`score_fn` returned NaN or infinity at its first call, t={t:g} ({bad} of {score.size} "
                "values). Check that the network was trained down to t_min and up to t_max of the schedule."
            )
