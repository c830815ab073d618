"""Checks of what a user hands to a kernel, besides those it shares with the prior."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array
from numpyro.infer.initialization import init_to_value


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


def check_evaluations(value: Any, denoise: bool, **others: Any) -> None:
    """Raise unless it is an integer that leaves an evaluation for a segment, and chooses what others do not.

    Args:
        value: Score evaluations of a draw.
        denoise: Whether one of them denoises the draw.
        **others: Arguments that it stands in the place of.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"`evaluations` must be a number of score evaluations, got {value!r}.")
    if value < 1 + denoise:
        why = ", one of them for `denoise=True`" if denoise else ""
        raise ValueError(f"`evaluations` must be at least {1 + denoise}{why}, got {value}.")
    for name, other in others.items():
        if other is not None:
            raise ValueError(
                f"`evaluations={value}` chooses `{name}` itself, got `{name}={other!r}` too. Leave one "
                "of them out."
            )


def read_event(init_params: Any, site: str, event_shape: tuple[int, ...] | None, batched: bool) -> Any:
    """The initial value of the one site of a kernel without a model, an array or `{site: array}`; `None` if
    there is none.

    Raises:
        TypeError, ValueError: as `read_init_params` does, and if the shape is not known from anywhere.
    """
    if init_params is None:
        if event_shape is None:
            raise ValueError(
                "`event_shape` is missing: pass `event_shape=(...)` to the kernel, or "
                f'`init_params={{"{site}": array}}` to `MCMC.run` with the shape of one event.'
            )
        return None
    if not isinstance(init_params, dict):
        init_params = {site: init_params}
    if set(init_params) != {site}:
        raise ValueError(
            f"`init_params` must have the single key {site!r} (the kernel's `site`), got "
            f"{sorted(init_params)}."
        )
    value = jnp.asarray(init_params[site])
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
    _check_finite(site, value)
    return value


def read_init_params(init_params: Any, trace: Any, num_chains: int | None) -> dict[str, Array]:
    """The start that a user gives: constrained values of some or all latents of a model, by name.

    Args:
        init_params: As the user gave it; `None` for no start.
        trace: A trace of the model; its latents are those that may be named.
        num_chains: Number of vectorized chains, the leading axis of every value; `None` for one chain.

    Returns:
        The values in the dtypes of the sites; `{}` if there are none.

    Raises:
        TypeError, ValueError: for anything but a dict, names that are no latents, shapes that are not those
            of the sites, values that are not finite or outside the support.
    """
    if init_params is None:
        return {}
    if not isinstance(init_params, dict):
        raise TypeError(
            "`init_params` must be a dict of constrained values, `{site: value}`, got "
            f"{type(init_params).__name__}."
        )
    latents = _latents(trace)
    if not set(init_params) <= set(latents):
        raise ValueError(
            f"`init_params` has {sorted(set(init_params) - set(latents))}, but the latents are "
            f"{sorted(latents)}."
        )
    return {name: _read(name, value, latents[name], num_chains) for name, value in init_params.items()}


def read_start(init_params: Any, init_strategy: Any, trace: Any, num_chains: int | None) -> dict[str, Array]:
    """The same with the values of `init_to_value(values=...)`, which `init_params` takes the place of.

    What `init_strategy` says of sites that are no latents is ignored, as in NumPyro.
    """
    latents, values = _latents(trace), {}
    if getattr(init_strategy, "func", None) is init_to_value:
        values = {name: v for name, v in init_strategy.keywords["values"].items() if name in latents}
    given = {name: _read(name, value, latents[name], None, "values") for name, value in values.items()}
    if num_chains is not None:
        given = {name: jnp.broadcast_to(v[None], (num_chains, *v.shape)) for name, v in given.items()}
    return given | read_init_params(init_params, trace, num_chains)


def resolved_strategy(init_strategy: Any) -> functools.partial[Any]:
    """`init_to_sample` and `init_to_sample()` are the same, as in NumPyro."""
    return init_strategy if isinstance(init_strategy, functools.partial) else init_strategy()


def _latents(trace: Any) -> dict[str, Any]:
    """Latent sample sites of a trace."""
    return {
        name: site for name, site in trace.items() if site["type"] == "sample" and not site["is_observed"]
    }


def _read(name: str, value: Any, site: Any, num_chains: int | None, where: str = "init_params") -> Array:
    """One value, checked against its site."""
    shape, dtype = jnp.shape(site["value"]), jnp.result_type(site["value"])
    value = jnp.asarray(value)
    expected = shape if num_chains is None else (num_chains, *shape)
    if value.shape != expected:
        raise ValueError(
            f"`{where}[{name!r}]` has shape {value.shape}; site {name!r} has shape {shape}"
            + ("." if num_chains is None else f", so that {num_chains} chains take {expected}.")
        )
    if not jnp.can_cast(value.dtype, dtype, "same_kind"):
        raise TypeError(f"`{where}[{name!r}]` must be of dtype {dtype}, got {value.dtype}.")
    _check_finite(name, value, where)
    support = site["fn"].support
    # Bounds that are arrays may depend on other latents, whose values in a trace are placeholders.
    fixed = not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(support))
    if fixed and not isinstance(value, Tracer) and not np.all(np.asarray(support(value))):
        raise ValueError(
            f"`{where}[{name!r}]` is outside the support of its law, {support}. Starts are constrained "
            f"values, as the model sees them."
        )
    return value.astype(dtype)


def _check_finite(name: str, value: Array, where: str = "init_params") -> None:
    if not isinstance(value, Tracer) and not np.all(np.isfinite(np.asarray(value))):
        raise ValueError(f"`{where}[{name!r}]` contains NaN or infinity.")
