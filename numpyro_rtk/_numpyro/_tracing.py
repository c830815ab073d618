"""A model traced without a network: what stands for its diffusion sites, and the model as it was written."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer.gibbs import conditioned
from numpyro.infer.initialization import init_to_sample
from numpyro.primitives import Messenger
from numpyro.util import is_prng_key

from numpyro_rtk._prior._prior import DiffusionPrior


class Unweighted(dist.Distribution):
    """Stands for a diffusion prior where its density is accounted for elsewhere: `log_prob` is 0.

    `sample` returns a placeholder, so that tracing a model costs no score evaluation.
    """

    def __init__(self, base_dist: Any) -> None:
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, base_dist.event_shape)

    @property
    def support(self) -> Any:
        return (
            constraints.independent(constraints.real, len(self.event_shape))
            if self.event_shape
            else constraints.real
        )

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        if key is None:
            # NumPyro's HMC constrains its own sites by a replay without keys where a bound is an array.
            return jnp.zeros(self.shape(sample_shape))
        assert is_prng_key(key)
        return jr.normal(key, self.shape(sample_shape))

    def log_prob(self, value: Any) -> Array:
        batch_dims = jnp.ndim(value) - len(self.event_shape)
        return jnp.zeros(
            jnp.broadcast_shapes(jnp.shape(value)[:batch_dims], self.batch_shape), jnp.result_type(value)
        )


WRAPPERS: Any = (dist.ExpandedDistribution, dist.Independent, dist.MaskedDistribution)
"""What `expand`, `to_event` and `mask` give; exact types, as a subclass may have a `log_prob` of its own."""


def unwrap_prior(fn: Any) -> DiffusionPrior | None:
    """The diffusion prior inside `expand`, `to_event` and `mask`, or `None`."""
    while not isinstance(fn, DiffusionPrior):
        if type(fn) not in (*WRAPPERS, Unweighted):
            return None
        fn = fn.base_dist
    return fn


class _LeaveOut(Messenger):
    """Replaces the law of every diffusion site by one without a density."""

    def __init__(self, fn: Any = None, seen: dict[str, Any] | None = None) -> None:
        self.seen = seen
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or unwrap_prior(msg["fn"]) is None:
            return
        # An inner one of these may have been here before.
        fn = msg["fn"].base_dist if isinstance(msg["fn"], Unweighted) else msg["fn"]
        if self.seen is not None:
            self.seen[msg["name"]] = {**msg, "fn": fn}
        msg["fn"] = Unweighted(fn)


def _without_diffusion(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _LeaveOut():
        return model(*args, **kwargs)


def without_diffusion(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with the densities of its diffusion sites left out; idempotent, and pickles."""
    if isinstance(model, functools.partial) and model.func is _without_diffusion:
        return model
    return functools.partial(_without_diffusion, model)


def add_deterministic(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], z: dict[str, Any]
) -> dict[str, Any]:
    """Values of all latents, and the deterministic sites of the model there; evaluates no network."""
    replayed = handlers.substitute(handlers.seed(without_diffusion(model), jr.key(0)), data=z)
    trace = handlers.trace(replayed).get_trace(*args, **kwargs)
    return z | {name: site["value"] for name, site in trace.items() if site["type"] == "deterministic"}


_CONDITIONED: Any = getattr(conditioned(_without_diffusion), "func")  # noqa: B009 - a `partial`, typed as a callable


def user_model(model: Any) -> Any:
    """The model as the user wrote it: without what composites wrap around it to condition and leave out."""
    while isinstance(model, functools.partial) and (
        model.func is _CONDITIONED or model.func is _without_diffusion
    ):
        model = model.args[0]
    return model


def _placeholder(site: dict[str, Any]) -> Any:
    """A draw, for a site that has no value yet."""
    return init_to_sample(site) if site["value"] is None else None


def traced_sites(
    model: Callable[..., Any],
    rng_key: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A trace of the model that evaluates no network, and its diffusion sites as the model wrote them.

    Values that are not given are placeholders, so that arguments of laws are not validated: a rate that the
    prior keeps positive may be negative here.

    Args:
        model: The model.
        rng_key: One key.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values of latents; `None`: draws of their laws, and placeholders for diffusion sites.
    """
    seen: dict[str, Any] = {}
    # Innermost, so that it sees the laws as the model wrote them.
    seeded = handlers.seed(_LeaveOut(model, seen), rng_key)
    given: Any = {"substitute_fn": _placeholder} if values is None else {"data": values}
    with numpyro.validation_enabled(False):
        return handlers.trace(handlers.substitute(seeded, **given)).get_trace(*args, **kwargs), seen
