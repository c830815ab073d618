"""`ScoreHMC`: Hamiltonian Monte Carlo over all continuous latents of a model with diffusion sites."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from numpyro.infer.gibbs import GIBBS_SITES_KWARG
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import _transforms_from_trace
from numpyro.util import is_prng_key

from numpyro_rtk._diagnosis._start import check_calibration
from numpyro_rtk._moves._leapfrog import Leaves
from numpyro_rtk._numpyro._arguments import read_start, resolved_strategy
from numpyro_rtk._numpyro._data_mark import checksum
from numpyro_rtk._numpyro._dependent import refuse_supports
from numpyro_rtk._numpyro._derivatives import refuse_without_derivative
from numpyro_rtk._numpyro._programs import Programs
from numpyro_rtk._numpyro._score_hmc_chain import Chain, ScoreHMCState, SHARED
from numpyro_rtk._numpyro._score_hmc_mass import initial_mass
from numpyro_rtk._numpyro._score_hmc_options import check_options, Options
from numpyro_rtk._numpyro._score_hmc_problem import (
    calibrations,
    constrained,
    draws_and_scales,
    first_calls,
    grid_of,
    JointProblem,
    resolve_joint_problem,
    START_DRAWS,
)
from numpyro_rtk._numpyro._sharding import over_chains
from numpyro_rtk._numpyro._sites import inspect_model, refuse_discrete, refuse_latent_conditions
from numpyro_rtk._numpyro._start import Starter
from numpyro_rtk._numpyro._start_checks import check_start
from numpyro_rtk._score._checks import check_first_call
from numpyro_rtk._score._hoist import HoistedArrays


class ScoreHMC(MCMCKernel):
    r"""Hamiltonian Monte Carlo over all continuous latents of a model with diffusion sites, jointly.

    It works in NumPyro's unconstrained space. The density of a `DiffusionPrior` site is not evaluated: its
    share of the energy error is the line integral of its score (at the last time of the prior's grid) along
    the leapfrog path, which has visited those scores anyway. The rest of the model enters by its exact
    potential. Where a site and a parameter are strongly correlated, this mixes well where blocked updates
    crawl.

    *Law.* The posterior of the model up to the error of the line integral, which is of fourth order in the
    step size; no error for priors that are Gaussian, and none for those whose `score_fn` has a method
    `energy`, which is then used. Measured from scores alone, on a skewed and a bimodal law in 1, 2 and 10
    dimensions (`python -m benchmarks.bias`): means within 0.015 sd and variances within 1.5 %, hence the high
    default of `target_accept_prob`; at 0.9 they are off by 0.18 sd and 33 % in one dimension. Trajectories
    whose steps are too coarse for the line integral are rejected and set `unresolved`, which warmup counts as
    acceptance 0; many of them after the warmup call for a higher `target_accept_prob`. It moves within modes
    and between close ones; for modes far apart use `RTKParticleGibbs`, or `RTKGibbs`.

    *Cost.* One score evaluation per leapfrog step and event of each diffusion site, in
    `state.num_score_evals`. The end of a trajectory is the start of the next. Chains that are vectorized wait
    for the longest trajectory among them. `init` makes `16 * 43 + 16` evaluations per site for the initial
    mass matrix, two to check the score, and those of the annealed start (`RTKParticleGibbs` with 2 particles:
    two unconditional sweeps, 24 levels of 8 guided steps, three times over where there are other latents).
    Its memory is linear in the number of latents.

    *Warmup* is that of NumPyro's `HMC` (`warmup_adapter`: the same windows, dual averaging and
    regularisation). The mass matrix of diffusion sites starts from `E[score^2]` of prior draws. Each
    trajectory's length is `trajectory_length` times a uniform factor from 0.5 to 1.5, so that no direction
    can come back to its start for ever. Of a trajectory that meets a wall of the likelihood, where it becomes
    zero, the part before counts: `accept_prob` stays below its target there.

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
        target_accept_prob: Acceptance probability that warmup aims at. `None`: 0.98, or 0.8 where all
            diffusion sites have an energy, so that any acceptance is exact.
        inverse_mass_matrix: Initial inverse mass matrix in NumPyro's convention, an array over all
            sites in alphabetical order or a dict of blocks. `None`: from prior draws.
        max_num_steps: Most leapfrog steps of a trajectory; longer ones are cut.
        init_strategy: Where latents start that `init_params` does not name. `init_to_value(values=...)`:
            there, diffusion sites too. `init_to_sample`: at draws of the prior. Any other, as in NumPyro,
            says where the search for the latents that are no diffusion sites begins: sites that nothing is
            said of are annealed through the noise levels given the others, and these drawn given the sites by
            100 short trajectories without a score evaluation, three times over.

    Raises:
        TypeError, ValueError: for arguments that cannot work; at `init`, before compiling, for models that it
            cannot sample (see `RTKParticleGibbs`, and besides for discrete latents), and for a start at which
            the log density is not finite.

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
        target_accept_prob: float | None = None,
        inverse_mass_matrix: Any = None,
        max_num_steps: int = 1024,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        if not callable(model):
            raise TypeError(f"`model` must be a NumPyro model, a function, got {type(model).__name__}.")
        self._model = model
        self._options = check_options(
            Options(
                step_size=step_size,
                trajectory_length=trajectory_length,
                adapt_step_size=adapt_step_size,
                adapt_mass_matrix=adapt_mass_matrix,
                dense_mass=dense_mass,
                target_accept_prob=target_accept_prob,
                inverse_mass_matrix=inverse_mass_matrix,
                max_num_steps=max_num_steps,
                init_strategy=init_strategy,
            )
        )
        self._programs = Programs()

    def __repr__(self) -> str:
        options = self._options
        strategy = resolved_strategy(options.init_strategy)
        mass = "given" if options.inverse_mass_matrix is not None else f"from {START_DRAWS} prior draws"
        steps = min(max(round(options.trajectory_length / options.step_size), 1), options.max_num_steps)
        target = f"{options.resolved(False).target_accept_prob:g}"
        if options.target_accept_prob is None:
            target += f" ({options.resolved(True).target_accept_prob:g} where every score_fn has an energy)"
        return (
            f"ScoreHMC(step_size={options.step_size:g}{', adapted' if options.adapt_step_size else ''}; "
            f"trajectory_length={options.trajectory_length:g}, that is about {steps} score evaluations an "
            f"iteration and event at this step size, at most {options.max_num_steps}; inverse_mass_matrix "
            f"{mass}{', adapted' if options.adapt_mass_matrix else ''}, dense_mass={options.dense_mass}; "
            f"target_accept_prob={target}; init_strategy={strategy.func.__name__})"
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
        """The draws, and what is worth looking at in every run."""
        return ("z", "diverging", "energy", "accept_prob", "unresolved", "num_steps")

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
            init_params: `None`, or constrained values of some or all latents, with a chain axis if keys are
                batched; the others are found.
            model_args: Arguments of the model.
            model_kwargs: Keyword arguments of the model.
        """
        kwargs = {} if model_kwargs is None else dict(model_kwargs)
        batched, dtype = not is_prng_key(rng_key), jnp.result_type(float)
        found = inspect_model("ScoreHMC", self._model, rng_key[0] if batched else rng_key, model_args, kwargs)
        refuse_latent_conditions("ScoreHMC", found.conditions)
        refuse_discrete("ScoreHMC", found.trace)
        transforms = _transforms_from_trace(found.trace, raise_warnings=False)
        if kwargs.get(GIBBS_SITES_KWARG):
            refuse_supports("ScoreHMC", self._model, model_args, kwargs)
        num_chains = len(rng_key) if batched else None
        given = read_start(init_params, self._options.init_strategy, found.trace, num_chains)
        unconstrained = {
            name: jax.eval_shape(transform.inv, found.trace[name]["value"])
            for name, transform in transforms.inv_transforms.items()
        }
        # Before anything is compiled.
        initial_mass(self._options, unconstrained, {}, dtype)
        problem = resolve_joint_problem(self._model, model_args, kwargs, found.diffusion)
        refuse_without_derivative("ScoreHMC", problem.potential, unconstrained)

        def first(arrays: Any, args: Any, kwargs: Any) -> Any:
            inner = resolve_joint_problem(self._model, args, kwargs)
            scores = _scores(inner, arrays)
            return first_calls(inner, scores, dtype), calibrations(inner, scores, dtype)

        def begin(key: Any, given: Leaves, arrays: Any, mass: Any, args: Any, kwargs: Any) -> ScoreHMCState:
            options = self._options._replace(inverse_mass_matrix=mass)
            inner = resolve_joint_problem(self._model, args, kwargs)
            scores = _scores(inner, arrays)
            draws, scales = {}, {}
            if mass is None or not inner.names <= set(given):
                draws, scales = draws_and_scales(inner, scores, dtype)
            starter = Starter(inner, scores, draws, options.init_strategy)
            chain = _chain(options, inner, scores)

            def one(key: Any, given: Leaves) -> ScoreHMCState:
                start_key, chain_key = jr.split(key)
                z = starter.find(start_key, given)
                return chain.start(chain_key, z, initial_mass(options, z, scales, dtype), num_warmup)

            return jax.vmap(one)(key, given) if batched else one(key, given)

        arrays, mass = problem.scores.arrays, self._options.inverse_mass_matrix
        called, calibrated = self._program(f"first {dtype}", first, arrays, model_args, kwargs)
        for site, one, calibration in zip(problem.sites, called, calibrated, strict=True):
            prior, grid = site.prior, grid_of(site, dtype)
            check_first_call(one, grid)
            check_calibration(prior.score_fn, prior.schedule, grid, prior.event_shape, calibration, site.name)
        name = f"begin {batched} {num_warmup} {dtype}"
        state = self._program(name, begin, rng_key, given, arrays, mass, model_args, kwargs)
        _check_start(state)
        return state._replace(score_arrays=problem.scores, data=checksum(model_args, kwargs))

    def _program(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        # The model and the kernel's options are all that a program depends on besides its arguments.
        return self._programs(name, self._model, function, *args)

    def sample(
        self, state: ScoreHMCState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ScoreHMCState:
        """One trajectory, accepted or rejected, for one chain or a batch of them.

        A run that is resumed with other arguments of the model evaluates the state once more where it begins.
        """
        kwargs = {} if model_kwargs is None else model_kwargs
        if kwargs.get(GIBBS_SITES_KWARG):  # a block of NumPyro's `Gibbs`, which calls `refresh` where needed
            return self.trajectory(state, model_args, kwargs)
        chain, data = self._chain(state.score_arrays, model_args, kwargs), checksum(model_args, kwargs)
        changed = state.data != data
        state = jax.lax.cond(changed, functools.partial(_over_chains, chain.anew), lambda state: state, state)
        new = _over_chains(chain.step, state._replace(data=data))
        return new._replace(num_score_evals=new.num_score_evals + changed * chain.num_events)

    def trajectory(
        self, state: ScoreHMCState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ScoreHMCState:
        """The same from a state that was evaluated with these arguments, as `moved` gives."""
        chain = self._chain(state.score_arrays, model_args, model_kwargs)
        return _over_chains(chain.step, state)

    def refresh(
        self, state: ScoreHMCState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ScoreHMCState:
        """Evaluate the exact part of the potential for other arguments; no score evaluation but where priors
        have energies.
        """
        return self.moved(state, {}, model_args, model_kwargs)

    def moved(
        self,
        state: ScoreHMCState,
        z: Leaves,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> ScoreHMCState:
        """The state after another kernel moved some of the latents: one score evaluation per diffusion event.

        What diffusion priors without an energy contribute to `energy` by that move is the trapezoid rule
        between both ends: exact for Gaussian priors, and rough for a jump between modes.

        Args:
            state: The state.
            z: Unconstrained values of the latents that moved.
            model_args: Arguments of the model.
            model_kwargs: Keyword arguments of the model.
        """
        chain = self._chain(state.score_arrays, model_args, model_kwargs)
        return _over_chains(chain.at, state, z)

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
        return functools.partial(
            constrained, self._model, model_args, kwargs, deterministic=return_deterministic
        )

    def _chain(
        self, arrays: HoistedArrays, args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> Chain:
        kwargs = {} if model_kwargs is None else model_kwargs
        problem = resolve_joint_problem(self._model, args, kwargs)
        return _chain(self._options, problem, problem.score_models(arrays))


def _chain(options: Options, problem: JointProblem, scores: Any) -> Chain:
    has_energy = all(model.has_energy for model in scores.values())
    return Chain(options.resolved(has_energy), problem.evaluate(scores), problem.num_events)


def _scores(problem: JointProblem, arrays: Any) -> Any:
    """Score models inside a program, of arrays that are its arguments, or of its traced arguments."""
    return problem.score_models(HoistedArrays(arrays, problem.scores.fingerprint))


def _over_chains(function: Callable[..., ScoreHMCState], state: ScoreHMCState, *args: Any) -> ScoreHMCState:
    """The new state of one chain or of each of a batch; what they share has no chain axis."""
    alone = state._replace(score_arrays=HoistedArrays((), ""), data=None)
    one_chain = is_prng_key(state.rng_key)
    new = function(alone, *args) if one_chain else over_chains(function, 0)(alone, *args)
    return new._replace(**{name: getattr(state, name) for name in SHARED})


def _check_start(state: ScoreHMCState) -> None:
    """Raise where the start of a chain is impossible or not finite."""
    check_start("ScoreHMC", -state.potential)
    parts = {"a latent": state.z, "the score": state.score, "the gradient": state.gradient}
    for what, values in parts.items():
        for name, leaf in values.items():
            if isinstance(leaf, Tracer) or np.all(np.isfinite(np.asarray(leaf))):
                continue
            raise ValueError(
                f"`ScoreHMC` cannot start: {what} ({name!r}) is not finite there. Give a start, "
                "`MCMC.run(..., init_params={site: value})`, at which the network and the likelihood are."
            )
