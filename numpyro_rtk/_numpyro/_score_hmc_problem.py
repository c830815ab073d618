"""A model with its arguments, resolved: what joint HMC works on."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.util import constrain_fn, potential_energy

from numpyro_rtk._custom_types import Event, Scalar
from numpyro_rtk._diagnosis._start import num_pilot_draws
from numpyro_rtk._moves._accept import all_finite
from numpyro_rtk._moves._leapfrog import Leaves, PathPoint
from numpyro_rtk._noising._grid import noise_grid, NoiseGrid
from numpyro_rtk._numpyro._sites import DiffusionSite, latent_diffusion_sites
from numpyro_rtk._numpyro._tracing import traced_sites, without_diffusion
from numpyro_rtk._reverse._calibration import Calibration, or_zero
from numpyro_rtk._reverse._pilot import prior_draws, run_pilot
from numpyro_rtk._score._checks import first_call
from numpyro_rtk._score._hoist import hoist, HoistedArrays
from numpyro_rtk._score._model import ScoreModel


START_DRAWS = 16
"""Prior draws behind the initial mass matrix."""

START_PRIOR_DRAWS = 5.0
"""Weight of the mean over coordinates in the initial mass matrix, in draws."""

Scores = dict[str, ScoreModel]


class JointProblem(NamedTuple):
    """A model with its arguments, resolved."""

    model: Callable[..., Any]
    """The model, with what a composite conditions on among its keyword arguments."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sites: tuple[DiffusionSite, ...]
    """Latent diffusion sites in trace order."""
    scores: HoistedArrays
    """Arrays of all scores, marked with all that a state depends on."""
    rebuild: Callable[[Any], Scores]
    """Score models of such arrays."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the diffusion sites."""
        return frozenset(site.name for site in self.sites)

    @property
    def num_events(self) -> int:
        """Events of all diffusion sites."""
        return sum(math.prod(site.batch_shape) for site in self.sites)

    def score_models(self, arrays: HoistedArrays) -> Scores:
        """Score models of a state's arrays, or of traced arguments."""
        return self.rebuild(arrays.current(self.scores, "other sites").arrays)

    def potential(self, z: Leaves) -> Scalar:
        """Potential of unconstrained values without the diffusion priors; no score evaluation."""
        return jnp.asarray(potential_energy(_rest(self.model), self.args, self.kwargs, z))

    def constrain(self, z: Leaves) -> Leaves:
        """Constrained values."""
        return constrained(self.model, self.args, self.kwargs, z)

    def unconstrain(self, values: Leaves) -> Leaves:
        """Unconstrained values of constrained ones of all latents."""
        trace, _ = traced_sites(self.model, jr.key(0), self.args, self.kwargs, values)
        return {name: biject_to(trace[name]["fn"].support).inv(value) for name, value in values.items()}

    def evaluate(self, scores: Scores) -> Callable[..., PathPoint]:
        """The function that evaluates a point: one score evaluation an event."""

        def evaluate(z: Leaves, score: Leaves | None = None) -> PathPoint:
            """A point; given the scores there, they are not evaluated."""
            potential, gradient = jax.value_and_grad(self.potential)(z)
            found, energies = {}, [jnp.zeros(())]
            for site in self.sites:
                model, x = scores[site.name], z[site.name]
                t = jnp.asarray(site.prior.segment_times[-1], x.dtype)
                if model.has_energy:
                    energy, own = model.each_with_energy(site.events(x), t)
                    own = own.reshape(x.shape)
                    energies += [energy, own]
                    potential = potential + jnp.sum(energy)
                    gradient = gradient | {site.name: gradient[site.name] - own}
                elif score is None:
                    found[site.name] = model.each(site.events(x), t).reshape(x.shape)
                else:
                    found[site.name] = score[site.name]
            finite = all_finite(*z.values(), *found.values(), *energies)
            return PathPoint(z, found, potential, gradient, finite)

        return evaluate


def constrained(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    z: Leaves,
    *,
    deterministic: bool = False,
) -> Leaves:
    """Constrained values of unconstrained ones, replaying the model without evaluating a network."""
    return constrain_fn(_rest(model), args, kwargs, z, return_deterministic=deterministic)


