"""Transverse relaxation of axons at their surface, which two models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bids_gacelle.engine.models.base import POSITIVE, Parameter, Reference

SURFACE_OPTIONS: dict[str, Any] = {
    "r2a": 1 / 0.12697,
    "k2a": 2.32,
    "fit_r2a": False,
    "fit_k2a": False,
}
"""Constructor options; the constants are for 3 T."""
SURFACE_LIMITS = {"r2a": POSITIVE, "k2a": POSITIVE}

SURFACE_REFERENCE = Reference(
    "barakovic2023",
    "Barakovic M, Pizzolato M, Tax CMW, Rudrapatna U, Magon S, Dyrby TB, Granziera C, Thiran JP, "
    "Jones DK, Canales-Rodriguez EJ. Estimating axon radius using diffusion-relaxation MRI: "
    "calibrating a surface-based relaxation model with histology. Front Neurosci 2023;17:1209521.",
    "10.3389/fnins.2023.1209521",
)

_K2A = Parameter(
    "k2a",
    "um/s",
    "Surface relaxivity of axons",
    bounds=(0.0, 4.0),
    start=(1.3, 3.3),
    window=(0.0, 4.0),
)
_R2A = Parameter(
    "r2a",
    "1/s",
    "Transverse relaxation rate of axoplasm",
    bounds=(1.0, 20.0),
    start=(6.0, 10.0),
    window=(0.0, 20.0),
)


class SurfaceRelaxation:
    """R = r2a + k2a / radius, with constants or parameters r2a (1/s) and k2a (um/s).

    Attributes
    ----------
    parameters
        Those of the two that are fitted.
    """

    def __init__(self, r2a: float, k2a: float, *, fit_r2a: bool, fit_k2a: bool) -> None:
        self.constants = {"r2a": r2a, "k2a": k2a}
        self.parameters = (_K2A,) * fit_k2a + (_R2A,) * fit_r2a

    def rate(self, params: dict[str, Tensor]) -> Tensor:
        """Return R in 1/s, (...)."""
        r2a, k2a = self._values(params)
        return r2a + 2 * k2a / params["diameter"]

    def slopes(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the derivatives of R by the diameter and by what is fitted, (...) each."""
        diameter = params["diameter"]
        _, k2a = self._values(params)
        every = {
            "diameter": -2 * k2a / diameter**2,
            "k2a": 2 / diameter,
            "r2a": torch.ones_like(diameter),
        }
        return {name: every[name] for name in ("diameter", *(p.name for p in self.parameters))}

    def diameter(self, rate: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Return the diameter in um at which R is `rate`; infinite where R is below r2a."""
        r2a, k2a = self._values(params)
        return 2 * k2a / (rate - r2a).clamp_min(0)

    def _values(self, params: dict[str, Tensor]) -> tuple[Any, Any]:
        """Return r2a and k2a, each a tensor if it is fitted, else a number."""
        r2a, k2a = (params.get(name, value) for name, value in self.constants.items())
        return r2a, k2a
