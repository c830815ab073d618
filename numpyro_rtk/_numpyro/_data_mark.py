"""Which data a state was evaluated with: a resumed run may have others."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.core import Tracer
from jaxtyping import Array, UInt32


def checksum(args: tuple[Any, ...], kwargs: dict[str, Any]) -> UInt32[Array, ""]:
    """Tells the arguments of a model from others: 32 bits of all arrays and numbers among them.

    A constant where they are known while tracing.
    """
    leaves = [leaf for leaf in jax.tree.leaves((args, kwargs)) if eqx.is_array_like(leaf)]
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return _checksum(leaves)
    with jax.ensure_compile_time_eval():
        return _checksum(leaves)


def _checksum(leaves: list[Any]) -> Array:
    total = jnp.zeros((), jnp.uint32)
    for leaf in leaves:
        words = _words(jnp.asarray(leaf))
        # Odd weights, so that neither the order nor any single bit is lost.
        weights = np.uint32(2246822519) * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1)
        total = total * np.uint32(2654435761) + jnp.sum(words * weights, dtype=jnp.uint32)
    return total


def _words(leaf: Array) -> Array:
    """The bits of an array as 32 bit words."""
    if jnp.issubdtype(leaf.dtype, dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == jnp.bool_ or leaf.dtype.itemsize < 4:
        leaf = leaf.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