def _rest(model: Callable[..., Any]) -> Callable[..., Any]:
    """A model without the densities of its diffusion sites."""
    return handlers.seed(without_diffusion(model), jr.key(0))


def resolve_joint_problem(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sites: tuple[DiffusionSite, ...] | None = None,
) -> JointProblem:
    """Resolve a model that was inspected before; its diffusion sites are looked up unless they are known."""
    if sites is None:
        sites = latent_diffusion_sites(model, jr.key(0), args, kwargs)
    found, rebuilds, fingerprint = {}, {}, ""
    for site in sites:
        x = jax.ShapeDtypeStruct(site.prior.event_shape, jnp.result_type(float))
        t = jax.ShapeDtypeStruct((), jnp.result_type(float))
        own, rebuilds[site.name] = hoist(site.prior.score_fn, x, t, conditions=site.conditions)
        found[site.name] = own.arrays
        fingerprint += f"{site.name} {site.shape} {own.fingerprint} at {site.prior.segment_times[-1]}; "

    def rebuild(arrays: Any) -> Scores:
        return {name: one(arrays[name]) for name, one in rebuilds.items()}

    return JointProblem(model, args, kwargs, sites, HoistedArrays(found, fingerprint), rebuild)


def grid_of(site: DiffusionSite, dtype: Any) -> NoiseGrid:
    """The noise grid of a site's prior."""
    return noise_grid(site.prior.schedule, site.prior.segment_times, dtype)


def calibrations(problem: JointProblem, scores: Scores, dtype: Any) -> list[Calibration]:
    """How the score of each site fits the noise of its own draws, with a fixed key.

    `43 + levels` evaluations of 128 draws, or of 16 above 256 dimensions.
    """
    draw_key, pilot_key = jr.split(jr.key(0))
    found = []
    for site in problem.sites:
        prior = site.prior
        num_draws = num_pilot_draws(math.prod(prior.event_shape))
        model = scores[site.name].thinned(num_draws)
        draws, _ = prior_draws(draw_key, model, prior.noise, prior.event_shape, dtype, num_draws)
        found.append(run_pilot(pilot_key, model, grid_of(site, dtype), or_zero(draws)).calibration)
    return found


def first_calls(problem: JointProblem, scores: Scores, dtype: Any) -> list[tuple[Array, Array]]:
    """Scores at both ends of each site's grid: two evaluations a site."""
    return [
        first_call(scores[site.name], grid_of(site, dtype), site.prior.event_shape) for site in problem.sites
    ]


def draws_and_scales(problem: JointProblem, scores: Scores, dtype: Any) -> tuple[Leaves, Leaves]:
    """Of every site a prior draw, and `1 / E score^2` by coordinate from `START_DRAWS` of them.

    The key is fixed: they are a property of the prior. Elements of a batch are alike.
    """
    values, scales = {}, {}
    for site in problem.sites:
        prior, model = site.prior, scores[site.name].thinned(START_DRAWS)
        draws, _ = prior_draws(jr.key(0), model, prior.noise, prior.event_shape, dtype, START_DRAWS)
        t = jnp.asarray(prior.segment_times[-1], dtype)
        squares = jnp.mean(model.each(draws, t) ** 2, axis=0)
        weight = START_PRIOR_DRAWS / (START_PRIOR_DRAWS + START_DRAWS)
        squares = (1 - weight) * squares + weight * jnp.mean(squares)
        # Where a draw failed there is nothing to learn.
        scale = jnp.where(jnp.isfinite(squares) & (squares > 0), 1 / squares, 1.0)
        scales[site.name] = _to_batch(scale, site)
        values[site.name] = _to_batch(jnp.where(jnp.isfinite(draws[0]), draws[0], 0.0), site)
    return values, scales


def _to_batch(event: Event, site: DiffusionSite) -> Array:
    return jnp.broadcast_to(event.reshape((1,) * len(site.batch_shape) + event.shape), site.shape)
