"""The NumPyro side: the only place that imports `numpyro.infer`."""

from numpyro_rtk._numpyro._gibbs import RTKGibbs as RTKGibbs
from numpyro_rtk._numpyro._particle_gibbs import RTKParticleGibbs as RTKParticleGibbs
from numpyro_rtk._numpyro._particle_gibbs_chain import ParticleGibbsState as ParticleGibbsState
from numpyro_rtk._numpyro._rtk_kernel import RTKKernel as RTKKernel, RTKState as RTKState
from numpyro_rtk._numpyro._rtk_named import RTKMALA as RTKMALA, RTKULD as RTKULD
from numpyro_rtk._numpyro._score_hmc import ScoreHMC as ScoreHMC
from numpyro_rtk._numpyro._score_hmc_chain import ScoreHMCState as ScoreHMCState
from numpyro_rtk._numpyro._sharding import shard_chains as shard_chains
