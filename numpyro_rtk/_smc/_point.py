"""What the sweeps know of a site, of a point, and of a move."""

import math
from typing import NamedTuple

from jaxtyping import Array

from numpyro_rtk._custom_types import Count, Flag, Scalar
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
    """A point at a level with all that moves need to know of it; costs one score evaluation."""

    x: Array
    """Shape `(dim,)`."""
    score: Array
    """Score of the prior at the level."""
    energy: Scalar
    """`-log p_t` up to a constant where all priors know it, otherwise 0."""
    log_twist: Scalar
    """`log G_t`."""
    twist_score: Array
    """Gradient of `log G_t`, exact at `t_min`; above, with the denoiser's Jacobian or its mean, so that it
    only proposes."""
    other: Scalar
    """Log probability of what the twist tempers, at the denoised point; 0 at `t_min`."""


class MoveInfo(NamedTuple):
    """What a move reports."""

    accept_prob: Scalar
    """Mean acceptance probability of its accept steps."""
    tuning_prob: Scalar
    """The same as the adaptation of step sizes sees it (`Trajectory.tuning_prob`)."""
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
