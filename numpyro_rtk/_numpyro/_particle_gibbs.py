"""`RTKParticleGibbs`: exact posterior draws of the diffusion sites of a model."""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float
from numpyro import handlers
from numpyro.infer.gibbs import conditioned, GIBBS_SITES_KWARG
from numpyro.infer.hmc_util import dual_averaging
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import identity, is_prng_key

from numpyro_rtk._moves._line_integral import ExactEnergy, Simpson
from numpyro_rtk._noising._grid import (
    candidate_levels,
    chosen_grid,
    Levels,
    noise_levels,
    segment_grid,
    SegmentGrid,
)
from numpyro_rtk._noising._times import resolve_segments
from numpyro_rtk._numpyro._arguments import check_target_accept_prob
from numpyro_rtk._numpyro._likelihood import Likelihood
from numpyro_rtk._numpyro._particle_gibbs_warmup import (
    given_step_size,
    ParticleGibbsAdaptState,
    update_adaptation,
    warn_at_end,
)
from numpyro_rtk._numpyro._sites import (
    DiffusionSite,
    inspect_model,
    latent_diffusion_sites,
    ModelSites,
    without_diffusion,
)
from numpyro_rtk._reverse._base import AbstractInnerKernel, check_inner
from numpyro_rtk._reverse._pass import rule_step_size
from numpyro_rtk._reverse._pilot import Pilot, prior_draws, run_pilot
from numpyro_rtk._reverse._preconditioned_mala import PreconditionedMALA
from numpyro_rtk._score._checks import check_first_call, check_score_shape
from numpyro_rtk._score._hoist import hoist, HoistedArrays
from numpyro_rtk._smc._conditional import (
    conditional_sweep,
    max_step_size,
    no_sweep,
    sweep_evaluations,
    SweepTuning,
)
from numpyro_rtk._smc._local import AbstractLocalMove, LocalHMC
from numpyro_rtk._smc._placement import place_levels, transition_difficulty
from numpyro_rtk._smc._posterior import Posterior, SiteLaw
from numpyro_rtk._smc._twist import AbstractTwist, MAX_EXACT_OBSERVATIONS, MAX_RESIDUALS
from numpyro_rtk._smc._unconditional import choose_sweep, unconditional_sweep


DEFAULT_LEVEL_SEGMENTS = 24

MAX_INNER_STEP_SIZE = 4.0
"""`max_step_size` of the default inner kernel where energy differences are good: nearly an independent
draw.
"""

MAX_MEAN_SLOPE_DIM = 100
"""Most dimensions in which guided moves take the denoiser's Jacobian as diagonal unless told otherwise."""


class Shared(NamedTuple):
    """What all chains share; without a chain axis where chains are vectorized."""

    score_arrays: HoistedArrays
    """The networks' arrays, kept here so that they are arguments of the compiled program."""
    grids: tuple[tuple[SegmentGrid, Levels], ...]
    """Segments and levels of each site."""
    pilots: tuple[Pilot, ...]
    """What prior draws taught about each site's levels."""
    reference: Float[Array, " dim"]
    """Mean of the prior draws, where twists are linearised."""
    iteration: Array
    """Iterations so far, warmup included."""
    num_warmup: Array
    """Length of the warmup."""


class ParticleGibbsState(NamedTuple):
    """State of `RTKParticleGibbs`; with vectorized chains every field but `shared` has a chain axis.

    Levels and segments run from noise to data. A partial refresh leaves noisier levels out: they are NaN.
    """

    z: dict[str, Array]
    """The draw, `{site: value}`."""
    accept_prob: Float[Array, ""]
    """Mean acceptance probability of the inner kernel over the visited segments."""
    segment_accept_prob: Float[Array, " segments"]
    """The same by segment."""
    guided_accept_prob: Float[Array, " segments"]
    """Mean acceptance probability of the guided moves at the start of each segment."""
    local_accept_prob: Float[Array, ""]
    """Mean acceptance probability of the local moves."""
    effective_sample_size: Float[Array, " levels"]
    """Of the particles' weights at each level, from 1 to `num_particles`."""
    changed: Bool[Array, ""]
    """Whether the sweep left the pinned path."""
    depth: Array
    """Levels refreshed, 1 to the number of levels (a full sweep); 0 in an iteration without a sweep."""
    log_evidence: Float[Array, ""]
    """Estimate of the log evidence from the unconditional sweep at the start; constant over the run."""
    diverging: Bool[Array, ""]
    """Whether something non-finite was met."""
    num_score_evals: Array
    """Score evaluations of the iteration, over all events of all sites."""
    adapt_state: ParticleGibbsAdaptState
    """What warmup learns."""
    shared: Shared
    """What all chains share."""
    rng_key: Any
    """Random key of the next iteration."""


