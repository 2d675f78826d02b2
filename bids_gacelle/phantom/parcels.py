"""Parcels of white matter, each with its own content of myelin.

White matter is divided among seeds in MNI coordinates: a voxel belongs to the nearest one. The
myelin water fractions are spread evenly from 6 to 18 %, in an order that follows what is seen in
adults: little in the frontal and temporal lobes, most in the splenium, the internal capsule and
the brainstem.
"""

from __future__ import annotations

from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from bids_gacelle.phantom.anatomy import Anatomy, Label

LEAST_MWF, MOST_MWF = 0.06, 0.18


@dataclass(frozen=True)
class Parcel:
    """A part of white matter: value in the image, name, abbreviation, colour, seed in MNI mm."""

    index: int
    name: str
    abbreviation: str
    color: str
    seed: tuple[float, float, float]


# From little to much myelin. Those off the midline are there twice, with x mirrored.
_SEEDS: tuple[tuple[str, str, tuple[float, float, float]], ...] = (
    ("Orbitofrontal white matter", "OFWM", (20, 34, -10)),
    ("Anterior temporal white matter", "ATWM", (38, -2, -24)),
    ("Anterior frontal white matter", "AFWM", (22, 44, 10)),
    ("Posterior temporal white matter", "PTWM", (42, -38, -6)),
    ("Superior frontal white matter", "SFWM", (22, 14, 44)),
    ("External capsule", "EC", (31, 6, 0)),
    ("Cerebellar white matter", "CBWM", (18, -52, -34)),
    ("Parietal white matter", "PWM", (26, -56, 38)),
    ("Anterior corona radiata", "ACR", (25, 22, 18)),
    ("Occipital white matter", "OWM", (24, -80, 6)),
    ("Genu of corpus callosum", "GCC", (0, 26, 8)),
    ("Precentral white matter", "PCWM", (24, -22, 50)),
    ("Superior corona radiata", "SCR", (26, -8, 28)),
    ("Posterior corona radiata", "PCR", (27, -34, 26)),
    ("Body of corpus callosum", "BCC", (0, -4, 26)),
    ("Brainstem", "BS", (0, -29, -32)),
    ("Internal capsule", "IC", (24, -14, 8)),
    ("Splenium of corpus callosum", "SCC", (0, -38, 15)),
)


def _color(index: int) -> str:
    """Return a colour whose hue is far from those of neighbouring indices."""
    red, green, blue = hsv_to_rgb(0.618 * index % 1, 0.6, 0.9)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _parcels() -> tuple[Parcel, ...]:
    parcels: list[Parcel] = []
    for name, abbreviation, (x, y, z) in _SEEDS:
        sides = (("", "", 1),) if x == 0 else (("Left ", "L", -1), ("Right ", "R", 1))
        for side, letter, sign in sides:
            called = f"{side}{name[0].lower()}{name[1:]}" if side else name
            seed = (sign * x, y, z)
            index = len(parcels) + 1
            parcels.append(Parcel(index, called, f"{letter}{abbreviation}", _color(index), seed))
    return tuple(parcels)


PARCELS = _parcels()
"""All parcels, in the order of their mean myelin water fraction."""


def parcel_mwf() -> np.ndarray:
    """Return the mean myelin water fraction of every parcel, float64 (parcels,)."""
    return np.linspace(LEAST_MWF, MOST_MWF, len(PARCELS))


def parcel_labels(anatomy: Anatomy) -> np.ndarray:
    """Return the parcel of every voxel, uint8 (x, y, z): its index, 0 outside white matter."""
    white = anatomy.labels == Label.WHITE_MATTER
    labels = np.zeros(white.shape, dtype=np.uint8)
    nearest = cKDTree([parcel.seed for parcel in PARCELS]).query(anatomy.mni[white])[1]
    labels[white] = np.array([parcel.index for parcel in PARCELS])[nearest]
    return labels
