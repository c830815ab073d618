"""How a model falls into elements: events of its diffusion sites that share no observation."""

import math

import jax
import numpy as np

from numpyro_rtk._moves._elements import Elements, Groups, ONE, Structure


@jax.tree_util.register_static
class Partition(Structure):
    """The elements of a model, and the element of each log probability in it.

    Args:
        elements: Of the flat vector and of Gaussian observations.
        log_probs: Element of each log probability of each observation.
    """

    def __init__(self, elements: Elements, log_probs: dict[str, Groups]) -> None:
        self.elements, self.log_probs = elements, log_probs
        self.key = (elements.key, *((name, groups.key) for name, groups in log_probs.items()))


WHOLE = Partition(ONE, {})
"""All is one element."""


def number_events(batch_shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A number for each event of each site, shape `batch_shape`, that no other event has."""
    numbers, start = {}, 0
    for name, shape in batch_shapes.items():
        numbers[name] = start + np.arange(math.prod(shape)).reshape(shape)
        start += math.prod(shape)
    return numbers


def partition_of(
    events: dict[str, np.ndarray],
    sizes: dict[str, int],
    reached: dict[str, tuple[np.ndarray, list[frozenset[int]]]],
    gaussian: dict[str, tuple[int, ...]],
) -> Partition:
    """The finest partition in which no log probability depends on events of two elements.

    Args:
        events: Number of each event, by site.
        sizes: Coordinates of an event, by site.
        reached: For each observation the number of the set of events that each of its log probabilities
            depends on, and the sets.
        gaussian: Shapes of the whitened residuals of Gaussian observations, in their order.
    """
    parents = list(range(sum(numbers.size for numbers in events.values())))

    def root(event: int) -> int:
        while parents[event] != event:
            parents[event] = parents[parents[event]]
            event = parents[event]
        return event

    for numbers, sets in reached.values():
        for members in (sets[number] for number in np.unique(numbers)):
            roots = sorted({root(event) for event in members})
            for one in roots[1:]:
                parents[one] = roots[0]
    roots, owner = np.unique([root(event) for event in range(len(parents))], return_inverse=True)
    if roots.size <= 1:
        return WHOLE

    def owners(name: str) -> np.ndarray:
        # What depends on no event is a constant, of whichever element.
        numbers, sets = reached[name]
        of_set = np.asarray([owner[min(members)] if members else 0 for members in sets])
        return of_set[numbers]

    def of_residuals(name: str, shape: tuple[int, ...]) -> np.ndarray:
        mine = owners(name)
        mine = mine.reshape(mine.shape + (1,) * (len(shape) - mine.ndim))
        return np.broadcast_to(mine, shape).ravel()

    residuals = [of_residuals(name, shape) for name, shape in gaussian.items()]
    elements = Elements(
        [owner[numbers.ravel()] for numbers in events.values()],
        [sizes[name] for name in events],
        np.concatenate(residuals) if residuals else (),
        roots.size,
    )
    return Partition(elements, {name: Groups(owners(name), roots.size) for name in reached})
