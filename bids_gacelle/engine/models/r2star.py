"""Mono-exponential decay of multi-echo gradient-echo magnitudes."""

from __future__ import annotations

import torch
from torch import Tensor

from bids_gacelle.engine.models.base import Inputs, Parameter, Reference, SignalModel


class R2Star(SignalModel):
    """S(TE) = S0 exp(-TE R2*), magnitude."""

    name = "r2star"
    title = "Effective transverse relaxation"
    description = (
        "The magnitude of every voxel over the echo times of a multi-echo gradient-echo scan was "
        "fitted with a mono-exponential decay, S(TE) = S0 exp(-TE R2*), in the signal domain."
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
    datatype = "anat"
    bare_names = True
    minimum_measurements = 2
    required = ("echo_time",)
    compile_from = 4_000_000  # eager steps of so small a model are nearly as fast
    # At 3 T: Peters et al. 2007, doi:10.1016/j.mri.2007.02.014.
    tissues = {  # noqa: RUF012
        "grey matter": {"R2star": 15.2},
        "white matter": {"R2star": 18.8},
        "putamen": {"R2star": 31.7},
    }
    parameters = (
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

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the decay at each echo time; shapes as in `SignalModel.signal`."""
        return params["S0"] * torch.exp(-self._echo_time(params["S0"]) * params["R2star"])

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return signal and derivatives by S0 and R2star."""
        time = self._echo_time(params["S0"])
        decay = torch.exp(-time * params["R2star"])
        signal = params["S0"] * decay
        return signal, torch.stack((decay, -time * signal))

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return T2star = 1 / R2star in s."""
        return {"T2star": 1 / params["R2star"]}

    def guess(self, data: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Return R2star of the log-linear regression weighted by the squared signal."""
        time = self._echo_time(data[0])
        size = data.clamp_min(1e-3 * data.abs().amax(0))
        weight, log = size**2, torch.log(size)
        total = weight.sum(0)
        time = time - (weight * time).sum(0) / total
        return {"R2star": -(weight * time * log).sum(0) / (weight * time**2).sum(0)}

    def _echo_time(self, like: Tensor) -> Tensor:
        assert self.scheme.echo_time is not None
        return self.table("echo_time", self.scheme.echo_time, like)
