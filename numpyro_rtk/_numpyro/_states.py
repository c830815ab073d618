"""What the states of all kernels have in common."""

from typing import Any, TypeVar


State = TypeVar("State", bound=type)


def lists_fields(state: State) -> State:
    """Decorates a `NamedTuple`: a field that it does not have is answered by a list of those it has.

    `MCMC` looks names of `extra_fields` up as attributes and then as keys.
    """
    by_position: Any = state.__getitem__  # pyright: ignore[reportAttributeAccessIssue]
    derived = [name for name, value in vars(state).items() if isinstance(value, property)]

    def lookup(self: Any, key: Any) -> Any:
        if isinstance(key, str):
            known: Any = state
            raise ValueError(
                f"`{state.__name__}` has no field {key!r}. Names that `extra_fields` may have are "
                f"{', '.join([*known._fields, *derived])}, and what is inside of these, as in "
                "'adapt_state.step_size'."
            )
        return by_position(self, key)

    setattr(state, "__getitem__", lookup)  # noqa: B010 - a type checker does not expect this of a class
    return state
