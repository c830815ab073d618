"""Keep a network's arrays out of the compiled program.

JAX writes arrays that a traced function closes over into the program as constants: 40 MB of them for
10 million float32 parameters, copied at every stage of compilation. `MCMC` traces `kernel.sample`, so a network held by the
kernel would be such a constant. Here its arrays are separated from its structure; the kernel puts
them into its state, which is an argument of the compiled program.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.core import Tracer


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


class HoistedArrays(eqx.Module):
    """Arrays of a score callable, with a fingerprint that says which callable they belong to."""

    arrays: Any
    fingerprint: str = eqx.field(static=True)


def _fingerprint(arrays: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, Tracer):
            return "traced"
        values = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, dtypes.prng_key) else leaf
        values = np.asarray(values)
        digest.update(str((values.shape, values.dtype)).encode())
        digest.update(np.ascontiguousarray(values).view(np.uint8).data if values.size else b"")
    return digest.hexdigest()


def hoist(
    score_fn: Callable[..., Any], x: Any, t: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[HoistedArrays, Callable[[Any], Callable[..., Any]]]:
    """Separate the arrays of a score callable from the rest.

    PyTrees (Equinox modules, the adapters) are partitioned; of any other callable the arrays it
    closes over are found by tracing it once. Callables that are no PyTree but have an `energy` method
    are left alone: their arrays remain constants of the program.

    Args:
        score_fn: `score_fn(x, t, *args, **kwargs)`.
        x: Shape and dtype of one event.
        t: Shape and dtype of the time.
        args: Further positional arguments.
        kwargs: Further keyword arguments.

    Returns:
        The arrays, and a function that puts arrays of that structure back into a score callable.
    """
    is_leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(score_fn))
    if not is_leaf:
        arrays, static = eqx.partition(score_fn, _is_array)
        return HoistedArrays(arrays, _fingerprint(arrays)), lambda arrays: eqx.combine(arrays, static)
    if hasattr(score_fn, "energy"):
        return HoistedArrays((), _fingerprint(())), lambda arrays: score_fn
    converted = eqx.filter_closure_convert(score_fn, x, t, *args, **kwargs)
    arrays, static = eqx.partition(converted, _is_array)
    return HoistedArrays(arrays, _fingerprint(arrays)), lambda arrays: eqx.combine(arrays, static)
