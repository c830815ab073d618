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
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_rtk._custom_types import Event, RandomKey, Scalar
from numpyro_rtk._schedule import AbstractNoiseSchedule


def _check_network(owner: str, network: Any, schedule: Any) -> None:
    if not callable(network):
        raise TypeError(f"`{owner}(network=...)` must be callable as network(x, t), got {type(network).__name__}.")
    _check_schedule(owner, schedule)


def _check_schedule(owner: str, schedule: Any) -> None:
    if not isinstance(schedule, AbstractNoiseSchedule):
        hint = f" Did you mean `{schedule.__name__}()`?" if isinstance(schedule, type) else ""
        raise TypeError(f"`{owner}(schedule=...)` must be a noise schedule such as `OU()`, got {schedule!r}.{hint}")


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
            raise TypeError(f"`BatchedNetwork(network=...)` must be callable, got {type(self.network).__name__}.")

    def __call__(self, x: Event, t: Array, *args: Any, **kwargs: Any) -> Event:
        """Prediction for one event, shape of `x`."""
        args, kwargs = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None] if eqx.is_array_like(leaf) else leaf, (args, kwargs))
        return self.network(x[None], jnp.asarray(t)[None], *args, **kwargs)[0]


class EnergyScore(eqx.Module):
    """Score of an energy network: `-grad energy_fn`, with exact energies for Metropolis ratios.

    Args:
        energy_fn: `energy_fn(x, t)`, one event, returns the scalar `-log p_t(x)` up to a constant that
            may depend on `t`.
    """

    energy_fn: Callable[..., Any]

    def __check_init__(self) -> None:
        if not callable(self.energy_fn):
            raise TypeError(
                f"`EnergyScore(energy_fn=...)` must be callable as energy_fn(x, t), got {type(self.energy_fn).__name__}."
            )

    def __call__(self, x: Event, t: Scalar, *args: Any, **kwargs: Any) -> Event:
        """Score of one event, shape of `x`."""
        return -jax.grad(self.energy_fn)(x, t, *args, **kwargs)

    def energy(self, x: Event, t: Scalar, *args: Any, **kwargs: Any) -> Scalar:
        """`-log p_t(x)` up to a constant in `x`, scalar."""
        return self.energy_fn(x, t, *args, **kwargs)

    def energy_and_score(self, x: Event, t: Scalar, *args: Any, **kwargs: Any) -> tuple[Scalar, Event]:
        """Both, for one evaluation and one gradient."""
        energy, gradient = jax.value_and_grad(self.energy_fn)(x, t, *args, **kwargs)
        return energy, -gradient


