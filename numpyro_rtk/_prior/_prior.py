"""`DiffusionPrior`: a diffusion model where any NumPyro distribution may stand."""

import contextlib
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jax.core import Tracer
from jaxtyping import Array, ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample
from numpyro.util import is_prng_key

from numpyro_rtk._custom_types import Event, RandomKey
from numpyro_rtk._diagnosis._start import check_calibration, check_nodes
from numpyro_rtk._noising._base import AbstractNoiseSchedule
from numpyro_rtk._noising._grid import noise_grid, NoiseGrid
from numpyro_rtk._noising._terminal import Terminal
from numpyro_rtk._noising._times import DEFAULT_SEGMENTS, NoiseRange, resolve_segments
from numpyro_rtk._prior._density import (
    AbstractLogDensity,
    EnergyDensity,
    LineIntegral,
    ProbabilityFlow,
)
from numpyro_rtk._prior._derivative import log_density_with_score
from numpyro_rtk._prior._latents import running_latents
from numpyro_rtk._prior._learnt import Kept, learn, LEARNT, Learnt
from numpyro_rtk._reverse._base import AbstractInnerKernel, check_kernel
from numpyro_rtk._reverse._pass import reverse_pass, rule_step_size, Tuning
from numpyro_rtk._reverse._preconditioned_mala import PreconditionedMALA
from numpyro_rtk._score._checks import (
    check_event_shape,
    check_first_call,
    check_score_fn,
    check_score_shape,
    first_call,
    schedule_or_assumed,
)
from numpyro_rtk._score._model import has_energy, resolve_score


def _default_density(score_fn: Any, event_shape: Any) -> AbstractLogDensity:
    """The most exact density that the score allows; an estimated trace would mislead a sampler without a sign
    of it.
    """
    if has_energy(score_fn):
        return EnergyDensity()
    flow = ProbabilityFlow()
    return flow if math.prod(event_shape) <= flow.max_exact_dim else LineIntegral()


