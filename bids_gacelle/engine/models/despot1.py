"""Longitudinal relaxation from spoiled gradient echoes at several flip angles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import Inputs, Parameter, Reference, SignalModel
from bids_gacelle.engine.physics.steady_state import rational_fit, spgr
from bids_gacelle.engine.scheme import GradientEchoScheme, Scheme

# Echo times that differ by less are one.
_SAME_ECHO_S = 1e-5


class Despot1(SignalModel):
    """S = M0 sin a (1 - E1) / (1 - E1 cos a), E1 = exp(-TR R1), a = b1 x nominal flip angle."""

    name = "despot1"
    title = "Longitudinal relaxation from variable flip angles"
    description = (
        "Spoiled gradient-echo signals at several flip angles were fitted with the Ernst equation "
        "(DESPOT1), with the nominal flip angles multiplied by the relative transmit field where "
        "such a map was given."
    )
    references = (
        Reference(
            "deoni2003",
            "Deoni SCL, Rutt BK, Peters TM. Rapid combined T1 and T2 mapping using gradient "
            "recalled acquisition in the steady state. Magn Reson Med 2003;49:515-526.",
            "10.1002/mrm.10407",
        ),
        Reference(
            "fram1987",
            "Fram EK, Herfkens RJ, Johnson GA, et al. Rapid calculation of T1 using variable flip "
            "angle gradient refocused imaging. Magn Reson Imaging 1987;5:201-208.",
            "10.1016/0730-725X(87)90021-X",
        ),
    )
    kind = "vfa"
    datatype = "anat"
    bare_names = True
    minimum_measurements = 2
    required = ("flip_angle", "repetition_time")
    compile_from = 4_000_000  # eager steps of so small a model are nearly as fast
    voxel_inputs = ("b1",)
    input_defaults = {"b1": 1.0}  # noqa: RUF012
    scheme: GradientEchoScheme
    # At 3 T: Wansapura et al. 1999,
    # doi:10.1002/(SICI)1522-2586(199904)9:4<531::AID-JMRI4>3.0.CO;2-L.
    tissues = {  # noqa: RUF012
        "grey matter": {"R1": 0.75},
        "white matter": {"R1": 1.2},
    }
    parameters = (
        Parameter(
            "M0",
            "arbitrary",
            "Equilibrium magnetisation, with receive sensitivity and transverse decay",
            bounds=(0.0, float("inf")),
            suffix="M0map",
            colormap="gray",
            amplitude=True,
        ),
        Parameter(
            "R1",
            "1/s",
            "Longitudinal relaxation rate",
            bounds=(0.05, 50.0),
            start=(0.2, 5.0),
            window=(0.0, 2.0),
            suffix="R1map",
        ),
    )
    derived = (
        Parameter("T1", "s", "Longitudinal relaxation time", window=(0.0, 4.0), suffix="T1map"),
    )

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the steady state at each flip angle; shapes as in `SignalModel.signal`."""
        return params["M0"] * self._unit(params["R1"], inputs)[0]

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return signal and derivatives by M0 and R1."""
        unit, slope = self._unit(params["R1"], inputs)
        return params["M0"] * unit, torch.stack((unit, params["M0"] * slope))

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return T1 = 1 / R1 in s."""
        return {"T1": 1 / params["R1"]}

    def guess(self, data: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Return R1 of a linear estimate, for several repetition times an approximate one."""
        if self._same_time:
            return {"R1": self._regress(data, inputs)["R1"]}
        like = data[0]
        time = self.table("repetition_time", self._repetition_time, like)
        r1 = rational_fit(data, self._angle(like, inputs), time)
        return {"R1": torch.where(r1 > 0, r1, torch.nan)}

    def closed_form(self, data: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Return the linear DESPOT1 estimate: regress S / sin a on S / tan a (Deoni 2003, eq. 3).

        NaN where the slope does not lie between 0 and 1.

        Raises
        ------
        EngineError
            The repetition times differ.
        """
        time = self._repetition_time
        if not self._same_time:
            raise EngineError(
                "The linear DESPOT1 estimate needs one repetition time for all flip angles, "
                f"got {time.min()} to {time.max()} s: use solver 'lm'."
            )
        return self._regress(data, inputs)

    @classmethod
    def wanted(cls, scheme: Scheme, options: Mapping[str, Any]) -> NDArray[np.bool_] | None:
        """Tell the first echoes, of each flip angle and repetition time."""
        assert isinstance(scheme, GradientEchoScheme)
        if scheme.echo_time is None:
            return None
        number, values = scheme.excitations()
        shortest = np.full(len(values), np.inf)
        np.minimum.at(shortest, number, scheme.echo_time)
        first = scheme.echo_time <= shortest[number] + _SAME_ECHO_S
        return None if first.all() else first

    @property
    def _same_time(self) -> bool:
        return bool(np.ptp(self._repetition_time) <= 1e-6 * self._repetition_time.mean())

    @property
    def _repetition_time(self) -> np.ndarray:
        assert self.scheme.repetition_time is not None
        return self.scheme.repetition_time

    def _angle(self, like: Tensor, inputs: Inputs | None) -> Tensor:
        """Return the actual flip angles in radian."""
        assert self.scheme.flip_angle is not None
        nominal = self.table("flip_angle", np.deg2rad(self.scheme.flip_angle), like)
        return nominal * self.voxel_input("b1", inputs, like)

    def _unit(self, r1: Tensor, inputs: Inputs | None) -> tuple[Tensor, Tensor]:
        time = self.table("repetition_time", self._repetition_time, r1)
        return spgr(self._angle(r1, inputs), time, r1)

    def _regress(self, data: Tensor, inputs: Inputs | None) -> dict[str, Tensor]:
        angle = self._angle(data[0], inputs)
        x, y = data / torch.tan(angle), data / torch.sin(angle)
        dx = x - x.mean(0)
        slope = (dx * y).sum(0) / (dx * dx).sum(0)
        slope = torch.where((slope > 0) & (slope < 1), slope, torch.nan)
        intercept = y.mean(0) - slope * x.mean(0)
        r1 = -torch.log(slope) / float(self._repetition_time.mean())
        return {"M0": intercept / (1 - slope), "R1": r1}
