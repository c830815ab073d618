"""What has no derivative, found by tracing: networks and likelihoods behind `pure_callback`, loops of unknown
length.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_rtk._prior._conditions import one_condition


def why_no_derivative(function: Callable[[Any], Any], x: Any) -> Exception | None:
    """What JAX raises where it pulls vectors back through a function, `None` where it can, and where the
    function fails by itself.

    Traces it, computes nothing.

    Args:
        function: Of one argument.
        x: Its shapes and dtypes.
    """

    def pull_back(x: Any) -> Any:
        value, pullback = jax.vjp(function, x)
        return pullback(value)

    try:
        jax.eval_shape(pull_back, x)
    except Exception as error:
        return error if _can_be_traced(function, x) else None
    return None


def _can_be_traced(function: Callable[[Any], Any], x: Any) -> bool:
    try:
        jax.eval_shape(function, x)
    except Exception:
        return False
    return True


def score_derivative(site: Any) -> Exception | None:
    """The same of the score of a diffusion site in its event."""
    prior = site.prior
    t = jnp.asarray(prior.noise.t_min, jnp.result_type(float))
    given = one_condition(prior.condition, len(prior.batch_shape))
    x = jax.ShapeDtypeStruct(prior.event_shape, t.dtype)
    return why_no_derivative(lambda x: prior.score_fn(x, t, *given), x)


def in_short(error: Exception) -> str:
    """The first line of what JAX says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


WITHOUT = "`twist=TemperedTwist(), num_guided_steps=0, num_start_steps=0, local=None`"
"""Options of particle Gibbs with which nothing asks for a derivative of the likelihood."""


@contextmanager
def naming_what_has_no_derivative(owner: str, function: Callable[[Any], Any], x: Any) -> Iterator[None]:
    """Where something fails, and a function that the kernel differentiates has no derivative, say so and what
    to write instead.

    Args:
        owner: The kernel.
        function: The log likelihood, or the potential, of values by site.
        x: Shapes and dtypes of those.
    """
    try:
        yield
    except Exception as error:
        reason = why_no_derivative(function, x)
        if reason is None:
            raise
        raise ValueError(
            f"`{owner}` takes the derivative of the likelihood in {sorted(x)}, and it has none: "
            f"{in_short(reason)}\n"
            f"`RTKParticleGibbs` with {WITHOUT} takes none, nor does `RTKGibbs` with these options in the "
            "diffusion sites: particles do the work, in few dimensions."
        ) from error
