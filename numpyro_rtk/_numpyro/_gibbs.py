"""`RTKGibbs`: particle Gibbs for the diffusion sites of a model, another kernel for everything else."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
from jaxtyping import Array
from numpyro.infer.gibbs import conditioned, Gibbs, GIBBS_SITES_KWARG, with_conditioning
from numpyro.infer.hmc import HMC
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_rtk._numpyro._arguments import check_count, read_start
from numpyro_rtk._numpyro._blocks import refresh, refuse_nested
from numpyro_rtk._numpyro._dependent import refuse_supports
from numpyro_rtk._numpyro._gibbs_state import any_flag, axes_without, RTKGibbsState, with_shared
from numpyro_rtk._numpyro._inner_start import start_inner
from numpyro_rtk._numpyro._joint import joint_init, joint_sample
from numpyro_rtk._numpyro._latent_conditions import (
    check_condition_moves,
    check_path_segments,
    DEFAULT_PATH_SEGMENTS,
    draw_conditions,
    draw_paths,
    path_evaluations,
)
from numpyro_rtk._numpyro._particle_gibbs import RTKParticleGibbs
from numpyro_rtk._numpyro._particle_gibbs_chain import DEFAULT_STATISTICS, ParticleGibbsState
from numpyro_rtk._numpyro._score_hmc import ScoreHMC
from numpyro_rtk._numpyro._score_hmc_chain import ScoreHMCState, SHARED
from numpyro_rtk._numpyro._sharding import over_chains
from numpyro_rtk._numpyro._sites import (
    diffusion_site_names,
    inspect_model,
    latent_diffusion_sites,
    ModelSites,
    refuse_discrete,
    refuse_latent_conditions,
)
from numpyro_rtk._numpyro._start_checks import check_start
from numpyro_rtk._numpyro._tracing import PATHS_KWARG, traced_sites, without_diffusion
from numpyro_rtk._user import arviz_asks


def _shows_options(init: Callable[..., None]) -> Callable[..., None]:
    """Shows the options of `RTKParticleGibbs`, with their defaults, in the signature of an `__init__` that
    takes them as `**options`.
    """
    own = list(inspect.signature(init).parameters.values())[:-1]
    options = inspect.signature(RTKParticleGibbs.__init__).parameters.values()
    shown = [parameter for parameter in options if parameter.kind is parameter.KEYWORD_ONLY]
    init.__signature__ = inspect.Signature([*own, *shown], return_annotation=None)  # pyright: ignore
    return init


class RTKGibbs(Gibbs):
    r"""All latents of a model: diffusion sites by `RTKParticleGibbs`, the others by `inner_kernel`, in turn.

    `RTKGibbs(NUTS(model))` is used as NumPyro's `HMCGibbs(NUTS(model), ...)` is. It is a NumPyro `Gibbs` of
    two blocks, whose inner kernel sees the model without the densities of the diffusion sites: they do not
    depend on its sites, so that a leapfrog step costs no score evaluation.

    `RTKGibbs(ScoreHMC(model))` is different: `ScoreHMC` moves *all* latents, the diffusion sites too, after
    each sweep. Sweeps go between modes, joint trajectories along ridges between a site and a parameter. It
    takes the place of the local moves (`local=None` unless given), and the model may have no other latents.

    *Law.* Leaves the joint posterior invariant up to what `RTKParticleGibbs`, and `ScoreHMC` if it is there,
    say of theirs. Where a diffusion site and another latent are strongly correlated, blocks that take turns
    move slowly (R-hat and effective sample sizes say so); then use `ScoreHMC`, alone or here.

    *Latent conditions.* Where the `condition` of a diffusion site is a latent, no network says how likely it
    is. But each iteration noises the current `x_0` up through `path_segments` levels, by a path that does not
    depend on the condition; the law of the path is a product of reverse transitions, nearly Gaussian, whose
    means are known from scores. Their log density stands for the prior's in the inner kernel: exact as
    segments shrink, and short of information by a share that falls as `1 / path_segments`. A posterior comes
    out up to 3 % too wide at the default, 5 % where the prior was measured at conditions that mean four times
    the scale, without a bias of its mean (`python -m benchmarks.conditions`). Longer segments than tell
    conditions apart are warned of. The condition and `x` take turns, and are slow where each pins the other.

    *Cost.* `num_score_evals`: those of particle Gibbs and none by the inner kernel, but for latent
    conditions: `path_segments` for each event and leapfrog step, with their gradient, in one batch (counted
    for HMC and NUTS; kernels without gradients count one evaluation of their potential). With `ScoreHMC`, its
    own and one per event besides, as its start has moved. The state has `diverging` and `unresolved` of both
    blocks, `particle_ess`, `changed`, `depth` and `accept_prob` of particle Gibbs, and `energy` of a
    Hamiltonian inner kernel; all other statistics are `"block_states.0.<field>"` in `extra_fields` for
    particle Gibbs and `"block_states.1.<field>"` for the inner kernel.

    *Start.* `init_params` has constrained values of any latents, as has `init_to_value` of the inner kernel;
    a diffusion site that is given is never drawn anew. As a block of a NumPyro `Gibbs` it finds a start of
    its own.

    Args:
        inner_kernel: A kernel built on the model: `NUTS(model)`, `HMC(model)`, `DiscreteGibbs(model)`, a
            NumPyro `Gibbs` of several, any that implements `refresh` and `wrap_model`; or `ScoreHMC(model)`,
            for all latents together.
        path_segments: Segments of the noising paths that tell how likely a latent condition is, even in the
            log signal-to-noise ratio.
        **options: Arguments of `RTKParticleGibbs`.

    Raises:
        TypeError, ValueError: for an inner kernel without a model, a latent condition that `ScoreHMC` would
            have to sample or along which the score has no derivative, and as `RTKParticleGibbs` and NumPyro's
            `Gibbs` do.
    """

    _state_cls = RTKGibbsState  # pyright: ignore[reportAssignmentType]

    @_shows_options
    def __init__(
        self, inner_kernel: MCMCKernel, *, path_segments: int = DEFAULT_PATH_SEGMENTS, **options: Any
    ) -> None:
        if not isinstance(inner_kernel, MCMCKernel):
            got = (
                f"the class {inner_kernel.__name__}"
                if isinstance(inner_kernel, type)
                else type(inner_kernel).__name__
            )
            raise TypeError(f"`inner_kernel` must be a NumPyro kernel such as `NUTS(model)`, got {got}.")
        model = getattr(inner_kernel, "model", None)
        if model is None:
            raise TypeError(
                f"`inner_kernel` must be built on a model, as `NUTS(model)` is; this "
                f"{type(inner_kernel).__name__} has none (a "
                "potential function says nothing of diffusion sites)."
            )
        if isinstance(inner_kernel, RTKParticleGibbs):
            raise TypeError(
                "`inner_kernel` samples the other latents, and `RTKParticleGibbs` samples diffusion sites: "
                "pass its options to "
                "`RTKGibbs` itself, as in `RTKGibbs(NUTS(model), num_particles=8)`. Without other latents "
                "use "
                "`RTKParticleGibbs(model)` alone."
            )
        refuse_nested(inner_kernel)
        check_count("path_segments", path_segments, 2, "segments of a noising path")
        self._path_segments = int(path_segments)
        self._user_model = model
        self._joint = isinstance(inner_kernel, ScoreHMC)
        if self._joint:
            joint_options: dict[str, Any] = {"local": None, **options}
            particle_gibbs = RTKParticleGibbs(model, **joint_options)
            super().__init__([(particle_gibbs, diffusion_site_names), (inner_kernel, None)])
            return
        free = inner_kernel.wrap_model(without_diffusion)
        free_model = getattr(free, "model")  # noqa: B009 - not every kernel has one
        particle_gibbs = RTKParticleGibbs(model, **options).wrap_model(lambda _: free_model)
        super().__init__([(particle_gibbs, diffusion_site_names), (free, None)])

    @property
    def default_fields(self) -> tuple[str, ...]:
        """The draws, whether something failed, and whether sweeps moved; with `ScoreHMC` its energy."""
        return ("z", *DEFAULT_STATISTICS, *["energy"] * self._joint)

    @property
    def model(self) -> Callable[..., Any]:
        """The model as it was given; for ArviZ, which only reads plates and observations, one that evaluates
        no network.
        """
        return without_diffusion(self._user_model) if arviz_asks() else self._user_model

    @property
    def _sample_fn(self) -> Any:
        """Tells `MCMC` whether a resumed run needs no `init`: it does where the inner kernel keeps what it
        learnt of the model outside its state, and has not seen the model, as after pickling.
        """
        inner = self._kernels[1]
        known = [getattr(inner, name, True) for name in ("_sample_fn", "_prepared_model")]
        return None if any(value is None for value in known) else self._sample_chain

    @_sample_fn.setter
    def _sample_fn(self, value: Any) -> None:
        # NumPyro's `Gibbs` writes here.
        del value

    def __repr__(self) -> str:
        (particle_gibbs, _), (inner, _) = self.blocks
        name = repr(inner) if self._joint else type(inner).__name__
        return f"RTKGibbs({name}, {particle_gibbs!r})"

    def get_diagnostics_str(self, state: RTKGibbsState) -> str:
        """What both blocks say, for the progress bar; over all chains if there are several."""
        if jnp.ndim(state.diverging) == 0:
            return super().get_diagnostics_str(state)  # pyright: ignore[reportArgumentType]
        text, inner = self._kernels[0].get_diagnostics_str(state.block_states[0]), state.block_states[1]
        accept_prob = getattr(inner, "mean_accept_prob", None)
        return text if accept_prob is None else f"{text} | acc. prob={np.mean(accept_prob):.2f}"

    def init(
        self,
        rng_key: Any,
        num_warmup: int,
        init_params: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> RTKGibbsState:
        """Initial state of one chain, or of a batch of vectorized chains.

        Args:
            rng_key: One key, or one per vectorized chain.
            num_warmup: Length of the warmup.
            init_params: `None`, or constrained values of some or all latents, `{site: value}`, with a chain
                axis if keys are batched.
            model_args: Arguments of the model.
            model_kwargs: Keyword arguments of the model.
        """
        kwargs = {} if model_kwargs is None else dict(model_kwargs)
        # Before the blocks, whose own words would not name this kernel, and outside `vmap`.
        found = inspect_model("RTKGibbs", conditioned(self._user_model), jr.key(0), model_args, kwargs)
        inner = self._kernels[1]
        if self._joint:
            refuse_latent_conditions("RTKGibbs(ScoreHMC(model))", found.conditions)
        if isinstance(inner, HMC):
            refuse_discrete(f"RTKGibbs({type(inner).__name__}(model))", found.trace)
        batched = not is_prng_key(rng_key)
        self._resolve(found, kwargs)
        refuse_supports("RTKGibbs", self._user_model, model_args, kwargs)
        given: dict[str, Array] = {}
        if GIBBS_SITES_KWARG not in kwargs:
            num_chains = rng_key.shape[0] if batched else None
            given = read_start(init_params, getattr(inner, "_init_strategy", None), found.trace, num_chains)

        pilots = {}
        if self._conditional:
            pilots = draw_conditions(conditioned(self._user_model), self._conditional, model_args, kwargs)

        def one(inputs: tuple[Any, dict[str, Array]]) -> RTKGibbsState:
            return self._init_chain(*inputs, num_warmup, pilots, model_args, kwargs)

        def log_likelihood(state: RTKGibbsState) -> Array:
            others = self._others(state.z, model_args, kwargs)
            block, z = self._kernels[0], state.block_states[0].z
            return block.log_likelihood(z, model_args, with_conditioning(kwargs, others))  # pyright: ignore

        if not batched:
            state = one((rng_key, given))
            check_start("RTKGibbs", log_likelihood(state))
            self._check_conditions(state, found, pilots)
            return state
        axes = self._chain_axes()
        state = jax.vmap(one, out_axes=axes)((rng_key, given))
        check_start("RTKGibbs", jax.vmap(log_likelihood, in_axes=(axes,))(state))
        self._check_conditions(state, found, pilots)
        return state

    def _resolve(self, found: ModelSites, kwargs: dict[str, Any]) -> None:
        """Which block has which sites, and which conditions are latents of the inner kernel: static, and the
        same for every trace of the model.
        """
        self._sites = self._resolve_partition(found.trace, frozenset(kwargs.get(GIBBS_SITES_KWARG, {})))
        self._has_deterministic = any(site["type"] == "deterministic" for site in found.trace.values())
        own = set(self._sites[1])
        self._conditional = tuple(name for name, latents in found.conditions.items() if own & set(latents))

    def _check_conditions(self, state: RTKGibbsState, found: ModelSites, pilots: dict[str, Array]) -> None:
        """Ask of each latent condition whether its paths tell enough."""
        measured = state.block_states[0].shared.measured
        for site, seen in zip(found.diffusion, measured, strict=True):
            if site.name in pilots:
                latents = found.conditions[site.name]
                check_condition_moves(self._kernels[1], site, latents)
                check_path_segments(site, pilots[site.name], latents, seen, self._path_segments)

    def _others(self, z: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Array]:
        """Constrained values of the latents that are no diffusion sites."""
        values = self.get_constrain_fn(args, kwargs)(z)
        return {name: value for name, value in values.items() if name in z and name not in self._sites[0]}

    def _init_chain(
        self,
        rng_key: Any,
        given: dict[str, Array],
        num_warmup: int,
        pilots: dict[str, Array],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> RTKGibbsState:
        particle_gibbs, inner = self._kernels
        assert isinstance(particle_gibbs, RTKParticleGibbs)
        if isinstance(inner, ScoreHMC):
            init_key, next_key = jr.split(rng_key)
            blocks = joint_init(particle_gibbs, inner, init_key, num_warmup, given, args, kwargs)
            z = blocks[1].z
        else:
            next_key, trace_key, particle_key, inner_key = jr.split(rng_key, 4)
            diffusion, own = self._sites
            trace, _ = traced_sites(conditioned(self._user_model), trace_key, args, kwargs)
            others: dict[str, Any] = {name: given.get(name, trace[name]["value"]) for name in own}
            here = with_conditioning(kwargs, others)
            sites = latent_diffusion_sites(conditioned(self._user_model), jr.key(0), args, here)
            x = {name: value for name, value in given.items() if name in diffusion}
            block = particle_gibbs.start(particle_key, num_warmup, x, sites, args, here, pilots)
            here = with_conditioning(kwargs, block.z)
            with numpyro.validation_enabled(False):  # NumPyro traces the model at placeholders
                rest = start_inner(inner, inner_key, num_warmup, given, others, args, here)
            blocks = (block, rest)
            z = self._merge_z(blocks)
        zero = jnp.zeros_like(blocks[0].num_score_evals)
        return RTKGibbsState(z, blocks, next_key, jnp.zeros((), bool), zero)

    def sample(
        self, state: RTKGibbsState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> RTKGibbsState:
        """One sweep over both blocks, for one chain or a batch of them."""
        if is_prng_key(state.rng_key):
            return self._sample_chain(state, model_args, model_kwargs)

        def one(state: RTKGibbsState) -> RTKGibbsState:
            return with_shared(self._sample_chain(state, model_args, model_kwargs), None)

        # NumPyro's `Gibbs` refreshes blocks by a `cond`, which gives everything a chain axis; what chains
        # share needs none.
        shared, axes = state.block_states[0].shared, self._chain_axes()
        new = over_chains(one, (axes,), axes)(state)
        return with_shared(new, shared._replace(iteration=shared.iteration + 1))

    def _sample_chain(self, state: RTKGibbsState, args: Any, kwargs: Any) -> RTKGibbsState:
        particle_gibbs, inner = self._kernels
        if isinstance(inner, ScoreHMC):
            assert isinstance(particle_gibbs, RTKParticleGibbs)
            next_key, _ = jr.split(state.rng_key)
            states: Any = state.block_states
            blocks, evaluations = joint_sample(particle_gibbs, inner, states, args, dict(kwargs or {}))
            new = state._replace(z=blocks[1].z, block_states=blocks, rng_key=next_key)
        else:
            new: Any = self._take_turns(state, args, dict(kwargs or {}))
            evaluations = new.num_score_evals
        return new._replace(diverging=any_flag(new.block_states, "diverging"), num_score_evals=evaluations)

    def _take_turns(self, state: RTKGibbsState, args: Any, kwargs: dict[str, Any]) -> RTKGibbsState:
        """A sweep of particle Gibbs, then the inner kernel, each given what the other has, and all that
        encloses them: nothing that a block keeps outlives an iteration, so that `refresh` has nothing to do.
        """
        (particle_gibbs, inner), (diffusion, rest) = self._kernels, state.block_states
        here = with_conditioning(kwargs, self._others(state.z, args, kwargs))
        diffusion = particle_gibbs.sample(diffusion, args, here)
        next_key, path_key = jr.split(state.rng_key)
        evaluations = diffusion.num_score_evals
        inside, paths = with_conditioning(kwargs, diffusion.z), {}
        if self._conditional:
            sites = latent_diffusion_sites(conditioned(self._user_model), jr.key(0), args, here)
            paths = draw_paths(
                path_key, sites, diffusion.z, diffusion.shared, self._conditional, self._path_segments
            )
            inside[PATHS_KWARG] = paths
        rest = inner.sample(refresh(inner, rest, args, inside), args, inside)
        if paths:
            each = sum(one.path.shape[0] * (one.path.shape[1] - 1) for one in paths.values())
            evaluations += (each * path_evaluations(inner, rest)).astype(evaluations.dtype)
        blocks = (diffusion, rest)
        return state._replace(
            z=self._merge_z(blocks), block_states=blocks, rng_key=next_key, num_score_evals=evaluations
        )

    def _chain_axes(self) -> RTKGibbsState:
        """Axes of the chains in a state: everywhere but in what chains share."""
        blocks: Any = (
            axes_without(ParticleGibbsState, ("shared",)),
            axes_without(ScoreHMCState, SHARED) if self._joint else 0,
        )
        return RTKGibbsState(z=0, block_states=blocks, rng_key=0, diverging=0, num_score_evals=0)  # pyright: ignore

    def get_constrain_fn(self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None) -> Any:
        """Constrained values of all latents."""
        if self._joint:
            return self._kernels[1].get_constrain_fn(model_args, model_kwargs)
        return super().get_constrain_fn(model_args, model_kwargs)

    def postprocess_fn(self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None) -> Any:
        """Constrained values of all latents, and the deterministic sites."""
        if self._joint:
            return self._kernels[1].postprocess_fn(model_args, model_kwargs)
        return super().postprocess_fn(model_args, model_kwargs)

    def wrap_model(self, wrapper: Callable[..., Any]) -> "RTKGibbs":
        """A copy whose model is `wrapper(model)`."""
        kernel = super().wrap_model(wrapper)
        assert isinstance(kernel, RTKGibbs)
        kernel = copy.copy(kernel)
        kernel._user_model = wrapper(self._user_model)
        return kernel
