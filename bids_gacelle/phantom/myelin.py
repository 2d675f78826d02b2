"""Complex gradient echoes at several flip angles from tissue with myelin water.

Three pools of water, in myelin (MW), inside axons (IW) and outside of them (EW). IW and EW share
their magnetisation, which exchanges with that of MW; the steady state of the two is that of
extended phase graphs with exchange, with quadratic RF spoiling (`engine.physics.epgx`), never
that of an approximation. From there on every pool decays at its own rate and frequency,

    S(TE) = [M_IEW ((1-IWF) e^{-TE R2*EW} + IWF e^{-TE R2*IW + i 2 pi f_IW TE})
             + rho M_MW e^{-TE R2*MW + i 2 pi f_MW TE}] e^{i (2 pi f TE + phi)},

with the frequencies of MW and IW those of the hollow cylinder model at the angle between fibres
and static field (Wharton and Bowtell 2012, doi:10.1073/pnas.1211075109). M_IEW and M_MW are
complex: both pools have the phase that imperfect spoiling gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bids_gacelle.engine import GradientEchoScheme
from bids_gacelle.engine.models.threepools import MYELIN_WATER_DENSITY
from bids_gacelle.engine.physics import hollow_cylinder
from bids_gacelle.engine.physics.epgx import spoiled_steady_state
from bids_gacelle.phantom.anatomy import Label
from bids_gacelle.phantom.head import Head
from bids_gacelle.phantom.magnet import GYROMAGNETIC_RATIO
from bids_gacelle.phantom.parcels import PARCELS, parcel_labels, parcel_mwf
from bids_gacelle.phantom.tissue import POOLS

MYELIN_T1_S, MYELIN_T2_S = 0.234, 0.015
MWF_RANGE = (0.05, 0.20)
"""Of white matter."""

Progress = Callable[[float], None]
"""Called with the share of a simulation that is done."""


def silent(share: float) -> None:
    """Tell nobody."""


_CASES_AT_ONCE = 40_000  # of which one report of progress is made


@dataclass(frozen=True)
class Protocol:
    """A multi-echo gradient echo at several flip angles.

    Times in s, angles and the increment of the RF phase in degrees, the field in T.
    """

    echo_times: tuple[float, ...]
    flip_angles: tuple[float, ...]
    repetition_time: float
    spoiling_increment: float = 50
    field_strength: float = 3

    @property
    def hertz_per_ppm(self) -> float:
        """Frequency in Hz of a field of 1 ppm."""
        return GYROMAGNETIC_RATIO * self.field_strength

    def scheme(self, flips: Sequence[float] = ()) -> GradientEchoScheme:
        """Return the images of some flip angles, or of all: flip by flip, echo by echo."""
        flips = flips or self.flip_angles
        return GradientEchoScheme(
            echo_time=np.tile(self.echo_times, len(flips)),
            flip_angle=np.repeat(flips, len(self.echo_times)),
            repetition_time=self.repetition_time,
            field_strength=self.field_strength,
            spoiling_increment=self.spoiling_increment,
        )


MWI = Protocol(
    echo_times=tuple(float(time) for time in np.round(0.0022 + 0.00307 * np.arange(12), 5)),
    flip_angles=(5.0, 10.0, 20.0, 50.0, 70.0),
    repetition_time=0.038,
)
"""What the digital brain is scanned with."""


def water_pools(head: Head) -> dict[str, np.ndarray]:
    """Return the true parameters of all voxels inside, named as those of the models.

    Returns
    -------
    dict of float64 (voxels,)
        S0 (relative to water), MWF, IWF, R1IEW, kIEWM, R2sMW, R2sIW, R2sEW (rates in 1/s),
        freqMW, freqIW (ppm, relative to EW), theta (radian).
    """
    pools = {name: head.parameter(f"mwi.{name}") for name in POOLS}
    pools["S0"] = head.parameter("M0")
    parcels = parcel_labels(head.anatomy)[head.inside]
    mean = np.zeros(len(PARCELS) + 1)
    mean[1:] = parcel_mwf()
    white = head.anatomy.labels[head.inside] == Label.WHITE_MATTER
    variation = pools["MWF"][white] / np.mean(pools["MWF"][white])
    pools["MWF"][white] = np.clip(mean[parcels[white]] * variation, *MWF_RANGE)
    # What is all one pool has one transverse relaxation.
    pools["R2sIW"] = np.where(pools["MWF"] > 0, pools["R2sIW"], pools["R2sEW"])
    pools["theta"] = np.arccos(np.clip(np.abs(head.fibres()[:, 2]), 0, 1))
    pools["freqMW"], pools["freqIW"] = _cylinders(pools)
    return pools


def _cylinders(pools: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return the frequencies of MW and IW in ppm; 0 where there is no myelin."""
    axon = torch.from_numpy((1 - pools["MWF"]) * pools["IWF"])
    myelin = torch.from_numpy(pools["MWF"] / MYELIN_WATER_DENSITY)
    sin2 = torch.from_numpy(np.sin(pools["theta"]) ** 2)
    found = hollow_cylinder.frequencies(hollow_cylinder.myelin_share(axon, myelin), sin2)
    return [torch.where(myelin > 0, frequency, 0.0).numpy() for frequency in found]


