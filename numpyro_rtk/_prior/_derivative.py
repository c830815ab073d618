"""The log density with its derivative, the score: in `x` alone, and refused in anything else."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from numpyro_rtk._custom_types import Event, Scalar, ScoreFn
from numpyro_rtk._prior._density import AbstractLogDensity, NoiseRange
from numpyro_rtk._prior._latents import descendants, Latents


class _Hoisted:
    """A function of one event, traced once, with all arrays it closes over taken out as arguments."""

    def __init__(self, function: Callable[[Event], Any], x: Event) -> None:
        closed, out = jax.make_jaxpr(function, return_shape=True)(x)
        self.arrays = list(closed.consts)
        self._evaluate = jax.jit(lambda arrays, x: jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, arrays))(x))
        self._structure = jax.tree.structure(out)

    def __call__(self, arrays: list[Any], x: Event) -> Any:
        return jax.tree.unflatten(self._structure, self._evaluate(arrays, x))


def log_density_with_score(
    density: AbstractLogDensity, score_fn: ScoreFn, noise: NoiseRange, x: Event, latents: Latents = ()
) -> Scalar:
    """Log density of one event at `t_min`, whose derivative in `x` is the score at `t_min`: one evaluation.

    In forward and reverse mode, under `vmap` and `jit`. The value is computed once, also together with the
    gradient, and is not differentiated. The score may close over tracers of `jit` or `vmap`; if the
    derivative with respect to one of them is asked for, this raises instead of dropping it.

    Args:
        density: How the value is computed.
        score_fn: `score_fn(x, t)`.
        noise: The noising process and its ends.
        x: One event, floating point.
        latents: Latents of the model that the prior belongs to.

    Raises:
        ValueError: when differentiated with respect to something that `score_fn` closes over, and for a value
            up to a constant that depends on a latent.
    """
    t = jnp.asarray(noise.t_min, x.dtype)
    value_of = _Hoisted(lambda x: density.log_density(score_fn, noise, x), x)
    if latents and not density.normalized(score_fn):
        _refuse_unnormalized(density, descendants(value_of.arrays, latents))
    joint = density.shares_evaluation(score_fn)
    score_of = _Hoisted(
        lambda x: density.log_density_and_score(score_fn, noise, x) if joint else score_fn(x, t),
        x,
    )

    # Whatever the functions close over is an argument, so that its tangent is seen below: a custom derivative
    # does not see, and would drop, the derivative with respect to what it closes over.
    @jax.custom_jvp
    def log_density(x: Event, value_arrays: list[Any], score_arrays: list[Any]) -> Scalar:
        del score_arrays
        return value_of(value_arrays, x)

    def rule(primals: Any, tangents: Any) -> tuple[Scalar, Scalar]:
        x, value_arrays, score_arrays = primals
        x_tangent, *other_tangents = tangents
        is_zero = [
            isinstance(leaf, SymbolicZero)
            for leaf in jax.tree.leaves(other_tangents, is_leaf=_is_symbolic_zero)
        ]
        if not all(is_zero):
            raise ValueError(
                "The log density of a `DiffusionPrior` was differentiated with respect to something that its "
                "`score_fn` (or `density`) depends on, such as another latent of the model. Its derivative "
                "is the score, in `x` only; the derivative in anything else would be dropped and the "
                "posterior be wrong. Make it data; or, where a kernel samples it by values alone, as "
                "`DiscreteHMCGibbs(NUTS(model))` does a discrete latent, use `density=ProbabilityFlow()`, "
                "whose values are normalised."
            )
        if isinstance(x_tangent, SymbolicZero):
            value = log_density(x, value_arrays, score_arrays)
            return value, jnp.zeros_like(value)
        if joint:
            value, score = score_of(score_arrays, x)
        else:
            value, score = log_density(x, value_arrays, score_arrays), score_of(score_arrays, x)
        return value, jnp.sum(score * x_tangent)

    log_density.defjvp(rule, symbolic_zeros=True)
    return log_density(x, value_of.arrays, score_of.arrays)


def _refuse_unnormalized(density: AbstractLogDensity, names: tuple[str, ...]) -> None:
    if not names:
        return
    on = " and ".join(map(repr, names))
    raise ValueError(
        f"The score of a `DiffusionPrior` depends on latent site{'s' * (len(names) > 1)} {on}, and its "
        f"`density={type(density).__name__}()` gives values up to a constant, which depends on {on} too: the "
        f"posterior of {on} would be wrong. Use `density=ProbabilityFlow()`, which is normalised, or an "
        f"energy that is (`EnergyScore(energy_fn, normalized=True)`), or pass {on} as data."
    )


def _is_symbolic_zero(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)
