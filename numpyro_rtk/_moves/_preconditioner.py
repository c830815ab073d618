"""Fixed mass matrices, diagonal plus few directions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_rtk._moves._elements import Elements, ONE


class Preconditioner(NamedTuple):
    """A factor `B` of a fixed mass matrix, `B B^T = (S^-2 + V^T V)^-1` with `S` diagonal and few rows in
    `V`; one such matrix for each element.
    """

    scale: Array
    """`S`, shape `(dim,)`."""
    basis: Array
    """Orthonormal rows in scaled coordinates, shape `(rank, dim)`: of each element, in its coordinates."""
    gain: Array
    """Factor minus one along each, shape `(rank, *elements)`."""
    elements: Elements = ONE
    """Which coordinates belong together."""

    def apply(self, u: Array) -> Array:
        """`B u`."""
        return self.scale * (u + self._gained(u))

    def transpose(self, g: Array) -> Array:
        """`B^T g`."""
        scaled = self.scale * g
        return scaled + self._gained(scaled)

    def _gained(self, u: Array) -> Array:
        if self.elements.count == 1:
            return (self.gain * (self.basis @ u)) @ self.basis
        along = jax.vmap(self.elements.dot, in_axes=(0, None))(self.basis, u)
        return jnp.sum(self.elements.spread(self.gain * along) * self.basis, axis=0)


def preconditioner_of(scale: Array, rows: Array, elements: Elements = ONE) -> Preconditioner:
    """The factor of `(S^-2 + V^T V)^-1`, from rows `V S` of each element, shape `(rank, dim)`."""
    if rows.shape[0] == 0:
        return Preconditioner(scale, rows, jnp.zeros((0, *elements.shape), rows.dtype), elements)
    if elements.count == 1:
        return Preconditioner(scale, *_directions(rows), elements)
    apart = jnp.moveaxis(elements.coordinates.padded(rows), 1, 0)
    basis, gain = jax.vmap(_directions)(apart)
    basis = elements.coordinates.unpadded(jnp.moveaxis(basis, 0, 1))
    return Preconditioner(scale, basis, gain.T, elements)


def _directions(rows: Array) -> tuple[Array, Array]:
    # (I + V^T V)^(-1/2) = I + sum_k ((1 + s_k^2)^(-1/2) - 1) w_k w_k^T over singular vectors of V.
    values, vectors = jnp.linalg.eigh(rows @ rows.T)
    values = jnp.maximum(values, 0.0)
    norms = jnp.sqrt(jnp.maximum(values, 1e-12))
    basis = (vectors.T @ rows) / norms[:, None]
    return basis, jnp.where(values > 1e-10, 1 / jnp.sqrt(1 + values) - 1, 0.0)
