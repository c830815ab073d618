"""Where the user's own line is, so that what is said points to it."""

import sys
from typing import Any


_LIBRARIES = ("numpyro", "numpyro_rtk", "jax", "equinox", "contextlib", "functools")


def user_stack_level() -> int:
    """Stack level of the first frame outside NumPyro, JAX and this package, for `warnings.warn`."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


def user_line() -> tuple[str, int]:
    """File and line of that frame."""
    frame = sys._getframe(user_stack_level() - 1)
    return frame.f_code.co_filename, frame.f_lineno


def arviz_asks() -> bool:
    """Whether the caller of the caller is ArviZ, which seeds the model of a kernel to read its plates and
    observations, and would draw from every prior for that.
    """
    return sys._getframe(2).f_globals.get("__name__", "").split(".")[0] in ("arviz", "arviz_base")


def name_of(function: Any) -> str:
    """What a user calls a callable: its own name, or that of its class."""
    return getattr(function, "__name__", None) or type(function).__name__