class GaussianMixtureScore(eqx.Module):
    r"""Closed-form score of a Gaussian mixture under any schedule.

    If `x_0` has law `sum_k w_k N(mu_k, C_k)`, then `x_t` has law
    `sum_k w_k N(alpha mu_k, alpha^2 C_k + sigma^2 I)`. The covariances are diagonalised once.

    Args:
        weights: Mixture weights, shape `(components,)`, non-negative; normalised here.
        means: Shape `(components, dim)`.
        covariances: Full covariances, shape `(components, dim, dim)`, symmetric positive
            semi-definite.
        schedule: The noising process.

    Raises:
        ValueError: if shapes disagree, a weight is negative, or a covariance is not symmetric
            positive semi-definite.
    """

    log_weights: Float[Array, " components"]
    means: Float[Array, "components dim"]
    eigenvalues: Float[Array, "components dim"]
    eigenvectors: Float[Array, "components dim dim"]
    schedule: AbstractNoiseSchedule

    def __init__(self, weights: ArrayLike, means: ArrayLike, covariances: ArrayLike, schedule: AbstractNoiseSchedule) -> None:
        owner = "GaussianMixtureScore"
        weights, means, covariances = (np.asarray(a, np.float64) for a in (weights, means, covariances))
        if weights.ndim != 1 or means.ndim != 2 or means.shape[0] != weights.shape[0]:
            raise ValueError(
                f"`{owner}` needs `weights` of shape (components,) and `means` of shape (components, dim), got "
                f"{weights.shape} and {means.shape}."
            )
        if covariances.shape != (*means.shape, means.shape[1]):
            raise ValueError(
                f"`{owner}(covariances=...)` must have shape {(*means.shape, means.shape[1])}, got {covariances.shape}."
            )
        if not (np.all(weights >= 0) and np.sum(weights) > 0):
            raise ValueError(f"`{owner}(weights=...)` must be non-negative with a positive sum, got {weights}.")
        if not np.allclose(covariances, np.swapaxes(covariances, 1, 2), rtol=1e-5, atol=1e-8):
            raise ValueError(f"`{owner}(covariances=...)` must be symmetric.")
        eigenvalues, eigenvectors = np.linalg.eigh(covariances)
        if np.min(eigenvalues) < -1e-6 * np.max(np.abs(eigenvalues)):
            raise ValueError(
                f"`{owner}(covariances=...)` must be positive semi-definite; smallest eigenvalue {np.min(eigenvalues):g}."
            )
        _check_schedule(owner, schedule)
        # A component of weight zero is left out: any log weight, finite or not, would show somewhere, in a score
        # far from the others or in a gradient.
        kept = weights > 0
        self.log_weights = jnp.asarray(np.log(weights[kept] / weights.sum()))
        self.means = jnp.asarray(means[kept])
        self.eigenvalues = jnp.asarray(np.maximum(eigenvalues[kept], 0.0))
        self.eigenvectors = jnp.asarray(eigenvectors[kept])
        self.schedule = schedule

    def _components(self, x: Event, t: Scalar) -> tuple[Array, Array, Array]:
        """Component log densities with weights, standardised residuals, variances, in each eigenbasis."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        variances = alpha**2 * self.eigenvalues + sigma**2
        residuals = jnp.einsum("kij,ki->kj", self.eigenvectors, x[None] - alpha * self.means)
        scaled = residuals / variances
        log_normal = -0.5 * jnp.sum(residuals * scaled + jnp.log(2 * jnp.pi * variances), axis=-1)
        return self.log_weights + log_normal, scaled, variances

    def log_density(self, x: Event, t: Scalar) -> Scalar:
        """Normalised `log p_t(x)` of one event of shape `(dim,)`, scalar."""
        return jax.nn.logsumexp(self._components(x, t)[0])

    def energy(self, x: Event, t: Scalar) -> Scalar:
        """`-log p_t(x)`, normalised, scalar."""
        return -self.log_density(x, t)

    def energy_and_score(self, x: Event, t: Scalar) -> tuple[Scalar, Event]:
        """Both in closed form, sharing the component densities."""
        log_terms, scaled, _ = self._components(x, t)
        responsibilities = jax.nn.softmax(log_terms)
        score = -jnp.einsum("k,kij,kj->i", responsibilities, self.eigenvectors, scaled)
        return -jax.nn.logsumexp(log_terms), score

    def __call__(self, x: Event, t: Scalar) -> Event:
        """Score of one event, shape `(dim,)`."""
        return self.energy_and_score(x, t)[1]

    def sample(self, key: RandomKey, num_samples: int, t: Scalar | None = None) -> Float[Array, "num_samples dim"]:
        """Exact draws of `x_t`, or of the data where `t` is not given."""
        component_key, noise_key = jax.random.split(key)
        component = jax.random.categorical(component_key, self.log_weights, shape=(num_samples,))
        alpha, sigma = (1.0, 0.0) if t is None else (self.schedule.alpha(t), self.schedule.sigma(t))
        scale = jnp.sqrt(alpha**2 * self.eigenvalues + sigma**2)
        noise = jax.random.normal(noise_key, (num_samples, self.means.shape[1]), self.means.dtype)
        noise = jnp.einsum("nij,nj->ni", self.eigenvectors[component], scale[component] * noise)
        return alpha * self.means[component] + noise
