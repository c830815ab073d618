"""What has no derivative, found by tracing: networks and likelihoods behind `pure_callback`, loops of unknown
length.
"""

from collections.abc import Callable
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


def why_no_score_derivative(site: Any) -> Exception | None:
    """What JAX raises where it pulls vectors back through the score of a diffusion site, in its event."""
    prior = site.prior
    t = jnp.asarray(prior.noise.t_min, jnp.result_type(float))
    given = one_condition(prior.condition, len(prior.batch_shape))
    x = jax.ShapeDtypeStruct(prior.event_shape, t.dtype)
    return why_no_derivative(lambda x: prior.score_fn(x, t, *given), x)


def in_short(error: Exception) -> str:
    """The first line of what JAX says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


PARTICLES = (
    "In diffusion sites `RTKParticleGibbs` and `RTKGibbs` take none with `twist=TemperedTwist(), "
    "num_guided_steps=0, num_start_steps=0, local=None`: particles do the work, in few dimensions."
)
"""What to write where the likelihood has no derivative in a diffusion site."""


def refuse_without_derivative(
    owner: str, function: Callable[[Any], Any], x: dict[str, Any], instead: str = PARTICLES
) -> None:
    """Raise if a function that a kernel differentiates has no derivative; before anything is compiled.

    Args:
        owner: The kernel.
        function: The log likelihood, or the potential, of values by site.
        x: Shapes and dtypes of those.
        instead: What to write, for the message.
    """
    error = why_no_derivative(function, x)
    if error is not None:
        raise ValueError(
            f"`{owner}` takes the derivative of the likelihood in {sorted(x)}, and it has none: "
            f"{in_short(error)}\n{instead}"
        ) from error
