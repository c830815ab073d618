"""What a result depends on, found by tracing: the names of the inputs that can reach it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


Names = frozenset[str]
NONE: Names = frozenset()


def dependence(
    function: Callable[[dict[str, Any]], dict[str, Any]], inputs: dict[str, Any]
) -> dict[str, Names]:
    """Names of the inputs that each result of a function can depend on, whatever their types.

    Never too few: where a primitive is not known, all its results depend on all that it takes. A product with
    0 counts as a dependence, a shape does not.

    Args:
        function: Takes a dict of arrays and returns a dict of PyTrees of arrays.
        inputs: Arrays, or their shapes and dtypes, by name.
    """
    closed, results = jax.make_jaxpr(function, return_shape=True)(inputs)
    if holds_refs(closed.jaxpr):
        return dict.fromkeys(results, frozenset(inputs))
    # Both in the order of the keys, as PyTrees have them.
    given = [frozenset({name}) for name in sorted(inputs) for _ in jax.tree.leaves(inputs[name])]
    reached = iter(_through(closed.jaxpr, given))
    return {
        name: NONE.union(*(next(reached) for _ in jax.tree.leaves(results[name]))) for name in sorted(results)
    }


def holds_refs(jaxpr: Jaxpr) -> bool:
    """Whether something is written in place, at any depth: what it holds is then not known."""
    for equation in jaxpr.eqns:
        if any("Ref" in type(atom.aval).__name__ for atom in (*equation.invars, *equation.outvars)):
            return True
        for leaf in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
            inner = leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf
            if isinstance(inner, Jaxpr) and holds_refs(inner):
                return True
    return False


def _through(jaxpr: Jaxpr, given: list[Names]) -> list[Names]:
    """Names that reach the results of a jaxpr."""
    known = dict(zip(jaxpr.invars, given, strict=True))

    def read(atom: Any) -> Names:
        return NONE if isinstance(atom, Literal) else known.get(atom, NONE)

    for equation in jaxpr.eqns:
        taken = [read(atom) for atom in equation.invars]
        known.update(zip(equation.outvars, _through_equation(equation, taken), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _through_equation(equation: Any, taken: list[Names]) -> list[Names]:
    everything, params = NONE.union(*taken), equation.params
    if not everything:
        return [everything] * len(equation.outvars)
    name, num_results = equation.primitive.name, len(equation.outvars)
    if name == "scan":
        num_consts, num_carry, num_slices = scan_sizes(params, len(taken))
        if num_consts + num_carry + num_slices == len(taken):
            return _through_loop(params["jaxpr"].jaxpr, taken, num_consts, num_carry)
        return [everything] * num_results
    if name == "while":
        start = params["cond_nconsts"]
        after = start + params["body_nconsts"]
        carry = _through_loop(params["body_jaxpr"].jaxpr, taken[start:], after - start, len(taken) - after)
        # How often it runs decides over all of the carry.
        (runs,) = _through(params["cond_jaxpr"].jaxpr, taken[:start] + carry)
        return [runs.union(*carry)] * num_results if runs else carry
    if name == "cond":
        branches = [_through(branch.jaxpr, taken[1:]) for branch in params["branches"]]
        return [taken[0].union(*results) for results in zip(*branches, strict=True)]
    inside = [params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params]
    if len(inside) == 1 and isinstance(inside[0], ClosedJaxpr | Jaxpr):
        jaxpr = inside[0].jaxpr if isinstance(inside[0], ClosedJaxpr) else inside[0]
        if len(jaxpr.invars) == len(taken) and len(jaxpr.outvars) == num_results:
            return _through(jaxpr, taken)
    return [everything] * num_results


def scan_sizes(params: dict[str, Any], num_taken: int) -> tuple[int, int, int]:
    """Numbers of constants, of values carried and of values sliced, as older and newer JAX write them."""
    if "num_consts" in params:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        return num_consts, num_carry, num_taken - num_consts - num_carry
    consts, carry, slices = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry)), len(list(slices))


def _through_loop(body: Jaxpr, taken: list[Names], num_consts: int, num_carry: int) -> list[Names]:
    """Names that reach the carry and the stacked results once another turn adds none."""
    consts, carry, slices = (
        taken[:num_consts],
        taken[num_consts:][:num_carry],
        taken[num_consts + num_carry :],
    )
    while True:
        results = _through(body, consts + carry + slices)
        wider = [old | new for old, new in zip(carry, results[:num_carry], strict=True)]
        if wider == carry:
            return carry + results[num_carry:]
        carry = wider
