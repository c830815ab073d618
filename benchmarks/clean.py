"""What denoising leaves open, pixel by pixel, on a real galaxy whose clean image is known.

The galaxy of `examples/galaxy_restore.py` is noised to `t_min` again and again, and denoised. Beside the
error are its two estimates: `prior.denoise_sd`, over draws of the prior, and `prior.denoise_sd_of`, over
these images.

Run with:  python -m benchmarks.clean [--images 32]
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from examples.galaxy_restore import hubble_galaxy, network_prior


EDGES = (-1.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=32)
    options = parser.parse_args()
    prior, light = network_prior(0.03), hubble_galaxy()
    clean = 10 * jnp.log1p(light)[None]
    schedule = prior.schedule
    noise = schedule.sigma(schedule.t_min) * jr.normal(jr.key(0), (options.images, *clean.shape))
    images = schedule.alpha(schedule.t_min) * clean[None] + noise
    denoised = jax.lax.map(prior.denoise, images, batch_size=16)
    columns = {
        "error": jnp.sqrt(jnp.mean((denoised - clean[None]) ** 2, axis=0)),
        "denoise_sd": prior.denoise_sd,
        "denoise_sd_of": prior.denoise_sd_of(images),
    }
    print(f"noise of t_min {prior.noise.data_sd:.3f}; root mean square over pixels by their light")
    print("light           pixels  " + "  ".join(f"{name:>13}" for name in columns))
    for low, high in itertools.pairwise(EDGES):
        chosen = np.asarray((light > low) & (light <= high))
        values = (np.sqrt(np.mean(np.asarray(values)[0][chosen] ** 2)) for values in columns.values())
        bounds = f"{low:g} to {high:g}"
        print(f"{bounds:14} {chosen.sum():7d}  " + "  ".join(f"{value:13.3f}" for value in values))


if __name__ == "__main__":
    main()
