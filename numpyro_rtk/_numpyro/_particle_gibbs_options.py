"""The arguments of `RTKParticleGibbs`, checked, and what `None` means among them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from numpyro_rtk._moves._line_integral import ExactEnergy, Simpson
from numpyro_rtk._numpyro._arguments import check_count, check_target_accept_prob
from numpyro_rtk._numpyro._derivatives import in_short, why_no_score_derivative
from numpyro_rtk._numpyro._sites import DiffusionSite
from numpyro_rtk._reverse._base import AbstractInnerKernel, check_reverse_kernel
from numpyro_rtk._reverse._preconditioned_mala import PreconditionedMALA
from numpyro_rtk._score._model import has_energy
from numpyro_rtk._smc._local import AbstractLocalMove, LocalHMC
from numpyro_rtk._smc._twist import AbstractTwist
from numpyro_rtk._thresholds import MANY_DIMENSIONS, MAX_MEAN_SLOPE_DIM
from numpyro_rtk._tuning._sweeps import ParticleGibbsAdaptState


DEFAULT_LEVEL_SEGMENTS = 24
"""Segments between noise levels where the user names none."""

PARTICLES, FEW_PARTICLES = 16, 2
"""Particles where the user names no number; few where gradient moves do the work."""

LONG_LOCAL = LocalHMC(num_steps=100, num_trajectories=1)
"""Local moves where gradient moves do the work; elsewhere `LocalHMC()`."""

INFORMATIVE_SHARE = 0.25
"""Observations for each coordinate of many from which data are taken to inform all of them, so that particles
cannot follow and gradient moves do the work."""

PILOT_DRAWS, PILOT_DRAWS_IN_MANY = 128, 32
"""Prior draws that measure the levels where the user names no number; in many dimensions each tells more."""

MAX_INNER_STEP_SIZE = 4.0
"""`max_step_size` of the default reverse kernel where energy differences are good: nearly an independent
draw."""


class Options(NamedTuple):
    """As `RTKParticleGibbs` documents them; `resolved` for a model, none of them is left to be chosen but by
    warmup.
    """

    num_particles: Any
    segments: Any
    reverse: AbstractInnerKernel | None
    twist: AbstractTwist | None
    num_guided_steps: int
    num_start_steps: int
    num_restarts: int
    sweep_prob: float | None
    refresh_depths: tuple[float, ...]
    guidance: Literal["jacobian", "mean"] | None
    local: Any
    target_accept_prob: float
    num_pilot_draws: Any
    batch_size: int | None
    num_elements: int | None = None
    """Elements that the options are chosen for, where a start has counted them."""

    @property
    def start_steps(self) -> int:
        """Guided steps of unconditional sweeps."""
        return max(self.num_start_steps, self.num_guided_steps)

    @property
    def takes_gradients(self) -> bool:
        """Whether anything asks for the derivative of the likelihood."""
        tempered = self.twist is not None and not self.twist.gaussian
        return not tempered or self.start_steps > 0 or self.local is not None

    def over_chains(self, function: Callable[[Any], Any], inputs: Any) -> Any:
        """`function` of every chain, as many at once as `batch_size` allows."""
        num_chains = jax.tree.leaves(inputs)[0].shape[0]
        at_once = num_chains if self.batch_size is None else max(1, self.batch_size // self.num_particles)
        if at_once >= num_chains:
            return jax.vmap(function)(inputs)
        return jax.lax.map(function, inputs, batch_size=at_once)

    def sweep_prob_of(self, adapted: ParticleGibbsAdaptState) -> Any:
        """Probability of a sweep: what was given, or else what warmup learnt; 1 where nothing else moves."""
        if self.sweep_prob is None:
            return 1.0 if self.local is None else adapted.sweep_prob
        return self.sweep_prob

    def depths(self, num_levels: int) -> tuple[int, ...]:
        """The depths that warmup chooses among, in levels."""
        return tuple(sorted({max(1, round(fraction * num_levels)) for fraction in self.refresh_depths}))

    def kernel_for(self, sites: tuple[DiffusionSite, ...], num_elements: int) -> AbstractInnerKernel:
        """The reverse kernel that was given, or the default for these sites in so many elements."""
        if self.reverse is not None:
            return self.reverse
        if all(has_energy(site.prior.score_fn) for site in sites):
            return PreconditionedMALA(energy_difference=ExactEnergy(), max_step_size=MAX_INNER_STEP_SIZE)
        if _dim(sites) / num_elements > MAX_MEAN_SLOPE_DIM:
            return PreconditionedMALA()
        # The cost of two steps with the trapezoid rule, and hardly any error in a prior of several modes.
        return PreconditionedMALA(num_steps=1, energy_difference=Simpson(), max_step_size=MAX_INNER_STEP_SIZE)

    def resolved(
        self, sites: tuple[DiffusionSite, ...], num_elements: int, num_observations: Callable[[], int]
    ) -> "Options":
        """With what was not given chosen for a model.

        Args:
            sites: Its diffusion sites.
            num_elements: Elements that they fall into.
            num_observations: Counts the observed numbers that depend on them.
        """
        many, gradients = _dim(sites) / num_elements > MANY_DIMENSIONS, False
        largest = max(math.prod(site.prior.event_shape) for site in sites)
        if many and self.local is not None and (self.num_particles is None or self.local == "default"):
            gradients = num_observations() >= INFORMATIVE_SHARE * _dim(sites)
        return self._replace(
            num_particles=_or(self.num_particles, FEW_PARTICLES if gradients else PARTICLES),
            num_pilot_draws=_or(
                self.num_pilot_draws, PILOT_DRAWS_IN_MANY if largest > MANY_DIMENSIONS else PILOT_DRAWS
            ),
            local=(LONG_LOCAL if gradients else LocalHMC()) if self.local == "default" else self.local,
        )

    def jacobian_for(self, sites: tuple[DiffusionSite, ...], num_elements: int) -> bool:
        """Whether guided moves go through the denoiser's Jacobian.

        Raises:
            ValueError: where that was asked for and a score has none.
        """
        few = _dim(sites) / num_elements <= MAX_MEAN_SLOPE_DIM
        if self.guidance == "mean" or (self.guidance is None and few) or not self.takes_gradients:
            return False
        for site in sites:
            error = why_no_score_derivative(site)
            if error is not None and self.guidance is None:
                return False
            if error is not None:
                raise ValueError(
                    f'`guidance="jacobian"` asks for the derivative of the score of diffusion site '
                    f'{site.name!r}, which has none: {in_short(error)}. Use `guidance="mean"`.'
                )
        return True

    def restarts_at(self, iteration: Any, num_warmup: Any) -> Any:
        """Whether an iteration of the warmup draws the sites anew: 0, 1, 3, 7, ..., in its first half.

        Never one after it, as a restart leaves no law invariant.
        """
        is_due = (iteration & (iteration + 1)) == 0
        return is_due & (iteration < 2 ** min(self.num_restarts - 1, 30)) & (2 * iteration < num_warmup)


class Chosen(NamedTuple):
    """What the options came to for a model."""

    options: Options
    """With what was chosen for the model."""
    reverse: AbstractInnerKernel
    """Reverse kernel."""
    num_levels: int
    """Noise levels."""
    jacobian: bool
    """Whether guided moves go through the denoiser's Jacobian."""
    num_elements: int
    """Elements that move apart."""
    most_evaluations: int
    """Score evaluations of an iteration with a full sweep, over all events of all sites."""


