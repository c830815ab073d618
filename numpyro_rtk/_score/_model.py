"""What a score callable offers, resolved once: its score, and its energy where it has one."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_rtk._custom_types import Event, Scalar


class ScoreModel(eqx.Module):
    """A score callable with its further arguments bound; itself a score callable.

    Every room below works on `(x, t)` alone and asks here, and nowhere else, whether there is an energy, and
    which condition an event has. A model with conditions is a family: `member` gives the score of one event.
    """

    score: Callable[..., Event]
    """`score(x, t)` of one event, or `score(x, t, condition)` of a family."""
    energy_and_score: Callable[..., tuple[Scalar, Event]] | None = None
    """Both of one event, in one evaluation where the callable offers that; `None` if there is no energy."""
    conditions: Array | None = None
    """Conditions of the members of a family, shape `(members, *condition)`."""

    @property
    def has_energy(self) -> bool:
        """Whether `-log p_t` is known up to a constant."""
        return self.energy_and_score is not None

    def energy(self, x: Event, t: Scalar, *condition: Array) -> Scalar:
        """`-log p_t(x)` up to a constant in `x`, scalar, where there is an energy."""
        assert self.energy_and_score is not None
        return self.energy_and_score(x, t, *condition)[0]

    def __call__(self, x: Event, t: Scalar, *condition: Array) -> Event:
        """Score of one event at scalar time `t`, shape of `x`."""
        return self.score(x, t, *condition)

    def given(self, condition: Array) -> "ScoreModel":
        """The score of one condition."""
        both = self.energy_and_score
        return ScoreModel(
            lambda x, t: self.score(x, t, condition),
            None if both is None else lambda x, t: both(x, t, condition),
        )

    def member(self, index: Any) -> "ScoreModel":
        """The score of an event, by its number; events beyond the last member begin again at the first."""
        if self.conditions is None:
            return self
        return self.given(self.conditions[index % self.num_members])

    def thinned(self, num_members: int) -> "ScoreModel":
        """The same with that many members at most, spread evenly, for measurements of all together."""
        if self.conditions is None or self.num_members <= num_members:
            return self
        return self.of(self.conditions[jnp.arange(num_members) * self.num_members // num_members])

    def each(self, x: Array, t: Scalar, members: Array | None = None) -> Array:
        """Scores of many events at one time, shape `(events, *event)`; of the members in turn unless their
        numbers are given, shape `(events,)`.
        """
        members = jnp.arange(x.shape[0]) if members is None else members
        return jax.vmap(lambda i, x: self.member(i)(x, t))(members, x)

    def each_with_energy(self, x: Array, t: Scalar) -> tuple[Array, Array]:
        """Energies of many events, shape `(events,)`, and their scores, where there is an energy."""

        def one(index: Array, x: Event) -> tuple[Scalar, Event]:
            both = self.member(index).energy_and_score
            assert both is not None
            return both(x, t)

        return jax.vmap(one)(jnp.arange(x.shape[0]), x)

    @property
    def num_members(self) -> int:
        """Members of a family; 1 of a score without conditions."""
        return 1 if self.conditions is None else self.conditions.shape[0]

    @property
    def family(self) -> "ScoreModel":
        """The same without its conditions, to be called with one."""
        return self.of(None)

    def of(self, conditions: Array | None) -> "ScoreModel":
        """The same with other conditions."""
        return ScoreModel(self.score, self.energy_and_score, conditions)


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
    methods: list[Callable[..., Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    conditions: Array | None = None,
) -> ScoreModel:
    """The model of such methods with further arguments bound; those of a family come after its condition."""
    bound = [
        lambda x, t, *condition, method=method: method(x, t, *condition, *args, **kwargs)
        for method in methods
    ]
    return ScoreModel(*bound, conditions=conditions)


def resolve_score(
    score_fn: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    conditions: Array | None = None,
) -> ScoreModel:
    """The model of a score callable, called as `score_fn(x, t, *args, **kwargs)`; idempotent.

    Args:
        score_fn: A score callable, perhaps with methods `energy` and `energy_and_score`.
        args: Further arguments.
        kwargs: Further keyword arguments.
        conditions: Of a family `score_fn(x, t, condition)`, shape `(members, *condition)`.
    """
    if isinstance(score_fn, ScoreModel):
        return score_fn if conditions is None else score_fn.of(conditions)
    return bind_score(score_methods(score_fn), args, kwargs or {}, conditions)
