"""A model traced without a network: what stands for its diffusion sites, and the model as it was written."""

import functools
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers, plate
from numpyro.distributions import constraints
from numpyro.infer.gibbs import conditioned
from numpyro.infer.initialization import init_to_sample
from numpyro.primitives import Messenger
from numpyro.util import is_prng_key

from numpyro_rtk._prior._conditions import AT_PLACEHOLDERS
from numpyro_rtk._prior._prior import DiffusionPrior
from numpyro_rtk._reverse._path import path_log_density, PathGrid
from numpyro_rtk._score._hoist import hoist, TRACED


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
        if type(fn) not in (*WRAPPERS, Unweighted, PathLaw):
            return None
        fn = fn.base_dist
    return fn


PATHS_KWARG = "_noising_paths"
"""Keyword argument by which `without_diffusion(model)` is given noising paths, `{site: SitePath}`."""


class SitePath(NamedTuple):
    """The noising paths of all events of a diffusion site whose condition is a latent."""

    grid: PathGrid
    """Segments of the paths."""
    path: Array
    """Shape `(events, levels, *event)`, from noise to data."""
    score_arrays: list[Any]
    """Arrays of the site's score, arguments of the compiled program."""


class PathLaw(Unweighted):
    """Stands for a diffusion prior whose condition is a latent: `log_prob` is that of a noising path."""

    def __init__(self, base_dist: Any, site_path: SitePath) -> None:
        self.site_path = site_path
        super().__init__(base_dist)

    def log_prob(self, value: Any) -> Array:
        prior, (grid, path, arrays) = unwrap_prior(self.base_dist), self.site_path
        assert prior is not None
        batch = jnp.shape(value)[: jnp.ndim(value) - prior.event_dim]
        conditions = prior.model(batch).conditions
        x, t = (jax.ShapeDtypeStruct(shape, path.dtype) for shape in (prior.event_shape, ()))
        own, rebuild = hoist(prior.score_fn, x, t, conditions=conditions)
        model = rebuild(own.arrays if TRACED in own.fingerprint else arrays)

        def log_density(event: Array, path: Array) -> Array:
            return path_log_density(model.member(event), grid, path)

        values = jax.vmap(log_density)(jnp.arange(path.shape[0]), path).reshape(batch)
        # Axes that `to_event` took into an event.
        return jnp.sum(values, axis=tuple(range(jnp.ndim(value) - len(self.event_shape), len(batch))))


class _LeaveOut(Messenger):
    """Replaces the law of every diffusion site by one without a density, or by that of its noising path."""

    def __init__(
        self, fn: Any = None, seen: dict[str, Any] | None = None, paths: dict[str, SitePath] | None = None
    ) -> None:
        self.seen, self.paths = seen, paths or {}
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or unwrap_prior(msg["fn"]) is None:
            return
        # An inner one of these may have been here before.
        fn = msg["fn"].base_dist if isinstance(msg["fn"], Unweighted) else msg["fn"]
        if self.seen is not None:
            self.seen[msg["name"]] = {**msg, "fn": fn}
        path = self.paths.get(msg["name"])
        msg["fn"] = Unweighted(fn) if path is None else PathLaw(fn, path)


def _without_diffusion(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    paths = kwargs.pop(PATHS_KWARG, None)
    with _LeaveOut(paths=paths):
        return model(*args, **kwargs)


def without_diffusion(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with the densities of its diffusion sites left out, but for those of noising paths that are
    given it; idempotent, and pickles.
    """
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
        token = AT_PLACEHOLDERS.set(True)
        try:
            return handlers.trace(handlers.substitute(seeded, **given)).get_trace(*args, **kwargs), seen
        except ValueError as error:
            refuse_misfit(error)
            raise
        finally:
            AT_PLACEHOLDERS.reset(token)


def refuse_misfit(error: ValueError) -> None:
    """Raise by name if what failed was to fit the condition of a diffusion site into its plates.

    NumPyro's plates fail with the two shapes alone; what they were looking at is in their frames.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        msg = frame.f_locals.get("msg")
        if not isinstance(msg, dict) or msg.get("type") != "sample":
            continue
        prior = unwrap_prior(msg["fn"])
        if (
            prior is not None
            and prior.condition is not None
            and isinstance(frame.f_locals.get("self"), plate)
        ):
            own = frame.f_locals["self"]
            raise ValueError(
                f"The `condition` of diffusion site {msg['name']!r} has batch shape {prior.batch_shape}, "
                f"which does not fit plate {own.name!r} of size {own.size}: give one condition for each "
                "element, or one for all (shape `()`). `condition_ndims` counts the axes of one condition."
            ) from error
