"""Elements: parts of a vector that are independent given everything else, and so move apart.

A log density that is a sum over elements, each of which reads coordinates of its own, is a product of laws.
A move of all coordinates at once can then accept, weigh and resample each element by itself, for the same
evaluations. Which coordinates and which observations belong together is known outside the trace.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from numpyro_rtk._custom_types import RandomKey
from numpyro_rtk._moves._accept import all_finite
from numpyro_rtk._moves._line_integral import dot


class Structure:
    """Something known outside the trace, and equal to another of the same key."""

    key: tuple[Any, ...]
    """What two equal ones have in common."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.key == self.key  # pyright: ignore[reportAttributeAccessIssue]

    def __hash__(self) -> int:
        return hash(self.key)


@jax.tree_util.register_static
class Groups(Structure):
    """Entries of the last axis of an array, each of which belongs to one of `count` groups.

    Args:
        owner: Group of each entry, shape `(entries,)`.
        count: Number of groups; some may have no entries.
    """

    def __init__(self, owner: Any, count: int) -> None:
        self.owner, self.count = np.asarray(owner, np.int32).reshape(-1), count
        sizes = np.bincount(self.owner, minlength=count)
        self.size = int(sizes.max(initial=0))
        """Entries of the largest group."""
        order = np.argsort(self.owner, kind="stable")
        self._place = np.empty(self.owner.size, np.int64)
        self._place[order] = np.arange(self.owner.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        self._even = bool(np.all(sizes == self.size) and np.all(order == np.arange(order.size)))
        self._index = np.full((count, self.size), self.owner.size)
        self._index[self.owner, self._place] = np.arange(self.owner.size)
        self.key = (count, self.owner.tobytes())

    def padded(self, values: Array, fill: Any = 0) -> Array:
        """From `(..., entries)` to `(..., groups, size)`, filled up where a group has fewer entries."""
        if self._even:
            return values.reshape(*values.shape[:-1], self.count, self.size)
        pad = jnp.full((*values.shape[:-1], 1), fill, values.dtype)
        return jnp.concatenate([values, pad], axis=-1)[..., self._index]

    def unpadded(self, values: Array) -> Array:
        """Inverse of `padded`."""
        if self._even:
            return values.reshape(*values.shape[:-2], self.count * self.size)
        return values[..., self.owner, self._place]

    def sum(self, values: Array) -> Array:
        """Sums over groups, from `(..., entries)` to `(..., groups)`."""
        return jnp.sum(self.padded(values), axis=-1)

    def any(self, flags: Array) -> Array:
        """Whether a flag is set in a group, from `(..., entries)` to `(..., groups)`."""
        return jnp.any(self.padded(flags, False), axis=-1)

    def spread(self, values: Array) -> Array:
        """Each entry gets the value of its group, from `(..., groups)` to `(..., entries)`."""
        if self._even:
            return jnp.repeat(values, self.size, axis=-1)
        return values[..., self.owner]


@jax.tree_util.register_static
class Elements(Structure):
    """How the coordinates of a vector fall into elements.

    Values by element have the shape `shape` as their last axes: none where there is one element, so that
    they are scalars.

    Args:
        events: Element of each event of each site, one array `(batch_size,)` a site.
        sizes: Coordinates of an event of each site.
        observations: Element of each Gaussian observation, shape `(observations,)`.
        count: Number of elements.
    """

    def __init__(self, events: Any, sizes: Any, observations: Any, count: int) -> None:
        self.count = count
        self.events = tuple(Groups(owner, count) for owner in events)
        """Of each site."""
        owners = [np.repeat(g.owner, size) for g, size in zip(self.events, sizes, strict=True)]
        self.coordinates = Groups(np.concatenate(owners) if owners else np.zeros(0), count)
        """Of the flat vector."""
        self.observations = Groups(observations, count)
        """Gaussian ones."""
        groups = (*self.events, self.coordinates, self.observations) if count > 1 else ()
        self.key = (count, *(one.key for one in groups))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a value by element."""
        return () if self.count == 1 else (self.count,)

    def dot(self, x: Array, y: Array) -> Array:
        """Inner product of two vectors, by element."""
        if self.count == 1:
            return dot(x, y)
        x, y = self.coordinates.padded(x), self.coordinates.padded(y)
        return jnp.einsum("ei,ei->e", x, y, precision=jax.lax.Precision.HIGHEST)

    def all_finite(self, *vectors: Array) -> Array:
        """Whether every coordinate of an element is finite in every vector."""
        if self.count == 1:
            return all_finite(*vectors)
        broken = jnp.stack([~jnp.isfinite(vector) for vector in vectors]).any(axis=0)
        return ~self.coordinates.any(broken)

    def spread(self, values: Array) -> Array:
        """Each coordinate gets the value of its element."""
        return values if self.count == 1 else self.coordinates.spread(values)

    def sum_events(self, site: int, values: Array) -> Array:
        """Sums over the events of a site, the last axis, by element."""
        return jnp.sum(values, axis=-1) if self.count == 1 else self.events[site].sum(values)

    def any_event(self, site: int, flags: Array) -> Array:
        """Whether an event of a site, `(batch_size,)`, has a flag, by element."""
        return jnp.any(flags) if self.count == 1 else self.events[site].any(flags)

    def each(self, function: Callable[..., Any], *arrays: Array, key: RandomKey | None = None) -> Any:
        """A function of arrays without an axis of elements, applied to each element by itself.

        Args:
            function: Takes a key of its own, if one is given, and the arrays of one element.
            arrays: With elements as the last axis, which all results have, too.
            key: Random key.
        """
        given = () if key is None else (key,)
        if self.count == 1:
            return function(*given, *arrays)
        keys = () if key is None else (jr.split(key, self.count),)
        axes = (0,) * len(keys) + (-1,) * len(arrays)
        return jax.vmap(function, in_axes=axes, out_axes=-1)(*keys, *arrays)


ONE = Elements((), (), (), 1)
"""All coordinates are one element."""
