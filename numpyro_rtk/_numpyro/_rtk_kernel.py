"""`RTKKernel`: draws from a diffusion model through NumPyro's `MCMC`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_rtk._custom_types import Event
from numpyro_rtk._noising._base import AbstractNoiseSchedule
from numpyro_rtk._noising._grid import NoiseGrid
from numpyro_rtk._noising._terminal import Terminal
from numpyro_rtk._noising._times import DEFAULT_SEGMENTS, noise_range, NoiseRange, resolve_segments
from numpyro_rtk._numpyro._arguments import (
    check_evaluations,
    check_site,
    check_target_accept_prob,
    read_event,
)
from numpyro_rtk._numpyro._programs import Programs
from numpyro_rtk._numpyro._rtk_start import measure_start, Settings
from numpyro_rtk._numpyro._sharding import over_chains
from numpyro_rtk._numpyro._step_sizes import STEP_SIZES
from numpyro_rtk._reverse._base import AbstractInnerKernel, check_kernel
from numpyro_rtk._reverse._denoise import denoise_event
from numpyro_rtk._reverse._gaussian import GaussianTransition
from numpyro_rtk._reverse._pass import default_tuning, num_score_evaluations, reverse_pass
from numpyro_rtk._reverse._preconditioned_mala import PreconditionedMALA
from numpyro_rtk._score._checks import (
    check_event_shape,
    check_score_fn,
    check_score_shape,
    schedule_or_assumed,
    shown,
)
from numpyro_rtk._score._hoist import hoist, HoistedArrays
from numpyro_rtk._score._model import ScoreModel
from numpyro_rtk._tuning._passes import AdaptState, PassTuner
from numpyro_rtk._user import name_of


DEFAULT_EVALUATIONS = 50
"""Score evaluations of a draw where the user chooses nothing (`benchmarks/evaluations.py`)."""

DEFAULT_ACCEPT_PROB = 0.7
"""Target of the acceptance probability, for inner kernels that have one."""


class Shared(NamedTuple):
    """What all chains share; without a chain axis where chains are vectorized."""

    score_arrays: HoistedArrays
    """The network's arrays, kept here so that they are arguments of the compiled program."""
    grid: NoiseGrid
    """The segments of a pass; its times are `grid.t`, from noise to data."""
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

    With no other argument than the score, or with `evaluations`, a pass is made of Gaussian transitions of
    third order, at levels that are placed where passes learn most about their draws: the most accurate for
    a few dozen evaluations. With `segments`, `inner` or `target_accept_prob`, a kernel of the MALA family or
    another inner kernel takes steps in every segment.

    *Law.* Draws follow `p_{t_min}`, the law of the data noised to `t_min`, and are independent of each
    other once warmup is over. `GaussianTransition`, `ULA` and `ULD` are biased, and more segments or steps
    reduce the bias: on the laws of `benchmarks/evaluations.py`, 20,000 draws of 35 evaluations are about as
    far from the law as 20,000 exact draws. With the MALA family the error falls geometrically with
    `num_steps`, down to the error of the energy difference. The pass starts from a
    Gaussian with the measured mean and variance, by coordinate, of the data noised to the top of the grid.

    With `denoise=True` draws are those of clean data, up to the same error: `E[x_0 | x]` of such a draw plus
    independent normal noise of the measured denoising error of each coordinate. Their mean and their variance
    by coordinate are those of the data; of `x_0` given `x` the correlation, the shape, and how its spread
    varies with `x` are lost, all of the size of the noise of `t_min`.

    *Cost.* `evaluations` score evaluations per draw, or `num_segments * inner.evaluations_per_segment`, in
    `state.num_score_evals`. `init` makes more: 128 pilot draws (16 above 256 dimensions) of
    `44 + num_segments` evaluations (92 where levels are placed), which measure the terminal Gaussian, place
    levels and check the score, and up to 16,384 (1,024) for round trips that check the segments, or 4 of
    every segment if that is more. Only where a segment looks suspicious, 3,072 (160) further draws of 43
    evaluations and up to two round trips each.

    *Warmup* of inner kernels with steps learns, per segment, the mean curvature of `-log p_s` and a step
    size: dual averaging of the mean acceptance probability towards `target_accept_prob` for the MALA family,
    a rule based on the curvature for `ULA` and `ULD`; and, once for all segments, how the curvature is spread
    over coordinates. Nothing changes after warmup. With `num_warmup=0` step sizes assume the largest
    curvature any data can have, `1 / sigma_s^2`, which is safe and short. Gaussian transitions learn nothing,
    and need no warmup.

    *Failures.* If the network returns something non-finite where a segment starts, the pass is discarded: the
    draw before is kept and `diverging` is set. A non-finite proposal of an adjusted kernel is
    rejected and flagged.

    Args:
        score_fn: `score_fn(x, t)`: one event, scalar time, returns the score in the shape of `x`. Arguments
            of `MCMC.run(rng_key, *args, **kwargs)` are passed on: `score_fn(x, t, *args, **kwargs)`.
        event_shape: Shape of one event; may be left out if `init_params` is given to `MCMC.run`.
        schedule: The noising process. `None`: the schedule of `score_fn` if it has one (the adapters do),
            else `OU()`.
        segments: Number of segments (placed by `segment_times`), or a decreasing time grid. `None` with an
            `inner`: 32, or every step of a discrete schedule that has fewer.
        inner: The inner kernel; `None` with `segments` is `PreconditionedMALA()`, the member of the MALA
            family that measured best (`benchmarks/cost.py`).
        evaluations: Score evaluations of a draw, in place of `segments` and `inner`, which are then chosen
            for that many: `GaussianTransition(order=3)`, at levels that are placed when a run starts
            (`state.shared.grid.t`). `None`: 50, unless `segments`, `inner` or `target_accept_prob` is given.
        target_accept_prob: Acceptance probability that warmup aims at in every segment; `None` is 0.7.
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
        target_accept_prob: float | None = None,
        denoise: bool = False,
        site: str = "x",
    ) -> None:
        check_score_fn(score_fn)
        check_site(site)
        if target_accept_prob is not None:
            check_target_accept_prob(target_accept_prob)
        self._score_fn = score_fn
        self._event_shape = check_event_shape(event_shape)
        if not isinstance(denoise, bool):
            raise TypeError(f"`denoise` must be True or False, got {denoise!r}.")
        self._denoise = denoise
        self._schedule = schedule_or_assumed("RTKKernel", score_fn, schedule)
        own = {"segments": segments, "inner": inner, "target_accept_prob": target_accept_prob}
        if evaluations is None and all(value is None for value in own.values()):
            evaluations = DEFAULT_EVALUATIONS
        if evaluations is None:
            self._times = resolve_segments(self._schedule, segments, DEFAULT_SEGMENTS)
            self._noise = NoiseRange(self._schedule, t_min=self._times[-1], t_max=self._times[0])
            self._num_segments = self._times.size - 1
            self._inner = PreconditionedMALA() if inner is None else inner
        else:
            check_evaluations(evaluations, denoise, **own)
            self._times, self._noise = None, noise_range(self._schedule)
            self._num_segments = min(int(evaluations) - denoise, self._noise.max_segments)
            self._inner = GaussianTransition(order=3)
        check_kernel("inner", self._inner, score_fn, self.num_segments)
        self._target_accept_prob = float(
            DEFAULT_ACCEPT_PROB if target_accept_prob is None else target_accept_prob
        )
        self._site = site
        self._programs = Programs()

    def __repr__(self) -> str:
        shape = "that of init_params" if self._event_shape is None else self._event_shape
        noise = self._noise
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
    def segment_times(self) -> np.ndarray | None:
        """The time grid, shape `(num_segments + 1,)`, from noise to data.

        `None` where a run places its levels by what it measures: they are `state.shared.grid.t`, and may be
        given to another kernel as `segments`.
        """
        return None if self._times is None else self._times.copy()

    @property
    def num_segments(self) -> int:
        """Number of segments."""
        return self._num_segments

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
            f"(lowest {accept[worst]:.2f} in segment {worst}, t={state.shared.grid.t[worst + 1]:.2g}){failed}"
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
        x, t = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((), dtype)
        check_score_shape(self._score_fn, x, t, model_args, kwargs)
        arrays, _ = self._hoist(x, t, model_args, kwargs)
        settings = Settings(
            score_fn=self._score_fn,
            model=lambda arrays, args, kwargs: self._hoist(x, t, args, kwargs)[1](arrays),
            noise=self._noise,
            times=self._times,
            num_segments=self.num_segments,
            inner=self._inner,
            denoise=self._denoise,
            shape=shape,
            dtype=dtype,
        )
        grid, terminal, denoise_sd = measure_start(
            settings, self._programs, (arrays.arrays, model_args, kwargs)
        )
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
        return state._replace(shared=Shared(arrays, grid, terminal, denoise_sd))

    def _hoist(self, x: Any, t: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network's arrays, marked with all that a state of this kernel depends on."""
        found, rebuild = hoist(self._score_fn, x, t, args, kwargs)
        # What was learnt for one reverse kernel or grid means something else for another.
        levels = f"{self.num_segments} segments" if self._times is None else self._times.tolist()
        settings = f"{type(self._inner).__name__} on {levels} of {self._noise.fingerprint}"
        settings += ", denoised" * self._denoise
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
        tuner = self._tuner(state.shared.grid)

        def step(state: RTKState, shared: Shared) -> RTKState:
            return self._sample_chain(state, shared, model, tuner)

        chain = state._replace(shared=None)  # pyright: ignore[reportArgumentType]
        new = (over_chains(step, (0, None)) if batched else step)(chain, state.shared)
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
