"""Which data a state was evaluated with: a resumed run may have others."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jaxtyping import Array

from numpyro_rtk._custom_types import Flag
from numpyro_rtk._score._hoist import fingerprint_of, TRACED


class DataMark(eqx.Module):
    """Tells the arguments of a model from others, at no cost where they are known while tracing."""

    checksum: Array
    """A 32 bit checksum of all arrays."""
    fingerprint: str = eqx.field(static=True)
    """A digest of them, or `TRACED`."""

    def replaced_by(self, own: "DataMark") -> "tuple[DataMark, Flag | None]":
        """The mark of a state that goes on with the data of `own`, and whether those are others; `None` where
        they are known to be the same.
        """
        if self.fingerprint == own.fingerprint and TRACED not in own.fingerprint:
            return self, None
        return DataMark(own.checksum, self.fingerprint), self.checksum != own.checksum


def mark_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> DataMark:
    """That of a model's arguments; what is no array or number is left out."""
    leaves = [leaf for leaf in jax.tree.leaves((args, kwargs)) if eqx.is_array_like(leaf)]
    leaves = [leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for leaf in leaves]
    fingerprint = fingerprint_of(leaves)
    if fingerprint == TRACED:
        return DataMark(_checksum(leaves), fingerprint)
    with jax.ensure_compile_time_eval():
        return DataMark(_checksum(leaves), fingerprint)


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
