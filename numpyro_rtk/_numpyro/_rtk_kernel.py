"""`RTKKernel`: draws from a diffusion model through NumPyro's `MCMC`."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_rtk._custom_types import Event
from numpyro_rtk._diagnosis._round_trip import plan_trip, travel_all, Travellers
from numpyro_rtk._diagnosis._start import check_calibration, check_segments, num_pilot_draws
from numpyro_rtk._noising._base import AbstractNoiseSchedule
from numpyro_rtk._noising._grid import noise_grid, NoiseGrid
from numpyro_rtk._noising._terminal import Terminal
from numpyro_rtk._noising._times import DEFAULT_SEGMENTS, noise_range, NoiseRange, resolve_segments
from numpyro_rtk._numpyro._arguments import (
    check_evaluations,
    check_site,
    check_target_accept_prob,
    read_event,
)
from numpyro_rtk._numpyro._programs import Programs
from numpyro_rtk._numpyro._step_sizes import STEP_SIZES
from numpyro_rtk._reverse._base import AbstractInnerKernel, check_kernel
from numpyro_rtk._reverse._calibration import or_zero
from numpyro_rtk._reverse._denoise import denoise_event, measure_denoise_sd
from numpyro_rtk._reverse._gaussian import GaussianTransition
from numpyro_rtk._reverse._pass import default_tuning, num_score_evaluations, reverse_pass
from numpyro_rtk._reverse._pilot import prior_draws, run_pilot
from numpyro_rtk._reverse._preconditioned_mala import PreconditionedMALA
from numpyro_rtk._score._checks import (
    check_event_shape,
    check_first_call,
    check_score_fn,
    check_score_shape,
    first_call,
    schedule_or_assumed,
    shown,
)
from numpyro_rtk._score._hoist import hoist, HoistedArrays
from numpyro_rtk._score._model import ScoreModel
from numpyro_rtk._tuning._passes import AdaptState, PassTuner
from numpyro_rtk._user import name_of


DENOISE_DRAWS = 16
"""Draws that measure the error of denoised draws."""


class Shared(NamedTuple):
    """What all chains share; without a chain axis where chains are vectorized."""

    score_arrays: HoistedArrays
    """The network's arrays, kept here so that they are arguments of the compiled program."""
    terminal: Terminal
    """The law at the top of the grid, where passes start."""
    denoise_sd: Event | None
    """Error of a denoised draw by coordinate; `None` unless `denoise=True`."""


class RTKState(NamedTuple):
    """State of `RTKKernel`; with vectorized chains every field but `shared` has a chain axis."""

    z: dict[str, Array]
    """The draw, `{site: event}`."""
    accept_prob: Float[Array, ""]
    """Mean acceptance probability over the segments; 1 for inner kernels without an accept step."""
    segment_accept_prob: Float[Array, " segments"]
    """Mean acceptance probability of each segment's inner steps, from noise to data."""
    num_score_evals: Array
    """Score evaluations of the pass."""
    diverging: Bool[Array, ""]
    """Whether the pass met something non-finite (or, without an accept step, exploding)."""
    adapt_state: AdaptState
    """Step sizes and curvatures, one per segment."""
    shared: Shared
    """What all chains share."""
    rng_key: Any
    """Random key of the next pass."""