class RTKParticleGibbs(MCMCKernel):
    r"""Posterior draws of all `DiffusionPrior` sites of a model, given everything else in it.

    An iteration is one conditional SMC sweep over the noise levels (particle Gibbs), full or from a random
    level down, then local gradient moves at `t_min`. The current draw is noised up to a level, and
    `num_particles` particles, one of them pinned to that path, come down by reverse transitions, weighted by
    the twist, resampled, and moved by guided MALA.

    *Law.* Leaves the posterior `p_{t_min}(x) L(x)` invariant for any twist and any `num_particles >= 2`, up
    to the error of the inner kernel (geometrically small in `num_steps`) and of energy differences estimated
    from scores (see `PreconditionedMALA`, `LocalHMC`). `p_{t_min}` is the law of the data noised to `t_min`.

    *Cost.* `num_score_evals` in the state, of the chain's own sweep (vectorized chains are evaluated from the
    deepest sweep of any of them). A full sweep with `K` segments, `P` particles, `G` guided steps and an
    inner kernel of `E` evaluations a transition (3 by default) costs, per event of every site,
    `K (G + 1 + (P - 1)(E + G)) + P` and the local moves, vectorised over particles. A guided step counts
    twice with `guidance="mean"`, for Simpson's rule, unless all scores have an energy, where a transition
    counts one more. `init` draws `num_pilot_draws` from the prior (40 evaluations each and one per level; for
    64 of them 64 more, to place the levels) and runs two unconditional sweeps with `num_start_steps`.

    *Start.* Two unconditional sweeps from noise: the first adapts the guided step sizes and the powers of
    tempered twists, the second estimates the log evidence. The start is the draw of one of them, chosen in
    proportion to their evidence, as a sweep that missed the mode of the data has little. `init_params`
    replaces the start.

    *Warmup* adapts step sizes to `target_accept_prob`, powers of tempered twists, and how often to refresh to
    which depth (in proportion to the squared jump). Nothing changes afterwards.
    If the effective sample size of a level is below 2 in most sweeps, a warning names it when warmup ends.

    Args:
        model: A NumPyro model whose only unobserved sites, apart from those a composite conditions on, are
            `DiffusionPrior` sites: several sites, plates and batch shapes are fine, `scan`, `mask` and
            `scale` on them are not.
        num_particles: At least 2, the pinned one included.
        segments: Number of segments between noise levels (`None` is 24), placed for every site where its
            reverse transitions are measured to be far from Gaussian, as where modes part; or one time grid
            for all sites.
        inner: Inner kernel of the reverse transitions. `None` is `PreconditionedMALA`, at 3 evaluations a
            transition: one long step with `Simpson()` up to 100 dimensions over all sites, two short steps
                with the trapezoid rule above, and
            two long steps with `ExactEnergy()` where all scores have an energy.
        twist: `GaussianTwist()` or `TemperedTwist()`; `None` integrates Gaussian observations and tempers
            anything else.
        num_guided_steps: Guided MALA steps per level and particle; 0 for none.
        num_start_steps: Guided MALA steps per level and particle of the unconditional sweeps that find a
            start.
        num_restarts: Iterations of the warmup that draw the diffusion sites anew by an unconditional sweep
            given the other latents, only as a block of a composite, whose other latents are arbitrary at
            first: iterations 0, 1, 3, 7, ..., for as long as they are in the first half of the warmup, so
                that the others settle in between.
        sweep_prob: Probability that an iteration has a sweep; the others are local moves only. Where data are
            informative in every coordinate (an image with a value in every pixel) local moves do the work,
            and sweeps cost most.
        refresh_depths: Depths of the refreshes among which warmup chooses, as fractions of the levels: 1 is a
            full sweep. With many vectorized chains `(1.0,)` takes no more time, as a sweep lasts as long as
            the deepest of any chain. Shallow ones matter where data are sharp.
        guidance: How guided moves see through the denoiser: `"jacobian"`, one vector-Jacobian product of the
            score per evaluation and one more evaluation per level and particle; `"mean"`, the mean slope of
            each coordinate, for nothing. `None`: the first above 100 dimensions. It changes proposals, not
            the law.
        local: `LocalHMC(...)`, `LocalMALA(...)`, or `None` for no local moves.
        target_accept_prob: Acceptance probability that warmup aims at in all moves.
        num_pilot_draws: Prior draws that measure the denoising error of each level.

    Raises:
        TypeError, ValueError: for arguments and models that cannot work, naming what is wrong, before
        anything is compiled.

    References:
        Andrieu, Doucet and Holenstein (2010); Wu et al. (2023), arXiv 2306.17775; Corenflos et al. (2024),
        arXiv 2405.13794.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_particles: int = 16,
        segments: Any = None,
        inner: AbstractInnerKernel | None = None,
        twist: AbstractTwist | None = None,
        num_guided_steps: int = 1,
        num_start_steps: int = 8,
        num_restarts: int = 5,
        sweep_prob: float = 1.0,
        refresh_depths: Sequence[float] = (1.0, 0.75, 0.5, 0.35, 0.2, 0.1),
        guidance: Literal["jacobian", "mean"] | None = None,
        local: AbstractLocalMove | None = LocalHMC(),  # noqa: B008 - a frozen value
        target_accept_prob: float = 0.7,
        num_pilot_draws: int = 128,
    ) -> None:
        if not callable(model):
            raise TypeError(f"`model` must be a NumPyro model (a callable), got {type(model).__name__}.")
        _check_count("num_particles", num_particles, 2, "one of them is pinned to the current draw")
        _check_count("num_guided_steps", num_guided_steps, 0, "0 is none")
        _check_count("num_start_steps", num_start_steps, 1, "they anneal the start")
        _check_count("num_restarts", num_restarts, 0, "0 is none")
        if not (isinstance(sweep_prob, int | float | np.floating) and 0 <= sweep_prob <= 1):
            raise ValueError(f"`sweep_prob` must be between 0 and 1, got {sweep_prob!r}.")
        if sweep_prob == 0 and local is None:
            raise ValueError("`sweep_prob=0` with `local=None` would never move: give one of them.")
        try:
            depths = np.asarray(refresh_depths, np.float64)
        except (TypeError, ValueError):
            depths = np.asarray(np.nan)
        if depths.ndim != 1 or not depths.size or not np.all((depths > 0) & (depths <= 1)):
            raise ValueError(
                "`refresh_depths` must be fractions of the levels, each above 0 and at most 1, such as "
                "`(1.0, 0.5)`, got "
                f"{refresh_depths!r}."
            )
        _check_count("num_pilot_draws", num_pilot_draws, 8, "they measure the denoising error of each level")
        check_target_accept_prob(target_accept_prob)
        if inner is not None and not isinstance(inner, AbstractInnerKernel):
            hint = f" Did you mean `{inner.__name__}()`?" if isinstance(inner, type) else ""
            raise TypeError(
                f"`inner` must be an inner kernel such as `PreconditionedMALA()`, got {inner!r}.{hint}"
            )
        if twist is not None and not isinstance(twist, AbstractTwist):
            hint = f" Did you mean `{twist.__name__}()`?" if isinstance(twist, type) else ""
            raise TypeError(
                f"`twist` must be `GaussianTwist()`, `TemperedTwist()` or `None`, got {twist!r}.{hint}"
            )
        if guidance not in (None, "jacobian", "mean"):
            raise ValueError(f'`guidance` must be "jacobian", "mean" or `None`, got {guidance!r}.')
        if local is not None and not isinstance(local, AbstractLocalMove):
            hint = f" Did you mean `{local.__name__}()`?" if isinstance(local, type) else ""
            raise TypeError(
                f"`local` must be `LocalHMC(...)`, `LocalMALA(...)` or `None`, got {local!r}.{hint}"
            )
        self._model = model
        self._num_particles = int(num_particles)
        self._segments = segments
        self._inner = inner
        self._twist = twist
        self._num_guided_steps = int(num_guided_steps)
        self._num_start_steps = int(num_start_steps)
        self._num_restarts = int(num_restarts)
        self._sweep_prob = float(sweep_prob)
        self._refresh_depths = tuple(float(depth) for depth in depths)
        self._guidance = guidance
        self._local = local
        self._target_accept_prob = float(target_accept_prob)
        self._num_pilot_draws = int(num_pilot_draws)

    def __repr__(self) -> str:
        return (
            f"RTKParticleGibbs(num_particles={self._num_particles}, segments={self._segments}, "
            f"inner={self._inner}, "
            f"twist={self._twist}, num_guided_steps={self._num_guided_steps}, local={self._local})"
        )

    @property
    def model(self) -> Callable[..., Any]:
        """The model."""
        return self._model

    @property
    def sample_field(self) -> str:
        """`"z"`."""
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        """The draws, and whether something non-finite was met."""
        return ("z", "diverging")

    def get_diagnostics_str(self, state: ParticleGibbsState) -> str:
        """Acceptances, the lowest effective sample size and the cost, for the progress bar."""
        ess = np.asarray(state.effective_sample_size)
        ess = ess[np.isfinite(ess)]
        lowest = f", lowest ESS {ess.min():.1f}/{self._num_particles}" if ess.size else ""
        failed = ", diverging" if bool(state.diverging) else ""
        return (
            f"{int(state.num_score_evals)} score evals, acc. prob={float(state.accept_prob):.2f}, "
            f"local {float(state.local_accept_prob):.2f}{lowest}{failed}"
        )

    # The model.

    def _times(self, site: DiffusionSite) -> np.ndarray:
        return resolve_segments(site.prior.schedule, self._segments, DEFAULT_LEVEL_SEGMENTS)

    def _depths(self, num_levels: int) -> tuple[int, ...]:
        """The depths that warmup chooses among, in levels."""
        return tuple(sorted({max(1, round(fraction * num_levels)) for fraction in self._refresh_depths}))

    def _inner_for(self, sites: tuple[DiffusionSite, ...]) -> AbstractInnerKernel:
        """The inner kernel that was given, or the default for these sites."""
        if self._inner is not None:
            return self._inner
        if all(callable(getattr(site.prior.score_fn, "energy", None)) for site in sites):
            return PreconditionedMALA(energy_difference=ExactEnergy(), max_step_size=MAX_INNER_STEP_SIZE)
        if sum(math.prod(site.shape) for site in sites) > MAX_MEAN_SLOPE_DIM:
            return PreconditionedMALA()
        # The cost of two steps with the trapezoid rule, and hardly any error in a prior of several modes.
        return PreconditionedMALA(num_steps=1, energy_difference=Simpson(), max_step_size=MAX_INNER_STEP_SIZE)

    def _hoist(self, sites: tuple[DiffusionSite, ...], dtype: Any) -> Any:
        """The networks' arrays of all sites, and functions that rebuild the scores from them."""
        found = []
        for site in sites:
            x, t = jax.ShapeDtypeStruct(site.prior.event_shape, dtype), jax.ShapeDtypeStruct((), dtype)
            found.append(hoist(site.prior.score_fn, x, t, (), {}, with_energy=True))
        settings = [
            f"{site.name} {one[0].fingerprint} {self._times(site).tolist()}"
            for site, one in zip(sites, found, strict=True)
        ]
        fingerprint = f"{settings} {type(self._inner).__name__} {self._num_particles} {self._refresh_depths}"
        arrays = HoistedArrays([one[0].arrays for one in found], fingerprint)
        return arrays, lambda arrays: [one[1](part) for one, part in zip(found, arrays, strict=True)]

    def _laws(
        self, sites: tuple[DiffusionSite, ...], scores: list[Any], shared: Shared
    ) -> tuple[SiteLaw, ...]:
        return tuple(
            SiteLaw(
                score_fn=score_fn,
                has_energy=callable(getattr(site.prior.score_fn, "energy", None)),
                grid=grid,
                levels=levels,
                pilot=pilot,
                event_shape=site.prior.event_shape,
                batch_size=math.prod(site.batch_shape),
            )
            for site, score_fn, (grid, levels), pilot in zip(
                sites, scores, shared.grids, shared.pilots, strict=True
            )
        )

    def _terms(self, sites: tuple[DiffusionSite, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The likelihood of a flat vector, split for the twist."""
        likelihood = Likelihood(
            conditioned(self._model), args, kwargs, gaussian=self._twist is None or self._twist.gaussian
        )

        return lambda x: likelihood.terms(_unflatten(sites, x))

    def _posterior(
        self,
        sites: tuple[DiffusionSite, ...],
        shared: Shared,
        log_beta: Array,
        rebuild: Any,
        args: Any,
        kwargs: Any,
    ) -> Posterior:
        laws = self._laws(sites, rebuild(shared.score_arrays.arrays), shared)
        terms = self._terms(sites, args, kwargs)
        dim = sum(law.size for law in laws)
        jacobian = dim > MAX_MEAN_SLOPE_DIM if self._guidance is None else self._guidance == "jacobian"
        return Posterior(laws, terms, self._inner_for(sites), log_beta, jacobian=jacobian)

    # The kernel.

    def init(
        self,
        rng_key: Any,
        num_warmup: int,
        init_params: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> ParticleGibbsState:
        """Check the model, measure the levels, and find a start by unconditional SMC.

        Args:
            rng_key: One key, or one per vectorized chain.
            num_warmup: Length of the warmup.
            init_params: `None`, or `{site: value}` to start from, with a chain axis if keys are batched.
                Ignored in a composite, which hands in prior draws.
            model_args: Arguments of the model.
            model_kwargs: Keyword arguments of the model.
        """
        kwargs = {} if model_kwargs is None else dict(model_kwargs)
        batched = not is_prng_key(rng_key)
        dtype = jnp.result_type(float)
        found = inspect_model("RTKParticleGibbs", conditioned(self._model), jr.key(0), model_args, kwargs)
        self._check_others(found)
        sites = found.diffusion
        self._check_sites(sites, dtype)
        arrays, rebuild = self._hoist(sites, dtype)
        num_levels = self._times(sites[0]).size
        terms = self._terms(sites, model_args, kwargs)
        values = None
        if init_params is not None and GIBBS_SITES_KWARG not in kwargs:
            values = _read_init_params(init_params, sites, batched, dtype)

        # A fixed key: what is measured is a property of the prior.
        draws, grids, pilots = jax.jit(functools.partial(self._measure, sites, rebuild, dtype))(arrays.arrays)
        flat_draws = _flatten_draws(sites, draws)
        num_observations = jax.eval_shape(
            terms, jax.ShapeDtypeStruct(flat_draws.shape[1:], dtype)
        ).whitened.shape[0]
        if self._twist is not None and self._twist.gaussian and num_observations == 0:
            raise ValueError(
                "`twist=GaussianTwist()` needs Gaussian observations (`Normal` or `MultivariateNormal` "
                "sites), and the model has "
                "none. Leave `twist` out, or use `TemperedTwist()`."
            )
        _check_likelihood(jax.jit(jax.vmap(terms))(flat_draws))
        # Only covariances that are formed need all residuals.
        kept = (
            MAX_RESIDUALS
            if num_observations > MAX_EXACT_OBSERVATIONS
            else self._num_pilot_draws
            if num_observations
            else 0
        )
        pilots = tuple(pilot._replace(residuals=pilot.residuals[:, :kept]) for pilot in pilots)
        shared = Shared(
            arrays,
            grids,
            pilots,
            jnp.mean(flat_draws, axis=0),
            jnp.zeros((), int),
            jnp.asarray(num_warmup, int),
        )

        def start(key: Any, value: Any, shared: Shared) -> ParticleGibbsState:
            return self._start(
                key, value, shared, sites, rebuild, num_levels, num_warmup, model_args, kwargs, dtype
            )

        run = jax.jit(jax.vmap(start, in_axes=(0, 0, None)) if batched else start)
        state = run(rng_key, values, shared)._replace(shared=shared)
        self._check_start(state, sites, terms, batched)
        return state

    def _check_others(self, found: ModelSites) -> None:
        if found.others:
            raise ValueError(
                f"`RTKParticleGibbs` samples diffusion sites only, and the model has other latent sites: "
                f"{list(found.others)}. "
                "Use `RTKGibbs(NUTS(model))` to sample them too, or `numpyro.handlers.condition` to fix "
                "them. "
                "Observed sites are among them if their data are `None`."
            )

    def _check_sites(self, sites: tuple[DiffusionSite, ...], dtype: Any) -> None:
        sizes = {site.name: self._times(site).size for site in sites}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"`segments` gives the diffusion sites different numbers of levels: {sizes}. Give a number "
                f"that all "
                "schedules allow."
            )
        for site in sites:
            prior = site.prior
            x, t = jax.ShapeDtypeStruct(prior.event_shape, dtype), jax.ShapeDtypeStruct((), dtype)
            check_inner(self._inner_for(sites), prior.score_fn, sizes[site.name] - 1)
            check_score_shape(prior.score_fn, x, t, (), {})
            check_first_call(
                prior.score_fn,
                segment_grid(prior.schedule, self._times(site), dtype),
                prior.event_shape,
                dtype,
                (),
                {},
            )

    def _measure(self, sites: tuple[DiffusionSite, ...], rebuild: Any, dtype: Any, arrays: Any) -> Any:
        """Prior draws of each site, its levels, and what the draws teach about them."""
        all_draws, grids, pilots = [], [], []
        for site, score_fn in zip(sites, rebuild(arrays), strict=True):
            draw_key, pilot_key, probe_key = jr.split(jr.key(0), 3)
            schedule, times = site.prior.schedule, self._times(site)
            draws = prior_draws(
                draw_key, score_fn, schedule, site.prior.event_shape, dtype, self._num_pilot_draws
            )
            draws = jnp.where(jnp.isfinite(draws), draws, 0.0)
            candidates = candidate_levels(schedule, times.size - 1, dtype)
            # A grid that was given is kept; so is one of all there is between the levels of a coarse
            # precision.
            if np.ndim(self._segments) == 0 and candidates.t.size >= times.size:
                difficulty = transition_difficulty(probe_key, score_fn, candidates, draws)
                grid, levels = chosen_grid(candidates, place_levels(difficulty, times.size - 1))
            else:
                grid, levels = segment_grid(schedule, times, dtype), noise_levels(schedule, times, dtype)
            all_draws.append(draws)
            grids.append((grid, levels))
            pilots.append(run_pilot(pilot_key, score_fn, levels, draws))
        return all_draws, tuple(grids), tuple(pilots)

    def _start(
        self,
        key: Any,
        value: Any,
        shared: Shared,
        sites: tuple[DiffusionSite, ...],
        rebuild: Any,
        num_levels: int,
        num_warmup: int,
        args: Any,
        kwargs: Any,
        dtype: Any,
    ) -> ParticleGibbsState:
        """State of one chain before its first iteration."""
        sweep_key, next_key = jr.split(key)
        *sweep_keys, choose_key = jr.split(sweep_key, 3)
        log_beta = _initial_log_beta(shared.pilots)
        posterior = self._posterior(sites, shared, log_beta, rebuild, args, kwargs)
        step_size = jnp.stack(
            [
                rule_step_size(
                    posterior.inner,
                    law.grid,
                    jnp.mean(law.pilot.curvature.reshape(num_levels, -1)[1:], -1),
                    law.event_size,
                )
                for law in posterior.sites
            ],
            axis=1,
        )
        step_size = jnp.minimum(step_size, getattr(posterior.inner, "max_step_size", jnp.inf))
        guided = jnp.full(num_levels - 1, 0.5 * max_step_size(posterior) * posterior.dim ** (-1 / 3), dtype)
        options = (
            self._num_particles,
            max(self._num_start_steps, self._num_guided_steps),
            self._target_accept_prob,
        )

        def sweep(carry: Any, inputs: Any) -> Any:
            (log_beta, guided), (key, adapt) = carry, inputs
            posterior = self._posterior(sites, shared, log_beta, rebuild, args, kwargs)
            tuning = SweepTuning(step_size, guided)
            point, info = unconditional_sweep(key, posterior, tuning, shared.reference, *options, adapt)
            return (info.log_beta, info.guided_step_size), (point.x, point.log_twist, info)

        # The first sweep adapts, the second does not.
        inputs = (jnp.stack(sweep_keys), jnp.array([True, False]))
        (log_beta, guided), (xs, log_twists, infos) = jax.lax.scan(sweep, (log_beta, guided), inputs)
        info = jax.tree.map(lambda leaf: leaf[1], infos)
        x = xs[choose_sweep(choose_key, xs, log_twists, infos.log_evidence)]
        z = _unflatten(sites, x) if value is None else value
        log_local = jnp.log(jnp.asarray(0.3 * posterior.dim ** (-1 / 4), dtype))
        init: Any = dual_averaging()[0]
        averaging = (
            jax.vmap(jax.vmap(init))(jnp.log(step_size)),
            jax.vmap(init)(jnp.log(guided)),
            init(log_local),
        )
        num_depths, scalar = len(self._depths(num_levels)), jnp.zeros((), dtype)
        adapt_state = ParticleGibbsAdaptState(
            step_size=step_size,
            guided_step_size=guided,
            local_step_size=given_step_size(self._local, jnp.exp(log_local)),
            log_beta=log_beta,
            depth_prob=jnp.full(num_depths, 1 / num_depths, dtype),
            depth_jump=jnp.zeros(num_depths, dtype),
            depth_count=jnp.zeros(num_depths, dtype),
            num_collapsed=jnp.zeros(num_levels, dtype),
            num_visits=jnp.zeros(num_levels, dtype),
            averaging=averaging,
            num_warmup=jnp.asarray(num_warmup, int),
        )
        return ParticleGibbsState(
            z=z,
            accept_prob=scalar,
            segment_accept_prob=jnp.zeros(num_levels - 1, dtype),
            guided_accept_prob=jnp.zeros(num_levels - 1, dtype),
            local_accept_prob=scalar,
            effective_sample_size=info.effective_sample_size,
            changed=jnp.zeros((), bool),
            depth=jnp.asarray(num_levels, int),
            log_evidence=info.log_evidence,
            diverging=jnp.zeros((), bool),
            num_score_evals=jnp.zeros((), int),
            adapt_state=adapt_state,
            shared=None,  # pyright: ignore - filled in without a chain axis
            rng_key=next_key,
        )

    def _check_start(
        self, state: ParticleGibbsState, sites: tuple[DiffusionSite, ...], terms: Any, batched: bool
    ) -> None:
        values = [state.z[site.name] for site in sites]
        if any(isinstance(value, Tracer) for value in values):
            return

        def log_likelihood(values: list[Array]) -> Array:
            return terms(jnp.concatenate([jnp.ravel(value) for value in values])).log_likelihood

        result = np.atleast_1d(
            np.asarray(jax.jit(jax.vmap(log_likelihood) if batched else log_likelihood)(values))
        )
        if not np.all(np.isfinite(result)):
            bad = [int(i) for i in np.flatnonzero(~np.isfinite(result))]
            raise ValueError(
                f"The log likelihood is {result[bad[0]]} at the start"
                + (f" of chains {bad}" if batched else "")
                + ". Give a start inside "
                "the support, `MCMC.run(..., init_params={site: value})`, or more particles."
            )

    def sample(
        self, state: ParticleGibbsState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ParticleGibbsState:
        """One sweep and its local moves, for one chain or a batch of them."""
        kwargs = {} if model_kwargs is None else dict(model_kwargs)
        batched = not is_prng_key(state.rng_key)
        sites = latent_diffusion_sites(conditioned(self._model), jr.key(0), model_args, kwargs)
        dtype = state.accept_prob.dtype
        own, rebuild = self._hoist(sites, dtype)
        shared = state.shared
        if own.fingerprint != shared.score_arrays.fingerprint:
            raise ValueError(
                "The state comes from a kernel with other network weights, another inner kernel, other "
                "segments, other "
                "refresh depths or another number of particles. Start a new `MCMC` (or call `warmup` again) "
                "instead of re-using "
                "`post_warmup_state`."
            )

        def step(state: ParticleGibbsState, shared: Shared) -> ParticleGibbsState:
            posterior = self._posterior(
                sites, shared, state.adapt_state.log_beta, rebuild, model_args, kwargs
            )
            if not self._num_restarts or GIBBS_SITES_KWARG not in kwargs:
                return self._step(state, shared, sites, posterior)
            # The iteration has no chain axis, so that this branches for vectorized chains, too.
            return jax.lax.cond(
                self._restarts_at(shared.iteration, shared.num_warmup),
                lambda: self._restart(state, shared, sites, posterior),
                lambda: self._step(state, shared, sites, posterior),
            )

        # Arrays of the network and measurements have no chain axis.
        chain = state._replace(shared=None)  # pyright: ignore
        new = (jax.vmap(step, in_axes=(0, None)) if batched else step)(chain, shared)
        iteration = shared.iteration + 1
        warn_at_end(new.adapt_state, shared.grids[0][1].t, iteration, shared.num_warmup, self._num_particles)
        return new._replace(shared=shared._replace(iteration=iteration))

    def _restarts_at(self, iteration: Array, num_warmup: Array) -> Array:
        """Whether an iteration of the warmup draws the sites anew; never one after it, as a restart leaves no
        law invariant.
        """
        is_due = (iteration & (iteration + 1)) == 0
        return is_due & (iteration < 2 ** min(self._num_restarts - 1, 30)) & (2 * iteration < num_warmup)

    def _step(
        self,
        state: ParticleGibbsState,
        shared: Shared,
        sites: tuple[DiffusionSite, ...],
        posterior: Posterior,
    ) -> ParticleGibbsState:
        """One iteration of one chain: a pure function of the state."""
        next_key, coin_key, depth_key, sweep_key, local_key = jr.split(state.rng_key, 5)
        adapt = state.adapt_state
        depths = jnp.asarray(self._depths(posterior.num_levels))
        choice = jr.categorical(depth_key, jnp.log(adapt.depth_prob))
        # Depth 0 is no sweep.
        swept = jr.bernoulli(coin_key, self._sweep_prob)
        depth = jnp.where(swept, depths[choice], 0)
        last = jnp.asarray(posterior.num_levels - 1)
        x = jnp.concatenate([jnp.ravel(state.z[site.name]) for site in sites])
        point = posterior.at_data(x)
        tuning = SweepTuning(adapt.step_size, adapt.guided_step_size)
        if self._sweep_prob > 0:
            new, info = conditional_sweep(
                sweep_key,
                posterior,
                tuning,
                shared.reference,
                point,
                depth,
                self._num_particles,
                self._num_guided_steps,
            )
        else:
            # Nothing to compile.
            new, info = point, no_sweep(posterior)
        jump = jnp.mean((new.x - x) ** 2 / posterior.mean_square[0])
        local_accept, diverging = jnp.ones((), x.dtype), info.diverging
        evaluations = 1 + sweep_evaluations(posterior, depth, self._num_particles, self._num_guided_steps)
        if self._local is not None:
            preconditioner = posterior.preconditioner(last, shared.reference)
            new, local_info = self._local(local_key, posterior, new, preconditioner, adapt.local_step_size)
            local_accept, diverging = local_info.accept_prob, diverging | local_info.diverging
            evaluations += self._local.num_evaluations
        adapt_state = update_adaptation(
            adapt,
            posterior,
            shared.iteration,
            info,
            local_accept,
            choice,
            swept,
            jump,
            target_accept_prob=self._target_accept_prob,
            num_particles=self._num_particles,
            local_move=self._local,
        )
        return ParticleGibbsState(
            z=_unflatten(sites, new.x),
            accept_prob=jnp.nanmean(info.accept_prob),
            segment_accept_prob=info.accept_prob,
            guided_accept_prob=info.guided_accept_prob,
            local_accept_prob=local_accept,
            effective_sample_size=info.effective_sample_size,
            changed=info.changed,
            depth=depth,
            log_evidence=state.log_evidence,
            diverging=diverging,
            num_score_evals=jnp.asarray(
                evaluations * sum(law.batch_size for law in posterior.sites), state.num_score_evals.dtype
            ),
            adapt_state=adapt_state,
            shared=None,  # pyright: ignore
            rng_key=next_key,
        )

    def _restart(
        self,
        state: ParticleGibbsState,
        shared: Shared,
        sites: tuple[DiffusionSite, ...],
        posterior: Posterior,
    ) -> ParticleGibbsState:
        """A warmup iteration that draws the sites anew given the other latents."""
        next_key, sweep_key = jr.split(state.rng_key)
        adapt = state.adapt_state
        tuning = SweepTuning(adapt.step_size, adapt.guided_step_size)
        num_steps = max(self._num_start_steps, self._num_guided_steps)
        options = (self._num_particles, num_steps, self._target_accept_prob, jnp.ones((), bool))
        point, info = unconditional_sweep(sweep_key, posterior, tuning, shared.reference, *options)
        init: Any = dual_averaging()[0]
        averaging = (adapt.averaging[0], jax.vmap(init)(jnp.log(info.guided_step_size)), adapt.averaging[2])
        usable = (point.log_twist > -jnp.inf) & jnp.all(jnp.isfinite(point.x))
        z = jax.tree.map(lambda new, old: jnp.where(usable, new, old), _unflatten(sites, point.x), state.z)
        per_level = num_steps * posterior.evaluations_per_guided_step
        per_level += posterior.evaluations_per_reverse + posterior.evaluations_to_prepare
        evaluations = self._num_particles * (1 + (posterior.num_levels - 1) * per_level)
        nan = jnp.asarray(jnp.nan, point.x.dtype)
        return state._replace(
            z=z,
            accept_prob=nan,
            segment_accept_prob=jnp.full_like(state.segment_accept_prob, nan),
            guided_accept_prob=jnp.full_like(state.guided_accept_prob, nan),
            local_accept_prob=nan,
            effective_sample_size=info.effective_sample_size,
            changed=jnp.ones((), bool),
            depth=jnp.full_like(state.depth, posterior.num_levels),
            diverging=~usable,
            num_score_evals=jnp.full_like(
                state.num_score_evals, evaluations * sum(law.batch_size for law in posterior.sites)
            ),
            adapt_state=adapt._replace(
                guided_step_size=info.guided_step_size, log_beta=info.log_beta, averaging=averaging
            ),
            rng_key=next_key,
        )

    def refresh(
        self, state: ParticleGibbsState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ParticleGibbsState:
        """The state itself: nothing that depends on conditioning values is cached."""
        del model_args, model_kwargs
        return state

    def wrap_model(self, wrapper: Callable[..., Any]) -> "RTKParticleGibbs":
        """A copy whose model is `wrapper(model)`."""
        kernel = copy.copy(self)
        kernel._model = wrapper(self._model)
        return kernel

    def get_constrain_fn(self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None) -> Any:
        """The identity: diffusion sites are unconstrained."""
        del model_args, model_kwargs
        return identity

    def postprocess_fn(self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None) -> Any:
        """Adds the deterministic sites of the model to the draws."""
        kwargs = {} if model_kwargs is None else dict(model_kwargs)
        model = conditioned(self._model)

        def add_deterministic(z: dict[str, Array]) -> dict[str, Array]:
            replayed = handlers.substitute(handlers.seed(without_diffusion(model), jr.key(0)), data=z)
            trace = handlers.trace(replayed).get_trace(*model_args, **kwargs)
            return z | {
                name: site["value"] for name, site in trace.items() if site["type"] == "deterministic"
            }

        return add_deterministic


def _unflatten(sites: tuple[DiffusionSite, ...], x: Array) -> dict[str, Array]:
    """A flat vector as values of the sites."""
    values, start = {}, 0
    for site in sites:
        size = math.prod(site.shape)
        values[site.name] = x[start : start + size].reshape(site.shape)
        start += size
    return values


def _check_count(name: str, value: Any, minimum: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum} ({why}), got {value!r}.")


def _initial_log_beta(pilots: tuple[Pilot, ...]) -> Array:
    """Share of the prior's variance that the denoiser explains at each level."""
    unexplained = sum(jnp.sum(p.mean_square.reshape(p.mean_square.shape[0], -1), axis=1) for p in pilots)
    assert isinstance(unexplained, jax.Array)
    share = jnp.clip(1 - unexplained / unexplained[0], 1e-4, 1.0)
    return jnp.log(share.at[-1].set(1.0))


def _flatten_draws(sites: tuple[DiffusionSite, ...], draws: list[Array]) -> Array:
    """Prior draws of all sites as flat vectors; elements of a batch take different draws."""
    columns = []
    for site, one in zip(sites, draws, strict=True):
        columns += [
            jnp.roll(one, i, axis=0).reshape(one.shape[0], -1) for i in range(math.prod(site.batch_shape))
        ]
    return jnp.concatenate(columns, axis=1)


def _check_likelihood(terms: Any) -> None:
    """Raise if the likelihood is impossible at every prior draw, or NaN at any."""
    total = terms.log_likelihood
    if isinstance(total, Tracer):
        return
    total = np.asarray(total)
    if np.all(np.isnan(total)):
        raise ValueError(
            "The log likelihood is NaN at every one of the prior draws tried. Check the observations and the "
            "parameters of their "
            "laws."
        )
    if not np.any(total > -np.inf):
        raise ValueError(
            f"The log likelihood is -inf at all {total.size} prior draws tried: the data are impossible "
            f"under the model there. "
            "Check the supports of the observed sites, and transforms (a rate must be positive: `exp`, "
            "`softplus`)."
        )


def _read_init_params(
    init_params: Any, sites: tuple[DiffusionSite, ...], batched: bool, dtype: Any
) -> dict[str, Array]:
    names = {site.name for site in sites}
    if not isinstance(init_params, dict) or set(init_params) != names:
        got = sorted(init_params) if isinstance(init_params, dict) else type(init_params).__name__
        raise ValueError(
            f"`init_params` must be a dict with the diffusion sites {sorted(names)} as keys, got {got}."
        )
    values = {}
    for site in sites:
        value = jnp.asarray(init_params[site.name], dtype)
        shape = value.shape[1:] if batched else value.shape
        if shape != site.shape:
            raise ValueError(
                f"`init_params[{site.name!r}]` has shape {shape}, but the site has shape {site.shape}."
            )
        if not isinstance(value, Tracer) and not np.all(np.isfinite(np.asarray(value))):
            raise ValueError(f"`init_params[{site.name!r}]` contains NaN or infinity.")
        values[site.name] = value
    return values
