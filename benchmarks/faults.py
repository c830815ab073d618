"""Faults planted in the galaxy network, and what starts say of them: `python -m benchmarks.faults`.

Nothing must be said of the right score; everything else must be named.
"""

import argparse
import warnings

import jax.numpy as jnp
import jax.random as jr
import numpy as np

import numpyro_rtk as rtk
from benchmarks.problems import galaxy_network


SHAPE = (1, 32, 32)
STEPS = rtk.DiscreteVP(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))


def faults():
    """Scores and schedules, and options of the kernel."""
    network, schedule = galaxy_network()

    def right(x, t):
        return network(x, t)

    def at_step_off_by(steps):
        def score(x, t):
            wrong = jnp.clip(t + steps, 0, 999)
            # `alpha = exp(-t / 2)` in the network's time; a noise prediction, made a score at the right step.
            time = jnp.clip(-2 * jnp.log(STEPS.alpha(wrong)), schedule.t_min, schedule.t_max)
            return network(x, time) * STEPS.sigma(wrong) / STEPS.sigma(t)

        return score

    return {
        "none": (right, schedule, {}),
        "noise prediction": (lambda x, t: -schedule.sigma(t) * network(x, t), schedule, {}),
        "sign": (lambda x, t: -network(x, t), schedule, {}),
        "2 t for t": (lambda x, t: network(x, jnp.minimum(2 * t, schedule.t_max)), schedule, {}),
        "VP taken for OU": (right, rtk.OU(t_min=0.01), {}),
        "50 steps late": (at_step_off_by(50), STEPS, {}),
        "50 steps early": (at_step_off_by(-50), STEPS, {}),
        "4 segments": (right, schedule, {"segments": 4}),
    }


def said(run):
    """What was raised or warned of, in short."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run()
        except ValueError as error:
            return f"ValueError: {error}"
    return "; ".join(f"{warning.category.__name__}: {warning.message}" for warning in caught) or "nothing"


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=200, help="characters of each message")
    width = parser.parse_args().width
    print("| Fault | What is said |\n|---|---|")
    for name, (score, schedule, options) in faults().items():
        options = {"segments": 32} | options
        kernel = rtk.RTKKernel(score, event_shape=SHAPE, schedule=schedule, **options)
        message = said(lambda kernel=kernel: kernel.init(jr.key(0), 1, None, (), {}))
        print(f"| {name} | {message[:width]} |", flush=True)
    network, schedule = galaxy_network()
    for num_nodes in (8, 129):
        density = rtk.LineIntegral(num_nodes=num_nodes)
        prior = rtk.DiffusionPrior(lambda x, t: network(x, t), SHAPE, schedule, density=density)
        message = said(lambda prior=prior: prior.log_prob(jnp.zeros(SHAPE)))
        print(f"| {num_nodes} nodes | {message[:width]} |", flush=True)


if __name__ == "__main__":
    main()
