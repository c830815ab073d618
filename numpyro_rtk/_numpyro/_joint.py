"""Particle Gibbs in turn with joint HMC: two kernels that share the diffusion sites, so no blocks of
NumPyro's `Gibbs`.
"""

import math
from typing import Any

import jax.random as jr
from jaxtyping import Array
from numpyro.infer.gibbs import with_conditioning

from numpyro_rtk._numpyro._particle_gibbs import RTKParticleGibbs
from numpyro_rtk._numpyro._particle_gibbs_chain import ParticleGibbsState
from numpyro_rtk._numpyro._score_hmc import ScoreHMC
from numpyro_rtk._numpyro._score_hmc_chain import ScoreHMCState
from numpyro_rtk._numpyro._sites import latent_diffusion_sites


def _given_others(
    hmc: ScoreHMC, z: dict[str, Any], sites: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The model's keyword arguments with all latents but the diffusion sites conditioned on; unchanged if
    there are none.
    """
    others = {
        name: value for name, value in hmc.get_constrain_fn(args, kwargs)(z).items() if name not in sites
    }
    return with_conditioning(kwargs, others) if others else kwargs


def joint_init(
    particle_gibbs: RTKParticleGibbs,
    hmc: ScoreHMC,
    rng_key: Any,
    num_warmup: int,
    given: dict[str, Array],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[ParticleGibbsState, ScoreHMCState]:
    """States of both kernels at one start of one chain.

    `ScoreHMC` finds values of the latents that are no diffusion sites, and particle Gibbs the diffusion sites
    given those; but for the constrained values that are given.
    """
    particle_key, hmc_key = jr.split(rng_key)
    hmc_state = hmc.init(hmc_key, num_warmup, given, args, kwargs)
    sites = latent_diffusion_sites(hmc.model, jr.key(0), args, kwargs)
    names = {site.name for site in sites}
    x = {name: value for name, value in given.items() if name in names}
    here = _given_others(hmc, hmc_state.z, names, args, kwargs)
    state = particle_gibbs.start(particle_key, num_warmup, x, sites, args, here)
    return state, hmc.moved(hmc_state, state.z, args, kwargs)


def joint_sample(
    particle_gibbs: RTKParticleGibbs,
    hmc: ScoreHMC,
    states: tuple[ParticleGibbsState, ScoreHMCState],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[ParticleGibbsState, ScoreHMCState], Any]:
    """A sweep over the diffusion sites given the others, then a trajectory of all: each leaves the posterior
    invariant.

    Returns:
        The new states, and the number of score evaluations: those of both, and one per event where the
        trajectory starts.
    """
    state, hmc_state = states
    sites = latent_diffusion_sites(hmc.model, jr.key(0), args, kwargs)
    state = state._replace(z={name: hmc_state.z[name] for name in state.z})
    state = particle_gibbs.sample(state, args, _given_others(hmc, hmc_state.z, state.z, args, kwargs))
    hmc_state = hmc.trajectory(hmc.moved(hmc_state, state.z, args, kwargs), args, kwargs)
    evaluations = (
        state.num_score_evals + hmc_state.num_score_evals + sum(math.prod(site.batch_shape) for site in sites)
    )
    return (state, hmc_state), evaluations
