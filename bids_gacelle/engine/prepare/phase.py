"""In which unit a phase image is, from what its sidecar says and from its values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bids_gacelle.engine.errors import EngineError

_Float = npt.NDArray[np.floating]


class PhaseScale(NamedTuple):
    """How stored values become radians: (value - zero) * factor.

    Attributes
    ----------
    factor, zero
        Of the scale.
    text
        What the values are taken for, to be said.
    assumed
        Whether it is read from the values, for want of a unit.
    """

    factor: float
    zero: float
    text: str
    assumed: bool


class _Scaling(NamedTuple):
    low: float
    high: float
    turn: float
    """What stands for 2 pi."""
    zero: float
    text: str


# From the narrowest to the widest: what does not leave one is not taken for the next.
_SCALINGS = (
    _Scaling(-np.pi, np.pi, 2 * np.pi, 0, "radians from -pi to pi"),
    _Scaling(0, 2 * np.pi, 2 * np.pi, np.pi, "radians from 0 to 2 pi"),
    _Scaling(-180, 180, 360, 0, "degrees from -180 to 180"),
    _Scaling(0, 360, 360, 180, "degrees from 0 to 360"),
    _Scaling(-2048, 2047, 4096, 0, "integers of the scanner from -2048 to 2047"),
    _Scaling(-3142, 3142, 2000 * np.pi, 0, "thousandths of a radian from -3142 to 3142"),
    _Scaling(0, 4095, 4096, 2048, "integers of the scanner from 0 to 4095"),
    _Scaling(-4096, 4095, 8192, 0, "integers of the scanner from -4096 to 4095"),
)
# Noise fills the range of a phase image, up to this share that may be missing at both ends.
_MISSING = 0.05
_BEYOND = 1e-3  # of the range, by which rounding may exceed it


def phase_scale(images: list[_Float], units: str = "") -> PhaseScale:
    """Return how the phase images of one series become radians.

    Parameters
    ----------
    images
        Values of any shape, as stored (with the slope and intercept of their headers).
    units
        "rad", "deg", or anything else: the scale is then recognised by the range that the values
        fill, which noise does in any image of a whole field of view.

    Raises
    ------
    EngineError
        The values contradict the unit, or fill no range of a known scale.
    """
    low, high, whole = _range(images)
    span = f"{low:.6g} to {high:.6g}"
    fills = [s for s in _SCALINGS if _fills(low, high, s)]
    if units == "rad":
        # unwrapped phases go far beyond a turn, but neither to the ends of a scale nor in steps
        if high - low <= 4 * np.pi or not (fills or whole):
            return PhaseScale(1.0, 0.0, "radians", assumed=False)
        if not fills:
            raise EngineError(
                f"the unit of the phase is rad, but its values are whole numbers from {span}; "
                "convert them to radians, or correct Units in the sidecars to what they are "
                '("deg" or "arbitrary")'
            )
    elif units == "deg":
        if high - low <= 2 * np.pi * (1 + _BEYOND) and not whole:
            raise EngineError(
                f"the unit of the phase is deg, but its values go from {span}, as radians do; "
                'correct Units in the sidecars to "rad"'
            )
        return PhaseScale(np.pi / 180, 0.0, "degrees", assumed=False)
    if not fills:
        raise EngineError(
            f"the phase has no unit, and its values from {span} fill the range of no scale that "
            f"is known ({', '.join(s.text for s in _SCALINGS)}); convert it to radians and give "
            '"Units": "rad" in the sidecars'
        )
    scale = fills[0]
    text = f"{scale.text} (found {span})"
    if units == "rad":
        text += ", whatever the unit rad in the sidecars says"
    return PhaseScale(2 * np.pi / scale.turn, scale.zero, text, assumed=True)


def _range(images: list[_Float]) -> tuple[float, float, bool]:
    """Return the least and the largest value of all images, and whether all are whole."""
    lows, highs, whole = [], [], True
    for image in images:
        values = image[np.isfinite(image)]
        if values.size:
            lows.append(float(values.min()))
            highs.append(float(values.max()))
            whole &= bool((values == np.round(values)).all())
    if not lows or min(lows) == max(highs):
        raise EngineError("the phase has the same value everywhere; convert it again")
    return min(lows), max(highs), whole


def _fills(low: float, high: float, scale: _Scaling) -> bool:
    width = scale.high - scale.low
    inside = low >= scale.low - _BEYOND * width and high <= scale.high + _BEYOND * width
    return inside and low <= scale.low + _MISSING * width and high >= scale.high - _MISSING * width
