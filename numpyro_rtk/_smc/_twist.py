r"""Twists: positive functions `G_t(x)` that stand for `E[L(x_0) | x_t = x]`, and equal `L` at `t_min`.

Any twist leaves the posterior invariant under particle Gibbs; a good one keeps the effective sample size up.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_rtk._custom_types import Scalar
from numpyro_rtk._moves._elements import Elements, ONE
from numpyro_rtk._moves._line_integral import dot
from numpyro_rtk._thresholds import MAX_EXACT_OBSERVATIONS


NUM_PROBES = 8
"""Random vectors that estimate the diagonal of the covariance where it is not formed."""
DIAGONAL_WEIGHT = 0.1
"""Weight of the diagonal in the measured covariance of the denoising error."""
MAX_RESIDUALS = 32
"""Measured residuals that carry the correlations of the error where the covariance is not formed."""
INDEPENDENT_WEIGHT = 0.5
"""Share of the error taken as independent between coordinates there: few residuals do not span an image."""


def num_residuals(num_observations: int, num_draws: int) -> int:
    """Measured residuals that twists need: only covariances that are formed need all."""
    if num_observations > MAX_EXACT_OBSERVATIONS:
        return MAX_RESIDUALS
    return num_draws if num_observations else 0


class AbstractTwist(eqx.Module):
    """How the likelihood is carried to noisier levels."""

    gaussian: eqx.AbstractClassVar[bool]
    """Whether Gaussian observations are integrated over the denoising error rather than tempered."""


class GaussianTwist(AbstractTwist):
    r"""Gaussian observations with the denoising error added to their covariance; anything else is tempered.

    With the mean `f(x_0)` of the observations and their scale `s`:
    `G_t(x) = N(y; f(xhat), s^2 I + J R_t J^T)`, `xhat = E[x_0 | x_t = x]`, `J` the Jacobian of `f` there, and
    `R_t` the measured covariance of `x_0 - xhat`. Up to 64 observations the covariance is formed exactly,
    with `R_t` from the prior draws themselves (correlations included). Beyond, no matrix is formed: half of
    the error is taken as independent between coordinates (its diagonal estimated with 8 fixed random vectors,
    exact where each observation depends on one coordinate), the other half as spanned by 32 measured
    residuals.

    *Cost.* No score evaluation besides the one that gives `xhat`; one Jacobian (or vector-Jacobian product)
    of `f`.

    References:
        Wu et al. (2023), arXiv 2306.17775, twisted diffusion sampler; Cardoso et al. (2023), arXiv
        2308.07983.
    """

    gaussian = True


class TemperedTwist(AbstractTwist):
    r"""Any likelihood at the denoised point, to a power: `G_t(x) = L(xhat)^beta_t`.

    The powers start from an adaptive pass that keeps half the effective sample size from level to level where
    it can, and are adapted in warmup until neighbouring levels lose alike.

    *Cost.* No score evaluation besides the one that gives `xhat`.
    """

    gaussian = False


class Terms(NamedTuple):
    """A log likelihood, split as a twist needs it: the sum of `-|whitened|^2 / 2`, `log_normalizer` and
    `other`. The latter by element: scalars where there is one.
    """

    whitened: Array
    """Whitened residuals `(y - mean) / scale` of the Gaussian observations, shape `(observations,)`."""
    log_normalizer: Array
    """Their log normalizer, `-sum(log scale)` and constants."""
    other: Array
    """Log probability of everything else."""
    log_prob: Array | None = None
    """The whole as the model's own laws give it; `None`: as the parts do."""

    @property
    def log_likelihood(self) -> Array:
        """The log likelihood, as the model has it, where there is one element."""
        return log_likelihood(self, ONE)


def log_likelihood(terms: Terms, elements: Elements) -> Array:
    """The log likelihood by element, as the model has it."""
    if terms.log_prob is not None:
        return terms.log_prob
    if elements.count == 1:
        square = dot(terms.whitened, terms.whitened)
    else:
        square = sum_observations(elements, terms.whitened**2)
    return terms.log_normalizer + terms.other - 0.5 * square


