"""Is this the score of the noised draws? Read from a pilot, at no evaluation."""

import math
from typing import NamedTuple

import numpy as np
from jax.core import Tracer

from numpyro_rtk._diagnosis._report import Finding
from numpyro_rtk._diagnosis._significance import normal_limit, normal_score
from numpyro_rtk._reverse._calibration import Calibration


MIN_DRAWS = 4
"""Fewest draws that say anything."""
MIN_STEIN = 0.15
"""Deviation from Stein's identity from which it is said, relative. That of the galaxy network is 0.01."""
MIN_SLOPE, MIN_NOISE = 0.07, 0.02
"""Deviation of the slope from 1, and of the predicted noise in sds, from which both together are said. Those
of the galaxy network are 0.002."""
MOST = 0.9
"""Share of draws that must show a wrong sign at the top."""
WRONG_SIGN = -0.25
"""Stein's identity gives 1; a score of the wrong sign gives less than this."""


class Subject(NamedTuple):
    """What the user calls the things that are checked."""

    score: str
    """The score, such as "`score_fn` of site 'x'"."""
    schedule: str
    """The noising process, as it is printed."""
    assumed: bool = False
    """Whether nobody gave the schedule."""

    @property
    def noising(self) -> str:
        """The schedule, and whose it is."""
        said = " (assumed: neither `score_fn` nor `schedule=` names one)" if self.assumed else ""
        return f"`schedule={self.schedule}`{said}"


def check_pilot(
    calibration: Calibration, times: np.ndarray, dim: int, subject: Subject, num_failed: int = 0
) -> list[Finding]:
    """Stein's identity, and the slope of the noise that was added on the noise that is predicted, by level.

    *Law.* A right score is spoken of at `FALSE_ALARM_RATE`, all levels together. Draws of a pilot come from
    the score itself: a wrong one is found where it contradicts itself, as those of another schedule, time or
    scale do at some level.

    *Cost.* No evaluation.

    Args:
        calibration: Of a pilot, shape `(levels, draws)`.
        times: Of the levels, from noise to data, shape `(levels,)`.
        dim: Number of coordinates of an event.
        subject: Names for the messages.
        num_failed: Number of prior draws that met NaN or infinity.

    Returns:
        No finding, or one: the worst level. None for traced values.
    """
    if any(isinstance(leaf, Tracer) for leaf in calibration):
        return []
    values = [np.asarray(leaf, np.float64) for leaf in calibration]
    usable = np.all(np.isfinite(values), axis=(0, 1))
    stein, product, square = (leaf[:, usable] for leaf in values)
    num_draws = stein.shape[1]
    if num_draws < MIN_DRAWS:
        return _failed(usable.size - num_draws, usable.size, subject)
    limit = normal_limit(2 * stein.shape[0])

    # The variance is 2 / dim for any Gaussian and larger for most laws; a few draws of a skewed law may show
    # too little of it.
    stein_score = normal_score(stein - 1, math.sqrt(2 / (dim * num_draws)))
    stein_mean = stein.mean(axis=1)
    # A few draws that explode scatter too much; but at the top, where all is noise, none may have this sign.
    certain = stein_score < -limit
    certain[0] |= bool(np.mean(stein[0] < 0) > MOST)
    wrong_sign = (stein_mean < WRONG_SIGN) & certain
    if np.any(wrong_sign):
        level = int(np.argmax(wrong_sign))
        return [_wrong_sign(level, float(times[level]), float(stein_mean[level]), subject)]
    if num_failed:
        return _failed(num_failed, num_draws, subject)

    noise = (product - square).mean(axis=1)
    slope = product.mean(axis=1) / np.maximum(square.mean(axis=1), np.finfo(float).tiny)
    slope_score = normal_score(product - square)
    bad_slope = (np.abs(slope - 1) > MIN_SLOPE) & (np.abs(noise) > MIN_NOISE) & (np.abs(slope_score) > limit)
    bad_stein = (np.abs(stein_mean - 1) > MIN_STEIN) & (np.abs(stein_score) > limit)
    num_bad = int(np.sum(bad_slope | bad_stein))
    if not num_bad:
        return []
    if np.any(bad_slope):
        level = int(np.argmax(np.where(bad_slope, np.abs(noise), 0.0)))
        number, scored = float(slope[level]), float(slope_score[level])
        what = f"the noise that was added is {number:.2f} times the noise that the score predicts"
    else:
        level = int(np.argmax(np.where(bad_stein, np.abs(stein_mean - 1), 0.0)))
        number, scored = float(stein_mean[level]), float(stein_score[level])
        what = f"E<x - E x, score> is {-number:.2f} dim in place of -dim (Stein's identity)"
    message = (
        f"{subject.score} is not the score of its own draws noised by {subject.noising}: at level {level} of "
        f"{times.size - 1} (t={times[level]:.3g}) {what}, where 1.00 is right ({abs(scored):.0f} standard "
        f"errors; {num_bad} of {times.size} levels are off). Draws follow another law. Check `schedule=`, "
        "the time that the network was trained with, its scale, and what it predicts (`NoisePrediction`, "
        "`DataPrediction`, `VelocityPrediction` and `FlowVelocity` make scores of networks)."
    )
    return [Finding("score", level, number, message)]


def _wrong_sign(level: int, t: float, number: float, subject: Subject) -> Finding:
    message = (
        f"{subject.score} has the wrong sign: at level {level} (t={t:.3g}) E<x - E x, score> is "
        f"{-number:+.3g} dim, where Stein's identity gives -dim. A network that predicts noise, data or a "
        "velocity needs its adapter: `NoisePrediction(network, schedule)`, `DataPrediction`, "
        "`VelocityPrediction` or `FlowVelocity`; an energy needs `EnergyScore`. (Noised by "
        f"{subject.noising}.)"
    )
    return Finding("sign", level, number, message)


def _failed(num_failed: int, num_draws: int, subject: Subject) -> list[Finding]:
    message = (
        f"{subject.score} gave NaN or infinity in {num_failed} of {num_draws} draws of the prior, noised by "
        f"{subject.noising}. Check `schedule=`, and what the network predicts (`NoisePrediction`, "
        "`DataPrediction`, `VelocityPrediction` and `FlowVelocity` make scores of networks)."
    )
    return [Finding("failed", 0, num_failed / num_draws, message)]
