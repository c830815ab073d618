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

from numpyro_rtk._custom_types import Event, Scalar
from numpyro_rtk._numpyro._dependence import dependence
from numpyro_rtk._numpyro._sites import _site_scale
from numpyro_rtk._numpyro._tracing import without_diffusion, WRAPPERS
from numpyro_rtk._smc._twist import Terms


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

    def _sites(self, x: dict[str, Event]) -> dict[str, dict[str, Any]]:
        model = handlers.substitute(handlers.seed(self._model, jr.key(0)), data=x)
        trace = handlers.trace(model).get_trace(*self._args, **self._kwargs)
        return {n: site for n, site in trace.items() if site["type"] == "sample" and n not in x}

    def _observations(self, x: dict[str, Any]) -> frozenset[str]:
        """Sites whose log probability depends on `x`, by a walk that is made once."""
        if self._dependent is None:
            shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in x.items()}

            def log_probs(x: dict[str, Event]) -> dict[str, Scalar]:
                sites = self._sites(x)
                # An observation may be smaller than its law, and NumPyro lets shapes broadcast.
                self._sizes = {
                    name: math.prod(np.broadcast_shapes(jnp.shape(site["value"]), site["fn"].shape()))
                    for name, site in sites.items()
                }
                return {name: _log_prob(site) for name, site in sites.items()}

            reached = dependence(log_probs, shapes)
            self._dependent = frozenset(name for name, names in reached.items() if names)
        return self._dependent

    def num_observations(self, shapes: dict[str, Any]) -> int:
        """Observed numbers whose law depends on the diffusion sites, of these shapes."""
        return sum(self._sizes[name] for name in self._observations(shapes))

    def terms(self, x: dict[str, Event]) -> Terms:
        """Log likelihood of one value of all diffusion sites (batch shapes included), split for a twist.

        Sites that do not depend on the diffusion sites are no observations of them: a constant in
        `log_normalizer`, which is never tempered.
        """
        observations = self._observations(x)
        whitened, log_normalizer, other, log_prob = [], jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
        for name, site in self._sites(x).items():
            own = _log_prob(site)
            log_prob += own
            split = _gaussian_terms(site) if self._gaussian and name in observations else None
            if split is not None:
                whitened.append(split[0])
                log_normalizer += split[1]
            elif name in observations:
                other += own
            else:
                log_normalizer += own
        return Terms(jnp.concatenate(whitened) if whitened else jnp.zeros(0), log_normalizer, other, log_prob)


def _log_prob(site: dict[str, Any]) -> Scalar:
    # Laws of plates are narrower than their values, and NumPyro lets shapes broadcast.
    with jax.numpy_rank_promotion("allow"):
        log_prob = site["fn"].log_prob(site["value"], *filter(None, [site["intermediates"]]))
    scale = _site_scale(site)
    return jnp.sum(log_prob if scale is None else scale * log_prob)


def _gaussian_terms(site: dict[str, Any]) -> tuple[Array, Scalar] | None:
    """Whitened residuals and log normalizer of a Gaussian site, or `None` if its law is not `Normal` or
    `MultivariateNormal` itself.
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
    return jnp.ravel(jnp.where(mask, whitened, 0.0)), -jnp.sum(jnp.where(mask, log_scale, 0.0))
