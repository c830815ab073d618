"""Checks of what a user hands to a kernel, besides those it shares with the prior."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_site(site: Any) -> None:
    """Raise unless `site` is a usable name."""
    if not isinstance(site, str) or not site:
        raise TypeError(f"`site` must be a non-empty string, got {site!r}.")


def check_count(name: str, value: Any, minimum: int, why: str) -> None:
    """Raise unless it is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum} ({why}), got {value!r}.")


def check_target_accept_prob(value: Any) -> None:
    """Raise unless it is inside (0, 1)."""
    if not (isinstance(value, int | float | np.floating) and 0 < value < 1):
        raise ValueError(f"`target_accept_prob` must be strictly between 0 and 1, got {value!r}.")


def read_init_params(init_params: Any, site: str, event_shape: tuple[int, ...] | None, batched: bool) -> Any:
    """The initial value of the site from `init_params`, or `None`; checks shape and dtype."""
    if init_params is None:
        if event_shape is None:
            raise ValueError(
                "`event_shape` is missing: pass `event_shape=(...)` to the kernel, or "
                f'`init_params={{"{site}": array}}` to `MCMC.run` with the shape of one event.'
            )
        return None
    if isinstance(init_params, dict):
        if set(init_params) != {site}:
            raise ValueError(
                f"`init_params` must have the single key {site!r} (the kernel's `site`), got "
                f"{sorted(init_params)}."
            )
        value = init_params[site]
    else:
        value = init_params
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"`init_params[{site!r}]` must be real floating point, got dtype {value.dtype}. "
            "Diffusion models noise real numbers; convert with `.astype(float)`"
            + (
                ", or stack real and imaginary parts."
                if jnp.issubdtype(value.dtype, jnp.complexfloating)
                else "."
            )
        )
    shape = value.shape[1:] if batched else value.shape
    if 0 in shape:
        raise ValueError(f"`init_params[{site!r}]` is empty (event shape {shape}); nothing can be sampled.")
    if event_shape is not None and shape != event_shape:
        raise ValueError(
            f"`init_params[{site!r}]` has event shape {shape}, but the kernel was given "
            f"`event_shape={event_shape}`." + (" Its leading axis is the chain axis." if batched else "")
        )
    if not isinstance(value, Tracer) and not np.all(np.isfinite(np.asarray(value))):
        raise ValueError(f"`init_params[{site!r}]` contains NaN or infinity.")
    return value