def sum_observations(elements: Elements, values: Array) -> Array:
    """Sums over the Gaussian observations, the last axis, by element."""
    return jnp.sum(values, axis=-1) if elements.count == 1 else elements.observations.sum(values)


class LevelError(NamedTuple):
    """The denoising error at one level, for the flat vector of all diffusion sites."""

    residuals: tuple[Array, ...]
    """Per site, shape `(draws, event_size)`: prior draws minus their denoised values."""
    mean_square: Array
    """Mean square by coordinate, shape `(dim,)`."""


class TwistPoint(NamedTuple):
    """A twist at one point; values by element."""

    log_value: Array
    gradient: Array
    """Gradient with respect to the denoised point, shape `(dim,)`, with the covariance held fixed."""
    other: Array
    """Log probability of what is tempered, at power one."""
    log_likelihood: Array
    """Log likelihood of the denoised point, as the model has it."""


class Linearization(NamedTuple):
    """Gaussian observations linearised at one point, for proposals."""

    jacobian: Array
    """`d whitened / d x / sd`, shape `(rank, dim)`, so that its Gram matrix is the curvature of `-log G`; of
    each element, in its coordinates."""
    diagonal: Array
    """Curvature by coordinate where the Jacobian is not formed, shape `(dim,)`."""


def _probes(dim: int, dtype: Any) -> Array:
    return jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], (NUM_PROBES, dim)), dtype)


def _rows(elements: Elements) -> Array:
    """Vectors that pick the observations, one of each element at once: shape `(most, observations)`."""
    groups = elements.observations
    eye = np.broadcast_to(np.eye(groups.size)[:, None], (groups.size, groups.count, groups.size))
    return groups.unpadded(jnp.asarray(eye))


def _covariance(
    jacobian: Array, error: LevelError, blocks: tuple[tuple[int, int], ...], elements: Elements
) -> Array:
    """`I + J R J^T`, shape `(*elements, rank, rank)`: `J` applied to measured residuals of each event, and to
    independent coordinates.
    """
    rank, start = jacobian.shape[0], 0
    total = jnp.broadcast_to(jnp.eye(rank, dtype=jacobian.dtype), (*elements.shape, rank, rank))
    for i, ((batch_size, event_size), residuals) in enumerate(zip(blocks, error.residuals, strict=True)):
        stop = start + batch_size * event_size
        block = jnp.moveaxis(jacobian[:, start:stop].reshape(rank, batch_size, event_size), 1, 0)
        mean_square = error.mean_square[start:stop].reshape(batch_size, 1, event_size)
        along = block @ residuals.T
        square = (1 - DIAGONAL_WEIGHT) / residuals.shape[0] * (along @ along.mT)
        square += DIAGONAL_WEIGHT * ((block * mean_square) @ block.mT)
        total += jnp.moveaxis(elements.sum_events(i, jnp.moveaxis(square, 0, -1)), (0, 1), (-2, -1))
        start = stop
    return total


