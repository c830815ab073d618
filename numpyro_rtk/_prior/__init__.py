"""`DiffusionPrior` and its densities."""
