"""Settings that hold for every test."""

import os


# Compiling is most of what tests do: LLVM's optimisations cost twice what they save here. Must precede the import of JAX.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest


# Missing axes are a bug in code written for one event. A global setting, so that the library's own traces see it.
jax.config.update("jax_numpy_rank_promotion", "raise")


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
