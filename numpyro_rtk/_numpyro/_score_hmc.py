"""`ScoreHMC`: Hamiltonian Monte Carlo over all continuous latents of a model with diffusion sites."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
from jax.core import Tracer
from jaxtyping import Array, Bool, Float
from numpyro import handlers
from numpyro.infer.gibbs import GIBBS_SITES_KWARG
from numpyro.infer.hmc import momentum_generator
from numpyro.infer.hmc_util import HMCAdaptState, IntegratorState, warmup_adapter
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import (
    _transforms_from_trace,
    constrain_fn,
    initialize_model,
    potential_energy,
    transform_fn,
)
from numpyro.util import is_prng_key

from numpyro_rtk._custom_types import Event, Scalar
from numpyro_rtk._moves._leapfrog import (
    Evaluate,
    leapfrog,
    Leaves,
    PathPoint,
)
from numpyro_rtk._noising._grid import noise_grid, NoiseGrid
from numpyro_rtk._numpyro._arguments import check_target_accept_prob
from numpyro_rtk._numpyro._sites import (
    DiffusionSite,
    inspect_model,
    latent_diffusion_sites,
    refuse_discrete,
    without_diffusion,
)
from numpyro_rtk._numpyro._start import annealed_start
from numpyro_rtk._reverse._pilot import prior_draws
from numpyro_rtk._score._checks import check_first_call, first_call
from numpyro_rtk._score._hoist import hoist, HoistedArrays
from numpyro_rtk._score._model import resolve_score


START_DRAWS = 16
"""Prior draws behind the initial mass matrix."""

START_PRIOR_DRAWS = 5.0
"""Weight of the mean over coordinates in the initial mass matrix, in draws."""


class _NumWarmup(eqx.Module):
    """Length of the warmup, static: NumPyro's adaptation windows are laid out while tracing."""

    value: int = eqx.field(static=True)


class ScoreHMCState(NamedTuple):
    """State of `ScoreHMC`; with vectorized chains every field but `score_arrays` has a chain axis."""

    z: dict[str, Array]
    """Unconstrained values of all latent sites."""
    i: Array
    """Iteration, warmup included."""
    relative_potential_energy: Float[Array, ""]
    """Potential energy relative to the chain's start: the sum over accepted moves. Not comparable between
    chains.
    """
    energy: Float[Array, ""]
    """The same plus the kinetic energy, at the end of the trajectory or, where it was rejected, at its
    start.
    """
    num_steps: Array
    """Leapfrog steps of the last trajectory."""
    accept_prob: Float[Array, ""]
    """Its acceptance probability."""
    mean_accept_prob: Float[Array, ""]
    """Mean acceptance probability since the start of the warmup, or since its end."""
    diverging: Bool[Array, ""]
    """Whether it met something non-finite or an energy error out of all proportion."""
    unresolved: Bool[Array, ""]
    """Whether its steps were too coarse to know its energy error from scores, so that it was rejected."""
    num_score_evals: Array
    """Score evaluations of the last trajectory: one per step and diffusion event."""
    adapt_state: HMCAdaptState
    """Step size and mass matrix, as in NumPyro's `HMC`."""
    score: Leaves
    """Scores at `z` of the diffusion sites without an energy."""
    potential: Scalar
    """The part of the potential energy at `z` that is known exactly."""
    gradient: Leaves
    """Its gradient."""
    score_arrays: HoistedArrays
    """The networks' arrays, kept here so that they are arguments of the compiled program."""
    num_warmup: _NumWarmup
    """Length of the warmup."""
    rng_key: Any
    """Random key of the next iteration."""

    @property
    def point(self) -> PathPoint:
        """`z` with all that is known there."""
        return PathPoint(self.z, self.score, self.potential, self.gradient)


