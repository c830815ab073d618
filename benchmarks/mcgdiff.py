"""MCGdiff's Gaussian mixture benchmark: particle Gibbs against the exact posterior.

25 modes at `(8 i, 8 j)`, repeated over the coordinates, unit covariances, random weights; a random linear
observation with Gaussian noise (Cardoso et al. 2023, arXiv 2308.07983, section 5.1). Per cell of dimension
and number of observations: sliced W2 to the exact posterior, its Monte Carlo floor for as many draws, the
error of the mode weights (total variation, and its floor), score evaluations per draw and seconds for all
draws of one problem after compilation.

Run with:  python -m benchmarks.mcgdiff [--cells 8x1 80x4 ...] [--problems 20]
"""

import argparse
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist

import numpyro_rtk as rtk
from benchmarks.problems import sliced_w2


# Chains, warmup sweeps, sweeps per draw and guided steps at the start.
EFFORT = {"8": (250, 14, 3, 4), "80": (100, 8, 3, 16), "800": (20, 6, 2, 4), "800x4": (20, 6, 1, 4)}
# Segments, particles and guided steps. In 800 dimensions short transitions and many particles matter more
# than guided moves.
SWEEP = {8: (32, 16, 1), 80: (32, 16, 1), 800: (44, 20, 0)}
# Most chains vectorized together.
BATCH = {8: 250, 80: 100, 800: 5}


def schedule_for(dim):
    """The outermost mode is `16 sqrt(dim)` from the origin: at the top a twentieth of the noise scale is left
    of it.

    At the bottom the whole mixture is scaled by `exp(-t_min)`, which must not be seen even in the sharpest
    observation.
    """
    return rtk.OU(t_max=float(np.log(20 * 16 * np.sqrt(dim))), t_min=1e-5)


def make_problem(seed, dim, num_observations):
    """Weights, operator, noise sd and data of one random problem."""
    rng = np.random.default_rng([seed, dim, num_observations])
    weights = rng.standard_normal(25) ** 2
    weights /= weights.sum()
    u, _, vt = np.linalg.svd(rng.standard_normal((num_observations, dim)), full_matrices=False)
    singular = np.sort(rng.uniform(size=num_observations))[::-1]
    operator = (u * singular) @ vt
    sd = rng.uniform() * singular.max()
    truth = modes(dim)[rng.choice(25, p=weights)] + rng.standard_normal(dim)
    y = operator @ truth + sd * rng.standard_normal(num_observations)
    return {"weights": weights, "operator": operator, "sd": sd, "y": y}


