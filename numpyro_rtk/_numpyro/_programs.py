"""Compiled programs of `init`, kept with a kernel: what was compiled once is not compiled again."""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np


MAX_PROGRAMS = 32
"""Programs that a process keeps; those that were not used for longest are compiled again when asked for.
NumPyro keeps every `MCMC` that ran, with its kernel, and a program holds hundreds of memory mappings, of
which Linux allows a process 65,530: a long notebook would end in LLVM's "cannot allocate memory".
"""

_RECENT: OrderedDict[Any, Any] = OrderedDict()


class Programs:
    """A cache of compiled functions, keyed by what they depend on besides arrays.

    It changes how long a call takes and nothing else, and is left behind when a kernel is pickled.
    """

    def __init__(self) -> None:
        self._functions: dict[Any, Callable[..., Any] | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_functions": {}}

    def __call__(self, name: str, owner: Any, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, compiled; arrays among the arguments are arguments of the program.

        A function that needs their values, as a model may that turns an argument into a NumPy array, is
        compiled for these values instead, once for each set of them.

        Args:
            name: With `owner`, and the structure and other leaves of `args`, what the program is known by.
            owner: The model or score that the function closes over, compared by identity.
            function: A pure function; it must do the same whenever `name`, `owner` and its arguments are the
                same.
            *args: Any PyTrees.
        """
        dynamic, static = eqx.partition(args, _is_array)
        leaves, structure = jax.tree.flatten(static)
        known = (name, _Identity(owner), structure, tuple(_hashable(leaf) for leaf in leaves))
        self._keep(known)
        if known not in self._functions:
            self._functions[known] = jax.jit(lambda dynamic: function(*eqx.combine(dynamic, static)))
        general = self._functions[known]
        if general is not None:
            try:
                return general(dynamic)
            except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
                self._functions[known] = None
        return jax.jit(lambda: function(*args))()

    def _keep(self, known: Any) -> None:
        """Make this program the one used last, and forget the one that was not used for longest."""
        _RECENT[id(self), known] = weakref.ref(self)
        _RECENT.move_to_end((id(self), known))
        while len(_RECENT) > MAX_PROGRAMS:
            (_, oldest), owner = _RECENT.popitem(last=False)
            if (programs := owner()) is not None:
                programs._functions.pop(oldest, None)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _hashable(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return _Identity(leaf)
    return leaf


class _Identity:
    """Something compared by identity, and kept alive, so that its identity stays its own."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