def steady_states(
    pools: Mapping[str, np.ndarray],
    b1: np.ndarray,
    protocol: Protocol,
    progress: Progress = silent,
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate the steady state at every flip angle, by extended phase graphs with exchange.

    The transverse relaxation of IEW between pulses is that of IW in the echoes, as models of
    these data take it.

    Parameters
    ----------
    pools
        As of `water_pools`.
    b1
        Actual over nominal flip angle, (voxels,).
    protocol
        Flip angles, repetition time and spoiling.
    progress
        Called with the share that is done.

    Returns
    -------
    iew, mw : complex128 (flip angles, voxels)
        Signal of both pools right after the pulse.
    """
    volume = pools["S0"] * (1 - pools["MWF"] + pools["MWF"] / MYELIN_WATER_DENSITY)
    fraction = pools["S0"] * pools["MWF"] / MYELIN_WATER_DENSITY / volume
    columns = (fraction, pools["R1IEW"], pools["R2sIW"], pools["kIEWM"], b1)
    shape = len(protocol.flip_angles), len(b1)
    iew, mw = np.empty(shape, np.complex128), np.empty(shape, np.complex128)
    angles = torch.tensor(protocol.flip_angles, dtype=torch.float64).deg2rad()[:, None]
    one = torch.ones((), dtype=torch.float64)
    step = _CASES_AT_ONCE // len(protocol.flip_angles)
    for start in range(0, len(b1), step):
        part = slice(start, start + step)
        f, r1, r2, k, scale = (torch.from_numpy(column[part]) for column in columns)
        found = spoiled_steady_state(
            f,
            r1,
            r2,
            one / MYELIN_T1_S,
            one / MYELIN_T2_S,
            k,
            one * protocol.repetition_time,
            angles * scale,
            protocol.spoiling_increment,
        )
        iew[:, part], mw[:, part] = (states.numpy() for states in found)
        progress(min(1.0, (start + step) / len(b1)))
    return iew * volume, mw * (volume * MYELIN_WATER_DENSITY)


def echo(
    pools: Mapping[str, np.ndarray],
    steady: tuple[np.ndarray, np.ndarray],
    time: float,
    phase: np.ndarray,
    protocol: Protocol,
) -> np.ndarray:
    """Return the signal at an echo time.

    Parameters
    ----------
    pools
        As of `water_pools`.
    steady
        Signals of IEW and MW at an echo time of 0, (..., voxels).
    time
        Echo time in s.
    phase
        What all pools have turned by until then, in radian, (..., voxels).
    protocol
        Gives the field strength.

    Returns
    -------
    np.ndarray
        complex128 (..., voxels).
    """

    def decay(pool: str) -> np.ndarray:
        hertz = protocol.hertz_per_ppm * pools.get(f"freq{pool}", np.zeros(1))
        return np.exp(time * (-pools[f"R2s{pool}"] + 2j * np.pi * hertz))

    iew, mw = steady
    free = pools["IWF"] * decay("IW") + (1 - pools["IWF"]) * decay("EW")
    return (iew * free + mw * decay("MW")) * np.exp(1j * phase)
