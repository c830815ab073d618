"""Sizes at which defaults change. What was chosen is in the `repr` of a kernel or a prior."""

MAX_MEAN_SLOPE_DIM = 100
"""Most dimensions of all sites in which guided moves take the denoiser's Jacobian as diagonal, and MALA moves
and reverse kernels evaluate midpoints, unless told otherwise."""

MAX_EXACT_TRACE_DIM = 100
"""Largest event whose probability flow takes the exact trace, and is the default density of a prior."""

MAX_EXACT_OBSERVATIONS = 64
"""Most Gaussian observations for which the covariance of the twist is formed as a matrix."""

MANY_DIMENSIONS = 256
"""Above so many, round trips through a segment and pilots of a posterior take fewer draws, as each tells more
and costs more."""
