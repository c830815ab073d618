"""What of a model must not depend on its latents, found by tracing and refused by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions import biject_to
from numpyro.infer.gibbs import GIBBS_SITES_KWARG

from numpyro_rtk._numpyro._dependence import dependence
from numpyro_rtk._numpyro._tracing import traced_sites, unwrap_prior, user_model
from numpyro_rtk._prior._conditions import one_condition
from numpyro_rtk._prior._prior import DiffusionPrior
from numpyro_rtk._score._model import score_methods


_BY_VALUES = (
    ", or use NumPyro's `DiscreteHMCGibbs(NUTS(model))` with `density=ProbabilityFlow()`, whose values are "
    "normalised and serve a discrete latent."
)


class _Traced:
    """The user's model, whose latents are those of all blocks: what a composite conditions on is one, too."""

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model, self._args = user_model(model), args
        self._kwargs = {key: value for key, value in kwargs.items() if key != GIBBS_SITES_KWARG}
        self.observed: set[str] = set()
        self.latents: dict[str, Any] = jax.eval_shape(self._values)

    def _values(self) -> dict[str, Array]:
        sites = {name: site for name, site in self.sites(None)[0].items() if site["type"] == "sample"}
        self.observed.update(name for name, site in sites.items() if site["is_observed"])
        return {name: jnp.asarray(site["value"]) for name, site in sites.items() if name not in self.observed}

    def sites(self, values: dict[str, Array] | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """A trace at values of the latents, and its diffusion sites."""
        return traced_sites(self._model, jr.key(0), self._args, self._kwargs, values)

    def dependent(self, function: Callable[[dict[str, Array]], dict[str, Any]]) -> list[tuple[str, Any]]:
        """What a function of the latents gives that depends on them, and the names of those."""
        return [(name, names) for name, names in dependence(function, self.latents).items() if names]


def refuse_dependent(
    owner: str, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, tuple[str, ...]]:
    """Raise if the score of a diffusion site, latent or not, depends on a latent of the user's model, or what
    is observed of one: kernels leave out the densities of diffusion sites. A condition is no part of the
    score.

    Returns the latents that the condition of each latent diffusion site depends on, where there are any.

    Args:
        owner: Name of the kernel, for messages.
        model: The model as the user gave it, perhaps conditioned by a composite.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
    """
    traced = _Traced(model, args, kwargs)

    def scores(values: dict[str, Array]) -> dict[str, Any]:
        return {name: _all_of_score(unwrap_prior(msg["fn"])) for name, msg in traced.sites(values)[1].items()}

    for name, names in traced.dependent(scores):
        by_values = not any(jnp.issubdtype(traced.latents[other].dtype, jnp.floating) for other in names)
        raise ValueError(
            f"The score of {'observed ' * (name in traced.observed)}diffusion site {name!r} depends on "
            f"{_named(names)}, and `{owner}` needs scores that are fixed given the model's "
            "arguments. Give it to the prior as its condition, `DiffusionPrior(score_fn, event_shape, "
            "condition=c)` with `score_fn(x, t, c)`, which `RTKGibbs` samples; pass it as data"
            + (by_values * _BY_VALUES or ".")
        )

    def seen(values: dict[str, Array]) -> dict[str, Any]:
        trace, diffusion = traced.sites(values)
        return {
            name: (
                trace[name]["value"],
                trace[name]["scale"],
                _masks(msg["fn"]),
                _condition(msg["fn"]),
            )
            for name, msg in diffusion.items()
            if name in traced.observed
        }

    for name, names in traced.dependent(seen):
        raise ValueError(
            f"The value, scale, mask or condition of observed diffusion site {name!r} depends on "
            f"{_named(names)}, and "
            f"`{owner}` leaves the densities of observed diffusion sites out. Add it by hand: "
            f"`numpyro.factor({name!r}, prior.log_prob(value))`, with `prior` the `DiffusionPrior` and "
            "`value` what is observed."
        )

    def conditions(values: dict[str, Array]) -> dict[str, Any]:
        found = {name: _condition(msg["fn"]) for name, msg in traced.sites(values)[1].items()}
        return {name: one for name, one in found.items() if one is not None and name not in traced.observed}

    return {name: tuple(sorted(names)) for name, names in traced.dependent(conditions)}


def refuse_supports(
    owner: str, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise if the support of a continuous latent depends on another one: its unconstrained value would mean
    another value once that has moved, and laws do not say by themselves that a value has left their support.

    Args: as those of `refuse_dependent`.
    """
    traced = _Traced(model, args, kwargs)

    def supports(values: dict[str, Array]) -> dict[str, Any]:
        trace, _ = traced.sites(values)
        found = {name: _image_of_zero(trace[name]["fn"].support, value) for name, value in values.items()}
        return {name: image for name, image in found.items() if image is not None}

    for name, names in traced.dependent(supports):
        raise ValueError(
            f"The support of site {name!r} depends on {_named(names)}, and `{owner}` moves latents in turn, "
            "which needs supports that are fixed. Sample it on a fixed support and transform it with "
            "`numpyro.deterministic`, or use `ScoreHMC(model)`, which moves all latents together."
        )


def _named(names: Any) -> str:
    return f"latent site{'s' * (len(names) > 1)} " + " and ".join(repr(name) for name in sorted(names))


def _condition(fn: Any) -> Array | None:
    prior = unwrap_prior(fn)
    assert prior is not None
    return prior.condition


def _all_of_score(prior: Any) -> list[Any]:
    """All that a kernel asks of a prior's score: its value, and its energy where it has one."""
    x, t = jnp.zeros(prior.event_shape), jnp.asarray(prior.schedule.t_min, float)
    given = one_condition(prior.condition, len(prior.batch_shape))
    zeros = [jnp.zeros(one.shape, one.dtype) for one in given]
    return [method(x, t, *zeros) for method in score_methods(prior.score_fn)]


def _image_of_zero(support: Any, value: Array) -> Array | None:
    """The constrained value that 0 stands for, or `None` where values have no unconstrained ones."""
    if support.is_discrete:
        return None
    try:
        transform = biject_to(support)
    except NotImplementedError:
        return None
    unconstrained = jax.eval_shape(transform.inv, value)
    return transform(jnp.zeros(unconstrained.shape, unconstrained.dtype))


def _masks(fn: Any) -> list[Any]:
    """Masks that a diffusion prior is wrapped in."""
    masks = []
    while not isinstance(fn, DiffusionPrior):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append(fn._mask)
        fn = fn.base_dist
    return masks