def describe(options: Options, chosen: Chosen | None) -> str:
    """The options in words, with what was chosen for the model once a start has seen it."""
    later = "chosen at the start"
    segments = DEFAULT_LEVEL_SEGMENTS if options.segments is None else options.segments
    if np.ndim(segments):
        segments = f"{np.size(segments) - 1} given"
    reverse: Any = options.reverse
    guidance: Any = options.guidance
    evaluations = elements = ""
    if chosen is not None:
        options = chosen.options
        segments = chosen.num_levels - 1 if options.segments is None else segments
        reverse, guidance = chosen.reverse, "jacobian" if chosen.jacobian else "mean"
        elements = f", elements={chosen.num_elements}" if chosen.num_elements > 1 else ""
        evaluations = f", at most {chosen.most_evaluations} score evaluations an iteration"
    twist = "GaussianTwist(), tempered where not Gaussian" if options.twist is None else options.twist
    local = {"None": "none", "default": later}.get(str(options.local), options.local)
    particles: Any = _or(options.num_particles, later)
    sweep_prob = "adapted" if options.sweep_prob is None else f"{options.sweep_prob:g}"
    return (
        f"num_particles={particles}, segments={segments}, reverse={reverse or later}, "
        f"twist={twist}, num_guided_steps={options.num_guided_steps}, guidance={guidance or later}, "
        f"sweep_prob={sweep_prob}, local={_shown(local)}{elements}{evaluations}"
    )


