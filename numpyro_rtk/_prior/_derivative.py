"""The log density with its derivative, the score: in `x` alone, and refused in anything else."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array

from numpyro_rtk._custom_types import Event, Scalar, ScoreFn
from numpyro_rtk._prior._density import AbstractLogDensity, NoiseRange
from numpyro_rtk._prior._latents import descendants, Latents
from numpyro_rtk._reverse._pilot import terminal_of
from numpyro_rtk._score._model import resolve_score


class _Hoisted:
    """A function of one event and its condition, traced once, with all arrays it closes over as arguments."""

    def __init__(self, function: Callable[..., Any], *inputs: Any) -> None:
        closed, out = jax.make_jaxpr(function, return_shape=True)(*inputs)
        self.arrays = list(closed.consts)
        self._evaluate = jax.jit(
            lambda arrays, *inputs: jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, arrays))(*inputs)
        )
        self._structure = jax.tree.structure(out)

    def __call__(self, arrays: list[Any], *inputs: Any) -> Any:
        return jax.tree.unflatten(self._structure, self._evaluate(arrays, *inputs))


def log_density_with_score(
    density: AbstractLogDensity,
    score_fn: ScoreFn,
    noise: NoiseRange,
    x: Event,
    latents: Latents = (),
    condition: Array | None = None,
) -> Scalar:
    """Log density of one event at `t_min`, whose derivative in `x` is the score at `t_min`: one evaluation.

    In forward and reverse mode, under `vmap` and `jit`. The value is computed once, also together with the
    gradient, and is differentiated in the condition alone, where it is normalised: once for each of its
    coordinates, if that is asked for. The score may close over tracers of `jit` or `vmap`; if the derivative
    with respect to one of them is asked for, this raises instead of dropping it.

    Args:
        density: How the value is computed.
        score_fn: `score_fn(x, t)`, or `score_fn(x, t, condition)`.
        noise: The noising process and its ends.
        x: One event, floating point.
        latents: Latents of the model that the prior belongs to.
        condition: Of this event, where there is one.

    Raises:
        ValueError: when differentiated with respect to something that `score_fn` closes over, or to a
            condition of which values are known up to a constant; and for such a value that depends on a
            latent.
    """
    t, given = jnp.asarray(noise.t_min, x.dtype), () if condition is None else (condition,)

    def value(x: Event, *given: Array) -> Scalar:
        if not given:
            return density.log_density(score_fn, noise, x)
        member, own = resolve_score(score_fn).given(*given), density
        if density.needs_terminal:
            own = density.ending_in(terminal_of(member, noise, x.shape, x.dtype))
        return own.log_density(member, noise, x)

    def score(x: Event, *given: Array) -> Any:
        if joint:
            of = resolve_score(score_fn).given(*given) if given else score_fn
            return density.log_density_and_score(of, noise, x)
        return score_fn(x, t, *given)

    joint = density.shares_evaluation(score_fn)
    value_of = _Hoisted(value, x, *given)
    if latents and not density.normalized(score_fn):
        _refuse_unnormalized(density, descendants([*value_of.arrays, *given], latents))
    score_of = _Hoisted(score, x, *given)

    # Whatever the functions close over is an argument, so that its tangent is seen below: a custom derivative
    # does not see, and would drop, the derivative with respect to what it closes over.
    @jax.custom_jvp
    def log_density(
        x: Event, given: tuple[Array, ...], value_arrays: list[Any], score_arrays: list[Any]
    ) -> Scalar:
        del score_arrays
        return value_of(value_arrays, x, *given)

    def rule(primals: Any, tangents: Any) -> tuple[Scalar, Scalar]:
        x, given, value_arrays, score_arrays = primals
        x_tangent, given_tangent, *other_tangents = tangents
        if not all(map(_is_symbolic_zero, jax.tree.leaves(other_tangents, is_leaf=_is_symbolic_zero))):
            raise ValueError(
                "The log density of a `DiffusionPrior` was differentiated with respect to something that its "
                "`score_fn` (or `density`) depends on, such as another latent of the model. Its derivative "
                "is the score, in `x` only; the derivative in anything else would be dropped and the "
                "posterior be wrong. Make it data, or a `condition` of the prior, `DiffusionPrior(..., "
                "condition=c)`, which `RTKGibbs(NUTS(model))` samples; or, where a kernel samples it by "
                "values alone, as `DiscreteHMCGibbs(NUTS(model))` does a discrete latent, use "
                "`density=ProbabilityFlow()`, whose values are normalised."
            )
        value, slope = None, jnp.zeros((), x.dtype)
        if not _is_symbolic_zero(x_tangent):
            if joint:
                value, own = score_of(score_arrays, x, *given)
            else:
                own = score_of(score_arrays, x, *given)
            slope += jnp.sum(own * x_tangent)
        if given and not _is_symbolic_zero(given_tangent[0]):
            _refuse_derivative(density, score_fn)
            slope += jnp.sum(
                _condition_gradient(density, value_of, value_arrays, x, *given) * given_tangent[0]
            )
        if value is None:
            value = log_density(x, given, value_arrays, score_arrays)
        return value, slope

    log_density.defjvp(rule, symbolic_zeros=True)
    return log_density(x, given, value_of.arrays, score_of.arrays)


def _condition_gradient(
    density: AbstractLogDensity, value_of: _Hoisted, arrays: list[Any], x: Event, condition: Array
) -> Array:
    """Gradient of the value in the condition."""
    derivative = jax.jacfwd if density.forward_mode else jax.grad
    return derivative(lambda condition: value_of(arrays, x, condition))(condition)


def _refuse_derivative(density: AbstractLogDensity, score_fn: Any) -> None:
    if not density.normalized(score_fn):
        raise ValueError(
            "The log density of a `DiffusionPrior` was differentiated with respect to its `condition`, and "
            f"its `density={type(density).__name__}()` gives values up to a constant, which depends on the "
            "condition too: the posterior would be wrong. Use `RTKGibbs(NUTS(model))`, which samples a "
            "condition with any network; or `density=ProbabilityFlow()`, which is normalised; or an energy "
            "that is (`EnergyScore(energy_fn, normalized=True)`)."
        )


def _refuse_unnormalized(density: AbstractLogDensity, names: tuple[str, ...]) -> None:
    if not names:
        return
    on = " and ".join(map(repr, names))
    raise ValueError(
        f"The score of a `DiffusionPrior` depends on latent site{'s' * (len(names) > 1)} {on}, and its "
        f"`density={type(density).__name__}()` gives values up to a constant, which depends on {on} too: the "
        f"posterior of {on} would be wrong. Use `RTKGibbs(NUTS(model))` with {on} as its `condition`, "
        "`DiffusionPrior(..., condition=c)`; or `density=ProbabilityFlow()`, which is normalised, or an "
        f"energy that is (`EnergyScore(energy_fn, normalized=True)`); or pass {on} as data."
    )


def _is_symbolic_zero(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)
