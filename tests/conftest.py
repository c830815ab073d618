"""Settings that hold for every test."""

import gc
import importlib.metadata
import os
import resource


# Compiling is most of what tests do: LLVM's optimisations cost twice what they save here, and so do the
# fusion emitters, which newer releases cannot do without. Not so for tests of many draws, which `make test`
# runs apart. Must precede the import of JAX.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_backend_optimization_level=0"] * ("OPTIMIZED" not in os.environ)
    + ["--xla_cpu_use_fusion_emitters=false"]
    * ("OPTIMIZED" not in os.environ and importlib.metadata.version("jaxlib").startswith("0.10."))
    + [os.environ.get("XLA_FLAGS", "")]
)

import jax
import pytest


# Missing axes are a bug in code written for one event. A global setting, so that the library's own traces see
# it.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes many short-lived objects: collecting at each 700 of them is a sixth of its time.
gc.set_threshold(100_000, 50, 1000)


LONG = (
    "test_calibration",
    "test_particle_gibbs",
    "test_rtk_gibbs",
    "test_latent_conditions",
    "test_score_hmc",
    "test_joint",
    "test_sharding",
    "test_docs",
)


def pytest_collection_modifyitems(items):
    """Modules that take long come first, so that no worker is left alone with one of them."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def many_programs():
    """Every compiled program holds memory and mappings of it, of which Linux allows a process 65,530. Running
    out of either is a crash.
    """
    try:
        with open("/proc/self/maps") as maps, open("/proc/self/statm") as pages:
            resident = int(pages.read().split()[1]) * resource.getpagesize()
            return resident > 2e9 or sum(1 for _ in maps) > 20_000
    except OSError:  # another system: no way to know
        return True


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """When there are many: forgetting takes seconds, and what modules share is compiled again."""
    yield
    if many_programs():
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def strict_dtypes():
    """Strict dtype promotion, for tests of the core only: NUTS does not pass under it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """Float64, for relations that hold to rounding."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def segments_are_not_checked(request, monkeypatch):
    """Starts check segments by a program of their own; compiling it for every kernel would double the time of
    the suite. Tests of the check itself ask for `segments_are_checked`.
    """
    if "segments_are_checked" not in request.fixturenames:
        monkeypatch.setattr("numpyro_rtk._diagnosis._start.CHECK_SEGMENTS", False)


@pytest.fixture
def segments_are_checked():
    """As it is for users."""
