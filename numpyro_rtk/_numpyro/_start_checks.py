"""Models and starts that particle Gibbs cannot work on, refused in words."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from numpyro_rtk._diagnosis._round_trip import Travellers
from numpyro_rtk._diagnosis._start import check_calibration, check_segments
from numpyro_rtk._noising._grid import NoiseGrid
from numpyro_rtk._numpyro._problem import Problem
from numpyro_rtk._numpyro._sites import ModelSites
from numpyro_rtk._prior._conditions import one_condition
from numpyro_rtk._reverse._base import check_kernel
from numpyro_rtk._reverse._pilot import Pilot
from numpyro_rtk._score._checks import check_score_shape
from numpyro_rtk._smc._twist import AbstractTwist


def check_others(found: ModelSites) -> None:
    """Raise for a model with latents that are no diffusion sites."""
    if found.others:
        raise ValueError(
            "`RTKParticleGibbs` samples diffusion sites only, and the model has other latent sites: "
            f"{list(found.others)}. Use `RTKGibbs(NUTS(model))` to sample them too, or "
            "`numpyro.handlers.condition` to fix them. Observed sites are among them if their data are "
            "`None`."
        )


def check_sites(problem: Problem) -> None:
    """Raise for a reverse kernel that does not fit a site, or a score whose shape does not."""
    for site, times in zip(problem.sites, problem.times, strict=True):
        prior = site.prior
        x = jax.ShapeDtypeStruct(prior.event_shape, problem.dtype)
        check_kernel("reverse", problem.kernel, prior.score_fn, times.size - 1)
        given = one_condition(prior.condition, len(prior.batch_shape))
        t = jax.ShapeDtypeStruct((), problem.dtype)
        check_score_shape(prior.score_fn, x, t, (), {}, in_model=True, condition=given)


def check_scores(
    problem: Problem,
    draws: list[Array],
    grids: list[NoiseGrid],
    pilots: list[Pilot],
    fly: Callable[..., Travellers],
) -> None:
    """Ask about the score of each site, and about its segments, once for each prior.

    Weights take reverse transitions to be exact: of segments that are too long the sweep keeps another law.

    Args:
        problem: The model.
        draws: Of each site's prior.
        grids: Of each site.
        pilots: Of each site.
        fly: Round trips of a site: `fly(site, key, draws, taken, index)`.
    """
    asked: list[Any] = []
    for i, (site, grid) in enumerate(zip(problem.sites, grids, strict=True)):
        prior = site.prior
        schedule, shape, score_fn = prior.schedule, prior.event_shape, prior.score_fn
        fits = check_calibration(score_fn, schedule, grid, shape, pilots[i].calibration, site.name)
        known = (prior.segment_times.tolist(), str(schedule), shape, id(score_fn))
        if fits and known not in asked:
            asked.append(known)

            def fly_site(*inputs: Any, i: int = i) -> Travellers:
                return fly(i, *inputs)

            check_segments(score_fn, fly_site, grid, draws[i], problem.kernel, "RTKParticleGibbs")


def check_twist(twist: AbstractTwist | None, num_observations: int) -> None:
    """Raise for a Gaussian twist where there is nothing Gaussian."""
    if twist is not None and twist.gaussian and num_observations == 0:
        raise ValueError(
            "`twist=GaussianTwist()` needs Gaussian observations (`Normal` or `MultivariateNormal` sites), "
            "and the model has none. Leave `twist` out, or use `TemperedTwist()`."
        )


def check_likelihood(log_likelihood: Any) -> None:
    """Raise if the likelihood of an element is impossible at every prior draw, or NaN; silent under a trace.

    Args:
        log_likelihood: Shape `(draws, *elements)`.
    """
    if isinstance(log_likelihood, Tracer):
        return
    total = np.asarray(log_likelihood)
    if np.any(np.all(np.isnan(total), axis=0)):
        raise ValueError(
            "The log likelihood is NaN at every one of the prior draws tried. Check the observations and the "
            "parameters of their laws."
        )
    if not np.all(np.any(total > -np.inf, axis=0)):
        raise ValueError(
            f"The log likelihood is -inf at all {total.shape[0]} prior draws tried: the data are impossible "
            "under the model there. Check the supports of the observed sites, and transforms (a rate must be "
            "positive: `exp`, `softplus`)."
        )


def check_start(owner: str, log_likelihood: Array) -> None:
    """Raise if the likelihood at the start is impossible or NaN; silent under a trace.

    Args:
        owner: Name of the kernel.
        log_likelihood: Of one chain, or of several, shape `(chains,)`.
    """
    if isinstance(log_likelihood, Tracer):
        return
    values = np.atleast_1d(np.asarray(log_likelihood))
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        chains = f" of chain{'s' * (bad.size > 1)} {', '.join(map(str, bad))}" if values.size > 1 else ""
        raise ValueError(
            f"`{owner}` cannot start: the log likelihood is {values[bad[0]]} at the start{chains}. Give a "
            "start inside the support, `MCMC.run(..., init_params={site: value})`."
        )
