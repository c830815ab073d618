"""A word when particles die out: draws stay right, and sweeps hardly ever change them."""

import warnings

import numpy as np

from numpyro_rtk._tuning._sweeps import COLLAPSED
from numpyro_rtk._user import user_stack_level


def warn_collapsed(particle_ess: np.ndarray, times: np.ndarray, num_particles: int) -> None:
    """Warn where the particles of most unconditional sweeps have collapsed.

    Args:
        particle_ess: Effective sample sizes, shape `(sweeps, levels)`.
        times: Of the levels, shape `(levels,)`.
        num_particles: Number of particles.
    """
    shares = np.mean(particle_ess < COLLAPSED, axis=0)
    bad = np.flatnonzero(shares > 0.5)
    if num_particles <= COLLAPSED or not bad.size:
        return
    named = ", ".join(f"level {i} (t={times[i]:.3g})" for i in bad[:6])
    more = f" and {bad.size - 6} more" if bad.size > 6 else ""
    warnings.warn(
        f"Particle weights collapsed: at the start the particle ESS was below 2 of {num_particles} at "
        f"{named}{more}. The law is not affected, but sweeps through these levels rarely move the draw, and "
        "their evaluations are lost. More `segments` or `num_particles` help. Where the data are informative "
        "in every coordinate local moves do the work: without `sweep_prob=`, warmup makes sweeps rare.",
        UserWarning,
        stacklevel=user_stack_level(),
    )
