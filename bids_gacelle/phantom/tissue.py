"""What the tissues of the digital brain are made of: parameter values at 3 T, and their maps.

Typical in vivo values: R2* and T1 at 3 T (Peters et al. 2007, doi:10.1016/j.mri.2007.02.014;
Wansapura et al. 1999, doi:10.1002/(SICI)1522-2586(199904)9:4<531::AID-JMRI4>3.0.CO;2-L), myelin
water (Nam et al. 2015, doi:10.1016/j.neuroimage.2015.03.081; Chan and Marques 2020,
doi:10.1016/j.neuroimage.2020.117159), exchange model (Jelescu et al. 2022,
doi:10.1016/j.neuroimage.2022.119277; Olesen et al. 2022, doi:10.1016/j.neuroimage.2022.118976),
spherical mean technique (Kaden et al. 2016, doi:10.1016/j.neuroimage.2016.06.002).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bids_gacelle.phantom.anatomy import Anatomy, Label
from bids_gacelle.phantom.fields import smooth_field, stream

POOLS = {
    "MWF": 0.08,
    "IWF": 0.05,
    "R1IEW": 0.05,
    "kIEWM": 0.10,
    "R2sMW": 0.08,
    "R2sIW": 0.06,
    "R2sEW": 0.06,
}
"""Relative standard deviation of each quantity of the water pools within a tissue."""

QUANTITIES = {
    "M0": 0.04,
    "T1": 0.05,
    "R2star": 0.08,
    "b0": 0.05,
    "nexi.fn": 0.08,
    "nexi.dn": 0.05,
    "nexi.de": 0.06,
    "nexi.tex": 0.12,
    "nexi.p2": 0.10,
    "mcmicro.fn": 0.08,
    "mcmicro.d": 0.05,
    **{f"mwi.{name}": spread for name, spread in POOLS.items()},
}
"""Relative standard deviation of each quantity within a tissue. M0 is the proton density relative
to water, b0 the signal without diffusion weighting relative to white matter; T1 in s, R2star and
the rates of the water pools (mwi) in 1/s, diffusivities in um^2/ms, tex in ms."""

_BETWEEN_SUBJECTS = 0.02
_FLUID_SPREAD = 0.015  # fluid is much the same everywhere and in everyone
_SESSION_SHARE = 0.25  # of the smooth variation, in standard deviations


@dataclass(frozen=True)
class Tissue:
    """What a label is called, and the colour it is drawn in."""

    label: Label
    name: str
    abbreviation: str
    color: str


TISSUES = (
    Tissue(Label.CSF, "Cerebrospinal fluid", "CSF", "#4682b4"),
    Tissue(Label.CORTEX, "Cerebral cortex", "CTX", "#a0a0a0"),
    Tissue(Label.WHITE_MATTER, "White matter", "WM", "#f5f5dc"),
    Tissue(Label.CEREBELLUM, "Cerebellar cortex", "CBC", "#c08457"),
    Tissue(Label.THALAMUS, "Thalamus", "THA", "#00760e"),
    Tissue(Label.CAUDATE, "Caudate nucleus", "CAU", "#7abadc"),
    Tissue(Label.PUTAMEN, "Putamen", "PUT", "#ec0db0"),
    Tissue(Label.PALLIDUM, "Globus pallidus", "PAL", "#0d30ff"),
)
"""The tissues of the brain."""

MEANS = {
    Label.CSF: (1.00, 4.00, 2.5, 2.40, 0.00, 2.0, 2.90, 30.0, 0.1, 0.00, 2.90),
    Label.CORTEX: (0.82, 1.40, 18.0, 1.30, 0.38, 2.4, 0.95, 25.0, 0.2, 0.35, 1.80),
    Label.WHITE_MATTER: (0.70, 0.85, 21.0, 1.00, 0.58, 2.2, 0.80, 60.0, 0.6, 0.58, 1.90),
    Label.CEREBELLUM: (0.82, 1.35, 20.0, 1.25, 0.36, 2.3, 1.00, 20.0, 0.2, 0.33, 1.80),
    Label.THALAMUS: (0.77, 1.15, 26.0, 1.10, 0.46, 2.3, 0.85, 35.0, 0.4, 0.45, 1.85),
    Label.CAUDATE: (0.80, 1.22, 30.0, 1.15, 0.40, 2.3, 0.95, 30.0, 0.3, 0.38, 1.80),
    Label.PUTAMEN: (0.79, 1.18, 33.0, 1.05, 0.41, 2.3, 0.92, 30.0, 0.3, 0.40, 1.80),
    Label.PALLIDUM: (0.75, 1.05, 43.0, 0.70, 0.48, 2.3, 0.85, 40.0, 0.4, 0.47, 1.85),
    Label.SCALP: (0.60, 0.40, 25.0, 0.15, 0.10, 2.0, 0.80, 30.0, 0.0, 0.10, 1.00),
}
"""Mean of every quantity but those of the pools, in the order of `QUANTITIES`; fluid has no
neurites."""

POOL_MEANS = {
    Label.CSF: (0.00, 0.00, 0.25, 0.0, 100.0, 2.5, 2.5),
    Label.CORTEX: (0.03, 0.50, 0.72, 2.0, 95.0, 16.0, 19.0),
    Label.WHITE_MATTER: (0.12, 0.60, 1.00, 2.0, 100.0, 15.6, 21.0),
    Label.CEREBELLUM: (0.03, 0.50, 0.75, 2.0, 95.0, 17.0, 20.0),
    Label.THALAMUS: (0.032, 0.50, 0.85, 2.0, 100.0, 21.0, 26.0),
    Label.CAUDATE: (0.027, 0.50, 0.80, 2.0, 105.0, 24.0, 29.0),
    Label.PUTAMEN: (0.028, 0.50, 0.83, 2.0, 105.0, 26.0, 32.0),
    Label.PALLIDUM: (0.032, 0.50, 0.92, 2.0, 110.0, 33.0, 39.0),
    Label.SCALP: (0.00, 0.00, 2.50, 0.0, 100.0, 25.0, 25.0),
}
"""Mean of the quantities of the water pools, in their order; neither fluid nor fat has myelin, and
white matter has the myelin water of its parcel instead."""


def parameter_map(
    quantity: str, anatomy: Anatomy, *, subject: int, session: int, seed: int
) -> np.ndarray:
    """Return one parameter everywhere: its tissue mean times a smooth variation.

    Tissue means differ a little between subjects; the smooth part is mostly the subject's own,
    the rest that of the session.

    Parameters
    ----------
    quantity
        A key of `QUANTITIES`.
    anatomy
        Where which tissue is.
    subject, session, seed
        Decide the variation.

    Returns
    -------
    np.ndarray
        float64 (x, y, z); 0 in bone and air.
    """
    column = list(QUANTITIES).index(quantity)
    rng = stream(seed, subject, quantity, "means")
    scatter = np.clip(rng.normal(0, _BETWEEN_SUBJECTS, max(Label) + 1), -0.04, 0.04)
    scatter[Label.CSF] = 0
    mean = np.zeros(max(Label) + 1)
    for label, means in MEANS.items():
        mean[label] = (means + POOL_MEANS[label])[column] * (1 + scatter[label])
    own = smooth_field(anatomy.mni, stream(seed, subject, quantity))
    today = smooth_field(anatomy.mni, stream(seed, subject, session, quantity))
    field = np.sqrt(1 - _SESSION_SHARE**2) * own + _SESSION_SHARE * today
    spread = np.full(len(mean), QUANTITIES[quantity])
    spread[Label.CSF] = _FLUID_SPREAD
    return mean[anatomy.labels] * (1 + spread[anatomy.labels] * field)


def transmit_field(anatomy: Anatomy, *, subject: int, session: int, seed: int) -> np.ndarray:
    """Return B1+ relative to nominal: high in the middle of the head, within 0.75 to 1.25.

    Returns
    -------
    np.ndarray
        float64 (x, y, z), smooth over the whole grid.
    """
    radius = np.linalg.norm((anatomy.mni - [0, -18, 10]) / [75.0, 95.0, 80.0], axis=-1)
    ripple = smooth_field(anatomy.mni, stream(seed, subject, session, "B1"), (150.0, 300.0))
    return np.clip(1.14 - 0.28 * radius**2 + 0.03 * ripple, 0.75, 1.25)


def fibre_direction(anatomy: Anatomy, *, subject: int, seed: int) -> np.ndarray:
    """Return the main fibre direction: left-right at the midline, up and forward beside it.

    Returns
    -------
    np.ndarray
        Unit vectors (x, y, z, 3) in scanner coordinates.
    """
    x = anatomy.mni[..., 0]
    commissural = np.exp(-((x / 22) ** 2))
    lateral = np.stack([0.25 * np.sign(x), np.full_like(x, 0.35), np.full_like(x, 0.9)], axis=-1)
    fibres = (1 - commissural[..., None]) * lateral
    fibres[..., 0] += commissural
    for axis in range(3):
        rng = stream(seed, subject, "fibres", axis)
        fibres[..., axis] += 0.35 * smooth_field(anatomy.mni, rng, (40.0, 100.0))
    return fibres / np.linalg.norm(fibres, axis=-1, keepdims=True)
