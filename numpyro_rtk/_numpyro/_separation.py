"""Which parts of a vector every number of a result depends on, found by tracing.

Finer than `_dependence`, which asks for whole arrays: here each entry of an array has the set of parts that
can reach it. A model separates over the elements of a plate where no entry of its log probability has two.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from numpyro_rtk._numpyro._dependence import holds_refs, scan_sizes


EMPTY = 0
"""The empty set."""

ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp "
    "convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "igamma igamma_grad_a igammac integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg "
    "nextafter not or polygamma pow real reduce_precision regularized_incomplete_beta rem round rsqrt "
    "select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta".split()
)
"""Primitives of which an entry of the result depends on the entries at its own place."""

MOVES = frozenset(
    "broadcast_in_dim concatenate expand_dims pad reshape rev slice squeeze stack transpose".split()
)
"""Primitives that put entries elsewhere."""

LOOKUPS = {"gather": 1, "dynamic_slice": 1}
"""Primitives that do so where their indices, from this operand on, are known."""

REDUCTIONS = frozenset(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor".split()
)
"""Primitives that reduce over `axes`."""

CUMULATIVE = frozenset("cumlogsumexp cummax cummin cumprod cumsum".split())
"""Primitives that reduce along an `axis`, and keep it."""


class _Traced(NamedTuple):
    """What is known of a value."""

    sets: np.ndarray
    """Number of the set of each entry."""
    value: Callable[[], Any] | None
    """The value itself, where it does not depend on the inputs."""


class _Sets:
    """Sets of parts by number, so that arrays of them are arrays of integers."""

    def __init__(self) -> None:
        self.members: list[frozenset[int]] = [frozenset()]
        self._numbers: dict[frozenset[int], int] = {frozenset(): EMPTY}

    def number(self, members: frozenset[int]) -> int:
        """Number of a set."""
        if members not in self._numbers:
            self._numbers[members] = len(self.members)
            self.members.append(members)
        return self._numbers[members]

    def union(self, *arrays: np.ndarray) -> np.ndarray:
        """Union entry by entry; shapes broadcast."""
        result, *others = arrays
        for other in others:
            result, other = np.broadcast_arrays(result, other)
            if not other.any() or np.array_equal(result, other):
                continue
            if not result.any():
                result = other
                continue
            pairs = np.stack([result.ravel(), other.ravel()], axis=1)
            found, inverse = np.unique(pairs, axis=0, return_inverse=True)
            numbers = [self.number(self.members[a] | self.members[b]) for a, b in found]
            result = np.asarray(numbers, np.int32)[inverse.reshape(-1)].reshape(result.shape)
        return result

    def over(self, sets: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Union over some axes, which are dropped."""
        axes = [axis % sets.ndim for axis in axes]
        kept = [axis for axis in range(sets.ndim) if axis not in axes]
        flat = sets.transpose(*kept, *axes).reshape(*(sets.shape[axis] for axis in kept), -1)
        if not flat.any() or not flat.shape[-1]:
            return np.zeros(flat.shape[:-1], np.int32)
        while flat.shape[-1] > 1:
            half = flat.shape[-1] // 2
            joined = self.union(flat[..., :half], flat[..., half : 2 * half])
            flat = np.concatenate([joined, flat[..., 2 * half :]], axis=-1)
        return flat[..., 0]


def separation(
    function: Callable[..., dict[str, Any]], parts: dict[str, np.ndarray], others: Any
) -> tuple[dict[str, np.ndarray], list[frozenset[int]]]:
    """Parts of the inputs that each entry of a result can depend on.

    Never too few: where a primitive is not known, or its indices are not, all entries of its results depend
    on all that it takes. A product with 0 counts as a dependence.

    Args:
        function: Takes a dict of arrays, and `others`, and returns a dict of arrays.
        parts: Number of the part of each entry, for each array of the first.
        others: PyTree of arrays, or their shapes and dtypes; nothing is taken from their values.

    Returns:
        The number of the set of each entry of each result, and the sets.
    """
    dtype = jnp.result_type(float)
    shapes = {name: jax.ShapeDtypeStruct(owner.shape, dtype) for name, owner in parts.items()}
    closed, results = jax.make_jaxpr(function, return_shape=True)(shapes, others)
    sets = _Sets()
    given = []
    # Both in the order of the keys, as PyTrees have them.
    for name in sorted(parts):
        labels, inverse = np.unique(parts[name], return_inverse=True)
        numbers = np.asarray([sets.number(frozenset({int(label)})) for label in labels], np.int32)
        given.append(_Traced(numbers[inverse.reshape(-1)].reshape(parts[name].shape), None))
    given += [_Traced(np.zeros(jnp.shape(leaf), np.int32), None) for leaf in jax.tree.leaves(others)]
    if holds_refs(closed.jaxpr):
        return {name: _all(sets, given, one.shape) for name, one in results.items()}, sets.members
    # Operations on constants are made now, even inside another trace.
    with jax.ensure_compile_time_eval():
        found = _through(sets, closed.jaxpr, [_constant(value) for value in closed.consts], given)
    return {name: one.sets for name, one in zip(sorted(results), found, strict=True)}, sets.members


