"""The arguments of `ScoreHMC`, checked."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpyro.infer.hmc_util import warmup_adapter

from numpyro_rtk._moves._accept import ENERGY_ACCEPT_PROB, LINE_INTEGRAL_ACCEPT_PROB
from numpyro_rtk._moves._leapfrog import MIN_STEPS
from numpyro_rtk._numpyro._arguments import check_count, check_target_accept_prob


class Options(NamedTuple):
    """As `ScoreHMC` documents them."""

    step_size: float
    trajectory_length: float
    adapt_step_size: bool
    adapt_mass_matrix: bool
    dense_mass: bool | list[tuple[str, ...]]
    target_accept_prob: float | None
    inverse_mass_matrix: Any
    max_num_steps: int
    init_strategy: Callable[..., Any]

    def resolved(self, has_energy: bool) -> "Options":
        """The acceptance that warmup aims at chosen, for diffusion sites that all have an energy or not."""
        if self.target_accept_prob is not None:
            return self
        return self._replace(
            target_accept_prob=ENERGY_ACCEPT_PROB if has_energy else LINE_INTEGRAL_ACCEPT_PROB
        )

    def dense_blocks(self, names: Any) -> list[tuple[str, ...]]:
        """Blocks of the mass matrix that are dense, for latents of these names."""
        if isinstance(self.dense_mass, bool):
            return [tuple(sorted(names))] if self.dense_mass else []
        return self.dense_mass

    def adapter(self, names: Any, num_warmup: int) -> Any:
        """NumPyro's warmup, for latents of these names."""
        return warmup_adapter(
            num_warmup,
            adapt_step_size=self.adapt_step_size,
            adapt_mass_matrix=self.adapt_mass_matrix,
            dense_mass=self.dense_blocks(names),  # pyright: ignore[reportArgumentType] - as NumPyro documents
            target_accept_prob=self.target_accept_prob,  # pyright: ignore[reportArgumentType] - resolved
        )


def check_options(options: Options) -> Options:
    """The options with numbers as Python's own.

    Raises:
        TypeError, ValueError: for arguments that cannot work.
    """
    target = options.target_accept_prob
    if target is not None:
        check_target_accept_prob(target)
    dense_mass = options.dense_mass
    if not (
        isinstance(dense_mass, bool)
        or (isinstance(dense_mass, list) and all(isinstance(block, tuple) for block in dense_mass))
    ):
        raise TypeError(
            f"`dense_mass` must be True, False or a list of tuples of site names, got {dense_mass!r}."
        )
    check_count("max_num_steps", options.max_num_steps, MIN_STEPS, "leapfrog steps of a trajectory")
    if not callable(options.init_strategy):
        raise TypeError(
            "`init_strategy` must be a strategy of NumPyro such as `init_to_sample` or "
            f"`init_to_value(values=...)`, got {options.init_strategy!r}."
        )
    return options._replace(
        step_size=_positive("step_size", options.step_size),
        trajectory_length=_positive("trajectory_length", options.trajectory_length),
        adapt_step_size=bool(options.adapt_step_size),
        adapt_mass_matrix=bool(options.adapt_mass_matrix),
        target_accept_prob=None if target is None else float(target),
        max_num_steps=int(options.max_num_steps),
    )


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or np.ndim(value) != 0 or not (np.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a positive number, got {value!r}.")
    return float(value)
