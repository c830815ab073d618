"""A model with its arguments, resolved: what particle Gibbs works on."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float
from numpyro.infer.gibbs import conditioned

from numpyro_rtk._diagnosis._round_trip import plan_trip, travel_all, Travellers
from numpyro_rtk._moves._elements import Elements
from numpyro_rtk._noising._grid import candidate_grid, chosen_grid, noise_grid, NoiseGrid
from numpyro_rtk._noising._terminal import Terminal
from numpyro_rtk._noising._times import resolve_levels
from numpyro_rtk._numpyro._derivatives import refuse_without_derivative
from numpyro_rtk._numpyro._likelihood import Likelihood
from numpyro_rtk._numpyro._particle_gibbs_options import DEFAULT_LEVEL_SEGMENTS, Options
from numpyro_rtk._numpyro._partition import Partition
from numpyro_rtk._numpyro._sites import DiffusionSite
from numpyro_rtk._reverse._base import AbstractInnerKernel
from numpyro_rtk._reverse._calibration import or_zero
from numpyro_rtk._reverse._pilot import Pilot, prior_draws, run_pilot
from numpyro_rtk._score._checks import first_call
from numpyro_rtk._score._hoist import hoist, HoistedArrays
from numpyro_rtk._score._model import ScoreModel
from numpyro_rtk._smc._placement import place_levels, transition_difficulty
from numpyro_rtk._smc._point import SiteLaw
from numpyro_rtk._smc._posterior import Floor, Likelihoods, Posterior
from numpyro_rtk._smc._twist import Terms


class Measured(NamedTuple):
    """What prior draws with a fixed key taught about one site: a property of its prior."""

    grid: NoiseGrid
    """Noise levels."""
    terminal: Terminal
    """The law at the noisiest of them."""
    pilot: Pilot
    """Denoising errors and curvatures."""


class Shared(NamedTuple):
    """What all chains share; without a chain axis where chains are vectorized."""

    score_arrays: HoistedArrays
    """The networks' arrays, kept here so that they are arguments of the compiled program."""
    measured: tuple[Measured, ...]
    """What prior draws taught about each site."""
    center: Float[Array, " dim"]
    """Mean of the prior draws, where twists are linearised."""
    iteration: Array
    """Iterations so far, warmup included."""
    num_warmup: Array
    """Length of the warmup."""
    restarts: Array
    """Whether the warmup may draw the sites anew: no start was given."""
    partition: Partition
    """What the start found; its number of elements is what options were chosen for."""


class Problem(NamedTuple):
    """A model with its arguments, resolved."""

    sites: tuple[DiffusionSite, ...]
    """Latent diffusion sites, in the order of the flat vector."""
    times: tuple[np.ndarray, ...]
    """Time grid of each site, before levels are placed."""
    scores: HoistedArrays
    """Arrays of all scores, marked with all that a state depends on."""
    rebuild: Callable[[Any], list[ScoreModel]]
    """Score models of such arrays."""
    likelihood: Likelihood
    """Everything else in the model."""
    partition: Partition
    """Events of the sites that share no observation."""
    options: Options
    """Those of the kernel, with what was chosen for the model."""
    kernel: AbstractInnerKernel
    """Reverse kernel."""
    jacobian: bool
    """Whether guided moves go through the denoiser."""
    dtype: Any
    """Of the draws."""
    pilots: dict[str, Array]
    """Prior draws of conditions that are latents, `{site: (draws, *condition)}`: what is measured of a prior
    does not depend on where a chain is."""

    @property
    def elements(self) -> Elements:
        """Coordinates of the flat vector that share no observation with others."""
        return self.partition.elements

    @property
    def num_levels(self) -> int:
        """Noise levels of every site."""
        return self.times[0].size

    @property
    def num_events(self) -> int:
        """Events of all sites."""
        return sum(math.prod(site.batch_shape) for site in self.sites)

    def flatten(self, z: dict[str, Array]) -> Array:
        """Values of the sites as a flat vector."""
        return jnp.concatenate([jnp.ravel(z[site.name]) for site in self.sites])

    def unflatten(self, x: Array) -> dict[str, Array]:
        """A flat vector as values of the sites."""
        values, start = {}, 0
        for site in self.sites:
            size = math.prod(site.shape)
            values[site.name] = x[start : start + size].reshape(site.shape)
            start += size
        return values

    def terms(self, x: Array) -> Terms:
        """The likelihood of a flat vector, split for the twist."""
        if not self.options.takes_gradients:
            # Whoever differentiates finds 0, and asks nothing of a likelihood that may have no derivative.
            x = jax.lax.stop_gradient(x)
        return self.likelihood.terms(self.unflatten(x), self.partition)

    def refuse_without_derivative(self, owner: str) -> None:
        """Raise if the likelihood has no derivative in the sites, where `owner` asks for one."""
        if self.options.takes_gradients:
            structure = _structure(self.sites, self.dtype)
            refuse_without_derivative(owner, lambda z: self.likelihood.terms(z).log_likelihood, structure)

    def posterior(self, shared: Shared, log_beta: Array, floor: Floor) -> Posterior:
        """The level targets, for powers of the twists and what stands for an impossible likelihood."""
        arrays = shared.score_arrays.current(
            self.scores, "another reverse kernel, other segments, refresh depths or number of particles"
        )
        laws = tuple(
            SiteLaw(
                model,
                seen.grid,
                seen.terminal,
                seen.pilot,
                site.prior.event_shape,
                math.prod(site.batch_shape),
            )
            for site, model, seen in zip(
                self.sites, self.rebuild(arrays.arrays), shared.measured, strict=True
            )
        )
        likelihoods = Likelihoods(self.terms, floor, shared.center, self.elements)
        return Posterior(laws, likelihoods, self.kernel, log_beta, jacobian=self.jacobian)


