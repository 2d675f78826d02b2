"""Phase images of scanners and converters become the same radians."""

from __future__ import annotations

import numpy as np
import pytest

from bids_gacelle.engine import EngineError
from bids_gacelle.engine.prepare.phase import phase_scale

TRUE = np.random.default_rng(0).uniform(-np.pi, np.pi, (2, 4000))


def read(stored, units=""):
    scale = phase_scale(list(stored), units)
    return (stored - scale.zero) * scale.factor, scale


@pytest.mark.parametrize(
    ("stored", "units", "words"),
    [
        (TRUE, "rad", "radians"),
        (TRUE, "", "-pi to pi"),
        (np.mod(TRUE, 2 * np.pi), "", "0 to 2 pi"),
        (np.rad2deg(TRUE), "deg", "degrees"),
        (np.rad2deg(TRUE), "arbitrary", "-180 to 180"),
        (np.round(TRUE / np.pi * 2047), "arbitrary", "-2048 to 2047"),
        (np.round(TRUE / np.pi * 2047.5 + 2047.5), "arbitrary", "0 to 4095"),
        (np.round(TRUE / np.pi * 2047) * 2, "", "-4096 to 4095"),
        (np.round(TRUE * 1000), "", "-3142 to 3142"),
        (TRUE * 1000, "arbitrary", "-3142 to 3142"),
        (np.round(TRUE / np.pi * 4095), "rad", "-4096 to 4095"),
        (np.rad2deg(TRUE), "rad", "-180 to 180"),
    ],
)
def test_scales_are_recognised(stored, units, words):
    found, scale = read(stored, units)
    assert words in scale.text
    assert scale.assumed is (units not in ("rad", "deg") or "rad in" in scale.text)
    off = np.angle(np.exp(1j * (found - TRUE)))
    common = np.angle(np.exp(1j * off).mean())  # a phase common to all images does not matter
    assert np.abs(np.angle(np.exp(1j * (off - common)))).max() < 5e-3


def test_unwrapped_radians_are_radians():
    unwrapped = TRUE + 2 * np.pi * np.random.default_rng(1).integers(-5, 6, TRUE.shape)
    found, scale = read(unwrapped, "rad")
    assert not scale.assumed
    np.testing.assert_array_equal(found, unwrapped)


@pytest.mark.parametrize(
    ("stored", "units", "words"),
    [
        (np.round(TRUE * 5), "rad", "whole numbers from -16 to 16"),
        (TRUE, "deg", 'correct Units in the sidecars to "rad"'),
        (TRUE / 3, "", "fill the range of no scale"),
        (np.round(TRUE * 400), "arbitrary", '"Units": "rad"'),
        (np.zeros((2, 5)), "rad", "same value everywhere"),
    ],
)
def test_what_cannot_be_is_refused(stored, units, words):
    with pytest.raises(EngineError, match=words):
        phase_scale(list(stored), units)
