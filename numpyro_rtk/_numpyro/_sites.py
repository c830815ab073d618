"""What a posterior kernel must know of a NumPyro model: its diffusion sites, and everything else that depends
on them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jax.core import Tracer
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer.gibbs import GIBBS_SITES_KWARG
from numpyro.infer.initialization import init_to_sample
from numpyro.primitives import Messenger
from numpyro.util import is_prng_key

from numpyro_rtk._prior._prior import DiffusionPrior


class DiffusionSite(NamedTuple):
    """A latent site whose prior is a diffusion model."""

    name: str
    prior: DiffusionPrior
    batch_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its value, batch and event."""
        return self.batch_shape + self.prior.event_shape


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
        assert is_prng_key(key)
        return jr.normal(key, self.shape(sample_shape))

    def log_prob(self, value: Any) -> Array:
        batch_dims = jnp.ndim(value) - len(self.event_shape)
        return jnp.zeros(
            jnp.broadcast_shapes(jnp.shape(value)[:batch_dims], self.batch_shape), jnp.result_type(value)
        )


def unwrap_prior(fn: Any) -> DiffusionPrior | None:
    """The diffusion prior inside `expand`, `to_event` and `mask`, or `None`."""
    while not isinstance(fn, DiffusionPrior):
        if not isinstance(
            fn, dist.ExpandedDistribution | dist.Independent | dist.MaskedDistribution | Unweighted
        ):
            return None
        fn = fn.base_dist
    return fn


def _is_masked(fn: Any) -> bool:
    while not isinstance(fn, DiffusionPrior):
        if isinstance(fn, dist.MaskedDistribution):
            return fn._mask is not True
        fn = fn.base_dist
    return False


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


class ModelSites(NamedTuple):
    """The sites of a model that a posterior kernel has to account for."""

    diffusion: tuple[DiffusionSite, ...]
    """Latent diffusion sites in trace order."""
    others: tuple[str, ...]
    """Other latent sample sites."""
    has_deterministic: bool
    """Whether the model has deterministic sites."""


