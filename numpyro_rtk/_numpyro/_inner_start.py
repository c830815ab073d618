"""Where the inner kernel of `RTKGibbs` starts: at the values that were given, as each NumPyro kernel reads
them.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array
from numpyro.infer.gibbs import CustomGibbs, DiscreteGibbs, prototype_trace
from numpyro.infer.hmc import HMC
from numpyro.infer.util import _transforms_from_trace, log_density, transform_fn

from numpyro_rtk._numpyro._derivatives import refuse_without_derivative


def start_inner(
    kernel: Any,
    rng_key: Any,
    num_warmup: int,
    given: dict[str, Array],
    values: dict[str, Array],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """State of the inner kernel of one chain.

    Args:
        kernel: Any NumPyro kernel but `ScoreHMC`.
        rng_key: One key.
        num_warmup: Length of the warmup.
        given: Constrained values that were given, of its sites and others.
        values: Constrained values of all its sites, given or not.
        args: Arguments of the model.
        kwargs: Keyword arguments of the model, with the values of the diffusion sites.
    """
    if isinstance(kernel, HMC):
        _refuse_without_derivative(kernel, values, args, kwargs)
        own = {name: value for name, value in given.items() if name in values}
        state = kernel.init(rng_key, num_warmup, None, args, kwargs)
        if not own:
            return state
        # What was not given stays where the kernel's own strategy put it.
        start = state.z | _unconstrained(kernel, rng_key, own, args, kwargs)
        return kernel.init(rng_key, num_warmup, start, args, kwargs)
    if not isinstance(kernel, CustomGibbs | DiscreteGibbs):
        # A composite with a Hamiltonian block reads unconstrained values of continuous sites.
        values = values | _unconstrained(kernel, rng_key, values, args, kwargs)
    return kernel.init(rng_key, num_warmup, values, args, kwargs)


def _refuse_without_derivative(
    kernel: HMC, values: dict[str, Array], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    refuse_without_derivative(
        f"RTKGibbs({type(kernel).__name__}(model))",
        lambda values: log_density(kernel.model, args, kwargs, values)[0],
        {name: jnp.asarray(value) for name, value in values.items()},
        f"Its inner kernel moves {sorted(values)} along gradients. Use one without them, such as NumPyro's "
        "`CustomGibbs`, or write that part of the model in JAX.",
    )


def _unconstrained(
    kernel: Any, rng_key: Any, values: dict[str, Array], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Array]:
    """Unconstrained values of continuous sites."""
    trace = prototype_trace(kernel.model, rng_key, args, kwargs)
    names = tuple(name for name in values if not trace[name]["fn"].support.is_discrete)
    transforms: Any = _transforms(trace, names).inv_transforms
    return transform_fn(transforms, {name: values[name] for name in names}, invert=True)


def _transforms(trace: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Transforms of some sites."""
    own: Any = {name: site for name, site in trace.items() if site["type"] != "sample" or name in names}
    return _transforms_from_trace(own, raise_warnings=False)
