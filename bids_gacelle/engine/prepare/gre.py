"""Complex gradient echoes: field and initial phase of each voxel, and signals without them.

Models of complex signals describe what is left: they start at no field and no phase, and correct
the estimates that were taken out here. No voxel sees its neighbours, and nothing is unwrapped.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.scheme import GradientEchoScheme

_Float = npt.NDArray[np.floating]
_Complex = npt.NDArray[np.complexfloating]
_Index = npt.NDArray[np.intp]

# Fields of one voxel at two flip angles differ by drift and by moves of the head, by less than
# this (Hz); beyond, a peak of the spectrum of one flip angle is noise.
_MOST_APART = 40.0
# Points of the search for each width of a spectral line (the inverse of the echo train).
_FINENESS = 4
_REFINEMENTS = 3
_BLOCK_ELEMENTS = 1 << 22
# Echo times of one train are equally spaced up to this share of the spacing.
_EQUAL_SPACING = 0.02
# Median phase (rad) between odd and even echoes that readouts of one polarity do not have.
_ALTERNATES = 0.15
_FEWEST_ALTERNATING = 4
_COHERENT = 0.9  # of what the echoes of a voxel say of it; noise says different things
_ENOUGH_VOXELS = 20_000


@dataclass(frozen=True)
class Demodulated:
    """Complex gradient echoes without the field and the initial phase of their voxel.

    Attributes
    ----------
    signals
        (2 images, voxels) float32: real parts of all images, then imaginary parts.
    field
        (excitations, voxels) Hz, what was taken out at each flip angle and repetition time.
    phase
        (voxels,) rad, what was taken out at all images.
    excitation
        (images,) which row of `field` an image belongs to.
    warnings
        What the phases cannot be trusted in.
    """

    signals: npt.NDArray[np.float32]
    field: npt.NDArray[np.float32]
    phase: npt.NDArray[np.float32]
    excitation: _Index
    warnings: list[str] = dataclasses.field(default_factory=list)


def demodulate(volumes: _Complex, scheme: GradientEchoScheme) -> Demodulated:
    """Estimate the field and the initial phase of every voxel, and take them out.

    The phase of an image is phi = 2 pi f_g TE + phi0, with one field f_g for each excitation g
    (flip angle and repetition time) and one initial phase phi0 for all: the phase of RF spoiling
    differs between flip angles and must stay in the signals.

    With |S| as the expected decay, the most likely field of an excitation is where
    |sum_j |S_j| S_j exp(-2 pi i f TE_j)|^2 is largest. The sum of it over all excitations is
    searched between +-1/(2 dTE), with dTE the shortest spacing of echoes, so that all excitations
    lie on the same alias of the field; each then has its own peak near by. The initial phase is
    that of the sum over all images at these fields.

    Parameters
    ----------
    volumes
        (images, voxels), complex; its phase grows with time where the field is higher.
    scheme
        Of the images, with echo times.

    Returns
    -------
    Demodulated
        Voxels with a value that is not finite keep it; field and phase are then those of the
        other images, 0 where there is none.

    Raises
    ------
    EngineError
        Numbers of images and echo times differ, or there are no echo times.
    """
    volumes = np.asarray(volumes)
    if scheme.echo_time is None:
        raise EngineError("Complex gradient echoes need their echo times.")
    if volumes.ndim != 2 or len(volumes) != len(scheme):
        raise EngineError(
            f"The volumes have shape {volumes.shape}; ({len(scheme)}, voxels) is needed, a "
            "row for each image of the acquisition."
        )
    trains, values = scheme.excitations()
    search = _Search(scheme.echo_time, trains)
    n, voxels = volumes.shape
    signals = np.empty((2 * n, voxels), np.float32)
    found = np.empty((len(values), voxels), np.float32)
    phase = np.empty(voxels, np.float32)
    step = max(1, _BLOCK_ELEMENTS // max(n, search.points))
    for start in range(0, voxels, step):
        block = slice(start, start + step)
        seen = np.nan_to_num(volumes[:, block], nan=0.0, posinf=0.0, neginf=0.0)
        f = search.fields(seen.astype(np.complex64))
        turn = _turn(scheme.echo_time, f[trains])
        phi = np.angle((np.abs(seen) * seen * turn).sum(0))
        left = volumes[:, block] * (turn * np.exp(-1j * phi))
        signals[:n, block], signals[n:, block] = left.real, left.imag
        found[:, block], phase[block] = f, phi
    warnings = _polarity(signals, scheme.echo_time, trains)
    return Demodulated(signals, found, phase, trains, warnings)


class _Search:
    """Looks for the fields of voxels in the spectra of their echo trains.

    Parameters
    ----------
    time
        (images,) echo times in s.
    trains
        (images,) the echo train of each image.
    """

    def __init__(self, time: _Float, trains: _Index) -> None:
        self._time = time
        self._rows = [np.flatnonzero(trains == g) for g in range(trains.max() + 1)]
        ordered = [np.sort(time[rows]) for rows in self._rows]
        gaps = np.concatenate([np.diff(t) for t in ordered])
        gaps = gaps[gaps > 0]
        span = max(float(np.ptp(t)) for t in ordered)
        self._step = 1 / (_FINENESS * span) if gaps.size else 0.0
        self._range = 1 / (2 * float(gaps.min())) if gaps.size else 0.0
        self._grid = self._around(self._range)
        self._near = self._around(min(self._range / 2, _MOST_APART))

    @property
    def points(self) -> int:
        """Number of frequencies that are tried."""
        return len(self._grid)

    def fields(self, volumes: _Complex) -> _Float:
        """Return the field (excitations, voxels) in Hz of complex images (images, voxels)."""
        n = volumes.shape[1]
        common = np.zeros((1, n))
        if self._step == 0:
            return np.repeat(common, len(self._rows), axis=0)
        filtered = np.abs(volumes) * volumes
        power = sum(self._power(filtered, rows, self._grid) for rows in self._rows)
        common = self._grid[np.argmax(power, axis=0)][None]
        common = common + self._refined(volumes, common, [np.arange(len(volumes))])
        found = np.repeat(common, len(self._rows), axis=0)
        if len(self._rows) > 1:
            # seen from the common field, no train is near the ends of the unaliased range
            turned = filtered * _turn(self._time, common)
            for g, rows in enumerate(self._rows):
                if np.ptp(self._time[rows]) > 0:
                    best = np.argmax(self._power(turned, rows, self._near), axis=0)
                    found[g] += self._near[best]
        for g, rows in enumerate(self._rows):
            found[g] += self._refined(volumes, found[g : g + 1], [rows])[0]
        return found

    def _around(self, half: float) -> _Float:
        if self._step == 0:
            return np.zeros(1)
        count = int(np.ceil(half / self._step))
        return np.linspace(-half, half, 2 * count + 1)

    def _power(self, filtered: _Complex, rows: _Index, grid: _Float) -> _Float:
        """Return the squared spectrum (frequencies, voxels) of one echo train."""
        kernel = np.exp(-2j * np.pi * grid[:, None] * self._time[rows])
        spectrum = kernel.astype(np.complex64) @ filtered[rows]
        return spectrum.real**2 + spectrum.imag**2

    def _refined(self, volumes: _Complex, field: _Float, trains: list[_Index]) -> _Float:
        """Return what to add to a field (1, voxels) from regressions of the phase on time.

        The weights are the squared magnitudes, as of phases that have the noise of their image.
        The regression is about the phase of each train, and never leaves the cell of the grid.
        """
        moved = np.zeros_like(field)
        # a common field has a phase for each train, a field of one train its own alone
        groups = self._rows if len(trains[0]) == len(volumes) else trains
        groups = [rows for rows in groups if np.ptp(self._time[rows]) > 0]
        for _ in range(_REFINEMENTS):
            slope, weight = np.zeros_like(field), np.zeros_like(field)
            for rows in groups:
                at = volumes[rows] * _turn(self._time[rows], field + moved)
                size = np.abs(at)
                total = (size * at).sum(0)
                angle = np.angle(at * np.conj(total))
                w = size**2
                sum_w = np.maximum(w.sum(0), np.finfo(np.float32).tiny)
                time = self._time[rows][:, None]
                time = time - (w * time).sum(0) / sum_w
                slope += (w * time * angle).sum(0)
                weight += (w * time**2).sum(0)
            change = slope / (2 * np.pi * np.where(weight > 0, weight, 1.0))
            moved = np.clip(moved + change, -self._step, self._step)
        return moved


def _turn(time: _Float, frequency: _Float) -> _Complex:
    """Return exp(-2 pi i f t) in single precision, (times, voxels)."""
    turns = time[:, None] * frequency
    angle = (-2 * np.pi * (turns - np.round(turns))).astype(np.float32)
    return np.cos(angle) + np.complex64(1j) * np.sin(angle)


def _polarity(signals: _Float, time: _Float, trains: _Index) -> list[str]:
    """Warn where odd and even echoes differ in phase, as with readouts of alternating polarity.

    phi_j - 2 phi_(j+1) + phi_(j+2) is free of field and initial phase. What alternates in its sign
    along the train is twice the difference of odd and even echoes; the mean of neighbours is free
    of it, and their difference of smooth phases such as those of several pools.
    """
    n, step = len(time), max(1, signals.shape[1] // _ENOUGH_VOXELS)
    volumes = signals[:n, ::step] + 1j * signals[n:, ::step]
    total, size, counted = np.zeros(volumes.shape[1], np.complex128), 0.0, 0
    for g in range(trains.max() + 1):
        rows = np.flatnonzero(trains == g)
        gaps = np.diff(time[rows])
        if len(rows) < _FEWEST_ALTERNATING or np.ptp(gaps) > _EQUAL_SPACING * gaps.mean():
            continue
        at = volumes[rows]
        bend = np.nan_to_num(at[:-2] * at[2:] * np.conj(at[1:-1]) ** 2)
        bend = bend[: len(bend) - len(bend) % 2]  # as many of one sign as of the other
        bend[1::2] = bend[1::2].conj()
        total += bend.sum(0)
        size = size + np.abs(bend).sum(0)
        counted += len(bend)
    agree = np.abs(total) > _COHERENT * size
    if not counted or not agree.any():
        return []
    apart = float(np.median(np.abs(np.angle(total[agree])))) / 2
    if apart < _ALTERNATES:
        return []
    return [
        f"the phases of odd and even echoes differ by {apart:.2g} rad (median), as when the "
        "polarity of the readout alternates: fields and compartment frequencies are not to be "
        "trusted before that is corrected"
    ]
