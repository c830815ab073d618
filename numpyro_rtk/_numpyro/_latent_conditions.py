"""Diffusion sites whose condition is a latent: noising paths for the kernel that moves it, and what is asked
of them at the start.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array
from numpyro.infer.gibbs import Gibbs
from numpyro.infer.hmc import HMC

from numpyro_rtk._custom_types import RandomKey
from numpyro_rtk._diagnosis._report import Finding, say
from numpyro_rtk._noising._grid import noise_grid
from numpyro_rtk._numpyro._problem import Measured
from numpyro_rtk._numpyro._sites import DiffusionSite, latent_diffusion_sites
from numpyro_rtk._numpyro._tracing import SitePath
from numpyro_rtk._prior._conditions import one_condition
from numpyro_rtk._reverse._path import noise_path, path_grid, path_log_density, PathGrid
from numpyro_rtk._reverse._pilot import prior_draws
from numpyro_rtk._score._model import resolve_score
from numpyro_rtk._thresholds import MANY_DIMENSIONS


DEFAULT_PATH_SEGMENTS = 100
"""Segments of a noising path."""

MAX_SHORTAGE = 0.1
"""Share of the information about a condition that may be lost to segments that are too long, unsaid."""

NUM_CONDITIONS = 16
"""Prior draws of the model's latents, at whose conditions the prior is measured."""

CHECKED_DRAWS, CHECKED_DRAWS_IN_MANY = 64, 4
"""Prior draws by which that share is estimated; in many dimensions each tells more and costs more."""

CERTAIN = 3.0
"""Standard errors by which what is lost must differ from nothing."""

CHECKED_CHANGE = 0.1
"""Size of the change of a real condition, as a fraction of the way to another prior draw of it."""


def path_grid_of(site: DiffusionSite, measured: Measured, num_segments: int) -> PathGrid:
    """Segments even in the log signal-to-noise ratio, with what was measured of the site's prior."""
    noise = site.prior.noise
    times = noise.times(min(num_segments, noise.max_segments), rho=math.inf)
    grid = noise_grid(noise.schedule, np.asarray(times), measured.grid.t.dtype)
    return path_grid(grid, measured.grid, measured.pilot.mean_square)


def draw_paths(
    key: RandomKey,
    sites: tuple[DiffusionSite, ...],
    z: dict[str, Array],
    shared: Any,
    names: tuple[str, ...],
    num_segments: int,
) -> dict[str, SitePath]:
    """Fresh noising paths of some sites; no score evaluation.

    Args:
        key: Random key.
        sites: All diffusion sites, in the order of what was measured of them.
        z: Their values.
        shared: What all chains share.
        names: Sites whose condition is a latent.
        num_segments: Segments of a path.
    """
    paths = {}
    for i, site in enumerate(sites):
        if site.name not in names:
            continue
        grid = path_grid_of(site, shared.measured[i], num_segments)
        events = site.events(z[site.name])
        keys = jr.split(jr.fold_in(key, i), events.shape[0])
        path = jax.vmap(lambda key, x, grid=grid: noise_path(key, grid.grid, x))(keys, events)
        paths[site.name] = SitePath(grid, path, shared.score_arrays.arrays[i])
    return paths


def path_evaluations(kernel: Any, state: Any) -> Array:
    """How often the inner kernel evaluated a path, as far as Hamiltonian blocks say; once to begin with."""
    if isinstance(kernel, Gibbs):
        counts = [
            path_evaluations(block, own)
            for (block, _), own in zip(kernel.blocks, state.block_states, strict=True)
        ]
        return jnp.sum(jnp.stack(counts))
    state = getattr(state, "hmc_state", state)  # of NumPyro's `HMCGibbs` and its like
    return 1 + getattr(state, "num_steps", jnp.zeros((), int))


def draw_conditions(
    model: Callable[..., Any], names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Array]:
    """Prior draws of the conditions of some sites, of all events, shape `(draws, *condition)`; fixed keys."""
    found: dict[str, list[Array]] = {name: [] for name in names}
    for key in jr.split(jr.key(4), NUM_CONDITIONS):
        for site in latent_diffusion_sites(model, key, args, kwargs):
            if site.name in names:
                conditions = site.conditions
                assert conditions is not None
                found[site.name].append(conditions)
    return {name: _usable(jnp.concatenate(conditions)) for name, conditions in found.items()}


def _usable(conditions: Array) -> Array:
    """Conditions, with the first finite one for those that are no number at placeholders of other sites."""
    finite = jnp.all(jnp.isfinite(conditions.reshape(conditions.shape[0], -1)), axis=1)
    shape = (-1,) + (1,) * (conditions.ndim - 1)
    return jnp.where(finite.reshape(shape), conditions, conditions[jnp.argmax(finite)][None])


def follows_gradients(kernel: Any) -> bool:
    """Whether a kernel, or one that it is made of, is a Hamiltonian one."""
    if isinstance(kernel, Gibbs):
        return any(follows_gradients(block) for block, _ in kernel.blocks)
    return isinstance(getattr(kernel, "inner_kernel", kernel), HMC)