def _or(given: Any, default: Any) -> Any:
    return default if given is None else given


def _shown(local: Any) -> str:
    """A local move, without `None` for a step size that is adapted."""
    return str(local).replace("step_size=None", "step_size=adapted")


def _dim(sites: tuple[DiffusionSite, ...]) -> int:
    return sum(math.prod(site.shape) for site in sites)


def check_options(options: Options) -> Options:
    """The same, each in its type; raises for what cannot work, naming the argument."""
    counts = (
        ("num_guided_steps", 0, "0 is none"),
        ("num_start_steps", 0, "0 is none"),
        ("num_restarts", 0, "0 is none"),
    )
    for name, minimum, why in counts:
        check_count(name, getattr(options, name), minimum, why)
    if options.num_particles is not None:
        check_count("num_particles", options.num_particles, 2, "one of them is pinned to the current draw")
    if options.num_pilot_draws is not None:
        why = "they measure the denoising error of each level"
        check_count("num_pilot_draws", options.num_pilot_draws, 8, why)
    if options.batch_size is not None:
        check_count("batch_size", options.batch_size, 1, "`None` is no bound")
    sweep_prob = options.sweep_prob
    if sweep_prob is not None:
        if not (isinstance(sweep_prob, int | float | np.floating) and 0 <= sweep_prob <= 1):
            raise ValueError(f"`sweep_prob` must be between 0 and 1, got {sweep_prob!r}.")
        sweep_prob = float(sweep_prob)
    if sweep_prob == 0 and options.local is None:
        raise ValueError("`sweep_prob=0` with `local=None` would never move: give one of them.")
    check_target_accept_prob(options.target_accept_prob)
    if options.reverse is not None:
        check_reverse_kernel("reverse", options.reverse)
        if options.reverse.history:
            raise ValueError(
                f"`reverse={options.reverse!r}` extrapolates from the segment before, and a particle's "
                f"segment "
                "has none that is its own: it would be of first order. Use `GaussianTransition()`, or a "
                "kernel "
                "with an accept step such as `PreconditionedMALA()`."
            )
    _check_member("twist", options.twist, AbstractTwist, "`GaussianTwist()`, `TemperedTwist()` or `None`")
    if not (isinstance(options.local, str) and options.local == "default"):
        allowed = "`LocalHMC(...)`, `LocalMALA(...)` or `None`"
        _check_member("local", options.local, AbstractLocalMove, allowed)
    if options.guidance not in (None, "jacobian", "mean"):
        raise ValueError(f'`guidance` must be "jacobian", "mean" or `None`, got {options.guidance!r}.')
    return options._replace(
        num_particles=None if options.num_particles is None else int(options.num_particles),
        num_guided_steps=int(options.num_guided_steps),
        num_start_steps=int(options.num_start_steps),
        num_restarts=int(options.num_restarts),
        sweep_prob=sweep_prob,
        refresh_depths=_check_depths(options.refresh_depths),
        target_accept_prob=float(options.target_accept_prob),
        num_pilot_draws=None if options.num_pilot_draws is None else int(options.num_pilot_draws),
    )


def _check_member(name: str, value: Any, kind: type, expected: str) -> None:
    if value is not None and not isinstance(value, kind):
        hint = f" Did you mean `{value.__name__}()`?" if isinstance(value, type) else ""
        raise TypeError(f"`{name}` must be {expected}, got {value!r}.{hint}")


def _check_depths(refresh_depths: Sequence[float]) -> tuple[float, ...]:
    try:
        depths = np.asarray(refresh_depths, np.float64)
    except (TypeError, ValueError):
        depths = np.asarray(np.nan)
    if depths.ndim != 1 or not depths.size or not np.all((depths > 0) & (depths <= 1)):
        raise ValueError(
            "`refresh_depths` must be fractions of the levels, each above 0 and at most 1, such as "
            f"`(1.0, 0.5)`, got {refresh_depths!r}."
        )
    return tuple(float(depth) for depth in depths)
