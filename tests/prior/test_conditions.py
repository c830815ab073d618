"""A condition for each element of a plate: the prior itself, and kernels that move it."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import NUTS, Predictive
from scipy import stats

import numpyro_rtk as rtk
from numpyro_rtk import DiffusionPrior, RTKParticleGibbs, ScoreHMC
from tests.helpers import run_mcmc


OU = rtk.OU()
ALPHA, SIGMA = float(OU.alpha(jnp.float32(OU.t_min))), float(OU.sigma(jnp.float32(OU.t_min)))
SD = np.sqrt(ALPHA**2 + SIGMA**2)
Z_MAX = stats.norm.isf(2.5e-5 / 2)
C = jnp.array([-2.0, 0.0, 3.0])
OPTIONS = {"segments": 8, "num_particles": 8, "reverse": rtk.PreconditionedMALA(1), "num_pilot_draws": 32}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Some donated buffers were not usable:UserWarning"),
    pytest.mark.filterwarnings("ignore:Particle weights collapsed:UserWarning"),
]


def located(x, t, c):
    """Score of `N(c, 1)`."""
    return -(x - OU.alpha(t) * c) / (OU.alpha(t) ** 2 + OU.sigma(t) ** 2)


def scaled(x, t, c):
    """Score of `N(0, exp(2 c))`."""
    return -x / (OU.alpha(t) ** 2 * jnp.exp(2 * c) + OU.sigma(t) ** 2)


class Energy:
    """The same, with its energy."""

    normalized = True

    def __init__(self):
        self.schedule = OU

    def energy(self, x, t, c):
        variance = OU.alpha(t) ** 2 + OU.sigma(t) ** 2
        return jnp.sum(0.5 * (x - OU.alpha(t) * c) ** 2 / variance + 0.5 * jnp.log(2 * jnp.pi * variance))

    def __call__(self, x, t, c):
        return located(x, t, c)


def normal(c):
    return dist.Normal(ALPHA * c[..., None], SD).to_event(1)


def test_shapes():
    prior = DiffusionPrior(located, (4,), OU, condition=C)
    assert (prior.batch_shape, prior.event_shape) == ((3,), (4,))
    assert prior.condition.shape == (3,)
    assert "condition of shape (3,)" in repr(prior)
    vector = DiffusionPrior(lambda x, t, c: located(x, t, c[0]), (4,), OU, condition=C, condition_ndims=1)
    assert vector.batch_shape == ()
    leaves, structure = jax.tree.flatten(prior)
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(again.condition, C)
    assert again.batch_shape == (3,)


@pytest.mark.slow
def test_draws_follow_their_conditions():
    prior = DiffusionPrior(located, (4,), OU, condition=C)
    draws = np.asarray(prior.sample(jr.key(0), (400,)), np.float64)
    assert draws.shape == (400, 3, 4)
    z = (draws.mean(axis=(0, 2)) - ALPHA * np.asarray(C)) / (SD / 40)
    assert np.all(np.abs(z) < Z_MAX)
    in_batches = DiffusionPrior(located, (4,), OU, condition=C, batch_size=7).sample(jr.key(0), (400,))
    np.testing.assert_allclose(in_batches, draws, atol=1e-4)
    assert prior.expand((2, 3)).sample(jr.key(1)).shape == (2, 3, 4)


@pytest.mark.parametrize("score", [located, Energy()], ids=["flow", "energy"])
def test_log_densities_and_their_derivatives(score):
    x = jr.normal(jr.key(1), (5, 3, 4))

    def log_prob(x, c):
        return DiffusionPrior(score, (4,), OU, condition=c).log_prob(x)

    with jax.numpy_rank_promotion("allow"):  # NumPyro's own laws
        right = normal(C).log_prob(x)
    np.testing.assert_allclose(log_prob(x, C), right, atol=0.05)
    # One value for every condition, as NumPyro broadcasts.
    one = jnp.broadcast_to(x[0, 0], (3, 4))
    np.testing.assert_allclose(log_prob(x[0, 0], C), normal(C).log_prob(one), atol=0.05)
    c = C + 0.3
    got = jax.grad(lambda x, c: log_prob(x, c).sum(), argnums=(0, 1))(x, c)
    with jax.numpy_rank_promotion("allow"):
        right = jax.grad(lambda x, c: normal(c).log_prob(x).sum(), argnums=(0, 1))(x, c)
    np.testing.assert_allclose(got[0], right[0], atol=1e-3)
    np.testing.assert_allclose(got[1], right[1], rtol=0.02, atol=0.1)


def test_denoising_by_condition():
    prior = DiffusionPrior(located, (4,), OU, condition=C)
    x = prior.sample(jr.key(0), (2,))
    right = (x + SIGMA**2 * located(x, jnp.float32(OU.t_min), C[None, :, None])) / ALPHA
    np.testing.assert_allclose(prior.denoise(x), right, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(prior.denoise_sd, SIGMA / SD, rtol=0.02)
    assert prior.clean_draws(jr.key(1), x).shape == x.shape


@pytest.mark.slow
def test_clean_draws_have_the_error_of_their_condition():
    """A narrow law hides less under noise than a wide one: `sd sigma / sqrt(sd^2 alpha^2 + sigma^2)`."""
    c = jnp.array([-4.0, 0.0, 0.0])
    prior = DiffusionPrior(scaled, (4,), OU, condition=c)
    x = prior.sample(jr.key(0), (320,))
    got = (prior.clean_draws(jr.key(1), x) - prior.denoise(x)).std(axis=(0, 2))
    sd = np.exp(np.asarray(c, np.float64))
    np.testing.assert_allclose(got, sd * SIGMA / np.sqrt(sd**2 * ALPHA**2 + SIGMA**2), rtol=0.1)


def test_the_error_of_many_conditions_is_measured_where_draws_were_made():
    """More conditions than pilot draws: each draw is denoised by the score that made it."""
    c = jnp.linspace(-5.0, 0.0, 40)
    sd = np.exp(np.asarray(c, np.float64))
    right = np.sqrt(np.mean(sd**2 * SIGMA**2 / (sd**2 * ALPHA**2 + SIGMA**2)))
    np.testing.assert_allclose(DiffusionPrior(scaled, (2,), OU, condition=c).denoise_sd, right, rtol=0.05)


def test_a_network_that_fails_for_one_of_the_conditions_is_refused():
    failing = lambda x, t, c: jnp.where(c > 2.0, jnp.nan, located(x, t, c))
    with pytest.raises(ValueError, match="returned NaN or infinity at its first call"):
        DiffusionPrior(failing, (2,), OU, condition=C).sample(jr.key(0))


def test_a_prior_made_under_vmap_is_refused_outside():
    prior = jax.vmap(lambda c: DiffusionPrior(located, (2,), OU, condition=c))(C)
    with pytest.raises(ValueError, match=r"made under `jax.vmap`"):
        prior.log_prob(jnp.zeros(2))


def in_a_plate(y, c):
    with numpyro.plate("objects", 3):
        x = numpyro.sample("x", DiffusionPrior(located, (2,), OU, condition=c))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


Y = jnp.array([[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0]])


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda model: RTKParticleGibbs(model, **OPTIONS), ScoreHMC, NUTS])
def test_posteriors_in_a_plate(make):
    mcmc = run_mcmc(make(in_a_plate), Y, C, num_warmup=150, num_samples=800, jit_model_args=True)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["x"], np.float64)
    precision = 1 / SD**2 + 1
    mean = (ALPHA * np.asarray(C)[:, None] / SD**2 + np.asarray(Y)) / precision
    for i, j in np.ndindex(3, 2):
        values = draws[..., i, j]
        size = min(effective_sample_size(values), values.size)
        assert abs(values.mean() - mean[i, j]) * np.sqrt(precision * size) < Z_MAX
        assert abs(values.std() * np.sqrt(precision) - 1) < 0.01 + Z_MAX / np.sqrt(2 * size)


def test_prior_predictive():
    draws = Predictive(in_a_plate, num_samples=200)(jr.key(0), None, C)["x"]
    assert draws.shape == (200, 3, 2)
    z = (np.asarray(draws).mean(axis=(0, 2)) - ALPHA * np.asarray(C)) / (SD / 20)
    assert np.all(np.abs(z) < Z_MAX)


@pytest.mark.slow
def test_objects_of_a_plate_move_apart():
    kernel = RTKParticleGibbs(in_a_plate, **OPTIONS)
    kernel.init(jr.key(0), 0, None, (Y, C), {})
    assert "elements=3" in repr(kernel)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"condition": jnp.array([1.0, jnp.nan])}, ValueError, r"`condition` has NaN or infinity \(1 of 2"),
        (
            {"condition": C, "condition_ndims": 2},
            ValueError,
            "`condition` has shape .* `condition_ndims=2` axes",
        ),
        ({"condition": C, "condition_ndims": -1}, ValueError, "`condition_ndims` must be the number of axes"),
        ({"condition": C, "condition_ndims": 1.0}, TypeError, "`condition_ndims` must be the number of axes"),
        ({"condition_ndims": 1}, ValueError, "`condition_ndims=1` .* there is no `condition`"),
        ({"condition": "red"}, TypeError, "`condition` must be an array"),
        ({"condition": jnp.zeros((0,))}, ValueError, "there is no condition in it"),
    ],
)
def test_conditions_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        DiffusionPrior(located, (4,), OU, **options)


def test_an_integer_where_the_network_wants_real_numbers():
    def network(x, t, c):
        return jax.grad(lambda c: jnp.sum(located(x, t, c)))(c) + x

    with pytest.raises(ValueError, match=r"dtype int32(.|\n)*condition=c.astype"):
        DiffusionPrior(network, (4,), OU, condition=jnp.array([1, 2]))


def test_wrong_axes_of_a_condition_are_told():
    with pytest.raises(ValueError, match=r"a condition of shape \(\)(.|\n)*condition_ndims=1"):
        DiffusionPrior(lambda x, t, c: located(x, t, c[0]), (4,), OU, condition=C)


def test_a_condition_that_does_not_fit_its_plate():
    def model(y):
        with numpyro.plate("objects", 4):
            x = numpyro.sample("x", DiffusionPrior(located, (2,), OU, condition=C))
        numpyro.sample("y", dist.Normal(x[0], 1.0).to_event(1), obs=y)

    for kernel in (RTKParticleGibbs(model), ScoreHMC(model)):
        with pytest.raises(ValueError, match=r"diffusion site 'x' .* plate 'objects' of size 4"):
            kernel.init(jr.key(0), 10, None, (Y[0],), {})