def inspect_model(
    owner: str, model: Callable[..., Any], rng_key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ModelSites:
    """Trace the model once, without evaluating a network, and refuse what no posterior kernel here can
    sample.

    Args:
        owner: Name of the kernel, for messages.
        model: The model as the user gave it, perhaps conditioned by a composite.
        rng_key: One key.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.

    Raises:
        ValueError: for a model without a latent diffusion site, diffusion sites that are masked, scaled,
            transformed, inside a `scan` or dependent on another latent, subsample plates, enumerated sites,
            observations with NaN.
    """
    seen: dict[str, Any] = {}
    # Innermost, so that it sees the laws as the model wrote them.
    seeded = handlers.seed(_LeaveOut(model, seen), rng_key)
    trace = handlers.trace(handlers.substitute(seeded, substitute_fn=init_to_sample)).get_trace(
        *args, **kwargs
    )
    samples = {name: site for name, site in trace.items() if site["type"] == "sample"}
    for name, site in trace.items():
        if site["type"] == "plate":
            size, subsample_size = site["args"]
            if subsample_size is not None and size > subsample_size:
                raise ValueError(
                    f"`{owner}` does not support plates that subsample: plate {name!r} takes "
                    f"{subsample_size} of {size}. "
                    "Give it all data, without `subsample_size`."
                )
    for name, site in samples.items():
        if site["infer"].get("enumerate") == "parallel" and not site["is_observed"]:
            raise ValueError(
                f"`{owner}` does not support enumerated sites: {name!r} is marked "
                f"`infer={{'enumerate': 'parallel'}}`. Sum it "
                "out by hand (`dist.MixtureSameFamily`), or sample it with `numpyro.infer.DiscreteGibbs` as "
                "a block of "
                "`numpyro.infer.Gibbs`."
            )
        # A scan hands on the sites of its body, marked as done, once it has run.
        in_scan = name not in seen or seen[name].get("_control_flow_done", False)
        if in_scan and unwrap_prior(site["fn"]) is not None and not site["is_observed"]:
            raise ValueError(
                f"Diffusion site {name!r} is inside a `scan`, where `{owner}` cannot move it. Write it "
                f"outside, in a plate or "
                "with `.expand(...)`, and pass its slices to the scan."
            )
        if name not in seen and not site["is_observed"]:
            _refuse_transformed(owner, name, site["fn"])
        if site["is_observed"] and not isinstance(site["value"], Tracer) and _has_nan(site["value"]):
            raise ValueError(
                f"Observed site {name!r} has {int(np.sum(np.isnan(np.asarray(site['value']))))} NaN. Replace "
                f"missing "
                "values by any number, and leave them out of the likelihood by "
                "`numpyro.handlers.mask(mask=~isnan(y))` around "
                "the site."
            )
    diffusion = []
    for name, msg in seen.items():
        if samples[name]["is_observed"]:
            continue
        scale = _site_scale(samples[name])
        if _is_masked(msg["fn"]) or scale is not None:
            what = "a mask" if scale is None else "a scale"
            raise ValueError(
                f"Diffusion site {name!r} has {what}: `{owner}` samples priors as they are. Put `mask` and "
                f"`scale` around "
                "the likelihood only."
            )
        diffusion.append(_diffusion_site(name, msg, samples[name]))
    others = tuple(name for name, site in samples.items() if not site["is_observed"] and name not in seen)
    if not diffusion:
        given = kwargs.get(GIBBS_SITES_KWARG, {})
        hint = f" (it has {list(others)})" if others else ""
        hint += (
            f", and {[n for n in seen if n in given]} are conditioned"
            if any(n in given for n in seen)
            else ""
        )
        raise ValueError(
            f"`{owner}` needs a model with a latent `DiffusionPrior` site, and this one has none{hint}. "
            'Write `numpyro.sample("x", DiffusionPrior(score_fn, event_shape))` in the model, or use another '
            "kernel."
        )
    _refuse_dependent(
        owner, model, rng_key, args, kwargs, diffusion, {name: samples[name]["value"] for name in others}
    )
    has_deterministic = any(site["type"] == "deterministic" for site in trace.values())
    return ModelSites(tuple(diffusion), others, has_deterministic)


def _site_scale(site: dict[str, Any]) -> Any:
    """Scale of a site's log probability, `None` where it is 1."""
    scale = site["scale"]
    return None if isinstance(scale, int | float) and scale == 1 else scale


def diffusion_site_names(trace: Any) -> tuple[str, ...]:
    """Names of the latent diffusion sites of a trace; usable as a site selector of NumPyro's `Gibbs`."""
    return tuple(
        name
        for name, site in trace.items()
        if site["type"] == "sample" and not site["is_observed"] and unwrap_prior(site["fn"]) is not None
    )


def latent_diffusion_sites(
    model: Callable[..., Any], rng_key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[DiffusionSite, ...]:
    """The latent diffusion sites of a model that was inspected before, in trace order."""
    seen: dict[str, Any] = {}
    seeded = handlers.seed(_LeaveOut(model, seen), rng_key)
    trace = handlers.trace(handlers.substitute(seeded, substitute_fn=init_to_sample)).get_trace(
        *args, **kwargs
    )
    return tuple(
        _diffusion_site(name, msg, trace[name])
        for name, msg in seen.items()
        if not trace[name]["is_observed"]
    )


def _diffusion_site(name: str, msg: dict[str, Any], site: dict[str, Any]) -> DiffusionSite:
    prior = unwrap_prior(msg["fn"])
    assert prior is not None
    shape = tuple(jnp.shape(site["value"]))
    return DiffusionSite(name, prior, shape[: len(shape) - len(prior.event_shape)])


def _has_nan(value: Any) -> bool:
    value = np.asarray(value)
    return bool(np.issubdtype(value.dtype, np.floating) and np.any(np.isnan(value)))


def _refuse_transformed(owner: str, name: str, fn: Any) -> None:
    while not isinstance(fn, DiffusionPrior):
        if not hasattr(fn, "base_dist"):
            return
        fn = fn.base_dist
    raise ValueError(
        f"Site {name!r} transforms a diffusion prior, and `{owner}` moves the prior itself. Use "
        f"`numpyro.handlers.reparam(model, config={{{name!r}: TransformReparam()}})`, or sample the "
        f"`DiffusionPrior` and apply "
        "the transform with `numpyro.deterministic`."
    )


def _refuse_dependent(
    owner: str,
    model: Callable[..., Any],
    rng_key: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sites: list[DiffusionSite],
    others: dict[str, Any],
) -> None:
    """Raise if the score of a diffusion site depends on another latent site (other diffusion sites
    included).
    """
    latents = (
        others | kwargs.get(GIBBS_SITES_KWARG, {}) | {site.name: jnp.zeros(site.shape) for site in sites}
    )
    floating = {
        name: value for name, value in latents.items() if jnp.issubdtype(jnp.result_type(value), jnp.floating)
    }
    fixed = {name: value for name, value in latents.items() if name not in floating}
    plain = {key: value for key, value in kwargs.items() if key != GIBBS_SITES_KWARG}
    inner = _unconditioned(model)

    def scores(values: dict[str, Any]) -> dict[str, Array]:
        seen: dict[str, Any] = {}
        substituted = handlers.substitute(handlers.seed(_LeaveOut(inner, seen), rng_key), data=values | fixed)
        handlers.trace(substituted).get_trace(*args, **plain)
        result = {}
        for site in sites:
            prior = unwrap_prior(seen[site.name]["fn"])
            assert prior is not None
            x, t = jnp.zeros(prior.event_shape), jnp.asarray(prior.schedule.t_min, float)
            result[site.name] = prior.score_fn(x, t)
        return result

    closed, shapes = jax.make_jaxpr(scores, return_shape=True)(floating)
    tainted = set(map(id, closed.jaxpr.invars))
    for equation in closed.jaxpr.eqns:
        if any(id(variable) in tainted for variable in equation.invars):
            tainted |= set(map(id, equation.outvars))
    for name, output in zip(sorted(shapes), closed.jaxpr.outvars, strict=True):
        if id(output) in tainted:
            raise ValueError(
                f"The score of diffusion site {name!r} depends on another latent site. `{owner}` needs a "
                f"score that is fixed "
                "given the model's arguments: pass what it is conditioned on as data."
            )


def _unconditioned(model: Any) -> Any:
    """The model inside NumPyro's `conditioned`, which hides sites that a composite conditions on."""
    while isinstance(model, functools.partial) and model.func.__name__ == "_conditioned_model":
        model = model.args[0]
    return model
