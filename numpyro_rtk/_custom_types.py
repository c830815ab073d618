"""Shape and dtype aliases used throughout the package.

`Event` is one draw `x` of any shape; batching is always `jax.vmap` outside.
"""

from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt32


Event: TypeAlias = Float[Array, "*event"]
Scalar: TypeAlias = Float[Array, ""]
Times: TypeAlias = Float[Array, "*times"]
PerSegment: TypeAlias = Float[Array, " segments"]
Flag: TypeAlias = Bool[Array, ""]
Count: TypeAlias = Int[Array, ""]
RandomKey: TypeAlias = Key[Array, ""] | UInt32[Array, "2"] | PRNGKeyArray
ScoreFn: TypeAlias = Callable[..., Event]
"""`score_fn(x, t) -> score`, one event `x`, scalar time `t`, the shape of `x`."""
