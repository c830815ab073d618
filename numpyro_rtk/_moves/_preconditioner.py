"""Fixed mass matrices, diagonal plus few directions."""

from typing import NamedTuple

from jaxtyping import Array


class Preconditioner(NamedTuple):
    """A factor `B` of a fixed mass matrix, `B B^T = (S^-2 + V^T V)^-1` with `S` diagonal and few rows in
    `V`.
    """

    scale: Array
    """`S`, shape `(dim,)`."""
    basis: Array
    """Orthonormal rows in scaled coordinates, shape `(rank, dim)`."""
    gain: Array
    """Factor minus one along each, shape `(rank,)`."""

    def apply(self, u: Array) -> Array:
        """`B u`."""
        return self.scale * (u + (self.gain * (self.basis @ u)) @ self.basis)

    def transpose(self, g: Array) -> Array:
        """`B^T g`."""
        scaled = self.scale * g
        return scaled + (self.gain * (self.basis @ scaled)) @ self.basis
