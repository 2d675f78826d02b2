"""Longitudinal and effective transverse relaxation from echoes at several flip angles."""

from __future__ import annotations

import torch
from torch import Tensor

from bids_gacelle.engine.models.base import Inputs
from bids_gacelle.engine.models.despot1 import Despot1
from bids_gacelle.engine.models.gradient_echo import GradientEchoModel
from bids_gacelle.engine.models.r2star import R2Star
from bids_gacelle.engine.physics.steady_state import rational_fit, spgr


class R1R2Star(GradientEchoModel):
    """S = M0 sin a (1 - E1) / (1 - E1 cos a) exp(-TE R2*), E1 = exp(-TR R1), a = b1 x nominal.

    Flip angles may differ in repetition time, and in number and times of their echoes.
    """

    name = "r1r2star"
    title = "Joint longitudinal and effective transverse relaxation"
    description = (
        "Spoiled gradient-echo magnitudes of all flip angles and echo times together were fitted "
        "with the Ernst equation times a mono-exponential decay, with the nominal flip angles "
        "multiplied by the relative transmit field where such a map was given."
    )
    references = (*Despot1.references, *R2Star.references)
    kind = "vfa"
    minimum_measurements = 3
    minimum_echo_times = 2
    required = ("echo_time", "flip_angle", "repetition_time")
    compile_from = 2_000_000  # eager steps of so small a model are nearly as fast
    voxel_inputs = ("b1",)
    input_defaults = {"b1": 1.0}  # noqa: RUF012
    tissues = {  # noqa: RUF012
        name: Despot1.tissues[name] | R2Star.tissues[name]
        for name in ("grey matter", "white matter")
    }
    parameters = (*Despot1.parameters, R2Star.parameters[1])
    derived = (*Despot1.derived, *R2Star.derived)

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the signal of each image; shapes as in `SignalModel.signal`."""
        return self._parts(params, inputs)[0]

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return signal and derivatives by M0, R1 and R2star."""
        signal, unit, slope = self._parts(params, inputs)
        return signal, torch.stack((unit, slope, -self.echo_time(params["M0"]) * signal))

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return T1 = 1 / R1 and T2star = 1 / R2star in s."""
        return {"T1": 1 / params["R1"], "T2star": 1 / params["R2star"]}

    def guess(self, data: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Return R2star of a log-linear regression, and R1 of what it leaves at TE = 0."""
        rate, at_zero = self.decay(data)
        like = data[0]
        r1 = rational_fit(at_zero, self.flip_angle(inputs, like), self.repetition_time(like))
        return {"R2star": rate, "R1": torch.where(r1 > 0, r1, torch.nan)}

    def _parts(
        self, params: dict[str, Tensor], inputs: Inputs | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the signal, the signal of unit M0, and the derivative of the signal by R1."""
        m0, r1 = params["M0"], params["R1"]
        state, slope = spgr(self.flip_angle(inputs, r1), self.repetition_time(r1), r1)
        decay = torch.exp(-self.echo_time(r1) * params["R2star"])
        unit = self.per_image(state) * decay
        return m0 * unit, unit, m0 * self.per_image(slope) * decay
