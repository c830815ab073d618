"""What a score callable offers, resolved once: its score, and its energy where it has one."""

from collections.abc import Callable
from typing import Any

import equinox as eqx

from numpyro_rtk._custom_types import Event, Scalar


class ScoreModel(eqx.Module):
    """A score callable with its further arguments bound; itself a score callable.

    Every room below works on `(x, t)` alone and asks here, and nowhere else, whether there is an energy.
    """

    score: Callable[[Event, Scalar], Event]
    """`score(x, t)` of one event."""
    energy_and_score: Callable[[Event, Scalar], tuple[Scalar, Event]] | None = None
    """Both of one event, in one evaluation where the callable offers that; `None` if there is no energy."""

    @property
    def has_energy(self) -> bool:
        """Whether `-log p_t` is known up to a constant."""
        return self.energy_and_score is not None

    def energy(self, x: Event, t: Scalar) -> Scalar:
        """`-log p_t(x)` up to a constant in `x`, scalar, where there is an energy."""
        assert self.energy_and_score is not None
        return self.energy_and_score(x, t)[0]

    def __call__(self, x: Event, t: Scalar) -> Event:
        """Score of one event at scalar time `t`, shape of `x`."""
        return self.score(x, t)


def has_energy(score_fn: Any) -> bool:
    """Whether a score callable knows its energy."""
    return (
        score_fn.has_energy
        if isinstance(score_fn, ScoreModel)
        else callable(getattr(score_fn, "energy", None))
    )


def score_methods(score_fn: Any) -> list[Callable[..., Any]]:
    """`[score]`, or `[score, energy_and_score]` of a callable with energies; further arguments not bound."""
    if not has_energy(score_fn):
        return [score_fn]
    both = score_fn.energy_and_score if hasattr(score_fn, "energy_and_score") else None

    def energy_and_score(x: Event, t: Scalar, *args: Any, **kwargs: Any) -> tuple[Scalar, Event]:
        return score_fn.energy(x, t, *args, **kwargs), score_fn(x, t, *args, **kwargs)

    return [score_fn, energy_and_score if both is None else both]


def bind_score(
    methods: list[Callable[..., Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ScoreModel:
    """The model of such methods with further arguments bound."""
    return ScoreModel(*(lambda x, t, method=method: method(x, t, *args, **kwargs) for method in methods))


def resolve_score(
    score_fn: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> ScoreModel:
    """The model of a score callable, called as `score_fn(x, t, *args, **kwargs)`; idempotent.

    Args:
        score_fn: A score callable, perhaps with methods `energy` and `energy_and_score`.
        args: Further arguments.
        kwargs: Further keyword arguments.
    """
    if isinstance(score_fn, ScoreModel):
        return score_fn
    return bind_score(score_methods(score_fn), args, kwargs or {})