def resolve_problem(
    options: Options,
    model: Callable[..., Any],
    sites: tuple[DiffusionSite, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: Any,
    partition: Partition | None = None,
    pilots: dict[str, Array] | None = None,
) -> Problem:
    """Resolve a model whose sites are known; and its partition, where it was found before.

    `pilots` has prior draws of conditions that are latents.

    Raises:
        ValueError: if `segments` does not fit the priors.
    """
    likelihood = Likelihood(
        conditioned(model), args, kwargs, gaussian=options.twist is None or options.twist.gaussian
    )
    if partition is None:
        partition = likelihood.partition(
            {site.name: (site.batch_shape, site.prior.event_shape) for site in sites}
        )
    num_elements = partition.elements.count if options.num_elements is None else options.num_elements
    options = options.resolved(
        sites, num_elements, lambda: likelihood.num_observations(_structure(sites, dtype))
    )
    times = tuple(
        resolve_levels(site.prior.noise, options.segments, DEFAULT_LEVEL_SEGMENTS) for site in sites
    )
    sizes = {site.name: grid.size for site, grid in zip(sites, times, strict=True)}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"`segments` gives the diffusion sites different numbers of levels: {sizes}. Give a number that "
            "all schedules allow."
        )
    found = []
    for site in sites:
        x, t = jax.ShapeDtypeStruct(site.prior.event_shape, dtype), jax.ShapeDtypeStruct((), dtype)
        found.append(hoist(site.prior.score_fn, x, t, conditions=site.conditions))
    settings = [
        f"{site.name} {one[0].fingerprint} {grid.tolist()}"
        for site, one, grid in zip(sites, found, times, strict=True)
    ]
    depths = (options.num_particles, options.refresh_depths)
    fingerprint = f"{settings} {type(options.reverse).__name__} {depths}"
    return Problem(
        sites=sites,
        times=times,
        scores=HoistedArrays([one[0].arrays for one in found], fingerprint),
        rebuild=lambda arrays: [one[1](part) for one, part in zip(found, arrays, strict=True)],
        likelihood=likelihood,
        partition=partition,
        options=options,
        kernel=options.kernel_for(sites, num_elements),
        jacobian=options.jacobian_for(sites, num_elements),
        dtype=dtype,
        pilots=pilots or {},
    )


def _structure(sites: tuple[DiffusionSite, ...], dtype: Any) -> dict[str, Any]:
    return {site.name: jax.ShapeDtypeStruct(site.shape, dtype) for site in sites}


def initial_grids(problem: Problem) -> list[NoiseGrid]:
    """The grid of each site before levels are placed."""
    return [
        noise_grid(site.prior.schedule, times, problem.dtype)
        for site, times in zip(problem.sites, problem.times, strict=True)
    ]


def pilot_models(problem: Problem, arrays: Any) -> list[ScoreModel]:
    """Score models whose members take turns in the prior draws of a pilot."""
    models = []
    for site, model in zip(problem.sites, problem.rebuild(arrays), strict=True):
        model = model.of(problem.pilots[site.name]) if site.name in problem.pilots else model
        models.append(model.thinned(problem.options.num_pilot_draws))
    return models


