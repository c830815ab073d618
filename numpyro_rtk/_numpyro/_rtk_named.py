"""`RTKKernel` with the paper's inner kernels, by name."""

from typing import Any

from numpyro_rtk._moves._line_integral import AbstractEnergyDifference, Trapezoid
from numpyro_rtk._numpyro._rtk_kernel import RTKKernel
from numpyro_rtk._reverse._mala import MALA
from numpyro_rtk._reverse._markov import Start
from numpyro_rtk._reverse._uld import ULD


def RTKMALA(
    score_fn: Any,
    *,
    num_steps: int = 4,
    segments: Any = 40,
    step_size: Any = None,
    energy_difference: AbstractEnergyDifference | None = None,
    start: Start = "gaussian",
    **options: Any,
) -> RTKKernel:
    """`RTKKernel` with `MALA` as inner kernel: `segments * (num_steps + 1)` score evaluations a draw.

    Args:
        score_fn: As in `RTKKernel`.
        num_steps: MALA steps per segment.
        segments: As in `RTKKernel`.
        step_size: As in `MALA`.
        energy_difference: As in `MALA`; `None` is `Trapezoid()`.
        start: As in `MALA`.
        **options: The other arguments of `RTKKernel`.
    """
    rule = Trapezoid() if energy_difference is None else energy_difference
    inner = MALA(num_steps=num_steps, step_size=step_size, energy_difference=rule, start=start)
    return RTKKernel(score_fn, inner=inner, segments=segments, **options)


def RTKULD(
    score_fn: Any,
    *,
    num_steps: int = 8,
    segments: Any = 20,
    step_size: Any = None,
    friction: Any = None,
    start: Start = "gaussian",
    **options: Any,
) -> RTKKernel:
    """`RTKKernel` with `ULD` as inner kernel: `segments * (num_steps + 1)` score evaluations a draw.

    Args:
        score_fn: As in `RTKKernel`.
        num_steps: Underdamped Langevin steps per segment.
        segments: As in `RTKKernel`.
        step_size: As in `ULD`.
        friction: As in `ULD`.
        start: As in `ULD`.
        **options: The other arguments of `RTKKernel`.
    """
    inner = ULD(num_steps=num_steps, step_size=step_size, friction=friction, start=start)
    return RTKKernel(score_fn, inner=inner, segments=segments, **options)
