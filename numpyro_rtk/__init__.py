"""Reverse-transition-kernel diffusion sampling as NumPyro MCMC kernels."""

from numpyro_rtk._moves._line_integral import (
    AbstractEnergyDifference as AbstractEnergyDifference,
    ExactEnergy as ExactEnergy,
    GaussLegendre as GaussLegendre,
    Simpson as Simpson,
    Trapezoid as Trapezoid,
)
from numpyro_rtk._noising._base import AbstractNoiseSchedule as AbstractNoiseSchedule
from numpyro_rtk._noising._cosine import Cosine as Cosine
from numpyro_rtk._noising._discrete import DiscreteVP as DiscreteVP
from numpyro_rtk._noising._flow_matching import FlowMatching as FlowMatching
from numpyro_rtk._noising._times import (
    paper_segment_times as paper_segment_times,
    segment_times as segment_times,
)
from numpyro_rtk._noising._variance_exploding import EDM as EDM, VE as VE
from numpyro_rtk._noising._variance_preserving import OU as OU, VP as VP
from numpyro_rtk._numpyro import (
    RTKGibbs as RTKGibbs,
    RTKKernel as RTKKernel,
    RTKMALA as RTKMALA,
    RTKParticleGibbs as RTKParticleGibbs,
    RTKULD as RTKULD,
    ScoreHMC as ScoreHMC,
    shard_chains as shard_chains,
)
from numpyro_rtk._prior._density import (
    AbstractLogDensity as AbstractLogDensity,
    EnergyDensity as EnergyDensity,
    LineIntegral as LineIntegral,
    ProbabilityFlow as ProbabilityFlow,
)
from numpyro_rtk._prior._prior import DiffusionPrior as DiffusionPrior
from numpyro_rtk._reverse._base import AbstractInnerKernel as AbstractInnerKernel
from numpyro_rtk._reverse._gaussian import GaussianTransition as GaussianTransition
from numpyro_rtk._reverse._mala import MALA as MALA
from numpyro_rtk._reverse._preconditioned_mala import PreconditionedMALA as PreconditionedMALA
from numpyro_rtk._reverse._ula import ULA as ULA
from numpyro_rtk._reverse._uld import ULD as ULD
from numpyro_rtk._score._adapters import (
    BatchedNetwork as BatchedNetwork,
    DataPrediction as DataPrediction,
    FlowVelocity as FlowVelocity,
    NoisePrediction as NoisePrediction,
    VelocityPrediction as VelocityPrediction,
)
from numpyro_rtk._score._closed_forms import (
    EnergyScore as EnergyScore,
    GaussianMixtureScore as GaussianMixtureScore,
)
from numpyro_rtk._smc._local import (
    AbstractLocalMove as AbstractLocalMove,
    LocalHMC as LocalHMC,
    LocalMALA as LocalMALA,
)
from numpyro_rtk._smc._twist import (
    AbstractTwist as AbstractTwist,
    GaussianTwist as GaussianTwist,
    TemperedTwist as TemperedTwist,
)
