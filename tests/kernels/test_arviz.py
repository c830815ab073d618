"""ArviZ reads what `MCMC` has collected: InferenceData in ArviZ 0.2x, a DataTree in 1.x."""

import warnings

import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import pytest
from numpyro.infer import MCMC

import numpyro_rtk as rtk


matplotlib.use("Agg")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ 0.23 announces ArviZ 1 at import
    import arviz as az
    from matplotlib import pyplot


IS_LEGACY = int(az.__version__.split(".")[0]) == 0
FIELDS = ("accept_prob", "segment_accept_prob", "num_score_evals", "adapt_state.step_size")


def score(x, t):
    """Score of N(0, 1/4) under OU."""
    alpha_squared = jnp.exp(-2 * t)
    return -x / (0.25 * alpha_squared + 1 - alpha_squared)


@pytest.fixture(scope="module")
def mcmc():
    kernel = rtk.RTKKernel(score, event_shape=(3,), segments=4, inner=rtk.MALA(num_steps=2))
    mcmc = MCMC(
        kernel, num_warmup=20, num_samples=60, num_chains=2, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(jr.key(0), extra_fields=FIELDS)
    return mcmc


@pytest.fixture(scope="module")
def data(mcmc):
    return az.from_numpyro(mcmc)


def values(group, name):
    return np.asarray(group[name].values)


def test_from_numpyro(mcmc, data):
    assert type(data).__name__ == ("InferenceData" if IS_LEGACY else "DataTree")
    posterior, stats = data["posterior"], data["sample_stats"]
    assert list(posterior.data_vars) == ["x"]
    np.testing.assert_array_equal(values(posterior, "x"), mcmc.get_samples(group_by_chain=True)["x"])
    expected = {"acceptance_rate", "diverging", "step_size", "segment_accept_prob", "num_score_evals"}
    assert set(stats.data_vars) == expected
    extra = mcmc.get_extra_fields(group_by_chain=True)
    np.testing.assert_array_equal(values(stats, "acceptance_rate"), extra["accept_prob"])
    np.testing.assert_array_equal(values(stats, "step_size"), extra["adapt_state.step_size"])
    assert stats["step_size"].shape == (2, 60, 4)
    assert stats["segment_accept_prob"].shape == (2, 60, 4)
    assert stats["diverging"].shape == (2, 60)
    assert values(stats, "diverging").dtype == bool
    np.testing.assert_array_equal(values(stats, "num_score_evals"), np.full((2, 60), 4 * 3))


def test_only_the_default_fields():
    # Without `extra_fields`, and with one chain and thinning.
    kernel = rtk.RTKKernel(score, event_shape=(), segments=2, inner=rtk.GaussianTransition())
    mcmc = MCMC(kernel, num_warmup=2, num_samples=8, thinning=2, progress_bar=False)
    mcmc.run(jr.key(0))
    data = az.from_numpyro(mcmc)
    assert data["posterior"]["x"].shape == (1, 4)
    assert set(data["sample_stats"].data_vars) == {"diverging"}


def test_summary_and_rhat(data):
    summary = az.summary(data)
    assert list(summary.index) == ["x[0]", "x[1]", "x[2]"]
    for column in ("mean", "sd", "ess_bulk", "r_hat"):
        assert np.all(np.isfinite(np.asarray(summary[column], float)))
    rhat = az.rhat(data)
    rhat = rhat["posterior"] if "posterior" in getattr(rhat, "children", {}) else rhat
    # Independent draws in 4 half chains of 30: R-hat^2 - 1 is near (chi2(3) / 3 - 1) / 30, and 1.2 is far
    # outside.
    assert np.all(np.asarray(rhat["x"]) < 1.2)


# ArviZ 0.23 calls Matplotlib in a way that 3.11 deprecates.
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping:DeprecationWarning")
def test_plot_trace(data, tmp_path):
    if IS_LEGACY:
        az.plot_trace(data)
        figure = pyplot.gcf()
    else:
        figure = az.plot_trace(data, backend="matplotlib").viz["figure"].item()
    figure.savefig(tmp_path / "trace.png")
    pyplot.close("all")
    assert (tmp_path / "trace.png").stat().st_size > 1000


def test_netcdf_round_trip(data, tmp_path):
    path = tmp_path / "draws.nc"
    if IS_LEGACY:
        data.to_netcdf(str(path), engine="h5netcdf")
        read = az.from_netcdf(str(path), engine="h5netcdf")
    else:
        data.to_netcdf(path, engine="h5netcdf")
        read = az.from_netcdf(path, engine="h5netcdf")
    for group in ("posterior", "sample_stats"):
        assert set(read[group].data_vars) == set(data[group].data_vars)
        for name in data[group].data_vars:
            np.testing.assert_array_equal(values(read[group], name), values(data[group], name))
