"""The reference problems and distances that benchmarks and statistical tests share."""

import functools
import time

import jax
import jax.random as jr
import numpy as np
from numpyro.infer import MCMC

import numpyro_rtk as rtk


NUM_MODES, DIM, RADIUS, SD = 6, 10, 1.5, 0.3


def ring_mixture(schedule):
    """The paper's mixture: 6 Gaussians of sd 0.3 on a circle of radius 1.5 in the first two of 10
    dimensions.
    """
    angles = 2 * np.pi * np.arange(NUM_MODES) / NUM_MODES
    means = np.zeros((NUM_MODES, DIM))
    means[:, 0], means[:, 1] = RADIUS * np.cos(angles), RADIUS * np.sin(angles)
    covariances = np.tile(SD**2 * np.eye(DIM), (NUM_MODES, 1, 1))
    return rtk.GaussianMixtureScore(np.full(NUM_MODES, 1 / NUM_MODES), means, covariances, schedule)


@functools.cache
def _directions(dim, num_directions):
    directions = np.random.default_rng(0).standard_normal((dim, num_directions))
    return directions / np.linalg.norm(directions, axis=0)


def sliced_w2(x, y, num_directions=128):
    """Sliced 2-Wasserstein distance of two samples of the same size, shape `(n, dim)`."""
    directions = _directions(np.shape(x)[1], num_directions)
    projected = [np.sort(np.asarray(sample, np.float64) @ directions, axis=0) for sample in (x, y)]
    return float(np.sqrt(np.mean((projected[0] - projected[1]) ** 2)))


class RingReference:
    """Exact draws of the ring mixture, in replicates, and the Monte Carlo floor of `sliced_w2`.

    The distance of two exact samples varies by a third from pair to pair: the floor is the mean of many
    pairs.
    """

    def __init__(self, num_draws, num_replicates, num_floor_pairs=20, seed=1):
        score = ring_mixture(rtk.OU())
        draws = [np.asarray(score.sample(key, num_draws)) for key in jr.split(jr.key(seed), num_replicates)]
        self.references = draws
        pairs = jr.split(jr.key(seed + 1), (num_floor_pairs, 2))
        self.floors = [
            sliced_w2(score.sample(one, num_draws), score.sample(other, num_draws)) for one, other in pairs
        ]

    @property
    def floor(self):
        """Mean distance of two exact samples."""
        return float(np.mean(self.floors))

    def distances(self, replicates):
        """Distance of each replicate of draws to its own exact sample."""
        return [sliced_w2(x, y) for x, y in zip(replicates, self.references, strict=False)]


def mode_weight_error(x):
    """Total variation distance between the fractions of draws nearest to each mode and 1/6."""
    means = np.asarray(ring_mixture(rtk.OU()).means)
    nearest = np.argmin(((np.asarray(x)[:, None, :2] - means[None, :, :2]) ** 2).sum(-1), axis=1)
    return 0.5 * float(np.abs(np.bincount(nearest, minlength=NUM_MODES) / len(x) - 1 / NUM_MODES).sum())


def draw(kernel, num_draws, *, num_warmup=200, num_chains=100, seed=0, extra_fields=()):
    """Draws of `kernel` through `MCMC` with vectorized chains; returns the `MCMC`."""
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_draws // num_chains,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jr.key(seed), extra_fields=extra_fields)
    return mcmc


def galaxy_network(t_min=0.01):
    """The pretrained galaxy network (a score, `network(x, t)` with `x` of shape (1, 32, 32)) and its
    schedule.

    Constant-rate VP with t from 0 to 10; the network was trained on images scaled by log1p, and below
    t = 0.01 (noise of sd 0.1 in these units) nothing is asked of it.
    """
    from galaxygrad.scorenet import HSC_32

    return HSC_32, rtk.VP(beta_min=1.0, beta_max=1.0, t_max=10.0, t_min=t_min)


POWER_BANDS = ((0.5, 2), (2, 4), (4, 8), (8, 12), (12, 23))


def galaxy_statistics(images):
    """Per-image statistics, each of shape `(n,)`: mean, sd, roughness, maximum, log power in bands of wave
    number.
    """
    images = np.asarray(images, np.float64).reshape(-1, 32, 32)
    roughness = 0.5 * sum(np.abs(np.diff(images, axis=axis)).mean((1, 2)) for axis in (1, 2))
    power = np.abs(np.fft.fft2(images)) ** 2 / images[0].size
    frequency = np.fft.fftfreq(32, 1 / 32)
    wave_number = np.hypot(*np.meshgrid(frequency, frequency))
    statistics = {
        "mean": images.mean((1, 2)),
        "sd": images.std((1, 2)),
        "roughness": roughness,
        "maximum": images.max((1, 2)),
    }
    for low, high in POWER_BANDS:
        band = (wave_number >= low) & (wave_number < high)
        statistics[f"log power {low:g}-{high:g}"] = np.log(power[:, band].mean(1))
    return statistics


def compare_galaxies(images, reference):
    """Per statistic: mean, reference mean, relative difference, difference in standard errors.

    A difference of a log power is a relative difference of the (geometric mean) power itself.
    """
    rows = {}
    ours, theirs = galaxy_statistics(images), galaxy_statistics(reference)
    for name in ours:
        difference = ours[name].mean() - theirs[name].mean()
        error = np.hypot(
            ours[name].std() / np.sqrt(len(ours[name])), theirs[name].std() / np.sqrt(len(theirs[name]))
        )
        relative = difference if name.startswith("log") else difference / abs(theirs[name].mean())
        rows[name] = (ours[name].mean(), theirs[name].mean(), relative, difference / error)
    return rows


def ddpm_galaxies(num_images, num_steps=1000, seed=11):
    """Reference draws of the galaxy network by DDPM."""
    network, schedule = galaxy_network()
    kernel = rtk.RTKKernel(
        network,
        event_shape=(1, 32, 32),
        schedule=schedule,
        segments=num_steps,
        inner=rtk.GaussianTransition(),
    )
    num_chains = min(64, num_images)
    mcmc = draw(kernel, num_images, num_warmup=0, num_chains=num_chains, seed=seed)
    return np.asarray(mcmc.get_samples()["x"])


def timed(function, *args, repeats=5):
    """Shortest wall time of `function(*args)` over `repeats` calls, in seconds, after a first call to
    compile.
    """
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)
