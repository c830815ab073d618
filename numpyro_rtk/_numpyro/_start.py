"""Where `ScoreHMC` starts: diffusion sites annealed through the noise levels, the other latents fitted to
them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree
from jax.scipy.optimize import minimize
from jaxtyping import Array
from numpyro.infer.gibbs import with_conditioning
from numpyro.util import is_prng_key

from numpyro_rtk._numpyro._particle_gibbs import RTKParticleGibbs


START_PARTICLES = 2
"""Particles of the annealed start: guided moves do the work, and the better of a few is kept at each
level.
"""

START_ROUNDS = 3
"""Rounds of annealing and fitting where there are other latents."""


def annealed_start(
    rng_key: Any,
    model: Callable[..., Any],
    others: dict[str, Array],
    constrain: Callable[[dict[str, Array]], dict[str, Array]],
    potential: Callable[[dict[str, Array]], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Array]:
    """Unconstrained values of all latents.

    The diffusion sites come from the unconditional sweeps that start `RTKParticleGibbs`, given the others;
    these are then fitted to them by minimising the rest of the potential (BFGS, no score evaluation), and so
    on.

    Args:
        rng_key: One key, or one per chain.
        model: The model.
        others: Unconstrained values of all other latents, with a chain axis if keys are batched.
        constrain: Constrained values of the other latents.
        potential: Potential of unconstrained values of all latents, without the diffusion priors.
        args: Arguments of the model.
        kwargs: Keyword arguments of the model.
    """
    kernel = RTKParticleGibbs(model, num_particles=START_PARTICLES, num_pilot_draws=32)

    def anneal(others: dict[str, Array], rng_key: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        return others, kernel.init(rng_key, 0, None, args, with_conditioning(kwargs, constrain(others))).z

    def fit(others: dict[str, Array], x: dict[str, Array]) -> dict[str, Array]:
        flat, unravel = ravel_pytree(others)
        best = minimize(lambda flat: potential(unravel(flat) | x), flat, method="BFGS").x
        return unravel(jnp.where(jnp.all(jnp.isfinite(best)), best, flat))

    def one(rng_key: Any, others: dict[str, Array]) -> dict[str, Array]:
        if not others:
            return anneal(others, rng_key)[1]

        def body(others: dict[str, Array], rng_key: Any) -> tuple[dict[str, Array], dict[str, Array]]:
            _, x = anneal(others, rng_key)
            return fit(others, x), x

        others, xs = jax.lax.scan(body, others, jr.split(rng_key, START_ROUNDS))
        return others | {name: value[-1] for name, value in xs.items()}

    return jax.jit(one)(rng_key, others) if is_prng_key(rng_key) else jax.jit(jax.vmap(one))(rng_key, others)
