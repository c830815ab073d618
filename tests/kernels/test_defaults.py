"""What particle Gibbs chooses for a model where nothing is given."""

import jax.numpy as jnp
import jax.random as jr
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_rtk as rtk
from numpyro_rtk._numpyro._particle_gibbs_options import FEW_PARTICLES, LONG_LOCAL, PARTICLES


def prior(*shape):
    return rtk.DiffusionPrior(lambda x, t: -x, shape, rtk.OU())


def image(y):
    x = numpyro.sample("x", prior(18, 18))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(2), obs=y)


def counts(y):
    x = numpyro.sample("x", prior(18, 18))
    sky = numpyro.sample("sky", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Poisson(sky + jnp.exp(x)).to_event(2), obs=y)


def few_numbers(y):
    x = numpyro.sample("x", prior(18, 18))
    numpyro.sample("y", dist.Normal(x[0, :4], 0.5).to_event(1), obs=y[0, :4])
    # Many data, which are none of `x`.
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([18, 18]).to_event(2), obs=y)


def small(y):
    x = numpyro.sample("x", prior(3, 3))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(2), obs=y[:3, :3])


def plate_of_small(y):
    with numpyro.plate("objects", 36):
        x = numpyro.sample("x", prior(9))
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y.reshape(36, 9))


def mixed_plate_of_small(y):
    with numpyro.plate("objects", 36):
        x = numpyro.sample("x", prior(9))
    # Each number sees two neighbours, so that the plate does not fall apart.
    numpyro.sample("y", dist.Normal(x + jnp.roll(x, 1, axis=0), 0.5).to_event(2), obs=y.reshape(36, 9))


def chosen(model, **options):
    kernel = rtk.RTKParticleGibbs(model, **options)
    return kernel._problem(None, (jnp.ones((18, 18)),), {}, jnp.float32).options


def one_value(y):
    x = numpyro.sample("x", prior(18, 18))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(2), obs=y[0, 0])


@pytest.mark.parametrize(
    ("model", "num_pilot_draws"), [(image, 32), (counts, 32), (one_value, 32), (mixed_plate_of_small, 128)]
)
def test_data_for_most_of_many_coordinates_leave_the_work_to_gradient_moves(model, num_pilot_draws):
    model = numpyro.handlers.condition(model, {"sky": jnp.asarray(0.3)})
    options = chosen(model)
    assert (options.num_particles, options.local) == (FEW_PARTICLES, LONG_LOCAL)
    assert options.num_pilot_draws == num_pilot_draws


@pytest.mark.parametrize(
    ("model", "num_pilot_draws"), [(few_numbers, 32), (small, 128), (plate_of_small, 128)]
)
def test_few_data_or_few_coordinates_have_particles(model, num_pilot_draws):
    options = chosen(model)
    assert (options.num_particles, options.local) == (PARTICLES, rtk.LocalHMC())
    assert options.num_pilot_draws == num_pilot_draws


def test_what_is_given_is_kept():
    given = {"num_particles": 5, "local": rtk.LocalMALA(), "num_pilot_draws": 9, "sweep_prob": 0.3}
    options = chosen(image, **given)
    assert {name: getattr(options, name) for name in given} == given
    # Without local moves particles do the work.
    without = chosen(image, local=None)
    assert (without.local, without.num_particles) == (None, PARTICLES)
    # Each by itself.
    assert chosen(image, num_particles=5).local == LONG_LOCAL


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Particle weights collapsed")
def test_what_was_chosen_is_printed():
    kernel = rtk.RTKParticleGibbs(small, segments=3, num_start_steps=0)
    assert "num_particles=chosen at the start" in repr(kernel)
    kernel.init(jr.key(0), 0, None, (jnp.ones((18, 18)),), {})
    assert f"num_particles={PARTICLES}" in repr(kernel)
    assert "local=LocalHMC()" in repr(kernel)


@pytest.mark.parametrize("local", ["adapted", 3, rtk.LocalHMC])
def test_local_moves_are_one_of_ours(local):
    with pytest.raises(TypeError, match="`local` must be `LocalHMC"):
        rtk.RTKParticleGibbs(image, local=local)