def evaluate_twist(
    terms: Callable[[Array], Terms],
    x: Array,
    error: LevelError,
    beta: Scalar,
    blocks: tuple[tuple[int, int], ...],
    elements: Elements = ONE,
) -> TwistPoint:
    """Log twist at the denoised point `x`, a flat vector of all sites.

    With no error and `beta = 1` it is the log likelihood, and the gradient is exact.

    Args:
        terms: The likelihood of a flat vector.
        x: The denoised point, shape `(dim,)`.
        error: Measured denoising error of the level.
        beta: Power of what is not Gaussian.
        blocks: `(batch_size, event_size)` of each site.
        elements: Coordinates whose likelihoods are independent of all others'.
    """

    def parts(x: Array) -> tuple[Any, Scalar]:
        split = terms(x)
        return (split.whitened, split.log_normalizer, split.other), log_likelihood(split, elements)

    (whitened, log_normalizer, other), vjp, whole = jax.vjp(parts, x, has_aux=True)
    size, one = most_observations(elements, whitened.shape[0]), jnp.ones_like(other)
    beta = jnp.broadcast_to(beta, one.shape).astype(one.dtype)
    if size == 0:
        (gradient,) = vjp((whitened, one, beta))
        return TwistPoint(beta * other + log_normalizer, gradient, other, whole)
    if size <= MAX_EXACT_OBSERVATIONS and elements.count > 1:
        log_value, downhill = _exact_by_element(vjp, whitened, error, blocks, elements)
        (rest,) = vjp((jnp.zeros_like(whitened), one, beta))
        gradient = rest - downhill
    elif size <= MAX_EXACT_OBSERVATIONS:
        eye, zero = jnp.eye(size, dtype=x.dtype), jnp.zeros((), x.dtype)
        (jacobian,) = jax.vmap(lambda row: vjp((row, zero, zero)))(eye)
        (rest,) = vjp((jnp.zeros_like(whitened), one, beta))
        cholesky = jnp.linalg.cholesky(_covariance(jacobian, error, blocks, elements))
        half = jax.scipy.linalg.solve_triangular(cholesky, whitened, lower=True)
        weighted = jax.scipy.linalg.solve_triangular(cholesky, half, lower=True, trans=1)
        log_value = -0.5 * dot(half, half) - jnp.sum(jnp.log(jnp.diagonal(cholesky)))
        gradient = rest - weighted @ jacobian
    else:
        # The diagonal, and as many correlated directions as there are measured residuals, by Woodbury's
        # identity.
        diagonal, rows = _low_rank(terms, x, error, blocks)
        if elements.count == 1:
            weighted, log_value = _by_woodbury(whitened, diagonal, rows)
        else:
            groups = elements.observations
            apart = groups.padded(whitened), groups.padded(diagonal, 1), groups.padded(rows)
            weighted, log_value = jax.vmap(_by_woodbury, in_axes=(0, 0, 1))(*apart)
            weighted = groups.unpadded(weighted)
        (gradient,) = vjp((-weighted, one, beta))
    return TwistPoint(log_value + log_normalizer + beta * other, gradient, other, whole)


def most_observations(elements: Elements, num_observations: int) -> int:
    """Gaussian observations of the element that has most of them."""
    return num_observations if elements.count == 1 else elements.observations.size


def _exact_by_element(
    vjp: Callable[..., Any],
    whitened: Array,
    error: LevelError,
    blocks: tuple[tuple[int, int], ...],
    elements: Elements,
) -> tuple[Array, Array]:
    """Log density of the whitened residuals of each element under `N(0, I + J R J^T)`, up to constants, and
    minus its gradient.
    """
    zero, groups = jnp.zeros(elements.shape, whitened.dtype), elements.observations
    (jacobian,) = jax.vmap(lambda row: vjp((row, zero, zero)))(_rows(elements).astype(whitened.dtype))
    cholesky = jnp.linalg.cholesky(_covariance(jacobian, error, blocks, elements))
    half = jax.vmap(functools.partial(jax.scipy.linalg.solve_triangular, lower=True))
    back = jax.vmap(functools.partial(jax.scipy.linalg.solve_triangular, lower=True, trans=1))
    scaled = half(cholesky, groups.padded(whitened))
    log_value = -0.5 * jnp.sum(scaled**2, axis=1)
    log_value -= jnp.sum(jnp.log(jnp.diagonal(cholesky, axis1=1, axis2=2)), axis=1)
    weighted = back(cholesky, scaled)
    return log_value, jnp.sum(elements.coordinates.spread(weighted.T) * jacobian, axis=0)


