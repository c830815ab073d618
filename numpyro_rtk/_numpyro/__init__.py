"""The NumPyro side: the only place that imports `numpyro.infer`."""

from numpyro_rtk._numpyro._rtk_kernel import (
    RTKKernel as RTKKernel,
    RTKMALA as RTKMALA,
    RTKState as RTKState,
    RTKULD as RTKULD,
)
