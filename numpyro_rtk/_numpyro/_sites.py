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
import numpyro
import numpyro.distributions as dist
from jax.core import Tracer
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer.gibbs import conditioned, GIBBS_SITES_KWARG
from numpyro.infer.initialization import init_to_sample
from numpyro.primitives import Messenger
from numpyro.util import is_prng_key

from numpyro_rtk._numpyro._dependence import dependence
from numpyro_rtk._prior._prior import DiffusionPrior
from numpyro_rtk._score._model import score_methods


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


_BY_VALUES = (
    ", or use NumPyro's `DiscreteHMCGibbs(NUTS(model))` with `density=ProbabilityFlow()`, whose values are "
    "normalised and serve a discrete latent."
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


class ModelSites(NamedTuple):
    """The sites of a model that a posterior kernel has to account for."""

    diffusion: tuple[DiffusionSite, ...]
    """Latent diffusion sites in trace order."""
    others: tuple[str, ...]
    """Other latent sample sites."""
    trace: Any
    """The trace; diffusion sites have placeholders as values."""


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
    trace, seen = traced_sites(model, rng_key, args, kwargs)
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
                f"`infer={{'enumerate': 'parallel'}}`. Leave the mark out and sample it: "
                f"{kernel_for_discrete(samples)}."
            )
        # A scan hands on the sites of its body, marked as done, once it has run.
        in_scan = name not in seen or seen[name].get("_control_flow_done", False)
        if in_scan and unwrap_prior(site["fn"]) is not None:
            raise ValueError(
                f"Diffusion site {name!r} is inside a `scan`, where `{owner}` cannot move it. Write it "
                f"outside, in a plate or "
                "with `.expand(...)`, and pass its slices to the scan."
            )
        if name not in seen and not site["is_observed"]:
            _refuse_transformed(owner, name, site["fn"])
        if site["is_observed"] and not isinstance(site["value"], Tracer) and _has_nan(site["value"]):
            raise ValueError(
                f"Observed site {name!r} has {int(np.sum(np.isnan(np.asarray(site['value']))))} NaN. Leave "
                "missing values out of its likelihood and put any number in their place. Where `y` has what "
                "is observed:\n"
                "    observed = ~jnp.isnan(y)\n"
                f"    numpyro.sample({name!r}, dist.Normal(...).mask(observed), obs=jnp.nan_to_num(y))\n"
                "The mask goes inside `.to_event(...)`: `dist.Normal(...).mask(observed).to_event(1)`."
            )
    diffusion = []
    for name, msg in seen.items():
        law: Any = type(unwrap_prior(msg["fn"]))
        if law.log_prob is not DiffusionPrior.log_prob:
            raise ValueError(
                f"Diffusion site {name!r} has a `log_prob` of its own ({law.__name__}), and `{owner}` "
                "samples the law of its score. Use a plain `DiffusionPrior`, and put the rest into the model "
                "as a `numpyro.factor`."
            )
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
    _refuse_dependent(owner, model, args, kwargs)
    return ModelSites(tuple(diffusion), others, trace)


def kernel_for_discrete(samples: dict[str, Any]) -> str:
    """What to write for a model with discrete latents, as code.

    Args:
        samples: Sample sites of a trace of the model.
    """
    continuous = [
        name
        for name, site in samples.items()
        if not (site["is_observed"] or site["fn"].support.is_discrete or unwrap_prior(site["fn"]))
    ]
    inner = "DiscreteHMCGibbs(NUTS(model))" if continuous else "DiscreteGibbs(model)"
    return f"`RTKGibbs({inner})`"


def refuse_discrete(owner: str, trace: dict[str, Any]) -> None:
    """Raise if a latent of a trace is discrete, for a kernel that moves along gradients."""
    samples = {name: site for name, site in trace.items() if site["type"] == "sample"}
    names = [n for n, site in samples.items() if not site["is_observed"] and site["fn"].support.is_discrete]
    if names:
        raise ValueError(
            f"`{owner}` cannot sample the discrete latent sites {names}: it follows gradients. Use "
            f"{kernel_for_discrete(samples)}, which samples all latents."
        )


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
    trace, seen = traced_sites(model, rng_key, args, kwargs)
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
    owner: str, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise if the score of a diffusion site, latent or not, depends on a latent of the user's model.

    What a composite conditions on is a latent here, of whatever type.
    """
    inner = user_model(model)
    plain = {key: value for key, value in kwargs.items() if key != GIBBS_SITES_KWARG}
    observed: set[str] = set()

    def latent_values() -> dict[str, Array]:
        samples = {
            n: s for n, s in traced_sites(inner, jr.key(0), args, plain)[0].items() if s["type"] == "sample"
        }
        observed.update(name for name, site in samples.items() if site["is_observed"])
        return {name: jnp.asarray(site["value"]) for name, site in samples.items() if name not in observed}

    def scores(values: dict[str, Array]) -> dict[str, Any]:
        _, seen = traced_sites(inner, jr.key(0), args, plain, values)
        return {name: _all_of_score(unwrap_prior(msg["fn"])) for name, msg in seen.items()}

    latents = jax.eval_shape(latent_values)
    for name, names in dependence(scores, latents).items():
        if not names:
            continue
        on = " and ".join(repr(other) for other in sorted(names))
        by_values = not any(jnp.issubdtype(latents[other].dtype, jnp.floating) for other in names)
        raise ValueError(
            f"The score of {'observed ' * (name in observed)}diffusion site {name!r} depends on latent "
            f"site{'s' * (len(names) > 1)} {on}, and `{owner}` needs scores that are fixed given the model's "
            "arguments. Pass what it is conditioned on as data" + (by_values * _BY_VALUES or ".")
        )


def _all_of_score(prior: Any) -> list[Any]:
    """All that a kernel asks of a prior's score: its value, and its energy where it has one."""
    x, t = jnp.zeros(prior.event_shape), jnp.asarray(prior.schedule.t_min, float)
    return [method(x, t) for method in score_methods(prior.score_fn)]
