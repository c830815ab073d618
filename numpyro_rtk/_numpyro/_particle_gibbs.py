"""`RTKParticleGibbs`: posterior draws of the diffusion sites of a model."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array
from numpyro.infer.gibbs import conditioned, GIBBS_SITES_KWARG
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import identity, is_prng_key

from numpyro_rtk._numpyro._arguments import read_init_params
from numpyro_rtk._numpyro._collapse import warn_collapsed
from numpyro_rtk._numpyro._likelihood import Likelihood
from numpyro_rtk._numpyro._measure import measure
from numpyro_rtk._numpyro._particle_gibbs_chain import Chain, DEFAULT_STATISTICS, ParticleGibbsState
from numpyro_rtk._numpyro._particle_gibbs_options import check_options, Chosen, describe, Options
from numpyro_rtk._numpyro._partition import Partition
from numpyro_rtk._numpyro._problem import Problem, resolve_problem, Shared
from numpyro_rtk._numpyro._programs import Programs
from numpyro_rtk._numpyro._sharding import over_chains
from numpyro_rtk._numpyro._sites import DiffusionSite, inspect_model, latent_diffusion_sites
from numpyro_rtk._numpyro._start_checks import check_others, check_sites, check_start
from numpyro_rtk._numpyro._tracing import add_deterministic, without_diffusion
from numpyro_rtk._reverse._base import AbstractInnerKernel
from numpyro_rtk._smc._local import AbstractLocalMove
from numpyro_rtk._smc._posterior import Floor
from numpyro_rtk._smc._twist import AbstractTwist
from numpyro_rtk._user import arviz_asks


class RTKParticleGibbs(MCMCKernel):
    r"""Posterior draws of all `DiffusionPrior` sites of a model, given everything else in it.

    An iteration is one conditional SMC sweep over the noise levels (particle Gibbs), full or from a random
    level down, then local gradient moves at `t_min`. The current draw is noised up to a level, and
    `num_particles` particles, one of them pinned to that path, come down by reverse transitions, weighted by
    the twist, resampled, and moved by guided MALA.

    Events that share no observation, such as objects of a plate given all other latents, are elements that
    move apart: weights, resampling and accept steps are of each by itself, in the same evaluations.

    *Law.* Leaves the posterior `p_{t_min}(x) L(x)` invariant for any twist and any `num_particles >= 2`, up
    to the error of the reverse kernel (geometrically small in `num_steps`) and of energy differences
    estimated from scores (see `PreconditionedMALA`, `LocalHMC`). `p_{t_min}` is the law of the data noised to
    `t_min`.

    *Derivatives.* Of the likelihood in the sites, which must have them, unless nothing asks for one: with
    `twist=TemperedTwist()`, `num_guided_steps=0`, `num_start_steps=0` and `local=None`. Of the score above
    100 dimensions, where it has them, see `guidance`.

    *Cost.* `num_score_evals` in the state, of the chain's own sweep (vectorized chains are evaluated from the
    deepest of any). A full sweep with `K` segments, `P` particles, `G` guided steps and a reverse kernel of
    `E` evaluations a transition (3 by default) costs, per event of every site,
    `K (G + 1 + (P - 1)(E + G)) + P` and the local moves, vectorised over particles. A guided step counts
    twice with `guidance="mean"`, for Simpson's rule, unless all scores have an energy, where a transition
    counts one more. `init` draws `num_pilot_draws` from the prior (43 evaluations each and one per level; for
    at most 64 of them 64 more, to place the levels), checks its transitions by round trips, as `RTKKernel`
    does, and runs two unconditional sweeps with `num_start_steps`.

    *Start.* Two unconditional sweeps from noise: the first adapts the guided step sizes and the powers of
    tempered twists, the second estimates the log evidence. The draw of one of them is chosen in proportion to
    their evidence, as a sweep that missed the mode of the data has little. `init_params` replaces it.

    *Warmup* adapts step sizes to `target_accept_prob`, powers of tempered twists, how often to sweep, and to
    which depth (in proportion to the squared jump). Nothing changes afterwards. A warning at the start names
    levels where particles have collapsed.

    Args:
        model: A NumPyro model whose only unobserved sites, apart from those a composite conditions on, are
            `DiffusionPrior` sites: several sites, plates and batch shapes are fine, `scan`, `mask` and
            `scale` on them are not.
        num_particles: At least 2, the pinned one included. `None`: 16, or 2 where gradient moves do the work:
            above 256 dimensions of all sites with an observation, masked or not, for at least every fourth.
        segments: Number of segments between noise levels (`None` is 24), placed for every site where its
            reverse transitions are measured to be far from Gaussian, as where modes part; or one time grid
            for all sites, whose ends must be those of the priors.
        reverse: Reverse kernel of the transitions. `None` is `PreconditionedMALA`, at 3 evaluations a
            transition: one long step with `Simpson()` up to 100 dimensions over all sites, two short steps
            with the trapezoid rule above, two long ones with `ExactEnergy()` where all scores have an energy.
        twist: `GaussianTwist()` or `TemperedTwist()`; `None` integrates Gaussian observations and tempers
            anything else.
        num_guided_steps: Guided MALA steps per level and particle; 0 for none.
        num_start_steps: Guided MALA steps per level and particle of the unconditional sweeps that find a
            start.
        num_restarts: Iterations of the warmup that draw the diffusion sites anew by an unconditional sweep
            given the other latents, only as a block of a composite, whose other latents are arbitrary at
            first, and not where a start was given: iterations 0, 1, 3, 7, ..., in its first half.
        sweep_prob: Probability that an iteration has a sweep; the others are local moves only. `None`: warmup
            decides. Sweeps of which at least 5 % change the draw are made in every iteration, rarer ones in
            proportion, but at least so often that full ones take half as many evaluations as local moves.
        refresh_depths: Depths of the refreshes among which warmup chooses, as fractions of the levels: 1 is a
            full sweep. With many vectorized chains `(1.0,)` takes no more time, as a sweep lasts as long as
            the deepest of any chain. Shallow ones matter where data are sharp.
        guidance: How guided moves see through the denoiser: `"jacobian"`, one vector-Jacobian product of the
            score per evaluation and one more evaluation per level and particle; `"mean"`, the mean slope of
            each coordinate, for nothing. `None`: the first above 100 dimensions where scores can be
            differentiated. It changes proposals, not the law.
        local: `LocalHMC(...)`, `LocalMALA(...)`, or `None` for no local moves. `"default"`: two trajectories
            of 10 steps, `LocalHMC()`; one of 100 steps where gradient moves do the work.
        target_accept_prob: Acceptance probability that warmup aims at in all moves.
        num_pilot_draws: Prior draws that measure each level. `None`: 128, or 32 above 256 dimensions each.
        batch_size: Most particles, of all vectorized chains together, that the start moves at once, for
            memory, but at least those of one chain. `None`: all of them. Pilot draws are made together.

    Raises:
        TypeError, ValueError: for arguments and models that cannot work, naming what is wrong, before
            anything is compiled.

    References:
        Andrieu, Doucet and Holenstein (2010); Wu et al. (2023), arXiv 2306.17775; Corenflos et al. (2024),
        arXiv 2405.13794.
    """

    _sample_fn = True
    """Tells `MCMC` that a resumed run needs no `init`: a state is all that `sample` depends on."""

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_particles: int | None = None,
        segments: Any = None,
        reverse: AbstractInnerKernel | None = None,
        twist: AbstractTwist | None = None,
        num_guided_steps: int = 1,
        num_start_steps: int = 8,
        num_restarts: int = 5,
        sweep_prob: float | None = None,
        refresh_depths: Sequence[float] = (1.0, 0.75, 0.5, 0.35, 0.2, 0.1),
        guidance: Literal["jacobian", "mean"] | None = None,
        local: AbstractLocalMove | Literal["default"] | None = "default",
        target_accept_prob: float = 0.7,
        num_pilot_draws: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"`model` must be a NumPyro model (a callable), got {type(model).__name__}.")
        self._model = model
        # fmt: off
        self._options = check_options(Options(
            num_particles, segments, reverse, twist, num_guided_steps, num_start_steps, num_restarts,
            sweep_prob, refresh_depths, guidance, local, target_accept_prob, num_pilot_draws,  # pyright: ignore
            batch_size,
        ))
        # fmt: on
        self._programs = Programs()
        self._chosen: Chosen | None = None

    def __repr__(self) -> str:
        return f"RTKParticleGibbs({describe(self._options, self._chosen)})"

    @property
    def model(self) -> Callable[..., Any]:
        """The model; for ArviZ, which only reads plates and observations, one that evaluates no network."""
        return without_diffusion(self._model) if arviz_asks() else self._model

    @property
    def sample_field(self) -> str:
        """`"z"`."""
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        """The draws, whether something failed, and whether sweeps moved."""
        return ("z", *DEFAULT_STATISTICS)

    def get_diagnostics_str(self, state: ParticleGibbsState) -> str:
        """Acceptances, the lowest particle effective sample size and the cost, for the progress bar; over all
        chains if there are several.
        """
        ess = np.asarray(state.particle_ess)[np.asarray(state.weighted)]
        sweep_prob = np.mean(self._options.sweep_prob_of(state.adapt_state))
        sweeps = "" if sweep_prob == 1 else f", sweeps {sweep_prob:.2f}"
        lowest = f", lowest particle ESS {ess.min():.1f}" if ess.size else ""
        failed = ", diverging" if np.any(state.diverging) else ""
        return (
            f"{int(np.sum(state.num_score_evals))} score evals, acc. prob={np.mean(state.accept_prob):.2f}, "
            f"local {np.mean(state.local_accept_prob):.2f}{sweeps}{lowest}{failed}"
        )

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
            init_params: `None`, or `{site: value}` to start from, of some or all sites, with a chain axis if
                keys are batched. Ignored as a block of NumPyro's `Gibbs`, which hands in draws of its own.
            model_args: Arguments of the model.
            model_kwargs: Keyword arguments of the model.
        """
        kwargs = {} if model_kwargs is None else dict(model_kwargs)
        found = inspect_model("RTKParticleGibbs", conditioned(self._model), jr.key(0), model_args, kwargs)
        check_others(found)
        given: dict[str, Array] = {}
        if GIBBS_SITES_KWARG not in kwargs:
            num_chains = None if is_prng_key(rng_key) else rng_key.shape[0]
            given = read_init_params(init_params, found.trace, num_chains)
        return self.start(rng_key, num_warmup, given, found.diffusion, model_args, kwargs)

    def start(
        self,
        rng_key: Any,
        num_warmup: int,
        given: dict[str, Array],
        sites: tuple[DiffusionSite, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        pilots: dict[str, Array] | None = None,
    ) -> ParticleGibbsState:
        """State at the start of a model that was inspected.

        Args:
            rng_key: One key, or one per vectorized chain.
            num_warmup: Length of the warmup.
            given: Values of some or all diffusion sites, which are then never drawn anew.
            sites: All diffusion sites.
            args: Arguments of the model.
            kwargs: Keyword arguments of the model, with the values of other latents in a composite.
            pilots: Prior draws of conditions that are latents, by site, shape `(draws, *condition)`.
        """
        batched, dtype = not is_prng_key(rng_key), jnp.result_type(float)
        problem = self._problem(sites, args, kwargs, dtype, pilots=pilots)
        check_sites(problem)
        problem.refuse_without_derivative("RTKParticleGibbs")
        known = (args, kwargs, dtype, problem.partition, pilots)  # here alone arguments have values

        def run(name: str, function: Callable[..., Any], *inputs: Any) -> Any:
            def whole(inputs: Any, known: Any) -> Any:
                return function(self._problem(None, *known), *inputs)

            return self._program(name, whole, inputs, known)

        shared, floor = measure(problem, num_warmup, run)
        shared = shared._replace(restarts=jnp.asarray(not given))

        def start(inner: Problem, keys: Any, given: Any, shared: Shared, floor: Floor) -> Any:
            chain = Chain(inner.options, inner, shared)
            self._chosen = chain.chosen  # for `repr` only

            def one(inputs: tuple[Any, dict[str, Array]]) -> ParticleGibbsState:
                return chain.start(*inputs, floor, num_warmup)

            return inner.options.over_chains(one, (keys, given)) if batched else one((keys, given))

        name = f"start {batched} {num_warmup}"
        state = run(name, start, rng_key, given, shared, floor)
        state = state._replace(shared=shared)

        def log_likelihood(z: dict[str, Array], args: Any, kwargs: Any) -> Array:
            one = functools.partial(self.log_likelihood, args=args, kwargs=kwargs)
            return jax.vmap(one)(z) if batched else one(z)

        check_start(
            "RTKParticleGibbs", self._program(f"likelihood {batched}", log_likelihood, state.z, args, kwargs)
        )
        if GIBBS_SITES_KWARG in kwargs:
            # The other latents are arbitrary at the start, and so are the weights and the evidence.
            return state._replace(log_evidence=None)
        if not isinstance(state.particle_ess, Tracer):
            ess, times = np.atleast_2d(state.particle_ess), np.asarray(shared.measured[0].grid.t)
            warn_collapsed(ess, times, problem.options.num_particles)
        return state

    def log_likelihood(self, z: dict[str, Array], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
        """Log probability of all besides the priors of the diffusion sites, for one chain."""
        return Likelihood(conditioned(self._model), args, kwargs).terms(z).log_likelihood

    def _program(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        # The model and the kernel's options are all that a program depends on besides its arguments.
        return self._programs(name, self._model, function, *args)

    def _problem(
        self,
        sites: tuple[DiffusionSite, ...] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dtype: Any,
        partition: Partition | None = None,
        pilots: dict[str, Array] | None = None,
        num_elements: int | None = None,
    ) -> Problem:
        if sites is None:
            sites = latent_diffusion_sites(conditioned(self._model), jr.key(0), args, kwargs)
        options = self._options._replace(num_elements=num_elements)
        return resolve_problem(options, self._model, sites, args, kwargs, dtype, partition, pilots)

    def sample(
        self, state: ParticleGibbsState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ParticleGibbsState:
        """One sweep and its local moves, for one chain or a batch of them."""
        kwargs = {} if model_kwargs is None else dict(model_kwargs)
        batched, shared = not is_prng_key(state.rng_key), state.shared
        # Arguments that have no values here may join elements; the options stay those of the start.
        num_elements, dtype = shared.partition.elements.count, state.accept_prob.dtype
        problem = self._problem(None, model_args, kwargs, dtype, num_elements=num_elements)

        def step(state: ParticleGibbsState, shared: Shared) -> ParticleGibbsState:
            chain = Chain(problem.options, problem, shared)
            if not self._options.num_restarts or GIBBS_SITES_KWARG not in kwargs:
                return chain.step(state)
            # The iteration has no chain axis, so that this branches for vectorized chains, too.
            return jax.lax.cond(
                shared.restarts & self._options.restarts_at(shared.iteration, shared.num_warmup),
                lambda: chain.restart(state),
                lambda: chain.step(state),
            )

        # Arrays of the network and measurements have no chain axis.
        alone = state._replace(shared=None)  # pyright: ignore[reportArgumentType]
        new = (over_chains(step, (0, None)) if batched else step)(alone, shared)
        return new._replace(shared=shared._replace(iteration=shared.iteration + 1))

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
        return functools.partial(add_deterministic, conditioned(self._model), model_args, kwargs)
