"""`DiffusionPrior`: a diffusion model where any NumPyro distribution may stand."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike
from numpyro.distributions.util import validate_sample
from numpyro.util import is_prng_key

from numpyro_rtk._custom_types import Count, Event, RandomKey
from numpyro_rtk._diagnosis._start import check_nodes
from numpyro_rtk._noising._base import AbstractNoiseSchedule
from numpyro_rtk._noising._grid import noise_grid, NoiseGrid
from numpyro_rtk._noising._terminal import Terminal
from numpyro_rtk._noising._times import DEFAULT_SEGMENTS, resolve_segments
from numpyro_rtk._prior._conditions import check_condition, one_condition
from numpyro_rtk._prior._density import (
    AbstractLogDensity,
    EnergyDensity,
    LineIntegral,
    ProbabilityFlow,
)
from numpyro_rtk._prior._derivative import log_density_with_score
from numpyro_rtk._prior._latents import running_latents
from numpyro_rtk._prior._learnt import key_of, LEARNT, learnt_of
from numpyro_rtk._prior._record import PriorRecord
from numpyro_rtk._reverse._base import AbstractInnerKernel, check_kernel
from numpyro_rtk._reverse._denoise import denoise_event, draw_clean, measure_denoise_sd
from numpyro_rtk._reverse._pass import reverse_pass, rule_step_size, Tuning
from numpyro_rtk._reverse._preconditioned_mala import PreconditionedMALA
from numpyro_rtk._score._checks import (
    check_batch_size,
    check_event_shape,
    check_score_fn,
    check_score_shape,
    schedule_or_assumed,
    shown,
)
from numpyro_rtk._score._model import has_energy, resolve_score, ScoreModel
from numpyro_rtk._user import name_of


def _default_density(score_fn: Any, event_shape: Any) -> AbstractLogDensity:
    """The most exact density that the score allows; an estimated trace would mislead a sampler without a sign
    of it.
    """
    if has_energy(score_fn):
        return EnergyDensity()
    flow = ProbabilityFlow()
    return flow if math.prod(event_shape) <= flow.max_exact_dim else LineIntegral()


class DiffusionPrior(PriorRecord):
    r"""A diffusion model as a NumPyro distribution.

    *Law.* `p_{t_min}`, the law of the data noised to `t_min`, the last time of the grid; under `OU()` that is
    noise of sd 0.045. `sample` follows it up to the error of the reverse kernel, which falls geometrically
    with its `num_steps`, and `log_prob` up to that of `density`. The two agree as far as `score_fn` is a
    score.

    *Shapes.* `batch_shape` is `()`, use `expand` or a plate for more, or that of the conditions;
    `event_shape` is that of one event, `()` for scalars. The support is real, so that every initialisation
    strategy works.

    *Conditions.* With `condition=c` the score is called as `score_fn(x, t, c)`, each element of the batch
    with its own: `c` has shape `(*batch_shape, *one condition)`, and one condition `condition_ndims` axes. It
    may be data, an argument of the model, or a latent. A latent condition is sampled by `RTKGibbs`, with any
    network; by NUTS and HMC where the density is normalised, which they differentiate in the condition; and
    by values in kernels without gradients. What is learnt for drawing is learnt of all conditions together.

    *Drawing.* `num_segments * reverse.evaluations_per_segment` score evaluations per draw, 96 by default. The
    first call of `sample` learns the curvature of every segment from 16 draws of a second-order predictor,
    noised and denoised, and the Gaussian that passes start from: `16 (40 + num_segments + 1) + 96`
    evaluations, 1,264 by default, 16 at a time, and two to check the score. They have a fixed key, so that
    the tuning is a property of the prior. It is kept for the same `score_fn` object, and is learnt while
    tracing, not in the compiled program, unless `score_fn` depends on tracers. All draws of one call are made
    together, in memory too, unless `batch_size` says how many at a time. A draw that failed is NaN. Segments
    that are too long are not looked for: `RTKKernel` of the same arguments tells.

    *Density.* Its gradient is the score at `t_min`, one evaluation, in forward and reverse mode. The value is
    `density`'s: the energy of the network if there is one, else the probability flow, or above 100 dimensions
    a line integral of the score. What each costs is on its own page. The score may depend on other values (a
    network's weights, arguments of the model). Where it depends on a latent of the model, a density that is
    not normalised is refused, and so is the derivative with respect to that latent, which NUTS asks for;
    values of `ProbabilityFlow()` serve kernels that ask for values alone, such as `DiscreteGibbs`. A
    `condition` is differentiated: that of a density which is not normalised is refused. The probability flow
    is differentiated in it once for each of its coordinates, and measures its end at each value, by 96
    evaluations.

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
        batch_size: How many draws are made at a time; `None`: all that one call asks for. Draws are the same.
        condition: What the score is conditioned on, shape `(*batch_shape, *one condition)`.
        condition_ndims: Number of axes of one condition: 0 for scalars and labels.
        validate_args: As in every NumPyro distribution.

    Raises:
        TypeError, ValueError: for arguments that cannot work, naming the argument, at construction. A score
            that is NaN, or does not look like one, is refused, or warned about, at the first draw (which NUTS
            makes when it starts).

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
        batch_size: int | None = None,
        condition: Any = None,
        condition_ndims: int = 0,
        validate_args: bool | None = None,
    ) -> None:
        check_score_fn(score_fn)
        shape = check_event_shape(event_shape)
        if shape is None:
            raise TypeError("`event_shape` must be the shape of one event, such as `(10,)`, got None.")
        condition, batch_shape = check_condition(condition, condition_ndims)
        dtype = jnp.result_type(float)
        x, t = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((), dtype)
        given = one_condition(condition, len(batch_shape))
        check_score_shape(score_fn, x, t, (), {}, in_model=True, condition=given)
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
        if given:
            zeros = jnp.zeros(given[0].shape, given[0].dtype)
            density.check(resolve_score(score_fn).given(zeros), schedule, shape)
        else:
            density.check(score_fn, schedule, shape)
        self._parts = (score_fn, schedule, reverse, density, condition)
        self._times = tuple(times.tolist())
        self._batch_size, self._condition_ndims = check_batch_size(batch_size), int(condition_ndims)
        self._latents = running_latents()
        super().__init__(batch_shape, shape, validate_args=validate_args)

    def __repr__(self) -> str:
        condition = "" if self.condition is None else f", condition of shape {self.condition.shape}"
        batches = "" if self._batch_size is None else f", batch_size={self._batch_size}"
        return (
            f"DiffusionPrior({name_of(self.score_fn)}, event_shape={self.event_shape}{condition}, "
            f"schedule={shown(self.schedule)}, noise of sd {self.noise.data_sd:.3g} at "
            f"t_min={self._times[-1]:.3g}, segments={len(self._times) - 1}, reverse={self.reverse}, "
            f"density={self.density}, num_score_evals={self.num_score_evals}{batches})"
        )

    def sample(self, key: RandomKey | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw by reverse passes.

        Args:
            key: Random key, old or new style.
            sample_shape: Shape of the batch of draws.

        Returns:
            Draws of shape `(*sample_shape, *batch_shape, *event_shape)`, in the default float dtype; NaN
            where a pass failed.
        """
        assert key is not None
        assert is_prng_key(key)
        dtype = jnp.result_type(float)
        grid = noise_grid(self.schedule, self.segment_times, dtype)
        tuning, terminal = self._tuning(grid)
        model, shape = self.model(), (*sample_shape, *self.batch_shape)

        def draw(inputs: tuple[RandomKey, Count]) -> Event:
            key, event = inputs
            result = reverse_pass(key, model.member(event), grid, self.reverse, tuning, terminal)
            return jnp.where(result.failed, jnp.nan, result.x)

        num_draws = math.prod(shape)
        inputs = (jr.split(key, num_draws), jnp.arange(num_draws))
        if self._batch_size is None:
            draws = jax.jit(jax.vmap(draw))(inputs)
        else:
            draws = jax.jit(lambda inputs: jax.lax.map(draw, inputs, batch_size=self._batch_size))(inputs)
        return draws.reshape(*shape, *self.event_shape)

    @validate_sample
    def log_prob(self, value: ArrayLike) -> Array:
        """Log density of `p_{t_min}`, as `density` computes it; its gradient is the score at `t_min`.

        *Cost.* That of `density`; its gradient one score evaluation for each event. The first call with a
        `LineIntegral` checks its nodes at pilot draws, once for a score object.

        Args:
            value: Shape `(*batch, *event_shape)`; any batch.

        Returns:
            Shape `batch`; NaN where the density could not be computed.
        """
        x = self._events("log_prob", value)
        self._check_density(x.dtype)
        noise, density = self.noise, self.density
        if self.condition is not None:

            def log_density_given(x: Event, condition: Array) -> Array:
                return log_density_with_score(density, self.score_fn, noise, x, self._latents, condition)

            return self._over_batch(log_density_given, x)
        if density.needs_terminal:
            grid = noise_grid(self.schedule, self.segment_times, x.dtype)
            density = density.ending_in(learnt_of(self, grid).terminal)

        def log_density(x: Event) -> Array:
            return log_density_with_score(density, self.score_fn, noise, x, self._latents)

        return self._over_batch(log_density, x)

    def denoise(self, value: ArrayLike) -> Array:
        """Clean data, `E[x_0 | x]` of `x` with the noise of `t_min`: `(x + sigma^2 score(x, t_min)) / alpha`.

        Inside a model, as `numpyro.deterministic("clean", prior.denoise(x))` or in the likelihood, and on
        draws. Differentiable; its derivative goes through the score.

        *Law.* Over draws of the prior or of a posterior it has the mean of `x_0`, and less than its variance:
        what is missing, by coordinate, is the square of `denoise_sd_of(draws)`. `clean_draws` puts it back.

        *Cost.* One score evaluation for each event.

        Args:
            value: Shape `(*batch, *event_shape)`; any batch.

        Returns:
            The same shape.
        """
        x = self._events("denoise", value)
        data = noise_grid(self.schedule, self.segment_times, x.dtype).level(-1)
        family = resolve_score(self.score_fn)

        def denoise(x: Event, *given: Array) -> Event:
            return denoise_event(family.given(*given) if given else family, data, x)

        return self._over_batch(denoise, x)

    @property
    def denoise_sd(self) -> Array:
        """Root mean square of `x_0 - denoise(x)` by coordinate, over draws of the prior: shape `event_shape`.

        *Cost.* 256 score evaluations, and the pilot of `sample`, once for a score object.
        """
        dtype = jnp.result_type(float)
        learnt = learnt_of(self, noise_grid(self.schedule, self.segment_times, dtype))
        kept = LEARNT.get(key_of(self, dtype))
        model = self.model().thinned(learnt.draws.shape[0])  # as the pilot drew
        if kept is None:
            return self._measured_sd(model, learnt.draws)
        measured = kept.denoise_sd
        if measured is None:
            with jax.ensure_compile_time_eval():
                measured = jax.jit(lambda: self._measured_sd(model, learnt.draws))()
            kept.denoise_sd = measured
        return measured

    def denoise_sd_of(self, value: ArrayLike) -> Array:
        """The same over draws that you have, shape `(*batch, *event_shape)`: root mean square over the batch,
        all conditions together.

        How much noise hides depends on where `x` is, so that the draws of a posterior have an error of their
        own. A few dozen of them do.

        *Cost.* 16 score evaluations for each event.
        """
        x = self._events("denoise_sd_of", value)
        batch = x.shape[: x.ndim - self.event_dim]
        return self._measured_sd(self.model(batch), x.reshape(-1, *self.event_shape))

    def _measured_sd(self, model: ScoreModel, draws: Array) -> Event:
        data = noise_grid(self.schedule, self.segment_times, draws.dtype).level(-1)
        return measure_denoise_sd(jr.key(1), model, data, draws)

    def clean_draws(self, key: RandomKey, draws: ArrayLike) -> Array:
        """Draws of clean data `x_0`, given draws with the noise of `t_min`, of the prior or of a posterior.

        *Law.* `denoise(x) + sd * noise`: the mean and variance of `x_0` by coordinate. That what is added is
        correlated, not normal, and larger at some draws is lost. `sd` is `denoise_sd_of` 32 of the draws,
        noised anew: a network's slope at one draw is rough, and what draws have in common, as those of a
        short chain, does not average out.

        *Cost.* One score evaluation for each draw, and at most 1,024 more; of those, for each condition.

        Args:
            key: Random key.
            draws: Shape `(*batch, *event_shape)`, all of the same law: of one member of a plate, not of all.
                With a batch of conditions, shape `(*batch, *batch_shape, *event_shape)`: each has its own.
        """
        x = self._events("clean_draws", draws)
        data = noise_grid(self.schedule, self.segment_times, x.dtype).level(-1)
        num_batch = x.ndim - self.event_dim
        own = x.shape[num_batch - len(self.batch_shape) : num_batch] if self.condition is not None else ()
        model, num_members = self.model(own), math.prod(own)

        def of_member(inputs: tuple[RandomKey, Count, Array]) -> Array:
            key, member, events = inputs
            return draw_clean(key, model.member(member), data, events, self._batch_size)

        if num_members == 1:
            clean = of_member((key, jnp.zeros((), int), x.reshape(-1, *self.event_shape)))
            return clean.reshape(x.shape)
        events = jnp.moveaxis(x.reshape(-1, num_members, *self.event_shape), 1, 0)
        clean = jax.lax.map(of_member, (jr.split(key, num_members), jnp.arange(num_members), events))
        return jnp.moveaxis(clean, 0, 1).reshape(x.shape)

    def _events(self, method: str, value: ArrayLike) -> Array:
        """Checked values of shape `(*batch, *event_shape)`, floating point."""
        x = jnp.asarray(value)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.result_type(float))
        num_batch = x.ndim - self.event_dim
        if num_batch < 0 or x.shape[num_batch:] != self.event_shape:
            raise ValueError(
                f"`DiffusionPrior.{method}` got a value of shape {x.shape} for events of shape "
                f"{self.event_shape}."
            )
        if x.dtype != jnp.result_type(float):
            event = jax.ShapeDtypeStruct(self.event_shape, x.dtype)
            given = one_condition(self.condition, len(self.batch_shape))
            t = jax.ShapeDtypeStruct((), x.dtype)
            check_score_shape(self.score_fn, event, t, (), {}, in_model=True, condition=given)
        try:
            batch = jnp.broadcast_shapes(x.shape[:num_batch], self.batch_shape)
        except ValueError:
            raise ValueError(
                f"`DiffusionPrior.{method}` got a value of shape {x.shape} for events of shape "
                f"{self.event_shape}, one for each `condition`, which has batch shape {self.batch_shape}."
            ) from None
        return x if batch == x.shape[:num_batch] else jnp.broadcast_to(x, batch + self.event_shape)

    def _over_batch(self, function: Any, x: Array) -> Array:
        """`function(event)`, or `function(event, condition)`, of values of shape `(*batch, *event_shape)`."""
        batch = x.shape[: x.ndim - self.event_dim]
        conditions = self.model(batch).conditions
        given = () if conditions is None else (conditions,)
        if not batch:
            return function(x, *(one[0] for one in given))
        values = jax.vmap(function)(x.reshape(-1, *self.event_shape), *given)
        return values.reshape(*batch, *values.shape[1:])

    def _tuning(self, grid: NoiseGrid) -> tuple[Tuning, Terminal]:
        """What `RTKKernel` learns in warmup, from a pilot with a fixed key, and the terminal Gaussian."""
        learnt = learnt_of(self, grid)
        step_size = rule_step_size(self.reverse, grid, learnt.curvature, math.prod(self.event_shape))
        return Tuning(step_size, learnt.curvature, learnt.profile), learnt.terminal

    def _check_density(self, dtype: Any) -> None:
        """Warn, once for a score object, of nodes that do not resolve the score between prior draws."""
        density = self.density
        if not isinstance(density, LineIntegral) or isinstance(density.reference, Tracer):
            return
        learnt = learnt_of(self, noise_grid(self.schedule, self.segment_times, dtype))
        kept = LEARNT.get(key_of(self, dtype))
        asked = (
            density.num_nodes,
            None if density.reference is None else np.asarray(density.reference).tobytes(),
        )
        if kept is None or asked in kept.nodes:
            return
        kept.nodes.add(asked)
        with jax.ensure_compile_time_eval():
            # Draws are of the members in turn; lines are within one of them.
            num_members = math.prod(self.batch_shape) if self.condition is not None else 1
            member, draws = self.model().member(0), learnt.draws[::num_members]
            check_nodes(member, density.reference, density.num_nodes, draws, self._times[-1])
