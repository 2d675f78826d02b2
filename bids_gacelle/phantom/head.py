"""One subject in one session, and what simulations need to know of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bids_gacelle.phantom.anatomy import Anatomy, Label
from bids_gacelle.phantom.magnet import drift, initial_phase, static_field
from bids_gacelle.phantom.tissue import fibre_direction, parameter_map, transmit_field


@dataclass(frozen=True)
class Head:
    """One subject in one session: the anatomy and what its parameters depend on."""

    anatomy: Anatomy
    subject: int
    session: int
    seed: int

    @property
    def inside(self) -> np.ndarray:
        """Voxels with a signal, bool (x, y, z)."""
        return self.anatomy.labels > 0

    @property
    def _ids(self) -> dict[str, int]:
        return {"subject": self.subject, "session": self.session, "seed": self.seed}

    def parameter(self, quantity: str) -> np.ndarray:
        """Return a parameter of `tissue.QUANTITIES` in the voxels inside, float64 (voxels,)."""
        return parameter_map(quantity, self.anatomy, **self._ids)[self.inside]

    def transmit(self) -> np.ndarray:
        """Return the relative B1+, float64 (x, y, z)."""
        return transmit_field(self.anatomy, **self._ids)

    def field(self, images: int) -> np.ndarray:
        """Return the static field less its nominal value in each of several scans.

        float64 (images, voxels) in ppm, of the voxels inside.
        """
        still = static_field(self.anatomy, **self._ids)[self.inside]
        return still + drift(images, **self._ids)[:, None]

    def initial_phase(self) -> np.ndarray:
        """Return the phase at an echo time of 0 in the voxels inside, float64 (voxels,)."""
        return initial_phase(self.anatomy, **self._ids)[self.inside]

    def fibres(self) -> np.ndarray:
        """Return the fibre direction in scanner coordinates, float64 (voxels, 3)."""
        return fibre_direction(self.anatomy, subject=self.subject, seed=self.seed)[self.inside]

    def volume(self, values: np.ndarray) -> np.ndarray:
        """Return values (..., voxels) of the voxels inside as a volume (x, y, z, ...).

        float32, or complex64 of complex values.
        """
        kind = np.complex64 if np.iscomplexobj(values) else np.float32
        out = np.zeros((*self.inside.shape, *values.shape[:-1]), dtype=kind)
        out[self.inside] = np.moveaxis(values, -1, 0)
        return out

    def white_matter(self, values: np.ndarray) -> float:
        """Return the mean over white matter of values (voxels,)."""
        return float(values[self.anatomy.labels[self.inside] == Label.WHITE_MATTER].mean())
