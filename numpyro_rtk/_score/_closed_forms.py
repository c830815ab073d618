"""Scores that know their energy: energy networks and Gaussian mixtures."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_rtk._custom_types import Event, RandomKey, Scalar
from numpyro_rtk._noising._base import AbstractNoiseSchedule
from numpyro_rtk._score._adapters import _check_schedule


class EnergyScore(eqx.Module):
    """Score of an energy network: `-grad energy_fn`, with exact energies for Metropolis ratios.

    Args:
        energy_fn: `energy_fn(x, t)`, one event, returns the scalar `-log p_t(x)` up to a constant that
            may depend on `t`.
        normalized: Whether the constant is 0: `exp(-energy_fn(x, t))` integrates to 1 at every `t`, and for
            every value of anything else that it depends on.
    """

    energy_fn: Callable[..., Any]
    normalized: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        if not callable(self.energy_fn):
            raise TypeError(
                f"`EnergyScore(energy_fn=...)` must be callable as energy_fn(x, t), got "
                f"{type(self.energy_fn).__name__}."
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
    normalized: ClassVar[bool] = True
    """Its energy is normalised."""

    def __init__(
        self, weights: ArrayLike, means: ArrayLike, covariances: ArrayLike, schedule: AbstractNoiseSchedule
    ) -> None:
        owner = "GaussianMixtureScore"
        weights, means, covariances = (np.asarray(a, np.float64) for a in (weights, means, covariances))
        if weights.ndim != 1 or means.ndim != 2 or means.shape[0] != weights.shape[0]:
            raise ValueError(
                f"`{owner}` needs `weights` of shape (components,) and `means` of shape (components, dim), "
                f"got "
                f"{weights.shape} and {means.shape}."
            )
        if covariances.shape != (*means.shape, means.shape[1]):
            raise ValueError(
                f"`{owner}(covariances=...)` must have shape {(*means.shape, means.shape[1])}, got "
                f"{covariances.shape}."
            )
        if not (np.all(weights >= 0) and np.sum(weights) > 0):
            raise ValueError(
                f"`{owner}(weights=...)` must be non-negative with a positive sum, got {weights}."
            )
        if not np.allclose(covariances, np.swapaxes(covariances, 1, 2), rtol=1e-5, atol=1e-8):
            raise ValueError(f"`{owner}(covariances=...)` must be symmetric.")
        eigenvalues, eigenvectors = np.linalg.eigh(covariances)
        if np.min(eigenvalues) < -1e-6 * np.max(np.abs(eigenvalues)):
            raise ValueError(
                f"`{owner}(covariances=...)` must be positive semi-definite; smallest eigenvalue "
                f"{np.min(eigenvalues):g}."
            )
        _check_schedule(owner, schedule)
        # A component of weight zero is left out: any log weight, finite or not, would show somewhere, in a
        # score far from the others or in a gradient.
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

    def sample(
        self, key: RandomKey, num_samples: int, t: Scalar | None = None
    ) -> Float[Array, "num_samples dim"]:
        """Exact draws of `x_t`, or of the data where `t` is not given."""
        component_key, noise_key = jax.random.split(key)
        component = jax.random.categorical(component_key, self.log_weights, shape=(num_samples,))
        alpha, sigma = (1.0, 0.0) if t is None else (self.schedule.alpha(t), self.schedule.sigma(t))
        scale = jnp.sqrt(alpha**2 * self.eigenvalues + sigma**2)
        noise = jax.random.normal(noise_key, (num_samples, self.means.shape[1]), self.means.dtype)
        noise = jnp.einsum("nij,nj->ni", self.eigenvectors[component], scale[component] * noise)
        return alpha * self.means[component] + noise