class RTKKernel(MCMCKernel):
    r"""Draw from a diffusion model: each MCMC iteration is one full reverse pass from fresh noise.

    *Law.* Draws follow `p_{t_min}`, the law of the data noised to `t_min`, and are independent of each
    other once warmup is over. The exactness of the law rests on the inner kernel: with the MALA family the
    error falls geometrically with `num_steps`, down to the error of the energy difference; `ULA`, `ULD` and
    `GaussianTransition` are biased at first or second order. The pass starts from a
    Gaussian with the measured mean and variance, by coordinate, of the data noised to the top of the grid.

    With `denoise=True` draws are those of clean data, up to the same error: `E[x_0 | x]` of such a draw plus
    independent normal noise of the measured denoising error of each coordinate. Their mean and their variance
    by coordinate are those of the data; of `x_0` given `x` the correlation, the shape, and how its spread
    varies with `x` are lost, all of the size of the noise of `t_min`.

    *Cost.* `num_segments * inner.evaluations_per_segment` score evaluations per draw, in
    `state.num_score_evals`. `init` makes more: 128 pilot draws (16 above 256 dimensions) of
    `44 + num_segments` evaluations, which measure the terminal Gaussian and check the score, and up to 16,384
    (1,024) for round trips that check the segments, or 4 of every segment if that is more. Only where a
    segment looks suspicious, 3,072 (160) further draws of 43 evaluations and up to two round trips each.

    *Warmup* learns, per segment, the mean curvature of `-log p_s` and a step size: dual averaging of the mean
    acceptance probability towards `target_accept_prob` for the MALA family, a rule based on the curvature
    for `ULA` and `ULD`; and, once for all segments, how the curvature is spread over coordinates. Nothing
    changes after warmup. With `num_warmup=0` step sizes assume the largest curvature any data can have,
    `1 / sigma_s^2`, which is safe and short.

    *Failures.* If the network returns something non-finite where a segment starts, the pass is discarded: the
    draw before is kept and `diverging` is set. A non-finite proposal of an adjusted kernel is
    rejected and flagged.

    Args:
        score_fn: `score_fn(x, t)`: one event, scalar time, returns the score in the shape of `x`. Arguments
            of `MCMC.run(rng_key, *args, **kwargs)` are passed on: `score_fn(x, t, *args, **kwargs)`.
        event_shape: Shape of one event; may be left out if `init_params` is given to `MCMC.run`.
        schedule: The noising process. `None`: the schedule of `score_fn` if it has one (the adapters do),
            else `OU()`.
        segments: Number of segments (placed by `segment_times`), or a decreasing time grid. `None`: 32, or
            every step of a discrete schedule that has fewer.
        inner: The inner kernel; `None` is `PreconditionedMALA()`, the member of the MALA family that measured
            best (`benchmarks/cost.py`).
        evaluations: Score evaluations of a draw, in place of `segments` and `inner`, which are then chosen
            for that many: second-order Gaussian transitions (`GaussianTransition(order=2)`) between levels
            that are even in the log signal-to-noise ratio, closer to the law than the default at fewer
            evaluations (`benchmarks/evaluations.py`). But there is no accept step, and only more evaluations
            reduce the bias.
        target_accept_prob: Acceptance probability that warmup aims at in every segment.
        denoise: Whether draws are of clean data, rather than with the noise of `t_min`; one more evaluation
            per draw.
        site: Name of the sample site.

    Raises:
        TypeError, ValueError: for arguments that cannot work, naming the argument; at construction where
            possible, otherwise in `init`, before anything is compiled.

    References:
        Huang et al. (2024), arXiv 2405.16387.
    """

    _sample_fn = True
    """Tells `MCMC` that a resumed run needs no `init`: a state is all that `sample` depends on."""

    def __init__(
        self,
        score_fn: Any,
        *,
        event_shape: tuple[int, ...] | None = None,
        schedule: AbstractNoiseSchedule | None = None,
        segments: Any = None,
        inner: AbstractInnerKernel | None = None,
        evaluations: int | None = None,
        target_accept_prob: float = 0.7,
        denoise: bool = False,
        site: str = "x",
    ) -> None:
        check_score_fn(score_fn)
        check_site(site)
        check_target_accept_prob(target_accept_prob)
        self._score_fn = score_fn
        self._event_shape = check_event_shape(event_shape)
        if not isinstance(denoise, bool):
            raise TypeError(f"`denoise` must be True or False, got {denoise!r}.")
        self._denoise = denoise
        self._schedule = schedule_or_assumed("RTKKernel", score_fn, schedule)
        if evaluations is None:
            self._times = resolve_segments(self._schedule, segments, DEFAULT_SEGMENTS)
            self._inner = PreconditionedMALA() if inner is None else inner
        else:
            check_evaluations(evaluations, denoise, segments=segments, inner=inner)
            noise, self._inner = noise_range(self._schedule), GaussianTransition(order=2)
            self._times = noise.times(min(evaluations - denoise, noise.max_segments), rho=math.inf)
        check_kernel("inner", self._inner, score_fn, self.num_segments)
        self._target_accept_prob = float(target_accept_prob)
        self._site = site
        self._programs = Programs()

    def __repr__(self) -> str:
        shape = "that of init_params" if self._event_shape is None else self._event_shape
        noise = NoiseRange(self._schedule, t_min=self._times[-1], t_max=self._times[0])
        law = "clean data" if self._denoise else f"noise of sd {noise.data_sd:.3g} at t_min={noise.t_min:.3g}"
        return (
            f"RTKKernel({name_of(self._score_fn)}, site={self._site!r}, event_shape={shape}, "
            f"schedule={shown(self._schedule)}, {law}, segments={self.num_segments}, inner={self._inner}, "
            f"num_score_evals={self.num_score_evals})"
        )

    @property
    def model(self) -> None:
        """`None`: there is no NumPyro model; ArviZ asks."""
        return None

    @property
    def sample_field(self) -> str:
        """`"z"`."""
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        """The draws, and whether the pass diverged."""
        return ("z", "diverging")

    @property
    def inner(self) -> AbstractInnerKernel:
        """The inner kernel."""
        return self._inner

    @property
    def schedule(self) -> AbstractNoiseSchedule:
        """The noising process."""
        return self._schedule

    @property
    def segment_times(self) -> np.ndarray:
        """The time grid, shape `(num_segments + 1,)`, from noise to data."""
        return self._times.copy()

    @property
    def num_segments(self) -> int:
        """Number of segments."""
        return self._times.size - 1

    @property
    def target_accept_prob(self) -> float:
        """Acceptance probability that warmup aims at in every segment."""
        return self._target_accept_prob

    @property
    def num_score_evals(self) -> int:
        """Score evaluations per draw."""
        return num_score_evaluations(self._inner, self.num_segments) + self._denoise

    def get_diagnostics_str(self, state: RTKState) -> str:
        """Acceptance, its worst segment and the cost, for the progress bar."""
        evaluations = f"{self.num_score_evals} score evals/draw"
        failed = ", diverging" if bool(state.diverging) else ""
        if not self._inner.adapts_step_size:
            return evaluations + failed
        accept = np.asarray(state.segment_accept_prob)
        worst = int(np.argmin(accept))
        return (
            f"{evaluations}, acc. prob={float(state.accept_prob):.2f} "
            f"(lowest {accept[worst]:.2f} in segment {worst}, t={self._times[worst + 1]:.2g}){failed}"
        )

    def init(
        self,
        rng_key: Any,
        num_warmup: int,
        init_params: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> RTKState:
        """Check the score and return the state before the first pass.

        Args:
            rng_key: One key, or one per vectorized chain.
            num_warmup: Length of the warmup.
            init_params: `None`, or `{site: array}` (or the array), with a chain axis if keys are batched: the
                value that is kept if the very first pass fails.
            model_args: Passed on to the score.
            model_kwargs: Passed on to the score.
        """
        kwargs = {} if model_kwargs is None else model_kwargs
        batched = not is_prng_key(rng_key)
        value = read_event(init_params, self._site, self._event_shape, batched)
        if value is None:
            assert self._event_shape is not None
            shape, dtype = self._event_shape, jnp.result_type(float)
        else:
            shape, dtype = value.shape[1:] if batched else value.shape, value.dtype
        grid = noise_grid(self._schedule, self._times, dtype)
        x, t = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((), dtype)
        check_score_shape(self._score_fn, x, t, model_args, kwargs)
        arrays, _ = self._hoist(x, t, model_args, kwargs)

        def measure(arrays: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            model = self._hoist(x, t, args, kwargs)[1](arrays)
            grid = noise_grid(self._schedule, self._times, dtype)
            draw_key, pilot_key = jr.split(jr.key(0))
            noise = NoiseRange(self._schedule, self._times[-1], self._times[0])
            num_draws = num_pilot_draws(math.prod(shape))
            draws, terminal = prior_draws(draw_key, model, noise, shape, dtype, num_draws)
            pilot = run_pilot(pilot_key, model, grid, or_zero(draws))
            usable, sd = or_zero(draws[:DENOISE_DRAWS]), None
            if self._denoise:
                sd = measure_denoise_sd(jr.key(1), model, grid.level(-1), usable)
            called = first_call(model, grid, shape)
            return called, (terminal, sd), draws, pilot.curvature[1:], pilot.calibration

        name = f"measure {shape} {dtype}"
        called, (terminal, denoise_sd), *pilot = self._programs(
            name, self._score_fn, measure, arrays.arrays, model_args, kwargs
        )
        draws, curvature, calibration = pilot
        check_first_call(called, grid)
        num_failed = jnp.sum(~jnp.all(jnp.isfinite(draws.reshape(draws.shape[0], -1)), axis=1))
        fits = check_calibration(
            self._score_fn, self._schedule, grid, shape, calibration, num_failed=num_failed
        )

        def fly(*inputs: Any) -> Travellers:
            def trips(arrays: Any, curvature: Array, args: Any, kwargs: Any, inputs: Any) -> Travellers:
                model = self._hoist(x, t, args, kwargs)[1](arrays)
                grid = noise_grid(self._schedule, self._times, dtype)
                noise = NoiseRange(self._schedule, self._times[-1], self._times[0])
                key, *places = inputs
                return travel_all(key, plan_trip(model, grid, self._inner, curvature), noise, *places)

            seen = (arrays.arrays, curvature, model_args, kwargs, inputs)
            return self._programs(f"trips {shape} {dtype}", self._score_fn, trips, *seen)

        if fits:
            check_segments(self._score_fn, fly, grid, draws, self._inner, "RTKKernel")
        tuner = self._tuner(grid)

        def init_chain(rng_key: Any, value: Any) -> RTKState:
            next_key, noise_key = jr.split(rng_key)
            if value is None:
                value = terminal.sample(noise_key)
            tuning = default_tuning(self._inner, grid, shape)
            return RTKState(
                z={self._site: value},
                accept_prob=jnp.zeros((), dtype),
                segment_accept_prob=jnp.zeros(self.num_segments, dtype),
                num_score_evals=jnp.zeros((), int),
                diverging=jnp.zeros((), bool),
                adapt_state=tuner.init(tuning, num_warmup),
                shared=None,  # pyright: ignore - filled in without a chain axis
                rng_key=next_key,
            )

        state = jax.vmap(init_chain)(rng_key, value) if batched else init_chain(rng_key, value)
        return state._replace(shared=Shared(arrays, terminal, denoise_sd))

    def _hoist(self, x: Any, t: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network's arrays, marked with all that a state of this kernel depends on."""
        found, rebuild = hoist(self._score_fn, x, t, args, kwargs)
        # What was learnt for one reverse kernel or grid means something else for another.
        settings = f"{type(self._inner).__name__} on {self._times.tolist()}" + ", denoised" * self._denoise
        return HoistedArrays(found.arrays, f"{found.fingerprint} {settings}"), rebuild

    def _tuner(self, grid: NoiseGrid) -> PassTuner:
        return PassTuner(self._inner, grid, self._target_accept_prob, STEP_SIZES)

    def sample(
        self, state: RTKState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> RTKState:
        """One reverse pass from fresh noise, for one chain or a batch of them."""
        kwargs = {} if model_kwargs is None else model_kwargs
        batched = not is_prng_key(state.rng_key)
        value = state.z[self._site]
        shape, dtype = value.shape[1:] if batched else value.shape, value.dtype
        x, t = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((), dtype)
        own, rebuild = self._hoist(x, t, model_args, kwargs)
        arrays = state.shared.score_arrays.current(own, "another inner kernel or other segments")
        model = rebuild(arrays.arrays)
        tuner = self._tuner(noise_grid(self._schedule, self._times, dtype))

        def step(state: RTKState, shared: Shared) -> RTKState:
            return self._sample_chain(state, shared, model, tuner)

        chain = state._replace(shared=None)  # pyright: ignore[reportArgumentType]
        new = (jax.vmap(step, in_axes=(0, None)) if batched else step)(chain, state.shared)
        return new._replace(shared=state.shared)

    def _sample_chain(self, state: RTKState, shared: Shared, model: ScoreModel, tuner: PassTuner) -> RTKState:
        """One pass of one chain: a pure function of the state."""
        next_key, pass_key = jr.split(state.rng_key)
        value, tuning = state.z[self._site], state.adapt_state.tuning
        result = reverse_pass(pass_key, model, tuner.grid, self._inner, tuning, shared.terminal)
        draw, failed = result.x, result.failed
        if shared.denoise_sd is not None:
            noise = jr.normal(jr.fold_in(pass_key, 1), draw.shape, draw.dtype)
            draw = denoise_event(model, tuner.grid.level(-1), draw) + shared.denoise_sd * noise
            failed |= ~jnp.all(jnp.isfinite(draw))
        return state._replace(
            z={self._site: jnp.where(failed, value, draw)},
            accept_prob=jnp.mean(result.accept_prob),
            segment_accept_prob=result.accept_prob,
            num_score_evals=jnp.full_like(state.num_score_evals, self.num_score_evals),
            diverging=jnp.any(result.diverging) | failed,
            adapt_state=tuner.update(state.adapt_state, result),
            rng_key=next_key,
        )
