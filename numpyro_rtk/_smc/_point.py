"""What the sweeps know of a site, of a point, and of a move."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from numpyro_rtk._custom_types import Count, Flag, Scalar
from numpyro_rtk._moves._elements import Elements
from numpyro_rtk._noising._grid import NoiseGrid
from numpyro_rtk._noising._terminal import Terminal
from numpyro_rtk._reverse._pilot import Pilot
from numpyro_rtk._score._model import ScoreModel


class SiteLaw(NamedTuple):
    """A diffusion site: `batch_size` independent events of one prior."""

    score_fn: ScoreModel
    grid: NoiseGrid
    terminal: Terminal
    pilot: Pilot
    event_shape: tuple[int, ...]
    batch_size: int

    @property
    def event_size(self) -> int:
        """Coordinates of one event."""
        return math.prod(self.event_shape)

    @property
    def size(self) -> int:
        """Coordinates of the site."""
        return self.batch_size * self.event_size


class Point(NamedTuple):
    """A point at a level with all that moves need to know of it; costs one score evaluation.

    Values by element are scalars where there is one element.
    """

    x: Array
    """Shape `(dim,)`."""
    score: Array
    """Score of the prior at the level."""
    energy: Array
    """`-log p_t` up to a constant where all priors know it, otherwise 0; by element."""
    log_twist: Array
    """`log G_t`, by element."""
    twist_score: Array
    """Gradient of `log G_t`, exact at `t_min`; above, with the denoiser's Jacobian or its mean, so that it
    only proposes."""
    other: Array
    """Log probability of what the twist tempers, at the denoised point; 0 at `t_min`. By element."""

    def merge(
        self, by_coordinate: Callable[..., Array], by_element: Callable[..., Array], *others: "Point"
    ) -> "Point":
        """A point made of this one and others: vectors by one function, values by element by another."""
        rest = zip(*others, strict=True) if others else ((),) * len(self)
        return Point(
            *(
                (by_coordinate if name in ("x", "score", "twist_score") else by_element)(mine, *theirs)
                for name, mine, theirs in zip(Point._fields, self, rest, strict=True)
            )
        )


def select_point(elements: Elements, condition: Array, if_true: Point, if_false: Point) -> Point:
    """Element by element one point or the other."""
    by_coordinate = elements.spread(condition)
    return if_true.merge(
        lambda x, y: jnp.where(by_coordinate, x, y), lambda x, y: jnp.where(condition, x, y), if_false
    )


def take_points(elements: Elements, points: Point, index: Array) -> Point:
    """Some of many points, element by element: `index` has elements as its last axis."""
    if elements.count == 1:
        return points.merge(lambda leaf: leaf[index], lambda leaf: leaf[index])
    rows, coordinates = elements.spread(index), jnp.arange(points.x.shape[-1])
    return points.merge(
        lambda leaf: leaf[rows, coordinates], lambda leaf: leaf[index, jnp.arange(elements.count)]
    )


class MoveInfo(NamedTuple):
    """What a move reports."""

    accept_prob: Scalar
    """Mean acceptance probability of its accept steps and elements."""
    tuning_prob: Scalar
    """The same as the adaptation of step sizes sees it (`Trajectory.tuning_prob`): 0 for an element of which
    a path was unresolved.
    """
    diverging: Flag
    """Whether something non-finite was met."""
    unresolved: Flag
    """Whether a path was too coarse to know its energy error from scores, and so was rejected."""
    num_evaluations: Count
    """Score evaluations made, each counted for one event of every site."""


class TransitionInfo(NamedTuple):
    """What a reverse transition of all sites reports."""

    accept_prob: Scalar
    """Mean acceptance probability of the reverse kernel."""
    diverging: Flag
    """Whether something non-finite was met; the new point then has no weight if it is unusable."""
