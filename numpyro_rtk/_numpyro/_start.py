"""Where gradient-based kernels start the diffusion sites of a model: annealed through the noise levels."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array
from numpyro.infer.gibbs import with_conditioning
from numpyro.util import is_prng_key

from numpyro_rtk._numpyro._particle_gibbs import RTKParticleGibbs


START_PARTICLES = 2
"""Particles of the annealed start: guided moves do the work, and the better of a few is kept at each level."""


def annealed_start(
    rng_key: Any, model: Callable[..., Any], others: dict[str, Array], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Array]:
    """Values of all diffusion sites given the other latents, by the unconditional sweeps that start `RTKParticleGibbs`.

    Particles come down from noise by reverse transitions, with guided MALA moves on `p_t G_t` at every level.

    Args:
        rng_key: One key, or one per chain.
        model: The model.
        others: Constrained values of all other latents, with a chain axis if keys are batched.
        args: Arguments of the model.
        kwargs: Keyword arguments of the model.
    """
    kernel = RTKParticleGibbs(model, num_particles=START_PARTICLES, num_pilot_draws=32)

    def one(rng_key: Any, others: dict[str, Array]) -> dict[str, Array]:
        return kernel.init(rng_key, 0, None, args, with_conditioning(kwargs, others)).z

    return one(rng_key, others) if is_prng_key(rng_key) else jax.vmap(one)(rng_key, others)