def _by_woodbury(whitened: Array, diagonal: Array, rows: Array) -> tuple[Array, Scalar]:
    """`C^-1 whitened`, and the log density under `N(0, C)` up to constants, with
    `C = diag(diagonal) + rows^T rows`.
    """
    inner = jnp.eye(rows.shape[0], dtype=whitened.dtype) + (rows / diagonal[None]) @ rows.T
    cholesky = jnp.linalg.cholesky(inner)
    projected = jax.scipy.linalg.cho_solve((cholesky, True), rows @ (whitened / diagonal))
    weighted = (whitened - projected @ rows) / diagonal
    log_value = -0.5 * (dot(whitened, weighted) + jnp.sum(jnp.log(diagonal)))
    return weighted, log_value - jnp.sum(jnp.log(jnp.diagonal(cholesky)))


def _low_rank(
    terms: Callable[[Array], Terms], x: Array, error: LevelError, blocks: tuple[tuple[int, int], ...]
) -> tuple[Array, Array]:
    """`1 + w diag(J R J^T)` for the independent part of the error, and `J` applied to residuals for the
    correlated part.
    """
    _, jvp = jax.linearize(lambda x: terms(x).whitened, x)
    scaled = _probes(x.shape[0], x.dtype) * jnp.sqrt(error.mean_square)[None]
    independent = jnp.mean(jax.vmap(jvp)(scaled) ** 2, axis=0)
    count = error.residuals[0].shape[0]
    if count == 0:
        return 1 + independent, jnp.zeros((0, independent.shape[0]), x.dtype)
    # Elements of a batch take different residuals.
    columns = []
    for (batch_size, _), residuals in zip(blocks, error.residuals, strict=True):
        columns += [jnp.roll(residuals, i, axis=0) for i in range(batch_size)]
    rows = jax.vmap(jvp)(jnp.concatenate(columns, axis=1)) * jnp.sqrt((1 - INDEPENDENT_WEIGHT) / count)
    return 1 + INDEPENDENT_WEIGHT * independent, rows


def linearize_twist(
    terms: Callable[[Array], Terms],
    x: Array,
    error: LevelError,
    blocks: tuple[tuple[int, int], ...],
    elements: Elements = ONE,
) -> Linearization:
    """Curvature of the Gaussian part of `-log G` with respect to the denoised point, at `x`."""
    whitened, vjp = jax.vjp(lambda x: terms(x).whitened, x)
    size = most_observations(elements, whitened.shape[0])
    none = jnp.zeros((0, x.shape[0]), x.dtype)
    if size == 0:
        return Linearization(none, jnp.zeros_like(x))
    if size <= MAX_EXACT_OBSERVATIONS and elements.count > 1:
        (jacobian,) = jax.vmap(vjp)(_rows(elements).astype(x.dtype))
        cholesky = jnp.linalg.cholesky(_covariance(jacobian, error, blocks, elements))
        half = jax.vmap(functools.partial(jax.scipy.linalg.solve_triangular, lower=True))
        rows = half(cholesky, jnp.moveaxis(elements.coordinates.padded(jacobian), 1, 0))
        rows = elements.coordinates.unpadded(jnp.moveaxis(rows, 0, 1))
        return Linearization(rows, jnp.zeros_like(x))
    if size <= MAX_EXACT_OBSERVATIONS:
        eye = jnp.eye(size, dtype=x.dtype)
        (jacobian,) = jax.vmap(vjp)(eye)
        cholesky = jnp.linalg.cholesky(_covariance(jacobian, error, blocks, elements))
        return Linearization(
            jax.scipy.linalg.solve_triangular(cholesky, jacobian, lower=True), jnp.zeros_like(x)
        )
    diagonal, factor = _low_rank(terms, x, error, blocks)
    sd = jnp.sqrt(diagonal + jnp.sum(factor**2, axis=0))
    (columns,) = jax.vmap(vjp)(_probes(whitened.shape[0], x.dtype) / sd[None])
    return Linearization(none, jnp.mean(columns**2, axis=0))
