"""Inner kernels, one a file."""

from numpyro_rtk._inner._base import (
    AbstractInnerKernel as AbstractInnerKernel,
    AbstractMarkovKernel as AbstractMarkovKernel,
    SegmentEntry as SegmentEntry,
    SegmentResult as SegmentResult,
    SegmentTuning as SegmentTuning,
    Start as Start,
    StepInfo as StepInfo,
)
from numpyro_rtk._inner._gaussian import GaussianTransition as GaussianTransition
from numpyro_rtk._inner._mala import MALA as MALA
from numpyro_rtk._inner._preconditioned_mala import PreconditionedMALA as PreconditionedMALA
from numpyro_rtk._inner._ula import ULA as ULA
from numpyro_rtk._inner._uld import ULD as ULD