def check_condition_moves(kernel: Any, site: DiffusionSite, latents: tuple[str, ...]) -> None:
    """Raise unless the score is differentiable in its condition, where the inner kernel follows gradients;
    traces it, computes nothing.

    Args:
        kernel: The inner kernel.
        site: The site.
        latents: What its condition depends on, for the message.
    """
    prior, dtype = site.prior, jnp.result_type(float)
    (condition,) = one_condition(prior.condition, len(prior.batch_shape))
    if not follows_gradients(kernel) or not jnp.issubdtype(condition.dtype, jnp.inexact):
        return  # rounded on the way: no gradient is asked for
    x, t = jax.ShapeDtypeStruct(prior.event_shape, dtype), jax.ShapeDtypeStruct((), dtype)
    try:
        jax.eval_shape(jax.grad(lambda c, x, t: jnp.sum(prior.score_fn(x, t, c))), condition, x, t)
    except Exception as error:
        named = " and ".join(map(repr, latents))
        raise ValueError(
            f"The score of diffusion site {site.name!r} is not differentiable in its `condition`, which "
            f"depends on {named}: {type(error).__name__}: {str(error).splitlines()[0]}\n"
            f"`RTKGibbs({type(kernel).__name__}(model))` moves {named} along gradients. Use an inner kernel "
            "without them, such as NumPyro's `CustomGibbs`, or a network in JAX."
        ) from error


def check_path_segments(
    site: DiffusionSite, pilots: Array, latents: tuple[str, ...], measured: Measured, num_segments: int
) -> None:
    """Warn of a path whose segments are too long to tell conditions apart; silent under a trace.

    The information about a condition that a path of `K` segments has is short by a share of about `e / K`.
    How much a path tells for one condition against another, of prior draws of the first, is compared at `K`
    and `2 K` segments.

    *Cost.* `9 K` evaluations, for the paths of 64 prior draws, or of 4 above 256 dimensions, and those draws.

    Args:
        site: The site.
        pilots: Prior draws of its condition, shape `(draws, *condition)`.
        latents: What its condition depends on, for the message.
        measured: What was measured of its prior.
        num_segments: Of a path.
    """
    if isinstance(pilots, Tracer) or isinstance(measured.grid.t, Tracer):
        return
    shape, dtype, noise = site.prior.event_shape, measured.grid.t.dtype, site.prior.noise
    num_draws = CHECKED_DRAWS if math.prod(shape) <= MANY_DIMENSIONS else CHECKED_DRAWS_IN_MANY
    # A discrete schedule may have no more; what is lost falls as the number of segments.
    asked = min(num_segments, noise.max_segments)
    compared = max(min(asked, noise.max_segments // 2), 1)
    fine = path_grid_of(site, measured, 2 * compared)
    coarse_times = np.asarray(fine.grid.t, np.float64)[::2]
    coarse_grid = noise_grid(noise.schedule, coarse_times, dtype)
    coarse = path_grid(coarse_grid, measured.grid, measured.pilot.mean_square)
    family = resolve_score(site.prior.score_fn)
    real = jnp.issubdtype(pilots.dtype, jnp.inexact)

    def gained(pilots: Array, fine: PathGrid, coarse: PathGrid) -> Any:
        draw_key, path_key = jr.split(jr.key(3))
        models = family.of(pilots).thinned(num_draws)
        draws, _ = prior_draws(draw_key, models, noise, shape, dtype, num_draws)

        def one(key: RandomKey, index: Array, x: Array) -> tuple[Array, Array]:
            path = noise_path(key, fine.grid, x)
            own, other = (pilots[i % pilots.shape[0]] for i in (index, index + 1))
            ends = [other]
            if real:
                change = CHECKED_CHANGE * (other - own)
                ends = [own + change, own - change]

            def told(grid: PathGrid, path: Array) -> Array:
                first, *rest = [path_log_density(family.given(end), grid, path) for end in (own, *ends)]
                return first - sum(rest) / len(rest)

            return told(fine, path), told(coarse, path[::2])

        return jax.vmap(one)(jr.split(path_key, num_draws), jnp.arange(num_draws), draws)

    both = np.stack([np.asarray(told, np.float64) for told in jax.jit(gained)(pilots, fine, coarse)])
    with_fine, with_coarse = both[:, np.all(np.isfinite(both), axis=0)]
    lost = with_fine - with_coarse
    # Conditions that are hardly told apart say nothing about segments.
    if lost.size < 2 or np.mean(lost) < CERTAIN * np.std(lost) / math.sqrt(lost.size):
        return
    limit = float(np.mean(2 * with_fine - with_coarse))
    shortage = 2 * float(np.mean(lost)) / limit * compared / asked if limit > 0 else 0.0
    if MAX_SHORTAGE < shortage < np.inf:
        named = " and ".join(map(repr, latents))
        wanted = math.ceil(asked * shortage / (0.5 * MAX_SHORTAGE))
        message = (
            f"`path_segments={asked}` of `RTKGibbs` is too few for diffusion site {site.name!r}: "
            f"noising paths keep {100 * (1 - shortage):.0f} % of what it tells about {named}, whose "
            f"posterior will be too wide by about {100 * shortage:.0f} %. Write `path_segments={wanted}`."
        )
        say([Finding("path", asked, shortage, message)], site.prior.score_fn)
