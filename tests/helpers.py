"""What several test modules share."""

import threading

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from numpyro.infer import MCMC

from numpyro_rtk import Cosine, DiscreteVP, EDM, FlowMatching, OU, VE, VP
from numpyro_rtk._noising._grid import Segment
from numpyro_rtk._reverse._segment import ReverseTransition
from numpyro_rtk._score._model import resolve_score


DDPM_ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))

SCHEDULES = {
    "OU": OU(),
    "VP": VP(),
    "VP-constant": VP(1.0, 1.0, t_max=10.0),
    "Cosine": Cosine(),
    "Cosine-no-offset": Cosine(offset=0.0),
    "VE": VE(),
    "EDM": EDM(),
    "FlowMatching": FlowMatching(),
    "DiscreteVP": DiscreteVP(DDPM_ALPHAS_CUMPROD),
}


class Counter:
    """Wraps a score callable (or an energy) and counts its evaluations at run time and its traces.

    Under `vmap` every event counts, so that `n` chains count `n` times one chain.
    """

    def __init__(self, function):
        self.function = function
        self.num_traces = 0
        self._count = 0
        self._lock = threading.Lock()

    def __call__(self, x, t):
        self.num_traces += 1
        # An ordinary debug callback is unrolled over a mapped axis; it must depend on the event to be mapped.
        jax.debug.callback(self._add, x)
        return self.function(x, t)

    def _add(self, x):
        del x
        with self._lock:
            self._count += 1

    @property
    def count(self):
        jax.effects_barrier()
        return self._count


def make_target(score_fn, schedule, s, t, x_t, score_t=None):
    """The segment from `t` down to `s`, as the reverse driver would build it, in the dtype of `x_t`."""
    with jax.enable_x64(True):
        times = jnp.asarray(s, jnp.float64), jnp.asarray(t, jnp.float64)
        a, v = schedule.transition(*times)
        values = [
            np.asarray(value) for value in (*times, a, v, schedule.sigma(times[0]), schedule.alpha(times[1]))
        ]
    s, t, a, v, sigma_s, alpha_t = (jnp.asarray(value, x_t.dtype) for value in values)
    score_t = score_fn(x_t, t) if score_t is None else score_t
    segment = Segment(t=t, s=s, a=a, v=v, alpha_t=alpha_t, sigma_s=sigma_s)
    return ReverseTransition(resolve_score(score_fn), x_t, score_t, segment)


def run_mcmc(
    kernel,
    *args,
    num_warmup,
    num_samples,
    num_chains=2,
    chain_method="vectorized",
    seed=0,
    key=None,
    thinning=1,
    jit_model_args=False,
    **options,
):
    """An `MCMC` that has run, without a progress bar. Modules bind the lengths that they need."""
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method=chain_method,
        thinning=thinning,
        jit_model_args=jit_model_args,
        progress_bar=False,
    )
    mcmc.run(jr.key(seed) if key is None else key, *args, **options)
    return mcmc