def _constant(value: Any) -> _Traced:
    known = None if isinstance(value, Tracer) else lambda: value
    return _Traced(np.zeros(jnp.shape(value), np.int32), known)


def _through(sets: _Sets, jaxpr: Jaxpr, consts: list[_Traced], given: list[_Traced]) -> list[_Traced]:
    """What is known of the results of a jaxpr."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *given], strict=True))

    def read(atom: Any) -> _Traced:
        return _constant(atom.val) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        taken = [read(atom) for atom in equation.invars]
        known.update(zip(equation.outvars, _through_equation(sets, equation, taken), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _through_equation(sets: _Sets, equation: Any, taken: list[_Traced]) -> list[_Traced]:
    inside = _inside(equation)
    if inside is not None:
        return _through(sets, inside.jaxpr, [_constant(value) for value in inside.consts], taken)
    shapes = _shapes(equation.outvars)
    if not any(one.sets.any() for one in taken):
        return _of_constants(equation, taken, shapes)
    results = _rule(sets, equation, taken, shapes)
    if results is None:
        results = [_all(sets, taken, shape) for shape in shapes]
    return [_Traced(result, None) for result in results]


def _all(sets: _Sets, taken: list[_Traced], shape: tuple[int, ...]) -> np.ndarray:
    """All that an equation takes, for every entry of a result."""
    everything = sets.union(*(sets.over(one.sets, range(one.sets.ndim)) for one in taken))
    return np.broadcast_to(everything, shape)


def _inside(equation: Any) -> ClosedJaxpr | None:
    """The jaxpr that an equation does nothing but call."""
    if equation.primitive.name in ("scan", "while", "cond"):
        return None
    params = equation.params
    inside = [params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params]
    if len(inside) != 1 or not isinstance(inside[0], ClosedJaxpr | Jaxpr):
        return None
    closed = inside[0] if isinstance(inside[0], ClosedJaxpr) else ClosedJaxpr(inside[0], [])
    jaxpr = closed.jaxpr
    # Some call it on a part of each array, as on several devices.
    same = _shapes([*jaxpr.invars, *jaxpr.outvars]) == _shapes([*equation.invars, *equation.outvars])
    return closed if same and len(closed.consts) == len(jaxpr.constvars) else None


def _shapes(atoms: Sequence[Any]) -> list[tuple[int, ...]]:
    return [atom.aval.shape for atom in atoms]


def _through_scan(sets: _Sets, equation: Any, taken: list[_Traced]) -> list[np.ndarray] | None:
    """Sets of the results of a `scan`: every turn takes the slices of all turns."""
    num_consts, num_carry, num_slices = scan_sizes(equation.params, len(taken))
    if num_consts + num_carry + num_slices != len(taken):
        return None
    body = equation.params["jaxpr"]
    # What a turn takes is not one value: nothing is known of it.
    unknown = [_Traced(one.sets, None) for one in taken]
    consts, carry = unknown[:num_consts], unknown[num_consts:][:num_carry]
    slices = [_Traced(sets.over(one.sets, [0]), None) for one in unknown[num_consts + num_carry :]]
    while True:
        results = _through(
            sets, body.jaxpr, [_constant(value) for value in body.consts], consts + carry + slices
        )
        wider = [
            _Traced(sets.union(old.sets, new.sets), None)
            for old, new in zip(carry, results[:num_carry], strict=True)
        ]
        if all(np.array_equal(old.sets, new.sets) for old, new in zip(carry, wider, strict=True)):
            break
        carry = wider
    stacked = [one.sets[None] for one in results[num_carry:]]
    shapes = _shapes(equation.outvars)
    found = [one.sets for one in carry] + stacked
    return [np.broadcast_to(one, shape) for one, shape in zip(found, shapes, strict=True)]


def _of_constants(equation: Any, taken: list[_Traced], shapes: list[tuple[int, ...]]) -> list[_Traced]:
    """Results of an equation that takes nothing of the inputs; evaluated where somebody asks."""
    values = [one.value for one in taken]
    cache: list[Any] = []

    def evaluate() -> Any:
        if not cache:
            result = equation.primitive.bind(*(value() for value in values if value), **equation.params)
            cache.extend(result if equation.primitive.multiple_results else [result])
        return cache

    known = all(value is not None for value in values)
    return [
        _Traced(np.zeros(shape, np.int32), (lambda i=i: evaluate()[i]) if known else None)
        for i, shape in enumerate(shapes)
    ]


def _rule(
    sets: _Sets, equation: Any, taken: list[_Traced], shapes: list[tuple[int, ...]]
) -> list[np.ndarray] | None:
    """Sets of the results of an equation, or `None` where its primitive is not known."""
    name, params = equation.primitive.name, equation.params
    first = taken[0].sets
    if name in ELEMENTWISE and all(_fits(one.sets.shape, shapes[0]) for one in taken):
        return [np.broadcast_to(sets.union(*(one.sets for one in taken)), shapes[0])]
    if name == "scan":
        return _through_scan(sets, equation, taken)
    if name in MOVES or name in LOOKUPS:
        operands = taken[: LOOKUPS.get(name, len(taken))]
        indices = [one.value for one in taken[len(operands) :]]
        if any(value is None for value in indices):
            return None
        if "fill_value" in params:
            params = params | {"fill_value": EMPTY}
        arrays = [jnp.asarray(one.sets, jnp.int32) for one in operands]
        moved = equation.primitive.bind(
            *arrays, *(value() for value in indices if value is not None), **params
        )
        return [np.maximum(np.asarray(moved), EMPTY)]
    if name in REDUCTIONS:
        return [sets.over(first, params["axes"]).reshape(shapes[0])]
    if name in CUMULATIVE:
        axis = params["axis"]
        return [np.broadcast_to(np.expand_dims(sets.over(first, [axis]), axis), shapes[0])]
    if name in ("sort", "fft"):
        axes = [params["dimension"]] if name == "sort" else range(-len(params["fft_lengths"]), 0)
        whole = sets.union(*(_spread_over(sets, one.sets, axes) for one in taken))
        return [_cut(whole, shape) for shape in shapes]
    if name == "conv_general_dilated":
        batch, kernel = params["dimension_numbers"].lhs_spec[0], taken[1].sets
        if params["batch_group_count"] == 1:
            image = sets.over(first, [axis for axis in range(first.ndim) if axis != batch])
            whole = sets.union(image, sets.over(kernel, range(kernel.ndim)))
            place = [1] * first.ndim
            place[params["dimension_numbers"].out_spec[0]] = -1
            return [np.broadcast_to(whole.reshape(place), shapes[0])]
    if name == "dot_general":
        return [_contraction(sets, params["dimension_numbers"], first, taken[1].sets)]
    if name == "cholesky":
        return [_spread_over(sets, first, [-2, -1])]
    if name == "triangular_solve":
        # Each right-hand side by itself.
        along = -2 if params["left_side"] else -1
        matrix, vectors = _spread_over(sets, first, [-2, -1]), _spread_over(sets, taken[1].sets, [along])
        return [sets.union(np.broadcast_to(matrix[..., :1, :1], vectors.shape), vectors)]
    return None


def _fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a shape is that of a scalar, or broadcasts to another of its rank."""
    same_rank = len(shape) == len(whole)
    return not shape or (same_rank and all(a in (1, b) for a, b in zip(shape, whole, strict=True)))


