r"""Score callables and adapters.

A *score callable* is any `score_fn(x, t)`: one event `x` of any shape, a scalar time `t`, returns
`grad_x log p_t(x)` in the shape and dtype of `x`. Further arguments, if any, come from
`MCMC.run(rng_key, *args, **kwargs)`, for networks that are conditioned on something.

A score callable may also have a method `energy(x, t)`, equal to `-log p_t(x)` up to a constant that
may depend on `t`; then exact Metropolis ratios are available.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_rtk._custom_types import Event, Scalar
from numpyro_rtk._noising._base import AbstractNoiseSchedule


def _check_network(owner: str, network: Any, schedule: Any) -> None:
    if not callable(network):
        raise TypeError(
            f"`{owner}(network=...)` must be callable as network(x, t), got {type(network).__name__}."
        )
    _check_schedule(owner, schedule)


def _check_schedule(owner: str, schedule: Any) -> None:
    if not isinstance(schedule, AbstractNoiseSchedule):
        hint = f" Did you mean `{schedule.__name__}()`?" if isinstance(schedule, type) else ""
        raise TypeError(
            f"`{owner}(schedule=...)` must be a noise schedule such as `OU()`, got {schedule!r}.{hint}"
        )


class AbstractNetworkScore(eqx.Module):
    """A score computed from a network that predicts something else; itself a score callable.

    One evaluation of the network per score. The network is called as
    `network(x, schedule.network_time(t), *args, **kwargs)` on one event.
    """

    network: eqx.AbstractVar[Callable[..., Any]]
    schedule: eqx.AbstractVar[AbstractNoiseSchedule]

    @abc.abstractmethod
    def _score(self, prediction: Event, x: Event, t: Scalar) -> Event:
        """The score, from the network's prediction at `(x, t)`."""

    def __call__(self, x: Event, t: Scalar, *args: Any, **kwargs: Any) -> Event:
        """Score of one event at scalar time `t`, in the shape of `x`."""
        prediction = self.network(x, self.schedule.network_time(t), *args, **kwargs)
        return self._score(prediction, x, t)


class NoisePrediction(AbstractNetworkScore):
    """Score of a network that predicts the noise `eps`: `-eps / sigma`.

    Args:
        network: `network(x, t)`, one event, returns the predicted `eps` in the shape of `x`.
        schedule: The schedule the network was trained with.

    References:
        Ho, Jain and Abbeel (2020), arXiv 2006.11239, section 3.2.
    """

    network: Callable[..., Any]
    schedule: AbstractNoiseSchedule

    def __check_init__(self) -> None:
        _check_network("NoisePrediction", self.network, self.schedule)

    def _score(self, prediction: Event, x: Event, t: Scalar) -> Event:
        return -prediction / self.schedule.sigma(t)


class DataPrediction(AbstractNetworkScore):
    """Score of a denoiser, a network that predicts `E[x_0 | x_t]`: `(alpha xhat - x) / sigma^2`.

    Args:
        network: `network(x, t)`, one event, returns the predicted data in the shape of `x`.
        schedule: The schedule the network was trained with.

    References:
        Tweedie's formula; Efron (2011), *Tweedie's formula and selection bias*.
    """

    network: Callable[..., Any]
    schedule: AbstractNoiseSchedule

    def __check_init__(self) -> None:
        _check_network("DataPrediction", self.network, self.schedule)

    def _score(self, prediction: Event, x: Event, t: Scalar) -> Event:
        return (self.schedule.alpha(t) * prediction - x) / self.schedule.sigma(t) ** 2


class VelocityPrediction(AbstractNetworkScore):
    """Score of a network that predicts `v = alpha eps - sigma x_0`.

    With `x = alpha x_0 + sigma eps` this gives `eps = (alpha v + sigma x) / (alpha^2 + sigma^2)`, so
    it holds for schedules that do not preserve the variance, too.

    Args:
        network: `network(x, t)`, one event, returns `v` in the shape of `x`.
        schedule: The schedule the network was trained with.

    References:
        Salimans and Ho (2022), arXiv 2202.00512, section 4.
    """

    network: Callable[..., Any]
    schedule: AbstractNoiseSchedule

    def __check_init__(self) -> None:
        _check_network("VelocityPrediction", self.network, self.schedule)

    def _score(self, prediction: Event, x: Event, t: Scalar) -> Event:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        noise = (alpha * prediction + sigma * x) / (alpha**2 + sigma**2)
        return -noise / sigma


class FlowVelocity(AbstractNetworkScore):
    """Score of a network that predicts the velocity `u = E[d x_t / dt]` of the interpolation.

    `u = alpha' x_0 + sigma' eps` and `x = alpha x_0 + sigma eps` give
    `eps = (alpha u - alpha' x) / (alpha sigma' - alpha' sigma)`; the derivatives of the schedule
    are taken by automatic differentiation.

    Args:
        network: `network(x, t)`, one event, returns `u` in the shape of `x`. Time runs from data to
            noise, as everywhere here: a network trained from noise (0) to data (1) needs
            `lambda x, t: -network(x, 1 - t)`.
        schedule: The interpolation, usually `FlowMatching()`.

    Raises:
        ValueError: for a schedule of discrete steps, which has no time derivative.

    References:
        Lipman et al. (2023), arXiv 2210.02747, section 4.
    """

    network: Callable[..., Any]
    schedule: AbstractNoiseSchedule

    def __check_init__(self) -> None:
        _check_network("FlowVelocity", self.network, self.schedule)
        if hasattr(self.schedule, "alphas_cumprod"):
            raise ValueError(
                "`FlowVelocity(schedule=...)` needs a schedule with continuous time; a `DiscreteVP` network "
                "predicts noise, data or v. Use `NoisePrediction`, `DataPrediction` or `VelocityPrediction`."
            )

    def _score(self, prediction: Event, x: Event, t: Scalar) -> Event:
        one = jnp.ones_like(t)
        alpha, alpha_rate = jax.jvp(self.schedule.alpha, (t,), (one,))
        sigma, sigma_rate = jax.jvp(self.schedule.sigma, (t,), (one,))
        noise = (alpha * prediction - alpha_rate * x) / (alpha * sigma_rate - alpha_rate * sigma)
        return -noise / sigma


class BatchedNetwork(eqx.Module):
    """Makes a network that only takes batches callable on one event.

    `network(x, t)` with `x` of shape `(batch, *event)` and `t` of shape `(batch,)` becomes a callable
    of one event and a scalar time: it is called with a batch of one. Under `vmap` (chains, particles)
    XLA sees one batched evaluation again.

    Args:
        network: The batched network; further array arguments get a leading axis of one, too.
    """

    network: Callable[..., Any]

    def __check_init__(self) -> None:
        if not callable(self.network):
            raise TypeError(
                f"`BatchedNetwork(network=...)` must be callable, got {type(self.network).__name__}."
            )

    def __call__(self, x: Event, t: Array, *args: Any, **kwargs: Any) -> Event:
        """Prediction for one event, shape of `x`."""
        args, kwargs = jax.tree.map(
            lambda leaf: jnp.asarray(leaf)[None] if eqx.is_array_like(leaf) else leaf, (args, kwargs)
        )
        return self.network(x[None], jnp.asarray(t)[None], *args, **kwargs)[0]
