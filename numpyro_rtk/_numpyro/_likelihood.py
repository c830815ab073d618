"""Everything in a model besides the priors of its diffusion sites, as a function of those sites."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.infer.gibbs import GIBBS_SITES_KWARG

from numpyro_rtk._custom_types import Event, Scalar
from numpyro_rtk._numpyro._dependence import dependence
from numpyro_rtk._numpyro._partition import number_events, Partition, partition_of, WHOLE
from numpyro_rtk._numpyro._separation import separation
from numpyro_rtk._numpyro._sites import _site_scale
from numpyro_rtk._numpyro._tracing import without_diffusion, WRAPPERS
from numpyro_rtk._smc._twist import sum_observations, Terms


class Likelihood:
    """Everything in a model besides the priors of its diffusion sites, as a function of those sites.

    Args:
        model: The model, with all other latents conditioned.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        gaussian: Whether `terms` keeps Gaussian observations apart.
    """

    def __init__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, gaussian: bool = True
    ) -> None:
        self._model, self._args, self._kwargs = without_diffusion(model), args, kwargs
        self._gaussian = gaussian
        self._dependent: frozenset[str] | None = None
        self._sizes: dict[str, int] = {}
        self._order: tuple[str, ...] = ()

    def _sites(self, x: dict[str, Event], others: Any = None) -> dict[str, dict[str, Any]]:
        """All sites but those of `x`, at values of other latents that replace those of the arguments."""
        kwargs = self._kwargs if not others else self._kwargs | {GIBBS_SITES_KWARG: others}
        model = handlers.substitute(handlers.seed(self._model, jr.key(0)), data=x)
        trace = handlers.trace(model).get_trace(*self._args, **kwargs)
        return {n: site for n, site in trace.items() if site["type"] == "sample" and n not in x}

    def _observations(self, x: dict[str, Any]) -> frozenset[str]:
        """Sites whose log probability depends on `x`, by a walk that is made once."""
        if self._dependent is None:
            shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in x.items()}

            def log_probs(x: dict[str, Event]) -> dict[str, Scalar]:
                sites = self._sites(x)
                # An observation may be smaller than its law, and NumPyro lets shapes broadcast.
                self._order = tuple(sites)
                self._sizes = {
                    name: math.prod(np.broadcast_shapes(jnp.shape(site["value"]), site["fn"].shape()))
                    for name, site in sites.items()
                }
                return {name: jnp.sum(_log_probs(site)) for name, site in sites.items()}

            reached = dependence(log_probs, shapes)
            self._dependent = frozenset(name for name, names in reached.items() if names)
        return self._dependent

    def num_observations(self, shapes: dict[str, Any]) -> int:
        """Observed numbers whose law depends on the diffusion sites, of these shapes."""
        return sum(self._sizes[name] for name in self._observations(shapes))

    def partition(self, sites: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> Partition:
        """Elements of the model given its other latents: events that share no observation, by a walk.

        Args:
            sites: Batch and event shape of each diffusion site, in the order of the flat vector.
        """
        events = number_events({name: batch for name, (batch, _) in sites.items()})
        if sum(numbers.size for numbers in events.values()) <= 1:
            return WHOLE
        parts = {
            name: np.broadcast_to(events[name].reshape(batch + (1,) * len(event)), batch + event)
            for name, (batch, event) in sites.items()
        }
        shapes = {
            name: jax.ShapeDtypeStruct(part.shape, jnp.result_type(float)) for name, part in parts.items()
        }
        observations, gaussian = self._observations(shapes), {}

        def log_probs(x: dict[str, Event], others: Any) -> dict[str, Array]:
            found = self._sites(x, others)
            for name in observations:
                split = self._split(name, found[name])
                if split is not None:
                    gaussian[name] = split[0].shape
            return {name: _log_probs(found[name]) for name in observations}

        # Values of other latents change in a run: nothing may be taken from them.
        reached, sets = separation(log_probs, parts, self._kwargs.get(GIBBS_SITES_KWARG, {}))
        ordered = {name: gaussian[name] for name in self._order if name in gaussian}
        sizes = {name: math.prod(event) for name, (_, event) in sites.items()}
        return partition_of(events, sizes, {name: (reached[name], sets) for name in reached}, ordered)

    def _split(self, name: str, site: dict[str, Any]) -> tuple[Array, Array] | None:
        """Whitened residuals and log scales of an observation that is kept apart as Gaussian."""
        return _gaussian_terms(site) if self._gaussian and name in (self._dependent or ()) else None

    def terms(self, x: dict[str, Event], partition: Partition = WHOLE) -> Terms:
        """Log likelihood of one value of all diffusion sites (batch shapes included), split for a twist.

        Sites that do not depend on the diffusion sites are no observations of them: a constant in
        `log_normalizer`, which is never tempered.
        """
        observations, elements = self._observations(x), partition.elements
        zero = jnp.zeros(elements.shape)
        whitened, log_scales, other, log_prob, constant = [], [], zero, zero, jnp.zeros(())
        for name, site in self._sites(x).items():
            own = _log_probs(site)
            if name not in observations:
                constant += jnp.sum(own)
                continue
            total = jnp.sum(own) if elements.count == 1 else partition.log_probs[name].sum(jnp.ravel(own))
            log_prob += total
            split = self._split(name, site)
            if split is None:
                other += total
            else:
                whitened.append(jnp.ravel(split[0]))
                log_scales.append(jnp.ravel(split[1]))
        none = jnp.zeros(0)
        log_normalizer = -sum_observations(elements, jnp.concatenate(log_scales) if log_scales else none)
        # A constant of the whole model, shared out so that elements sum to it.
        share = constant / elements.count
        return Terms(
            jnp.concatenate(whitened) if whitened else none, log_normalizer + share, other, log_prob + share
        )


def _log_probs(site: dict[str, Any]) -> Array:
    """Log probabilities of a site, one for each element of its batch."""
    # Laws of plates are narrower than their values, and NumPyro lets shapes broadcast.
    with jax.numpy_rank_promotion("allow"):
        log_prob = site["fn"].log_prob(site["value"], *filter(None, [site["intermediates"]]))
        scale = _site_scale(site)
        return jnp.asarray(log_prob if scale is None else scale * log_prob)


def _gaussian_terms(site: dict[str, Any]) -> tuple[Array, Array] | None:
    """Whitened residuals of a Gaussian site and the logs of their scales, with constants, or `None` if its
    law is not `Normal` or `MultivariateNormal` itself.
    """
    fn: Any = site["fn"]
    if _site_scale(site) is not None or site["intermediates"]:
        return None
    # An observation may be smaller than its law, which then counts it once per element of the batch.
    shape: Any = jnp.broadcast_shapes(jnp.shape(site["value"]), fn.shape())
    value = jnp.broadcast_to(site["value"], shape)
    mask: Any = True
    while type(fn) in WRAPPERS:
        if type(fn) is dist.MaskedDistribution:
            if fn.event_shape:  # the mask is over events
                flag = jnp.reshape(fn._mask, jnp.shape(fn._mask) + (1,) * len(fn.event_shape))
            else:
                flag = jnp.asarray(fn._mask)
            mask = flag if mask is True else jnp.logical_and(*jnp.broadcast_arrays(mask, flag))
        fn = fn.base_dist
    shape = jnp.shape(value)
    mask = jnp.broadcast_to(mask, shape)
    loc: Any = getattr(fn, "loc", None)
    if type(fn) is dist.Normal:
        given_scale: Any = fn.scale
        scale = jnp.broadcast_to(given_scale, shape)
        whitened = (value - jnp.broadcast_to(loc, shape)) / scale
        log_scale = jnp.log(scale) + 0.5 * jnp.log(2 * jnp.pi)
    elif type(fn) is dist.MultivariateNormal:
        given_tril: Any = fn.scale_tril
        scale_tril = jnp.broadcast_to(given_tril, (*shape, shape[-1]))
        residual = value - jnp.broadcast_to(loc, shape)
        whitened = jax.scipy.linalg.solve_triangular(scale_tril, residual[..., None], lower=True)[..., 0]
        log_scale = jnp.log(jnp.diagonal(scale_tril, axis1=-2, axis2=-1)) + 0.5 * jnp.log(2 * jnp.pi)
    else:
        return None
    return jnp.where(mask, whitened, 0.0), jnp.where(mask, jnp.broadcast_to(log_scale, shape), 0.0)
