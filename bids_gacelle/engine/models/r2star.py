"""Mono-exponential decay of multi-echo gradient echoes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bids_gacelle.engine.models.base import Inputs, Parameter, Reference
from bids_gacelle.engine.models.gradient_echo import (
    BACKGROUND,
    INITIAL_PHASE,
    GradientEchoModel,
)
from bids_gacelle.engine.physics.phase import times_i
from bids_gacelle.engine.scheme import GradientEchoScheme


class R2Star(GradientEchoModel):
    """S(TE) = S0 exp(-TE R2*), the magnitude, or with phase.

    Complex: S(TE) = S0 exp(-TE R2*) exp(i (2 pi gamma B0 dfreqBKG TE + dpini)).
    """

    name = "r2star"
    title = "Effective transverse relaxation"
    description = (
        "The signal of every voxel over the echo times of a multi-echo gradient-echo scan was "
        "fitted with a mono-exponential decay, S(TE) = S0 exp(-TE R2*), in the signal domain; "
        "complex images together with a frequency and an initial phase."
    )
    references = (
        Reference(
            "chavhan2009",
            "Chavhan GB, Babyn PS, Thomas B, Shroff MM, Haacke EM. Principles, techniques, and "
            "applications of T2*-based MR imaging and its special applications. Radiographics "
            "2009;29:1433-1449.",
            "10.1148/rg.295095034",
        ),
    )
    kind = "megre"
    bare_names = True
    minimum_measurements = 2
    required = ("echo_time",)
    options = {"signal": "magnitude"}  # noqa: RUF012
    choices = {"signal": ("magnitude", "complex")}  # noqa: RUF012
    compile_from = 4_000_000  # eager steps of so small a model are nearly as fast
    # At 3 T: Peters et al. 2007, doi:10.1016/j.mri.2007.02.014.
    tissues = {  # noqa: RUF012
        "grey matter": {"R2star": 15.2},
        "white matter": {"R2star": 18.8},
        "putamen": {"R2star": 31.7},
    }
    parameters: tuple[Parameter, ...] = (
        Parameter(
            "S0",
            "arbitrary",
            "Signal extrapolated to an echo time of zero",
            bounds=(0.0, float("inf")),
            suffix="S0map",
            colormap="gray",
            amplitude=True,
        ),
        Parameter(
            "R2star",
            "1/s",
            "Effective transverse relaxation rate",
            bounds=(0.0, 1000.0),
            start=(5.0, 200.0),
            window=(0.0, 60.0),
            suffix="R2starmap",
        ),
    )
    derived = (
        Parameter(
            "T2star",
            "s",
            "Effective transverse relaxation time",
            window=(0.0, 0.1),
            suffix="T2starmap",
        ),
    )

    def __init__(self, scheme: GradientEchoScheme, **options: Any) -> None:
        super().__init__(scheme, **options)
        if self.is_complex:
            self.parameters = (*R2Star.parameters, BACKGROUND, INITIAL_PHASE)

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the decay at each echo time; shapes as in `SignalModel.signal`."""
        return params["S0"] * self._unit(params)

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return signal and derivatives by the parameters, in their order."""
        unit = self._unit(params)
        signal = params["S0"] * unit
        if not self.is_complex:
            return signal, torch.stack((unit, -self.echo_time(params["S0"]) * signal))
        parts = signal.unflatten(0, (2, -1))
        turned = times_i(parts)
        columns = (
            unit,
            (-self.echo_time(params["S0"]) * parts).flatten(0, 1),
            (self.radians(params["S0"]) * turned).flatten(0, 1),
            turned.flatten(0, 1),
        )
        return signal, torch.stack(columns)

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return T2star = 1 / R2star in s."""
        return {"T2star": 1 / params["R2star"]}

    def guess(self, data: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Return R2star of the weighted log-linear regression, and the slope of the phase."""
        if not self.is_complex:
            return {"R2star": self.decay(data)[0]}
        parts = data.unflatten(0, (2, -1))
        frequency, phase = self.phases(parts)
        rate = self.decay(torch.hypot(*parts))[0]
        return {"R2star": rate, "dfreqBKG": frequency[0], "dpini": phase}

    def _unit(self, params: dict[str, Tensor]) -> Tensor:
        decay = torch.exp(-self.echo_time(params["S0"]) * params["R2star"])
        if not self.is_complex:
            return decay
        phase = self.radians(params["S0"]) * params["dfreqBKG"] + params["dpini"]
        return torch.cat((decay * torch.cos(phase), decay * torch.sin(phase)))
