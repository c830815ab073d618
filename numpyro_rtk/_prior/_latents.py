"""Whether what a prior is made of descends from a latent of the model that is being run.

A density is a function of `x` alone. Where its score also depends on a latent, the value must be normalised,
or that latent is sampled from the wrong law. NumPyro's kernels run models as they are, so the prior itself
has to look: when it is made it notes the latents of the model that is running, and in `log_prob` it follows
the tracers that its score closes over back to them. Arguments of the model and arrays of networks are tracers
too, and no concern here.
"""

from typing import Any

from jax.core import Tracer
from numpyro import handlers, primitives


Latents = tuple[tuple[str, Any], ...]
"""Names and traced values of latents."""


def running_latents() -> Latents:
    """The latents that the model which is being run has met so far, what a composite conditions on included;
    none outside a model.
    """
    stack, found, given = primitives._PYRO_STACK, {}, set()
    for handler in stack:
        if isinstance(handler, handlers.condition | handlers.substitute):
            given |= set(handler.data or {})
    for handler in stack:
        if not isinstance(handler, handlers.trace):
            continue
        for name, site in handler.trace.items():
            is_latent = site["type"] == "sample" and (not site["is_observed"] or name in given)
            if is_latent and isinstance(site["value"], Tracer):
                found[name] = site["value"]
    return tuple(found.items())


def descendants(values: list[Any], latents: Latents) -> tuple[str, ...]:
    """Names of the latents from which any of the values were computed.

    A transformation that keeps no record (`vmap` or `grad` outside of `jit`) counts as computing everything
    from everything.
    """
    origins, lost = _origins(values)
    names = []
    for name, value in latents:
        own, traces = _identities(value)
        if own & origins or traces & lost:
            names.append(name)
    return tuple(names)


def _inside(tracer: Any) -> list[Any]:
    """What a tracer of `vmap` or `grad` wraps, and the outer value that one of `jit` stands for."""
    lowered = tracer.full_lower()
    wrapped = [getattr(tracer, name, None) for name in ("val", "primal", "tangent")]
    return [one for one in [lowered, *wrapped] if isinstance(one, Tracer) and one is not tracer]


def _identity(tracer: Any) -> set[int]:
    """Tracers of one variable of a program are not always one object."""
    return {id(tracer), id(getattr(tracer, "val", tracer))}


def _identities(value: Any) -> tuple[set[int], set[int]]:
    """Of a tracer and of what it wraps, and the transformations they belong to."""
    waiting, own, traces = [value], set(), set()
    while waiting:
        tracer = waiting.pop()
        own |= _identity(tracer)
        traces.add(id(tracer._trace))
        waiting += _inside(tracer)
    return own, traces


def _origins(values: list[Any]) -> tuple[set[int], set[int]]:
    """All that values were computed from, and the transformations that keep no record of it."""
    waiting = [value for value in values if isinstance(value, Tracer)]
    origins: set[int] = set()
    lost: set[int] = set()
    while waiting:
        tracer = waiting.pop()
        if id(tracer) in origins:
            continue
        origins |= _identity(tracer)
        inside, parent = _inside(tracer), getattr(tracer, "parent", None)
        if parent is not None:
            inside += [one for one in parent.in_tracers if isinstance(one, Tracer)]
        elif not hasattr(tracer, "parent") and not inside:
            lost.add(id(tracer._trace))
        waiting += inside
    return origins, lost
