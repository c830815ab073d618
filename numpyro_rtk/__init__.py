"""Reverse-transition-kernel diffusion sampling as NumPyro MCMC kernels."""

from numpyro_rtk._density import (
    AbstractLogDensity as AbstractLogDensity,
    EnergyDensity as EnergyDensity,
    LineIntegral as LineIntegral,
    ProbabilityFlow as ProbabilityFlow,
)
from numpyro_rtk._energy import (
    AbstractEnergyDifference as AbstractEnergyDifference,
    ExactEnergy as ExactEnergy,
    GaussLegendre as GaussLegendre,
    Simpson as Simpson,
    Trapezoid as Trapezoid,
)
from numpyro_rtk._inner import (
    AbstractInnerKernel as AbstractInnerKernel,
    GaussianTransition as GaussianTransition,
    MALA as MALA,
    PreconditionedMALA as PreconditionedMALA,
    ULA as ULA,
    ULD as ULD,
)
from numpyro_rtk._local import (
    AbstractLocalMove as AbstractLocalMove,
    LocalHMC as LocalHMC,
    LocalMALA as LocalMALA,
)
from numpyro_rtk._numpyro import (
    RTKGibbs as RTKGibbs,
    RTKKernel as RTKKernel,
    RTKMALA as RTKMALA,
    RTKParticleGibbs as RTKParticleGibbs,
    RTKULD as RTKULD,
    ScoreHMC as ScoreHMC,
)
from numpyro_rtk._prior import DiffusionPrior as DiffusionPrior
from numpyro_rtk._schedule import (
    AbstractNoiseSchedule as AbstractNoiseSchedule,
    Cosine as Cosine,
    DiscreteVP as DiscreteVP,
    EDM as EDM,
    FlowMatching as FlowMatching,
    OU as OU,
    paper_segment_times as paper_segment_times,
    segment_times as segment_times,
    VE as VE,
    VP as VP,
)
from numpyro_rtk._score import (
    BatchedNetwork as BatchedNetwork,
    DataPrediction as DataPrediction,
    EnergyScore as EnergyScore,
    FlowVelocity as FlowVelocity,
    GaussianMixtureScore as GaussianMixtureScore,
    NoisePrediction as NoisePrediction,
    VelocityPrediction as VelocityPrediction,
)
from numpyro_rtk._twist import (
    AbstractTwist as AbstractTwist,
    GaussianTwist as GaussianTwist,
    TemperedTwist as TemperedTwist,
)
