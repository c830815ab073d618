"""The inverse mass matrix of `ScoreHMC`: where it starts, and what it makes of a momentum."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_rtk._moves._leapfrog import Leaves
from numpyro_rtk._numpyro._score_hmc_options import Options


def initial_mass(options: Options, shapes: dict[str, Any], scales: Leaves, dtype: Any) -> dict[Any, Any]:
    """Blocks of the initial inverse mass matrix, each a vector or, if given, a matrix.

    Args:
        options: Options.
        shapes: Anything with a `shape`, for each latent's unconstrained value.
        scales: Squared scales of some latents; the others have 1.
        dtype: Of the result.

    Raises:
        ValueError: if blocks do not name latents, each once, or a matrix that was given does not fit.
    """
    dense = options.dense_blocks(shapes)
    names = [name for block in dense for name in block]
    if len(set(names)) != len(names) or not set(names) <= set(shapes):
        raise ValueError(
            f"`dense_mass={options.dense_mass}` must name every site at most once; the latents are "
            f"{sorted(shapes)}."
        )
    if options.inverse_mass_matrix is not None:
        return _given_mass(options.inverse_mass_matrix, shapes, dense, dtype)
    remaining = tuple(sorted(set(shapes) - set(names)))
    blocks = [*dense, remaining] if remaining else dense
    inverse = {
        name: jnp.ravel(scales[name]) if name in scales else jnp.ones(_size(leaf), dtype)
        for name, leaf in shapes.items()
    }
    return {block: jnp.concatenate([inverse[name] for name in block]) for block in blocks}


def _given_mass(
    given: Any, shapes: dict[str, Any], dense: list[tuple[str, ...]], dtype: Any
) -> dict[Any, Any]:
    blocks = dict(given) if isinstance(given, dict) else {tuple(sorted(shapes)): given}
    names = [name for block in blocks for name in block]
    if len(set(names)) != len(names) or not set(names) <= set(shapes):
        raise ValueError(
            f"`inverse_mass_matrix` has blocks {list(blocks)}; they must name latents, each once: "
            f"{sorted(shapes)}."
        )
    if any(set(block) & set(other) and block != other for block in blocks for other in dense):
        raise ValueError(
            f"Blocks of `inverse_mass_matrix`, {list(blocks)}, must be those of `dense_mass`, {dense}, or "
            f"apart from them."
        )
    for block, matrix in blocks.items():
        size = sum(_size(shapes[name]) for name in block)
        if np.shape(matrix) not in ((size,), (size, size)):
            raise ValueError(
                f"`inverse_mass_matrix` of {block} must have shape {(size,)} or {(size, size)}, got "
                f"{np.shape(matrix)}."
            )
    return {block: jnp.asarray(matrix, dtype) for block, matrix in blocks.items()}


def _size(leaf: Any) -> int:
    return int(np.prod(leaf.shape))


def mass_velocity(inverse_mass_matrix: Any, momentum: Leaves) -> Leaves:
    """Inverse mass matrix times momentum, in NumPyro's blocks."""
    velocity = {}
    for names, inverse in inverse_mass_matrix.items():
        flat = jnp.concatenate([jnp.ravel(momentum[name]) for name in names])
        flat = inverse * flat if inverse.ndim == 1 else inverse @ flat
        start = 0
        for name in names:
            size = momentum[name].size
            velocity[name] = flat[start : start + size].reshape(momentum[name].shape)
            start += size
    return velocity
