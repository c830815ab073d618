"""`RTKGibbs`: particle Gibbs for the diffusion sites of a model, another kernel for everything else."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro
from numpyro.infer.gibbs import conditioned, Gibbs
from numpyro.infer.hmc import HMC
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_rtk._numpyro._joint import joint_init, joint_sample
from numpyro_rtk._numpyro._particle_gibbs import RTKParticleGibbs
from numpyro_rtk._numpyro._particle_gibbs_chain import ParticleGibbsState
from numpyro_rtk._numpyro._score_hmc import ScoreHMC
from numpyro_rtk._numpyro._score_hmc_chain import ScoreHMCState
from numpyro_rtk._numpyro._sites import (
    diffusion_site_names,
    inspect_model,
    refuse_discrete,
    without_diffusion,
)


class RTKGibbsState(NamedTuple):
    """State of `RTKGibbs`: NumPyro's `GibbsState` and what belongs to both blocks."""

    z: dict[str, Any]
    """The draws, as each block keeps them."""
    block_states: tuple[Any, ...]
    """State of the particle Gibbs block, and of the inner kernel."""
    rng_key: Any
    """Random key of the next iteration."""
    diverging: Any = False
    """Whether either block diverged."""
    num_score_evals: Any = 0
    """Score evaluations of the iteration."""


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

    *Cost.* `num_score_evals`: those of particle Gibbs and none by the inner kernel; with `ScoreHMC`, its own
    and one per event besides, as its start has moved. The state has `diverging` of both blocks;
    other statistics are `"block_states.0.<field>"` in `extra_fields` for particle Gibbs and
    `"block_states.1.<field>"` for the inner kernel.

    Args:
        inner_kernel: A kernel built on the model: `NUTS(model)`, `HMC(model)`, `DiscreteGibbs(model)`, a
            NumPyro `Gibbs` of several, any that implements `refresh` and `wrap_model`; or `ScoreHMC(model)`,
            for all latents together.
        **options: Arguments of `RTKParticleGibbs`.

    Raises:
        TypeError, ValueError: for an inner kernel without a model, and as `RTKParticleGibbs` and NumPyro's
        `Gibbs` do.
    """

    _state_cls = RTKGibbsState  # pyright: ignore[reportAssignmentType]

    def __init__(self, inner_kernel: MCMCKernel, **options: Any) -> None:
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
        """The draws, and whether either block diverged."""
        return ("z", "diverging")

    @property
    def model(self) -> Callable[..., Any]:
        """The model as it was given, with its diffusion priors."""
        return self._user_model

    def __repr__(self) -> str:
        (particle_gibbs, _), (inner, _) = self.blocks
        return f"RTKGibbs({type(inner).__name__}, {particle_gibbs!r})"

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
            init_params: `None`, or `{site: value}` with a chain axis if keys are batched: constrained values
                of diffusion sites, unconstrained ones of sites of an HMC inner kernel.
            model_args: Arguments of the model.
            model_kwargs: Keyword arguments of the model.
        """
        # Before the blocks, whose own words would not name this kernel, and outside `vmap`.
        trace = inspect_model(
            "RTKGibbs", conditioned(self._user_model), jr.key(0), model_args, dict(model_kwargs or {})
        ).trace
        if isinstance(self._kernels[1], HMC):
            refuse_discrete(f"RTKGibbs({type(self._kernels[1]).__name__}(model))", trace)
        if is_prng_key(rng_key):
            return self._init_chain(rng_key, num_warmup, init_params, model_args, model_kwargs)
        axes = self._chain_axes()

        def one(key: Any, params: Any) -> RTKGibbsState:
            return self._init_chain(key, num_warmup, params, model_args, model_kwargs)

        return jax.vmap(one, out_axes=axes)(rng_key, init_params)

    def _init_chain(
        self, rng_key: Any, num_warmup: int, init_params: Any, args: Any, kwargs: Any
    ) -> RTKGibbsState:
        if self._joint:
            init_key, next_key = jr.split(rng_key)
            blocks = joint_init(*self._kernels, init_key, num_warmup, init_params, args, dict(kwargs or {}))  # pyright: ignore
            self._sample_fn = (
                self._sample_chain
            )  # as NumPyro's `Gibbs` does: tells `MCMC` that a resumed run needs no `init`
            return RTKGibbsState(
                z=blocks[1].z,
                block_states=blocks,
                rng_key=next_key,
                diverging=jnp.zeros((), bool),
                num_score_evals=jnp.zeros_like(blocks[0].num_score_evals),
            )
        with numpyro.validation_enabled(False):  # NumPyro traces the model at placeholders
            state: Any = super().init(rng_key, num_warmup, init_params, args, kwargs)
        count = jnp.zeros_like(state.block_states[0].num_score_evals)
        state = state._replace(diverging=jnp.zeros((), bool), num_score_evals=count)
        given = {name: value for name, value in (init_params or {}).items() if name in self._sites[0]}
        if not given:
            return state
        # Particle Gibbs as a block starts from its own sweep; a start that the user gave comes before it.
        block = state.block_states[0]._replace(z=state.block_states[0].z | given)
        return state._replace(z=state.z | given, block_states=(block, *state.block_states[1:]))

    def sample(
        self, state: RTKGibbsState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> RTKGibbsState:
        """One sweep over both blocks, for one chain or a batch of them."""
        if is_prng_key(state.rng_key):
            return self._sample_chain(state, model_args, model_kwargs)

        def one(state: RTKGibbsState) -> RTKGibbsState:
            return _with_shared(self._sample_chain(state, model_args, model_kwargs), None)

        # NumPyro's `Gibbs` refreshes blocks by a `cond`, which gives everything a chain axis; what chains
        # share needs none.
        shared, axes = state.block_states[0].shared, self._chain_axes()
        new = jax.vmap(one, in_axes=(axes,), out_axes=axes)(state)
        return _with_shared(new, shared._replace(iteration=shared.iteration + 1))

    def _sample_chain(self, state: RTKGibbsState, args: Any, kwargs: Any) -> RTKGibbsState:
        if not self._joint:
            new: Any = super().sample(state, args, kwargs)  # pyright: ignore[reportArgumentType]
            evaluations = new.block_states[0].num_score_evals
        else:
            next_key, _ = jr.split(state.rng_key)
            blocks: Any
            blocks, evaluations = joint_sample(*self._kernels, state.block_states, args, dict(kwargs or {}))  # pyright: ignore
            new = state._replace(z=blocks[1].z, block_states=blocks, rng_key=next_key)
        flags = [jnp.any(block.diverging) for block in new.block_states if hasattr(block, "diverging")]
        return new._replace(diverging=jnp.any(jnp.stack(flags)), num_score_evals=evaluations)

    def _chain_axes(self) -> RTKGibbsState:
        """Axes of the chains in a state: everywhere but in what chains share."""
        blocks: Any = (
            _axes_without(ParticleGibbsState, "shared"),
            _axes_without(ScoreHMCState, "score_arrays") if self._joint else 0,
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


def _with_shared(state: RTKGibbsState, shared: Any) -> RTKGibbsState:
    block: Any = state.block_states[0]
    return state._replace(block_states=(block._replace(shared=shared), *state.block_states[1:]))


def _axes_without(state: Any, shared: str) -> Any:
    """Chain axes of all fields of a state but one."""
    return state(*(None if name == shared else 0 for name in state._fields))
