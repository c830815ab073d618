"""Keep a network's arrays out of the compiled program.

JAX writes arrays that a traced function closes over into the program as constants: 40 MB of them for
10 million float32 parameters, copied at every stage of compilation. `MCMC` traces `kernel.sample`, so a
network held by the kernel would be such a constant. Here its arrays are separated from its structure; the
kernel puts them into its state, which is an argument of the compiled program.
"""

import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun, Literal

from numpyro_rtk._score._model import bind_score, score_methods, ScoreModel
from numpyro_rtk._user import name_of, user_stack_level


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


TRACED = "traced"
"""In a fingerprint where an array is a tracer: a score that depends on arguments of a compiled program."""


class HoistedArrays(eqx.Module):
    """Arrays of a score callable, with a fingerprint that says which callable they belong to."""

    arrays: Any
    fingerprint: str = eqx.field(static=True)

    def current(self, own: "HoistedArrays", what: str) -> "HoistedArrays":
        """The arrays to sample with: these, from a state, unless the score depends on traced arguments.

        Args:
            own: The arrays of the kernel that samples now.
            what: What else may differ between the kernel of the state and this one, for the message.

        Raises:
            ValueError: if the state belongs to another kernel.
        """
        if TRACED in own.fingerprint:
            return own
        if TRACED not in self.fingerprint and self.fingerprint != own.fingerprint:
            raise ValueError(
                f"The state comes from a kernel with other network weights or {what} than this one, and "
                f"draws "
                "would mix the two. Start a new `MCMC` (or call `warmup` again) instead of re-using "
                "`post_warmup_state`."
            )
        return self


def fingerprint_of(arrays: Any) -> str:
    """What tells these arrays from others: a digest of their values, or `TRACED`."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, Tracer):
            return TRACED
        values = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, dtypes.prng_key) else leaf
        values = np.asarray(values)
        digest.update(str((values.shape, values.dtype)).encode())
        digest.update(np.ascontiguousarray(values).view(np.uint8).data if values.size else b"")
    return digest.hexdigest()


def _without_jit(leaf: Any) -> Any:
    # What a jitted function closes over is hidden in its own program.
    return getattr(leaf, "__wrapped__", leaf) if isinstance(leaf, jax.stages.Wrapped) else leaf


class _Converted(eqx.Module):
    """A traced function whose arrays are leaves; called with the arguments it was traced with, or their
    like.
    """

    arrays: list[Any]
    jaxpr: Any = eqx.field(static=True)
    out_structure: Any = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = [leaf for leaf in jax.tree.leaves((args, kwargs)) if _is_array(leaf)]
        closed = ClosedJaxpr(self.jaxpr, self.arrays)
        return jax.tree.unflatten(self.out_structure, jaxpr_as_fun(closed)(*leaves))


def _inner(jaxpr: Any) -> list[ClosedJaxpr]:
    """Programs inside a program: of jitted functions, loops and branches."""
    leaves = [
        leaf for eqn in jaxpr.eqns for leaf in jax.tree.leaves(list(eqn.params.values()), is_leaf=_closed)
    ]
    return [leaf for leaf in leaves if _closed(leaf)]


def _closed(leaf: Any) -> bool:
    return isinstance(leaf, ClosedJaxpr)


def _hidden_bytes(jaxpr: Any) -> int:
    """Size of the arrays that programs inside a program hold."""
    return sum(
        sum(np.size(const) * const.dtype.itemsize for const in inner.consts) + _hidden_bytes(inner.jaxpr)
        for inner in _inner(jaxpr)
    )


def _written_out(closed: ClosedJaxpr, leaves: Any) -> list[Any]:
    """Evaluate a program; those of jitted functions that hold arrays are evaluated in it, not called."""
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *leaves], strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for eqn in jaxpr.eqns:
        inputs, inner = [read(variable) for variable in eqn.invars], eqn.params.get("jaxpr")
        if eqn.primitive.name in ("jit", "pjit") and (inner.consts or _hidden_bytes(inner.jaxpr)):
            outputs = _written_out(inner, inputs)
        else:
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


MIN_HIDDEN_BYTES = 2**20
"""Arrays smaller than this may stay constants of the program."""


def _say_hidden(score_fn: Any, num_bytes: int) -> None:
    if num_bytes >= MIN_HIDDEN_BYTES:
        warnings.warn(
            f"Arrays of {num_bytes / 2**20:.1f} MiB stay constants of the compiled program, which makes "
            f"compilation slow: in `score_fn` ({name_of(score_fn)}) a function under `jax.jit` uses them "
            "inside a loop or branch. Leave `jax.jit` out there; what samples is compiled anyway.",
            UserWarning,
            stacklevel=user_stack_level(),
        )


def _convert(
    method: Callable[..., Any], x: Any, t: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    # Not `eqx.filter_closure_convert`: it leaves functions alone that use global arrays, and under `pmap` it
    # takes an argument on a device for another one than its shape and dtype say.
    dynamic, static = eqx.partition((args, kwargs), _is_array)

    def function(x: Any, t: Any, dynamic: Any) -> Any:
        args, kwargs = eqx.combine(dynamic, static)
        return method(x, t, *args, **kwargs)

    closed, out = jax.make_jaxpr(function, return_shape=True)(x, t, dynamic)
    if _hidden_bytes(closed.jaxpr):
        inputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
        closed = jax.make_jaxpr(lambda *leaves: _written_out(closed, leaves))(*inputs)
        _say_hidden(method, _hidden_bytes(closed.jaxpr))
    return _Converted(list(closed.consts), closed.jaxpr, jax.tree.structure(out))


def hoist(
    score_fn: Callable[..., Any],
    x: Any,
    t: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    conditions: Any = None,
) -> tuple[HoistedArrays, Callable[[Any], ScoreModel]]:
    """Separate the arrays of a score callable from the rest.

    They are found by tracing it once, so that it does not matter whether a module holds them, a function
    closes over them or a global name refers to them, and in functions that `score_fn` calls through
    `jax.jit`. Only where it does so inside a loop or a branch do they stay constants, which a warning says.

    Args:
        score_fn: `score_fn(x, t, *args, **kwargs)`, perhaps with energies.
        x: Shape and dtype of one event.
        t: Shape and dtype of the time.
        args: Further positional arguments; they are not hoisted.
        kwargs: Further keyword arguments.
        conditions: Of a family `score_fn(x, t, condition)`, shape `(members, *condition)`; not hoisted: they
            belong to the arguments of a model.

    Returns:
        The arrays, each once, and a function that makes the model, arguments bound, of arrays like them.
    """
    kwargs = {} if kwargs is None else kwargs
    methods = score_methods(jax.tree.map(_without_jit, score_fn))
    one = () if conditions is None else (conditions[0],)
    leaves, structure = jax.tree.flatten(
        [_convert(method, x, t, (*one, *args), kwargs) for method in methods]
    )
    keys = [
        (fingerprint_of(leaf), id(leaf) if isinstance(leaf, Tracer) else 0) if _is_array(leaf) else None
        for leaf in leaves
    ]
    unique = {key: leaf for key, leaf in zip(keys, leaves, strict=True) if key is not None}
    position = {key: i for i, key in enumerate(unique)}
    found = list(unique.values())

    def rebuild(arrays: list[Any]) -> ScoreModel:
        filled = [
            leaf if key is None else arrays[position[key]] for key, leaf in zip(keys, leaves, strict=True)
        ]
        return bind_score(jax.tree.unflatten(structure, filled), args, kwargs, conditions)

    return HoistedArrays(found, fingerprint_of(found)), rebuild
