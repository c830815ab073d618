"""What a check finds, and how it is said: a wrong sign is an error, all else a warning, each once."""

import warnings
import weakref
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from numpyro_rtk._user import user_stack_level


Kind = Literal["sign", "failed", "score", "round_trip", "line_integral", "path"]


class Finding(NamedTuple):
    """Something that is wrong with a score, a grid or a density."""

    kind: Kind
    """What is wrong; `"sign"` is an error."""
    index: int
    """Index of the level or segment, from noise to data, or number of nodes."""
    number: float
    """The number that was measured."""
    message: str
    """In words: where, the number, what to write instead."""


_SAID: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def say(findings: Iterable[Finding], score_fn: Any) -> None:
    """Raise or warn, at the user's line; the same message about the same score object only once.

    Raises:
        ValueError: for a score of the wrong sign.
    """
    for finding in findings:
        if finding.kind == "sign":
            raise ValueError(finding.message)
        try:
            said = _SAID.setdefault(score_fn, set())
        except TypeError:
            # A callable that cannot be referred to weakly, or hashed: `warnings` has its own memory.
            said = set()
        if finding.message not in said:
            said.add(finding.message)
            warnings.warn(finding.message, UserWarning, stacklevel=user_stack_level())