def first_calls(problem: Problem, arrays: Any) -> list[tuple[Array, Array]]:
    """Scores at both ends of each grid: two evaluations a site."""
    sites = zip(problem.sites, pilot_models(problem, arrays), initial_grids(problem), strict=True)
    return [first_call(model, grid, site.prior.event_shape) for site, model, grid in sites]


def draw_and_probe(problem: Problem, arrays: Any) -> list[tuple[Array, Terminal, Array | None]]:
    """Prior draws of each site, their terminal Gaussian, and where its reverse transitions are difficult.

    `num_pilot_draws * 43` score evaluations a site, and 64 more of up to 64 draws.
    """
    found = []
    for site, model, times in zip(problem.sites, pilot_models(problem, arrays), problem.times, strict=True):
        draw_key, _, probe_key = jr.split(jr.key(0), 3)
        noise = site.prior.noise
        num_draws = problem.options.num_pilot_draws
        draws, terminal = prior_draws(
            draw_key, model, noise, site.prior.event_shape, problem.dtype, num_draws
        )
        draws = or_zero(draws)
        difficulty = None
        candidates = candidate_grid(noise, times.size - 1, problem.dtype)
        # A grid that was given is kept; so is one of all there is between the levels of a coarse precision.
        if np.ndim(problem.options.segments) == 0 and candidates.num_levels >= times.size:
            difficulty = transition_difficulty(probe_key, model, candidates, draws)
        found.append((draws, terminal, difficulty))
    return found


def place(problem: Problem, found: list[tuple[Array, Terminal, Array | None]]) -> list[NoiseGrid]:
    """The noise grid of each site; evaluated in float64 unless the score is traced."""
    grids = []
    for site, times, (_, _, difficulty) in zip(problem.sites, problem.times, found, strict=True):
        noise = site.prior.noise
        if difficulty is None:
            grids.append(noise_grid(noise.schedule, times, problem.dtype))
        else:
            candidates = candidate_grid(noise, times.size - 1, problem.dtype)
            indices = place_levels(difficulty, candidates.log_snr_steps, times.size - 1)
            grids.append(chosen_grid(noise.schedule, candidates, indices))
    return grids


def run_pilots(problem: Problem, draws: list[Array], grids: list[NoiseGrid], arrays: Any) -> list[Pilot]:
    """Denoising errors of each site at its levels: one evaluation a level and draw."""
    key = jr.split(jr.key(0), 3)[1]
    models = pilot_models(problem, arrays)
    return [run_pilot(key, model, grid, one) for model, grid, one in zip(models, grids, draws, strict=True)]


def measured_of(
    found: list[tuple[Array, Terminal, Array | None]],
    grids: list[NoiseGrid],
    pilots: list[Pilot],
    num_residuals: int,
) -> tuple[Measured, ...]:
    """What was learnt of each site, with as many residuals as the twist needs."""
    return tuple(
        Measured(grid, terminal, pilot._replace(residuals=pilot.residuals[:, :num_residuals]))
        for grid, (_, terminal, _), pilot in zip(grids, found, pilots, strict=True)
    )


def fly_site(
    problem: Problem, index: int, grid: NoiseGrid, curvature: Array, arrays: Any, inputs: tuple[Any, ...]
) -> Travellers:
    """Round trips of one site through segments of its grid."""
    trip = plan_trip(pilot_models(problem, arrays)[index], grid, problem.kernel, curvature)
    key, *places = inputs
    return travel_all(key, trip, problem.sites[index].prior.noise, *places)


def flatten_draws(problem: Problem, draws: list[Array]) -> Array:
    """Prior draws of all sites as flat vectors; elements of a batch take different draws, and those that are
    conditioned on data draws of their own condition, or of the nearest that was drawn.
    """
    columns = []
    for site, one in zip(problem.sites, draws, strict=True):
        num_draws, num_events = one.shape[0], math.prod(site.batch_shape)
        alike = site.prior.condition is None or site.name in problem.pilots
        num_members = 1 if alike else min(num_events, num_draws)
        for i in range(num_events):
            own = np.resize(np.arange(i * num_members // num_events, num_draws, num_members), num_draws)
            columns.append(one[np.roll(own, i)].reshape(num_draws, -1))
    return jnp.concatenate(columns, axis=1)