def _spread_over(sets: _Sets, array: np.ndarray, axes: Any) -> np.ndarray:
    """The union over some axes, at every place along them."""
    axes = [axis % array.ndim for axis in axes]
    return np.broadcast_to(np.expand_dims(sets.over(array, axes), tuple(sorted(axes))), array.shape)


def _cut(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The same along all axes but those whose length is another, where it has one value only."""
    for axis, (mine, wanted) in enumerate(zip(array.shape, shape, strict=True)):
        if mine != wanted:
            array = array.take([0], axis)
    return np.broadcast_to(array, shape)


def _contraction(sets: _Sets, dimensions: Any, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sets of a product of tensors: each entry takes a row of one and a column of the other."""
    (left_sum, right_sum), (left_batch, right_batch) = dimensions
    rows, num_left = _reduced(sets, left, left_sum, left_batch)
    columns, num_right = _reduced(sets, right, right_sum, right_batch)
    num_batch = len(left_batch)
    rows = rows.reshape((*rows.shape, *(1,) * num_right))
    batch, free = columns.shape[:num_batch], columns.shape[num_batch:]
    columns = columns.reshape((*batch, *(1,) * num_left, *free))
    return sets.union(rows, columns)


def _reduced(sets: _Sets, array: np.ndarray, summed: Any, batch: Any) -> tuple[np.ndarray, int]:
    """Union over the axes that are summed, batch axes first; and the number of the others."""
    free = [axis for axis in range(array.ndim) if axis not in (*summed, *batch)]
    ordered = array.transpose(*batch, *free, *summed)
    last = range(len(batch) + len(free), array.ndim)
    return (sets.over(ordered, last) if len(last) else ordered), len(free)
