"""NumPyro's dual averaging, handed to the rooms that do not import NumPyro's inference."""

from numpyro.infer.hmc_util import dual_averaging

from numpyro_rtk._tuning._step_size import StepSizeTuner


STEP_SIZES = StepSizeTuner(*dual_averaging())
"""How every kernel here adapts step sizes."""