class ScoreHMC(MCMCKernel):
    r"""Hamiltonian Monte Carlo over all continuous latents of a model with diffusion sites, jointly.

    It works in NumPyro's unconstrained space. The density of a `DiffusionPrior` site is not evaluated: its
    share of the energy error is the line integral of its score (at the last time of the prior's grid) along
    the leapfrog path, which has visited those scores anyway. The rest of the model enters by its exact
    potential. Where a site and a parameter are strongly correlated, this mixes well where blocked updates
    crawl.

    *Law.* The posterior of the model up to the error of the line integral, which is of fourth order in the
    step size; no error for priors that are Gaussian, and none for those whose `score_fn` has a method
    `energy`, which is then used. Measured on skewed, quartic and bimodal laws in 10 dimensions from scores
    alone: means and variances within 0.4 % at an acceptance of 0.96, 1 % at 0.92 and 2 % at 0.8, hence the
    high default of `target_accept_prob` (`tests/moves/test_leapfrog.py`; the plain trapezoid rule is ten
    times worse, as bad as no accept step). Trajectories whose steps are too coarse for the line integral are
    rejected and set `unresolved`, which warmup counts as acceptance 0; many of them after the warmup call for
    a higher `target_accept_prob`. It moves within modes and between close ones; for modes far apart use
    `RTKParticleGibbs`, or `RTKGibbs`.

    *Cost.* One score evaluation per leapfrog step and event of each diffusion site, in
    `state.num_score_evals`. The end of a trajectory is the start of the next. Chains that are vectorized wait
    for the longest trajectory among them. `init` makes `16 * 40 + 16` evaluations per site for the initial
    mass matrix, 40 for a draw at which the other latents are made valid, two to check the score, and those of
    the annealed start (`RTKParticleGibbs` with 2 particles: two unconditional sweeps, 24 levels of 8 guided
    steps, three times over where there are other latents).

    *Warmup* is that of NumPyro's `HMC` (`warmup_adapter`: the same windows, dual averaging and
    regularisation). The mass matrix of diffusion sites starts from `E[score^2]` of prior draws. Each
    trajectory's length is `trajectory_length` times a uniform factor from 0.5 to 1.5, so that no direction
    can come back to its start for ever.

    *Statistics.* `energy` has the differences between iterations that ArviZ's BFMI needs, but no absolute
    zero: there is no `potential_energy`, as ArviZ would take it for a log density. Errors of the line
    integral add up in `energy` over a chain like a random walk, so that a long chain of a strongly
    non-Gaussian prior without an energy shows a BFMI that is too small.

    Args:
        model: A NumPyro model with at least one latent `DiffusionPrior`. All its latents must be continuous.
        step_size: Step size, or where its adaptation starts.
        trajectory_length: Mean length of a trajectory, in coordinates that have about unit scale after the
            warmup. The default measured best, or nearly, in effective draws per score evaluation on a
            Gaussian, an ill-conditioned rotated Gaussian and a mixture; longer ones pay where the mass matrix
            cannot undo the correlation.
        adapt_step_size: Whether warmup adapts the step size.
        adapt_mass_matrix: Whether warmup adapts the mass matrix.
        dense_mass: Whether the mass matrix is dense, or a list of tuples of site names with a dense block
            each.
        target_accept_prob: Acceptance probability that warmup aims at.
        inverse_mass_matrix: Initial inverse mass matrix in NumPyro's convention, an array over all
            sites in alphabetical order or a dict of blocks. `None`: from prior draws.
        max_num_steps: Most leapfrog steps of a trajectory; longer ones are cut.
        init_strategy: Where the latents that are no diffusion sites start, as in NumPyro. Diffusion sites
            start annealed through the noise levels given the others, which are then fitted to them, three
            times over; or where `init_params` says (unconstrained values, any of the latents).

    Raises:
        TypeError, ValueError: for arguments that cannot work; at `init`, before compiling, for models that it
        cannot
            sample: see `RTKParticleGibbs`, and besides for discrete latents.

    References:
        Neal (2011), *MCMC using Hamiltonian dynamics*. The energy error is described in
        `numpyro_rtk._moves._leapfrog`.
    """

    _sample_fn = True
    """Tells `MCMC` that a resumed run needs no `init`: a state is all that `sample` depends on."""

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float = 0.5,
        trajectory_length: float = 2.2,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        dense_mass: bool | list[tuple[str, ...]] = False,
        target_accept_prob: float = 0.9,
        inverse_mass_matrix: Any = None,
        max_num_steps: int = 1024,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        if not callable(model):
            raise TypeError(f"`model` must be a NumPyro model, a function, got {type(model).__name__}.")
        check_target_accept_prob(target_accept_prob)
        if not (
            isinstance(dense_mass, bool)
            or (isinstance(dense_mass, list) and all(isinstance(b, tuple) for b in dense_mass))
        ):
            raise TypeError(
                f"`dense_mass` must be True, False or a list of tuples of site names, got {dense_mass!r}."
            )
        if (
            isinstance(max_num_steps, bool)
            or not isinstance(max_num_steps, int | np.integer)
            or max_num_steps < 1
        ):
            raise ValueError(f"`max_num_steps` must be an integer of at least 1, got {max_num_steps!r}.")
        self._model = model
        self._step_size = _positive("step_size", step_size)
        self._trajectory_length = _positive("trajectory_length", trajectory_length)
        self._adapt_step_size = bool(adapt_step_size)
        self._adapt_mass_matrix = bool(adapt_mass_matrix)
        self._dense_mass = dense_mass
        self._target_accept_prob = float(target_accept_prob)
        self._inverse_mass_matrix = inverse_mass_matrix
        self._max_num_steps = int(max_num_steps)
        self._init_strategy = init_strategy

    def __repr__(self) -> str:
        return (
            f"ScoreHMC(step_size={self._step_size:g}, trajectory_length={self._trajectory_length:g}, "
            f"dense_mass={self._dense_mass}, target_accept_prob={self._target_accept_prob:g})"
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
        """The draws, and whether the trajectory diverged."""
        return ("z", "diverging")

    def get_diagnostics_str(self, state: ScoreHMCState) -> str:
        """Steps, step size and acceptance, for the progress bar."""
        return (
            f"{int(state.num_steps)} steps of size {float(state.adapt_state.step_size):.2e}. "
            f"acc. prob={float(state.mean_accept_prob):.2f}"
        )

    def init(
        self,
        rng_key: Any,
        num_warmup: int,
        init_params: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> ScoreHMCState:
        """Check the model and return the state at the start.

        Args:
            rng_key: One key, or one per vectorized chain.
            num_warmup: Length of the warmup.
            init_params: `None`, or unconstrained values of some or all latents, with a chain axis if keys are
                batched. As a block of `numpyro.infer.Gibbs`, which hands over constrained values, it reads
                them as such.
            model_args: Arguments of the model.
            model_kwargs: Keyword arguments of the model.
        """
        kwargs = {} if model_kwargs is None else model_kwargs
        batched = not is_prng_key(rng_key)
        one_key = rng_key[0] if batched else rng_key
        found = inspect_model("ScoreHMC", self._model, one_key, model_args, kwargs)
        sites, trace = found.diffusion, found.trace
        refuse_discrete("ScoreHMC", trace)
        transforms = _transforms_from_trace(trace, raise_warnings=False)
        if kwargs.get(GIBBS_SITES_KWARG) and transforms.dynamic_support:
            raise ValueError(
                "`ScoreHMC` as a block of a composite kernel needs latents whose support does not depend on "
                "other sites. Sample "
                "such sites on a fixed support and transform them with `numpyro.deterministic`."
            )
        given = _read_init_params(
            init_params, trace, transforms.inv_transforms, batched, bool(kwargs.get(GIBBS_SITES_KWARG))
        )
        dtype = jnp.result_type(float)
        for site in sites:
            score_fn, shape = site.prior.score_fn, site.prior.event_shape
            grid = _grid(site, dtype)
            check_first_call(eqx.filter_jit(first_call)(resolve_score(score_fn), grid, shape), grid)
        arrays, rebuild = _hoist(sites)
        evaluate = self._evaluate(sites, rebuild(arrays.arrays), model_args, kwargs)
        model_key, start_key, chain_key = _split(rng_key, 3)
        # The others are valid where the diffusion sites are draws of their priors, which a likelihood without
        # a link function may need; a placeholder would do for hardly any.
        x = _prior_values(sites, arrays.arrays, rebuild, dtype)
        here: dict[str, Any] = dict(x)
        here |= {name: given[name][0] if batched else given[name] for name in x if name in given}
        with numpyro.validation_enabled(False):
            z, *_ = initialize_model(
                model_key,
                handlers.condition(without_diffusion(self._model), here),
                init_strategy=self._init_strategy,
                dynamic_args=True,
                model_args=model_args,
                model_kwargs=kwargs,
            )[0]
        z |= (
            jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(rng_key), *leaf.shape)), x)
            if batched
            else x
        )
        z |= given
        if not {site.name for site in sites} <= set(given):
            others = {name: value for name, value in z.items() if name not in {site.name for site in sites}}
            constrain = functools.partial(transform_fn, transforms.inv_transforms)
            rest = functools.partial(potential_energy, without_diffusion(self._model), model_args, kwargs)
            z |= annealed_start(start_key, self._model, others, constrain, rest, model_args, kwargs)
            z |= given
        scales = (
            {}
            if self._inverse_mass_matrix is not None
            else _prior_scales(sites, arrays.arrays, rebuild, dtype)
        )
        inverse_mass = self._initial_mass(
            {name: value[0] if batched else value for name, value in z.items()}, scales, dtype
        )

        def init_chain(rng_key: Any, z: Leaves) -> ScoreHMCState:
            next_key, adapt_key = jr.split(rng_key)
            point = evaluate(z)
            wa_init, _ = self._adapter(z, num_warmup)
            adapt_state = wa_init(
                IntegratorState(z=z),
                adapt_key,
                jnp.asarray(self._step_size, dtype),
                inverse_mass_matrix=dict(inverse_mass),
            )
            zero, count = jnp.zeros((), dtype), jnp.zeros((), int)
            return ScoreHMCState(
                z=z,
                i=count,
                relative_potential_energy=zero,
                energy=zero,
                num_steps=count,
                accept_prob=zero,
                mean_accept_prob=zero,
                diverging=jnp.zeros((), bool),
                unresolved=jnp.zeros((), bool),
                num_score_evals=count,
                adapt_state=adapt_state,
                score=point.score,
                potential=point.potential,
                gradient=point.gradient,
                score_arrays=HoistedArrays((), ""),
                num_warmup=_NumWarmup(int(num_warmup)),
                rng_key=next_key,
            )

        state = jax.vmap(init_chain)(chain_key, z) if batched else init_chain(chain_key, z)
        _check_start(state.point)
        return state._replace(score_arrays=arrays)

    def sample(
        self, state: ScoreHMCState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ScoreHMCState:
        """One trajectory, accepted or rejected, for one chain or a batch of them."""
        batched = not is_prng_key(state.rng_key)
        arrays = state.score_arrays
        evaluate, num_events = self._evaluate_with(arrays, model_args, model_kwargs)
        step = functools.partial(self._sample_chain, evaluate, num_events)
        chain = state._replace(score_arrays=HoistedArrays((), ""))
        new = jax.vmap(step)(chain) if batched else step(chain)
        return new._replace(score_arrays=arrays)

    def refresh(
        self, state: ScoreHMCState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ScoreHMCState:
        """Evaluate the exact part of the potential for other arguments; no score evaluation but where priors
        have energies.
        """
        return self._at(state, {}, model_args, model_kwargs)

    def moved(
        self,
        state: ScoreHMCState,
        z: Leaves,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> ScoreHMCState:
        """The state after another kernel moved some of the latents: one score evaluation per diffusion event.

        `relative_potential_energy` and `energy` do not know what the diffusion priors without an energy
        contribute to that move.

        Args:
            state: The state.
            z: Unconstrained values of the latents that moved.
            model_args: Arguments of the model.
            model_kwargs: Keyword arguments of the model.
        """
        return self._at(state, z, model_args, model_kwargs)

    def _at(
        self,
        state: ScoreHMCState,
        moved: Leaves,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> ScoreHMCState:
        """The state where some latents have other values, or for other arguments; scores are evaluated where
        they moved.
        """
        arrays = state.score_arrays
        evaluate, _ = self._evaluate_with(arrays, model_args, model_kwargs)

        def update(state: ScoreHMCState, moved: Leaves) -> ScoreHMCState:
            point = evaluate(state.z | moved, None if moved else state.score)
            change = point.potential - state.potential
            return state._replace(
                z=point.position,
                score=point.score,
                potential=point.potential,
                gradient=point.gradient,
                relative_potential_energy=state.relative_potential_energy + change,
            )

        chain = state._replace(score_arrays=HoistedArrays((), ""))
        new = update(chain, moved) if is_prng_key(state.rng_key) else jax.vmap(update)(chain, moved)
        return new._replace(score_arrays=arrays)

    def wrap_model(self, wrapper: Callable[..., Any]) -> "ScoreHMC":
        """A copy of this kernel for `wrapper(model)`."""
        kernel = copy.copy(self)
        kernel._model = wrapper(self._model)
        return kernel

    def postprocess_fn(
        self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> Callable[[Leaves], Leaves]:
        """Constrains values and adds the deterministic sites."""
        return self.get_constrain_fn(model_args, model_kwargs, return_deterministic=True)

    def get_constrain_fn(
        self,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
        *,
        return_deterministic: bool = False,
    ) -> Callable[[Leaves], Leaves]:
        """A function from unconstrained to constrained values, which replays the model without evaluating a
        network.
        """
        kwargs = {} if model_kwargs is None else model_kwargs
        seeded = handlers.seed(without_diffusion(self._model), jr.key(0))
        return functools.partial(
            constrain_fn, seeded, model_args, kwargs, return_deterministic=return_deterministic
        )

    def _evaluate(
        self,
        sites: tuple[DiffusionSite, ...],
        score_fns: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Callable[..., PathPoint]:
        seeded = handlers.seed(without_diffusion(self._model), jr.key(0))

        def rest(z: Leaves) -> Scalar:
            return jnp.asarray(potential_energy(seeded, args, kwargs, z))

        def evaluate(z: Leaves, score: Leaves | None = None) -> PathPoint:
            """A point; given the scores there, they are not evaluated."""
            potential, gradient = jax.value_and_grad(rest)(z)
            scores = {}
            for site in sites:
                score_fn, x = score_fns[site.name], z[site.name]
                t = jnp.asarray(site.prior.segment_times[-1], x.dtype)
                if score_fn.has_energy:
                    energies, own = _over_batch(lambda x, f=score_fn, t=t: f.energy_and_score(x, t), site, x)
                    potential = potential + jnp.sum(energies)
                    gradient = gradient | {site.name: gradient[site.name] - own}
                elif score is None:
                    scores[site.name] = _over_batch(lambda x, f=score_fn, t=t: f(x, t), site, x)
                else:
                    scores[site.name] = score[site.name]
            return PathPoint(z, scores, potential, gradient)

        return evaluate

    def _evaluate_with(
        self, arrays: HoistedArrays, args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> tuple[Callable[..., PathPoint], int]:
        """A function that evaluates points, and how many events it evaluates the score of."""
        kwargs = {} if model_kwargs is None else model_kwargs
        sites = latent_diffusion_sites(self._model, jr.key(0), args, kwargs)
        own, rebuild = _hoist(sites)
        arrays = arrays.current(own, "other sites")
        num_events = sum(math.prod(site.batch_shape) for site in sites)
        return self._evaluate(sites, rebuild(arrays.arrays), args, kwargs), num_events

    def _adapter(self, z: Leaves, num_warmup: int) -> Any:
        return warmup_adapter(
            num_warmup,
            adapt_step_size=self._adapt_step_size,
            adapt_mass_matrix=self._adapt_mass_matrix,
            dense_mass=self._dense_blocks(z),  # pyright: ignore[reportArgumentType] - as NumPyro documents
            target_accept_prob=self._target_accept_prob,
        )

    def _dense_blocks(self, z: Leaves) -> list[tuple[str, ...]]:
        if isinstance(self._dense_mass, bool):
            return [tuple(sorted(z))] if self._dense_mass else []
        return self._dense_mass

    def _initial_mass(self, z: Leaves, scales: Leaves, dtype: Any) -> dict[Any, Any]:
        """Blocks of the initial inverse mass matrix, each a vector or, if given, a matrix."""
        dense = self._dense_blocks(z)
        names = [name for block in dense for name in block]
        if len(set(names)) != len(names) or not set(names) <= set(z):
            raise ValueError(
                f"`dense_mass={self._dense_mass}` must name every site at most once; the latents are "
                f"{sorted(z)}."
            )
        if self._inverse_mass_matrix is not None:
            return _given_mass(self._inverse_mass_matrix, z, dense, dtype)
        inverse = {
            name: jnp.ravel(scales.get(name, jnp.ones_like(value, dtype))) for name, value in z.items()
        }
        remaining = tuple(sorted(set(z) - set(names)))
        blocks = [*dense, remaining] if remaining else dense
        return {block: jnp.concatenate([inverse[name] for name in block]) for block in blocks}

    def _sample_chain(self, evaluate: Evaluate, num_events: int, state: ScoreHMCState) -> ScoreHMCState:
        """One iteration of one chain: a pure function of the state."""
        next_key, momentum_key, length_key, accept_key = jr.split(state.rng_key, 4)
        adapt_state, num_warmup = state.adapt_state, state.num_warmup.value
        momentum = momentum_generator(state.z, adapt_state.mass_matrix_sqrt, momentum_key)
        length = self._trajectory_length * jr.uniform(length_key, (), state.energy.dtype, 0.5, 1.5)
        wanted = jnp.ceil(length / adapt_state.step_size)
        # All steps of a trajectory have the same size, at most the adapted one.
        num_steps = jnp.clip(wanted, 1, self._max_num_steps).astype(int)
        step_size = length / jnp.maximum(wanted, 1)
        velocity = functools.partial(_velocity, adapt_state.inverse_mass_matrix)
        end = leapfrog(evaluate, velocity, state.point, momentum, step_size, num_steps)
        accept_prob = jnp.minimum(1.0, jnp.exp(-end.energy_error))
        accepted = jr.uniform(accept_key, (), accept_prob.dtype) < accept_prob
        point = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), end.point, state.point)
        potential = state.relative_potential_energy
        energy = potential + end.kinetic_start + jnp.where(accepted, end.energy_error, 0.0)
        in_warmup = state.i < num_warmup
        _, wa_update = self._adapter(state.z, num_warmup)
        adapt_state = jax.lax.cond(
            in_warmup,
            lambda adapt_state: wa_update(
                state.i, accept_prob, IntegratorState(z=point.position), adapt_state
            ),
            lambda adapt_state: adapt_state,
            adapt_state,
        )
        i = state.i + 1
        n = jnp.where(in_warmup, i, i - num_warmup)
        return state._replace(
            z=point.position,
            i=i,
            relative_potential_energy=potential + jnp.where(accepted, end.potential_difference, 0.0),
            energy=energy,
            num_steps=end.num_evaluations,
            accept_prob=accept_prob,
            mean_accept_prob=state.mean_accept_prob + (accept_prob - state.mean_accept_prob) / n,
            diverging=end.diverging,
            unresolved=end.unresolved,
            num_score_evals=end.num_evaluations * num_events,
            adapt_state=adapt_state,
            score=point.score,
            potential=point.potential,
            gradient=point.gradient,
            rng_key=next_key,
        )


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or np.ndim(value) != 0 or not (np.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a positive number, got {value!r}.")
    return float(value)


def _split(rng_key: Any, num: int) -> Any:
    """Keys for `num` purposes, each one key or one per chain."""
    if is_prng_key(rng_key):
        return jr.split(rng_key, num)
    return jnp.swapaxes(jax.vmap(lambda key: jr.split(key, num))(rng_key), 0, 1)


def _read_init_params(
    init_params: Any, trace: dict[str, Any], inv_transforms: dict[str, Any], batched: bool, constrained: bool
) -> Leaves:
    """Unconstrained values from what the user, or a composite kernel, gives."""
    if init_params is None:
        return {}
    if not isinstance(init_params, dict):
        raise TypeError(
            f"`init_params` must be a dict of unconstrained values, got {type(init_params).__name__}."
        )
    latents = {name for name, site in trace.items() if site["type"] == "sample" and not site["is_observed"]}
    if not set(init_params) <= latents:
        raise ValueError(
            f"`init_params` has {sorted(set(init_params) - latents)}, but the latents are {sorted(latents)}."
        )
    values = {name: jnp.asarray(value, float) for name, value in init_params.items()}
    if constrained:
        values = transform_fn({name: inv_transforms[name] for name in values}, values, invert=True)
    for name, value in values.items():
        shape = jnp.shape(inv_transforms[name].inv(trace[name]["value"]))
        if (value.shape[1:] if batched else value.shape) != shape or (batched and value.ndim == 0):
            raise ValueError(
                f"`init_params[{name!r}]` has shape {value.shape}; the unconstrained site has shape {shape}"
                + (" after the chain axis." if batched else ".")
            )
        if not isinstance(value, Tracer) and not np.all(np.isfinite(np.asarray(value))):
            raise ValueError(f"`init_params[{name!r}]` contains NaN or infinity.")
    return values


def _grid(site: DiffusionSite, dtype: Any) -> NoiseGrid:
    return noise_grid(site.prior.schedule, site.prior.segment_times, dtype)


def _hoist(sites: tuple[DiffusionSite, ...]) -> tuple[HoistedArrays, Callable[[Any], dict[str, Any]]]:
    """The arrays of all networks, and a function that makes score callables of such arrays."""
    found, rebuilds, fingerprint = {}, {}, ""
    for site in sites:
        x = jax.ShapeDtypeStruct(site.prior.event_shape, jnp.result_type(float))
        t = jax.ShapeDtypeStruct((), jnp.result_type(float))
        own, rebuilds[site.name] = hoist(site.prior.score_fn, x, t)
        found[site.name] = own.arrays
        fingerprint += f"{site.name} {site.shape} {own.fingerprint} at {site.prior.segment_times[-1]}; "
    return HoistedArrays(found, fingerprint), lambda arrays: {
        name: rebuilds[name](arrays[name]) for name in rebuilds
    }


def _over_batch(function: Callable[[Event], Any], site: DiffusionSite, x: Array) -> Any:
    """`function` of every event of a site."""
    for _ in site.batch_shape:
        function = jax.vmap(function)
    return function(x)


def _prior_values(
    sites: tuple[DiffusionSite, ...], arrays: Any, rebuild: Callable[[Any], dict[str, Any]], dtype: Any
) -> Leaves:
    """A prior draw of every site, with a fixed key; elements of a batch are alike."""

    @jax.jit
    def values(arrays: Any) -> Leaves:
        score_fns, draws = rebuild(arrays), {}
        for site in sites:
            prior, score_fn = site.prior, score_fns[site.name]
            draw = prior_draws(jr.key(1), score_fn, prior.noise, prior.event_shape, dtype, 2)[0][0]
            draws[site.name] = jnp.broadcast_to(jnp.where(jnp.isfinite(draw), draw, 0.0), site.shape)
        return draws

    return values(arrays)


def _prior_scales(
    sites: tuple[DiffusionSite, ...], arrays: Any, rebuild: Callable[[Any], dict[str, Any]], dtype: Any
) -> Leaves:
    """`1 / E score^2` by coordinate from prior draws with a fixed key, shapes of the sites."""

    @jax.jit
    def scales(arrays: Any) -> Leaves:
        score_fns, values = rebuild(arrays), {}
        for site in sites:
            prior, score_fn = site.prior, score_fns[site.name]
            draws, _ = prior_draws(jr.key(0), score_fn, prior.noise, prior.event_shape, dtype, START_DRAWS)
            t = jnp.asarray(prior.segment_times[-1], dtype)
            scores = jax.vmap(lambda x, f=score_fn, t=t: f(x, t))(draws)
            squares = jnp.mean(scores**2, axis=0)
            weight = START_PRIOR_DRAWS / (START_PRIOR_DRAWS + START_DRAWS)
            squares = (1 - weight) * squares + weight * jnp.mean(squares)
            # Where a draw failed there is nothing to learn.
            scale = jnp.where(jnp.isfinite(squares) & (squares > 0), 1 / squares, 1.0)
            values[site.name] = jnp.broadcast_to(
                scale.reshape((1,) * len(site.batch_shape) + scale.shape), site.shape
            )
        return values

    return scales(arrays)


def _given_mass(given: Any, z: Leaves, dense: list[tuple[str, ...]], dtype: Any) -> dict[Any, Any]:
    """A user's inverse mass matrix as blocks, checked."""
    blocks = dict(given) if isinstance(given, dict) else {tuple(sorted(z)): given}
    names = [name for block in blocks for name in block]
    if len(set(names)) != len(names) or not set(names) <= set(z):
        raise ValueError(
            f"`inverse_mass_matrix` has blocks {list(blocks)}; they must name latents, each once: "
            f"{sorted(z)}."
        )
    if any(set(block) & set(other) and block != other for block in blocks for other in dense):
        raise ValueError(
            f"Blocks of `inverse_mass_matrix`, {list(blocks)}, must be those of `dense_mass`, {dense}, or "
            f"apart from them."
        )
    for block, matrix in blocks.items():
        size = sum(z[name].size for name in block)
        if np.shape(matrix) not in ((size,), (size, size)):
            raise ValueError(
                f"`inverse_mass_matrix` of {block} must have shape {(size,)} or {(size, size)}, got "
                f"{np.shape(matrix)}."
            )
    return {block: jnp.asarray(matrix, dtype) for block, matrix in blocks.items()}


def _check_start(point: PathPoint) -> None:
    leaves = {"the potential": point.potential, "its gradient": point.gradient, "the score": point.score}
    for what, values in leaves.items():
        for leaf in jax.tree.leaves(values):
            if isinstance(leaf, Tracer) or np.all(np.isfinite(np.asarray(leaf))):
                continue
            raise ValueError(
                f"`ScoreHMC` cannot start: {what} is not finite there. Diffusion sites start from a prior "
                f"draw, so check that "
                "the likelihood is finite for draws of the prior, or pass a start as `init_params` to "
                "`MCMC.run`."
            )


def _velocity(inverse_mass_matrix: Any, momentum: Leaves) -> Leaves:
    """Inverse mass matrix times momentum, in NumPyro's blocks."""
    velocity = {}
    for names, inverse in inverse_mass_matrix.items():
        flat = jnp.concatenate([jnp.ravel(momentum[name]) for name in names])
        flat = inverse * flat if inverse.ndim == 1 else inverse @ flat
        start = 0
        for name in names:
            size = momentum[name].size
            velocity[name] = flat[start : start + size].reshape(momentum[name].shape)
            start += size
    return velocity
