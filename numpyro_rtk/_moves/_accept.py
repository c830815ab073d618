"""The accept step."""

from typing import Any

import jax
import jax.numpy as jnp

from numpyro_rtk._custom_types import Flag


MAX_ENERGY_DROP = 1000.0
"""An unadjusted step that lowers the log target by more than this has left the law (HMC's threshold)."""


def all_finite(*arrays: Any) -> Flag:
    """Whether every entry of every array is finite."""
    return jnp.stack([jnp.all(jnp.isfinite(array)) for array in arrays]).all()


def select(condition: Flag, if_true: Any, if_false: Any) -> Any:
    """`jnp.where` over two PyTrees of the same structure."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), if_true, if_false)