def modes(dim):
    """Means of the 25 modes, shape `(25, dim)`."""
    corners = np.array([(8.0 * i, 8.0 * j) for i in range(-2, 3) for j in range(-2, 3)])
    return np.tile(corners, (1, dim // 2))


def exact_posterior(problem, dim):
    """Weights, means and the common covariance of the posterior, a mixture itself."""
    a, sd, y = problem["operator"], problem["sd"], problem["y"]
    precision = np.eye(dim) + a.T @ a / sd**2
    covariance = np.linalg.inv(precision)
    means = (modes(dim) + y @ a / sd**2) @ covariance
    evidence_covariance = a @ a.T + sd**2 * np.eye(len(y))
    residuals = y - modes(dim) @ a.T
    log_weights = np.log(problem["weights"]) - 0.5 * np.sum(
        residuals @ np.linalg.inv(evidence_covariance) * residuals, axis=1
    )
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum(), means, covariance


def exact_draws(rng, posterior, num_draws):
    weights, means, covariance = posterior
    component = rng.choice(len(weights), size=num_draws, p=weights)
    return means[component] + rng.multivariate_normal(
        np.zeros(means.shape[1]), covariance, size=num_draws, method="cholesky"
    )


def mode_error(x, posterior):
    """Total variation between fractions of draws by mode and the exact weights."""
    nearest = np.argmin(((x[:, None, :2] - posterior[1][None, :, :2]) ** 2).sum(-1), axis=1)
    return 0.5 * np.abs(np.bincount(nearest, minlength=25) / len(x) - posterior[0]).sum()


def make_model(dim, schedule):
    """A model of the data with the mixture's closed-form score (not its energy) as prior."""
    means = jnp.asarray(modes(dim), jnp.float32)
    squares = jnp.sum(means**2, axis=1)

    def model(weights, operator, sd, y):
        def score_fn(x, t):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            variance = alpha**2 + sigma**2
            # Squared distances to the modes but for what they share: no array of modes by coordinates for
            # every particle.
            logits = jnp.log(weights) + alpha * (means @ x - 0.5 * alpha * squares) / variance
            return -(x - alpha * (jax.nn.softmax(logits) @ means)) / variance

        x = numpyro.sample("x", rtk.DiffusionPrior(score_fn, (dim,), schedule))
        numpyro.sample("y", dist.Normal(operator @ x, sd).to_event(1), obs=y)

    return model


def make_sampler(dim, num_draws, num_chains, num_warmup, thinning, num_start_steps, **options):
    """`run(key, problem)`: draws, and means over chains and draws of what the kernel reports."""
    if dim > 100:
        # The default is for networks on images; this score is exact at midpoints, too, and its modes are what
        # matters.
        inner = rtk.PreconditionedMALA(num_steps=1, energy_difference=rtk.Simpson(), max_step_size=4.0)
        options = {"guidance": "mean", "reverse": inner} | options
    # Chains walk through the levels together: a full sweep takes no longer than a partial one of most of
    # them.
    kernel = rtk.RTKParticleGibbs(
        make_model(dim, schedule_for(dim)), refresh_depths=(1.0,), num_start_steps=num_start_steps, **options
    )

    def run_chains(keys, args):
        state = kernel.init(keys, num_warmup, None, args, {})

        def sweep(state, _):
            state = kernel.sample(state, args, {})
            return state, (state.num_score_evals, state.particle_ess, state.changed)

        def body(state, _):
            state, (evaluations, ess, changed) = jax.lax.scan(sweep, state, None, length=thinning)
            return state, (state.z["x"], jnp.sum(evaluations, axis=0), ess[-1], changed)

        state, _ = jax.lax.scan(sweep, state, None, length=num_warmup)
        _, (x, evaluations, ess, changed) = jax.lax.scan(body, state, None, length=num_draws // num_chains)
        return x.reshape(-1, dim), jnp.mean(evaluations), jnp.nanmean(ess, axis=(0, 1)), jnp.mean(changed)

    def run(keys, args):
        # Vectorized chains in batches, one after the other, whose particles fit into a core's cache.
        batches = keys.reshape(-1, min(keys.size, BATCH[dim]))
        x, evaluations, ess, changed = jax.lax.map(lambda keys: run_chains(keys, args), batches)
        return x.reshape(-1, dim), evaluations, ess, changed

    mesh = jax.sharding.Mesh(jax.devices(), ("chains",))
    chains = jax.P("chains")
    on_devices = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(chains, jax.P()), out_specs=chains, check_vma=False)
    )

    def run_problem(key, problem):
        args = (problem["weights"], problem["operator"], problem["sd"], problem["y"])
        x, evaluations, ess, changed = on_devices(jr.split(key, num_chains), args)
        return x, jnp.mean(evaluations), jnp.mean(ess, axis=0), jnp.mean(changed)

    return run_problem


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", nargs="+", default=[f"{d}x{m}" for d in (8, 80, 800) for m in (1, 2, 4)])
    parser.add_argument("--problems", type=int, default=20, help="half as many in 800 dimensions")
    parser.add_argument("--seeds", nargs="+", type=int, help="these problems instead")
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument(
        "--effort",
        nargs=4,
        type=int,
        help="chains, warmup sweeps, sweeps per draw, guided steps at the start",
    )
    parser.add_argument("--particles", type=int)
    parser.add_argument("--segments", type=int)
    parser.add_argument("--guided", type=int, help="guided steps per level and particle")
    parser.add_argument("--devices", type=int, default=1, help="host devices (cores) that share the chains")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    numpyro.set_host_device_count(options.devices)
    # Random bits for half the price where the sharding of arrays need not be transparent to them.
    jax.config.update("jax_threefry_partitionable", False)
    print(f"{options}; effort by dimension: {EFFORT}, sweep {SWEEP}")
    print(
        "cell    problems  sliced W2   floor   ratio (s.e., worst)   modes  floor   evaluations  seconds "
        "(compile)"
    )
    for cell in options.cells:
        dim, num_observations = map(int, cell.split("x"))
        effort = options.effort or EFFORT.get(cell, EFFORT[str(dim)])
        if (
            effort[0] % (options.devices * min(BATCH[dim], effort[0] // options.devices))
            or options.draws % effort[0]
        ):
            parser.error(
                f"{effort[0]} chains cannot share {options.draws} draws, {options.devices} devices, batches "
                f"of {BATCH[dim]}"
            )
        given = (options.segments, options.particles, options.guided)
        sweep = [default if one is None else one for one, default in zip(given, SWEEP[dim], strict=True)]
        run = make_sampler(
            dim, options.draws, *effort, segments=sweep[0], num_particles=sweep[1], num_guided_steps=sweep[2]
        )
        rows, compile_time = [], 0.0
        seeds = options.seeds or range(options.problems if dim < 800 else max(1, options.problems // 2))
        for seed in seeds:
            problem = make_problem(seed, dim, num_observations)
            arrays = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), problem)
            if not rows:
                start = time.perf_counter()
                jax.block_until_ready(run(jr.key(1000), arrays))
                compile_time = time.perf_counter() - start
            start = time.perf_counter()
            x, evaluations, ess, changed = jax.block_until_ready(run(jr.key(seed), arrays))
            seconds = time.perf_counter() - start
            posterior, rng = exact_posterior(problem, dim), np.random.default_rng(seed)
            exact = [exact_draws(rng, posterior, len(x)) for _ in range(6)]
            floor = np.mean([sliced_w2(a, b) for i, a in enumerate(exact) for b in exact[:i]])
            distance = np.mean([sliced_w2(x, one) for one in exact])
            error = mode_error(np.asarray(x), posterior)
            error_floor = np.mean([mode_error(one, posterior) for one in exact])
            rows.append((distance, floor, distance / floor, error, error_floor, float(evaluations), seconds))
            if options.verbose:
                top = np.sort(posterior[0])[::-1][:3]
                print(
                    f"  {seed}: ratio {rows[-1][2]:.2f} modes {error:.3f} ({error_floor:.3f}) changed "
                    f"{float(changed):.2f} "
                    f"ESS {np.min(ess):.1f} at {np.argmin(ess)} sd {problem['sd']:.3f} weights "
                    f"{np.round(top, 2)}",
                    flush=True,
                )
        table = np.array(rows)
        mean, error = table.mean(0), table[:, 2].std() / np.sqrt(len(table))
        print(
            f"{cell:8} {len(table):5} {mean[0]:10.3f} {mean[1]:8.3f} {mean[2]:7.2f} ({error:.2f}, "
            f"{table[:, 2].max():.2f})"
            f" {mean[3]:12.3f} {mean[4]:6.3f} {mean[5]:12.0f} {mean[6]:8.1f} ({compile_time:.0f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