class DiffusionPrior(dist.Distribution):
    r"""A diffusion model as a NumPyro distribution.

    *Law.* `p_{t_min}`, the law of the data noised to `t_min`, the last time of the grid; under `OU()` that is
    noise of sd 0.045. `sample` follows it up to the error of the reverse kernel, which falls geometrically
    with its `num_steps`, and `log_prob` up to that of `density`. The two agree as far as `score_fn` is a
    score.

    *Shapes.* `batch_shape` is `()`, use `expand` or a plate for more; `event_shape` is that of one event,
    `()` for scalars. The support is real, so that every initialisation strategy works.

    *Drawing.* `num_segments * reverse.evaluations_per_segment` score evaluations per draw, 96 by default. The
    first call of `sample` learns the curvature of every segment from 16 draws of a second-order predictor,
    noised and denoised, and the Gaussian that passes start from: `16 (40 + num_segments + 1) + 96`
    evaluations, 1,264 by default, 16 at a time, and two to check the score. They have a fixed key, so that
    the tuning is a property of the prior. It is kept for the same `score_fn` object, and is learnt while
    tracing, not in the compiled program, unless `score_fn` depends on tracers. All draws of one call are made
    together: in memory, too. A draw that met something non-finite is NaN.

    *Density.* Its gradient is the score at `t_min`, one evaluation, in forward and reverse mode. The value is
    `density`'s: the energy of the network if there is one, else the probability flow, or above 100 dimensions
    a line integral of the score. What each costs is on its own page. The score may depend on other values (a
    network's weights, arguments of the model). Where it depends on a latent of the model, a density that is
    not normalised is refused, and so is the derivative with respect to that latent, which NUTS asks for;
    values of `ProbabilityFlow()` serve kernels that ask for values alone, such as `DiscreteGibbs`.

    Args:
        score_fn: `score_fn(x, t)`: one event, scalar time, returns the score in the shape of `x`.
        event_shape: Shape of one event.
        schedule: The noising process. `None`: the schedule of `score_fn` if it has one (the adapters do),
            else `OU()`.
        segments: Number of segments of a draw (placed by `segment_times`), or a decreasing time grid, whose
            ends are the noise and the data also for `log_prob`. `None`: 32, or every step of a discrete
            schedule that has fewer.
        reverse: The reverse kernel of a draw; `None` is `PreconditionedMALA()`.
        density: `EnergyDensity()`, `ProbabilityFlow()` or `LineIntegral()`; `None`: the first if `score_fn`
            has a method `energy`, else the second where its trace is exact (up to 100 dimensions), else the
            third.
        validate_args: As in every NumPyro distribution.

    Raises:
        TypeError, ValueError: for arguments that cannot work, naming the argument, at construction. A score
        that is NaN,
            or does not look like one, is refused, or warned about, at the first draw (which NUTS makes when
            it starts).

    References:
        Huang et al. (2024), arXiv 2405.16387. Song et al. (2021), arXiv 2011.13456, section 4.3 and appendix
        D.2, for the density.
    """

    arg_constraints = {}  # noqa: RUF012 - as NumPyro's distributions have it

    def __init__(
        self,
        score_fn: Any,
        event_shape: tuple[int, ...],
        schedule: AbstractNoiseSchedule | None = None,
        *,
        segments: Any = None,
        reverse: AbstractInnerKernel | None = None,
        density: AbstractLogDensity | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_score_fn(score_fn)
        shape = check_event_shape(event_shape)
        if shape is None:
            raise TypeError("`event_shape` must be the shape of one event, such as `(10,)`, got None.")
        schedule = schedule_or_assumed("DiffusionPrior", score_fn, schedule)
        times = resolve_segments(schedule, segments, DEFAULT_SEGMENTS)
        reverse = PreconditionedMALA() if reverse is None else reverse
        check_kernel("reverse", reverse, score_fn, times.size - 1)
        if density is None:
            density = _default_density(score_fn, shape)
        if not isinstance(density, AbstractLogDensity):
            hint = f" Did you mean `{density.__name__}()`?" if isinstance(density, type) else ""
            raise TypeError(
                f"`density` must be a log density such as `ProbabilityFlow()`, got {density!r}.{hint}"
            )
        dtype = jnp.result_type(float)
        x, t = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((), dtype)
        check_score_shape(score_fn, x, t, (), {}, in_model=True)
        density.check(score_fn, schedule, shape)
        self._parts = (score_fn, schedule, reverse, density)
        self._times = tuple(times.tolist())
        self._latents = running_latents()
        super().__init__((), shape, validate_args=validate_args)

    def __repr__(self) -> str:
        return (
            f"DiffusionPrior(event_shape={self.event_shape}, schedule={self.schedule}, "
            f"segments={len(self._times) - 1}, "
            f"reverse={self.reverse}, density={self.density})"
        )

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

    # As a PyTree its leaves are the arrays of the score, the reverse kernel and the density; NumPyro's fields
    # would make leaves of functions, which `jit` refuses.
    def tree_flatten(self) -> Any:
        """Arrays, and all the rest."""
        leaves, structure = jax.tree.flatten(self._parts)
        is_array = [eqx.is_array(leaf) for leaf in leaves]
        arrays = tuple(leaf for leaf, dynamic in zip(leaves, is_array, strict=True) if dynamic)
        static = tuple(None if dynamic else leaf for leaf, dynamic in zip(leaves, is_array, strict=True))
        rest = (
            structure,
            tuple(is_array),
            static,
            self._times,
            self.batch_shape,
            self.event_shape,
            self._validate_args,
        )
        return arrays, rest

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> "DiffusionPrior":
        """The inverse of `tree_flatten`; checks nothing, as JAX also puts placeholders in."""
        structure, is_array, static, times, batch_shape, event_shape, validate_args = aux_data
        arrays = iter(params)
        leaves = [next(arrays) if dynamic else leaf for dynamic, leaf in zip(is_array, static, strict=True)]
        prior = cls.__new__(cls)
        prior._parts = jax.tree.unflatten(structure, leaves)
        prior._times, prior._latents = times, ()
        prior._batch_shape, prior._event_shape, prior._validate_args = batch_shape, event_shape, validate_args
        return prior

    def sample(self, key: RandomKey | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw by reverse passes.

        Args:
            key: Random key, old or new style.
            sample_shape: Shape of the batch of draws.

        Returns:
            Draws of shape `(*sample_shape, *event_shape)`, in the default float dtype; NaN where a pass
            failed.
        """
        assert key is not None
        assert is_prng_key(key)
        dtype = jnp.result_type(float)
        grid = noise_grid(self.schedule, self.segment_times, dtype)
        tuning, terminal = self._tuning(grid)
        model = resolve_score(self.score_fn)

        def draw(key: RandomKey) -> Event:
            result = reverse_pass(key, model, grid, self.reverse, tuning, terminal)
            return jnp.where(result.failed, jnp.nan, result.x)

        draws = jax.jit(jax.vmap(draw))(jr.split(key, math.prod(sample_shape)))
        return draws.reshape(*sample_shape, *self.event_shape)

    @validate_sample
    def log_prob(self, value: ArrayLike) -> Array:
        """Log density of `p_{t_min}`, as `density` computes it; its gradient is the score at `t_min`.

        Args:
            value: Shape `(*batch, *event_shape)`; any batch.

        Returns:
            Shape `batch`; NaN where the density could not be computed.
        """
        x = jnp.asarray(value)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.result_type(float))
        num_batch = x.ndim - self.event_dim
        if num_batch < 0 or x.shape[num_batch:] != self.event_shape:
            raise ValueError(
                f"`DiffusionPrior.log_prob` got a value of shape {x.shape} for events of shape "
                f"{self.event_shape}."
            )
        if x.dtype != jnp.result_type(float):
            event = jax.ShapeDtypeStruct(self.event_shape, x.dtype)
            check_score_shape(self.score_fn, event, jax.ShapeDtypeStruct((), x.dtype), (), {}, in_model=True)
        self._check_density(x.dtype)
        noise = self.noise

        def log_density(x: Event) -> Array:
            return log_density_with_score(self.density, self.score_fn, noise, x, self._latents)

        if num_batch == 0:
            return log_density(x)
        batch = x.shape[:num_batch]
        return jax.vmap(log_density)(x.reshape(-1, *self.event_shape)).reshape(batch)

    def _tuning(self, grid: NoiseGrid) -> tuple[Tuning, Terminal]:
        """What `RTKKernel` learns in warmup, from a pilot with a fixed key, and the terminal Gaussian."""
        learnt = self._learnt(grid)
        step_size = rule_step_size(self.reverse, grid, learnt.curvature, math.prod(self.event_shape))
        return Tuning(step_size, learnt.curvature, learnt.profile), learnt.terminal

    def _check_density(self, dtype: Any) -> None:
        """Warn, once for a score object, of nodes that do not resolve the score between prior draws."""
        density = self.density
        if not isinstance(density, LineIntegral) or isinstance(density.reference, Tracer):
            return
        learnt = self._learnt(noise_grid(self.schedule, self.segment_times, dtype))
        kept = LEARNT.get(self._key(dtype))
        if kept is None or density.num_nodes in kept.nodes:
            return
        kept.nodes.add(density.num_nodes)
        with jax.ensure_compile_time_eval():
            check_nodes(self.score_fn, density.reference, density.num_nodes, learnt.draws, self._times[-1])

    def _key(self, dtype: Any) -> Any:
        return id(self.score_fn), str(self.schedule), self._times, self.event_shape, str(jnp.dtype(dtype))

    def _learnt(self, grid: NoiseGrid) -> Learnt:
        # NumPyro traces a model, and builds its distributions anew, many times. The same score object has the
        # same curvature; should what it refers to have changed since, the tuning is less apt and the law the
        # same.
        dtype = grid.t.dtype
        known = LEARNT.get(self._key(dtype))
        if known is not None:
            return known.learnt
        x, t = jnp.zeros(self.event_shape, dtype), jnp.zeros((), dtype)
        consts = jax.make_jaxpr(self.score_fn)(x, t).consts
        if any(isinstance(const, Tracer) for const in consts):
            return learn(resolve_score(self.score_fn), self.noise, grid, self.event_shape)[0]
        with jax.ensure_compile_time_eval():
            # Inside, so that nothing here belongs to a trace that is under way.
            grid = noise_grid(self.schedule, self.segment_times, dtype)
            called, learnt, calibration = jax.jit(self._first)(grid)
            check_first_call(called, grid)
            check_calibration(self.score_fn, self.schedule, grid, self.event_shape, calibration)
        if not isinstance(learnt.curvature, Tracer):
            # A callable that cannot be referred to weakly is learnt from at each call.
            with contextlib.suppress(TypeError):
                LEARNT[self._key(dtype)] = Kept(self.score_fn, learnt)
        return learnt

    def _first(self, grid: NoiseGrid) -> Any:
        model = resolve_score(self.score_fn)
        called = first_call(model, grid, self.event_shape)
        return called, *learn(model, self.noise, grid, self.event_shape)
