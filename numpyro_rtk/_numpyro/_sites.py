"""What a posterior kernel must know of a NumPyro model: its diffusion sites, and everything else that depends
on them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.core import Tracer
from jaxtyping import Array
from numpyro.infer.gibbs import GIBBS_SITES_KWARG

from numpyro_rtk._numpyro._dependent import refuse_dependent
from numpyro_rtk._numpyro._tracing import traced_sites, unwrap_prior
from numpyro_rtk._prior._conditions import refuse_not_finite
from numpyro_rtk._prior._prior import DiffusionPrior


class DiffusionSite(NamedTuple):
    """A latent site whose prior is a diffusion model."""

    name: str
    prior: DiffusionPrior
    batch_shape: tuple[int, ...]

    @property
    def conditions(self) -> Array | None:
        """Those of all its events, shape `(events, *condition)`, where the prior is conditional."""
        return self.prior.model(self.batch_shape).conditions

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its value, batch and event."""
        return self.batch_shape + self.prior.event_shape

    def events(self, x: Array) -> Array:
        """Its value as events, shape `(events, *event)`."""
        return x.reshape(-1, *self.prior.event_shape)


def _is_masked(fn: Any) -> bool:
    while not isinstance(fn, DiffusionPrior):
        if isinstance(fn, dist.MaskedDistribution):
            return fn._mask is not True
        fn = fn.base_dist
    return False


class ModelSites(NamedTuple):
    """The sites of a model that a posterior kernel has to account for."""

    diffusion: tuple[DiffusionSite, ...]
    """Latent diffusion sites in trace order."""
    others: tuple[str, ...]
    """Other latent sample sites."""
    trace: Any
    """The trace; diffusion sites have placeholders as values."""
    conditions: dict[str, tuple[str, ...]]
    """Latents that the condition of a diffusion site depends on, by its name, where there are any."""


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
    conditions = refuse_dependent(owner, model, args, kwargs)
    for site in diffusion:
        if site.conditions is not None and site.name not in conditions:
            refuse_not_finite(f"The `condition` of diffusion site {site.name!r}", site.conditions)
    for name, latents in conditions.items():
        diffuse = [latent for latent in latents if latent in seen]
        if diffuse:
            raise ValueError(
                f"The `condition` of diffusion site {name!r} depends on diffusion site {diffuse[0]!r}, and "
                f"`{owner}` moves {diffuse[0]!r} by its own prior and the observations. Train one network on "
                "both, or use `NUTS(model)` with priors whose densities are normalised."
            )
    return ModelSites(tuple(diffusion), others, trace, conditions)


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


def refuse_latent_conditions(owner: str, conditions: dict[str, tuple[str, ...]]) -> None:
    """Raise if the condition of a diffusion site depends on a latent, for a kernel that leaves out what the
    prior says of its condition.

    Args:
        owner: Name of the kernel, for messages.
        conditions: Latents that conditions depend on, by site.
    """
    for name, latents in conditions.items():
        named = " and ".join(map(repr, latents))
        raise ValueError(
            f"The `condition` of diffusion site {name!r} depends on {named}, and `{owner}` cannot sample "
            f"{named}: scores do not tell how likely a condition is. Use `RTKGibbs(NUTS(model))`, which can, "
            "or pass the condition as data."
        )


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
