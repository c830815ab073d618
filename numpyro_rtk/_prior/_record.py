"""What a `DiffusionPrior` is made of, as properties and as a PyTree."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions import constraints

from numpyro_rtk._noising._base import AbstractNoiseSchedule
from numpyro_rtk._noising._times import NoiseRange
from numpyro_rtk._prior._conditions import members
from numpyro_rtk._prior._density import AbstractLogDensity
from numpyro_rtk._reverse._base import AbstractInnerKernel
from numpyro_rtk._score._model import resolve_score, ScoreModel


class PriorRecord(dist.Distribution):
    """The parts of a `DiffusionPrior`, which is the only class below this one."""

    _parts: tuple[Any, ...]
    _times: tuple[float, ...]
    _batch_size: int | None
    _condition_ndims: int
    _latents: tuple[Any, ...]

    @property
    def score_fn(self) -> Any:
        """The score callable."""
        return self._parts[0]

    @property
    def schedule(self) -> AbstractNoiseSchedule:
        """The noising process."""
        return self._parts[1]

    @property
    def reverse(self) -> AbstractInnerKernel:
        """The reverse kernel of a draw."""
        return self._parts[2]

    @property
    def density(self) -> AbstractLogDensity:
        """How `log_prob` is computed."""
        return self._parts[3]

    @property
    def condition(self) -> Array | None:
        """What the score is conditioned on, shape `(*batch_shape, *condition)`."""
        return self._parts[4]

    @property
    def segment_times(self) -> np.ndarray:
        """The time grid, shape `(num_segments + 1,)`, from noise to data."""
        return np.asarray(self._times)

    @property
    def noise(self) -> NoiseRange:
        """The noising process and its ends, which all kernels take from here."""
        return NoiseRange(self.schedule, t_min=self._times[-1], t_max=self._times[0])

    @property
    def num_score_evals(self) -> int:
        """Score evaluations per draw, without the pilot of each call of `sample`."""
        return (len(self._times) - 1) * self.reverse.evaluations_per_segment

    @property
    def support(self) -> constraints.Constraint:
        """All real arrays of the event's shape."""
        return (
            constraints.independent(constraints.real, self.event_dim) if self.event_dim else constraints.real
        )

    @property
    def has_rsample(self) -> bool:
        """`False`: draws are not differentiable."""
        return False

    def model(self, batch_shape: tuple[int, ...] | None = None) -> ScoreModel:
        """The score of every event of a batch, its own unless given, which conditions are broadcast to."""
        batch_shape = self.batch_shape if batch_shape is None else batch_shape
        ndims = len(self.batch_shape) + self._condition_ndims
        if self.condition is not None and self.condition.ndim != ndims:
            raise ValueError(
                f"The `condition` of a `DiffusionPrior` has shape {self.condition.shape}, other axes than "
                "when it was made: it was made under `jax.vmap` and is used outside, where its batch shape "
                "is another. Give it a batch of conditions instead."
            )
        conditions = members(self.condition, self.batch_shape, batch_shape)
        return resolve_score(self.score_fn, conditions=conditions)

    # As a PyTree its leaves are the arrays of the score, the reverse kernel, the density and the condition;
    # NumPyro's fields would make leaves of functions, which `jit` refuses.
    def tree_flatten(self) -> Any:
        """Arrays, and all the rest."""
        leaves, structure = jax.tree.flatten(self._parts)
        is_array = [eqx.is_array(leaf) for leaf in leaves]
        arrays = tuple(leaf for leaf, dynamic in zip(leaves, is_array, strict=True) if dynamic)
        static = tuple(None if dynamic else leaf for leaf, dynamic in zip(leaves, is_array, strict=True))
        settings = (tuple(is_array), static, (self._times, self._batch_size, self._condition_ndims))
        return arrays, (structure, *settings, self.batch_shape, self.event_shape, self._validate_args)

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> Any:
        """The inverse of `tree_flatten`; checks nothing, as JAX also puts placeholders in."""
        structure, is_array, static, settings, batch_shape, event_shape, validate_args = aux_data
        arrays = iter(params)
        leaves = [next(arrays) if dynamic else leaf for dynamic, leaf in zip(is_array, static, strict=True)]
        prior = cls.__new__(cls)
        prior._parts = jax.tree.unflatten(structure, leaves)
        prior._times, prior._batch_size, prior._condition_ndims = settings
        prior._latents = ()
        prior._batch_shape, prior._event_shape, prior._validate_args = batch_shape, event_shape, validate_args
        return prior
