"""Axon diameter mapping with powder averages (AxCaliber-SMT)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from bids_gacelle.engine.models.base import POSITIVE, Inputs, Parameter, Reference
from bids_gacelle.engine.models.diffusion import DiffusionModel
from bids_gacelle.engine.physics.powder import axial_average, axial_average_slope
from bids_gacelle.engine.physics.restricted import CYLINDER, RestrictedTable
from bids_gacelle.engine.scheme import DiffusionScheme


def axcaliber_parameters(depar: float) -> tuple[Parameter, ...]:
    """Return the fitted parameters for an axial diffusivity outside the axons in um^2/ms."""
    return (
        Parameter(
            "diameter",
            "um",
            "Axon diameter",
            bounds=(0.1, 20.0),
            start=(1.0, 6.0),
            window=(0.0, 10.0),
        ),
        Parameter(
            "fn",
            "1",
            "Neurite share of the signal that is not CSF",
            bounds=(0.0, 1.0),
            start=(0.0, 1.0),
            window=(0.0, 1.0),
        ),
        Parameter(
            "fcsf",
            "1",
            "CSF signal fraction",
            bounds=(0.0, 1.0),
            start=(0.0, 1.0),
            window=(0.0, 1.0),
        ),
        Parameter(
            "deperp",
            "um^2/ms",
            "Extra-neurite perpendicular diffusivity",
            bounds=(min(0.01, 0.01 * depar), depar),
            start=(min(0.2, 0.2 * depar), depar),
            window=(0.0, depar),
        ),
    )


class AxCaliberSmt(DiffusionModel):
    """Axons as cylinders of one diameter, extra-neurite space and CSF, averaged over directions.

    S = (1 - fcsf) [fn Sa + (1 - fn) Se] + fcsf Scsf with

    Sa = int_0^1 exp(-C (1 - x^2) - b dn x^2) dx, Se = int_0^1 exp(-b deperp (1 - x^2)
    - b depar x^2) dx, Scsf = exp(-b dcsf),

    where C = g^2 h(diameter / 2) is the attenuation exponent across a cylinder with intrinsic
    diffusivity d0. The model's constants are d0, dn, depar and dcsf in um^2/ms.
    """

    name = "axcalibersmt"
    title = "AxCaliber-SMT axon diameter mapping"
    description = (
        "Powder-averaged signals at several b-values and diffusion times were fitted with "
        "AxCaliber-SMT: axons as impermeable cylinders of one diameter, an extra-neurite space "
        "with axial symmetry, and CSF. Diffusivities other than the extra-neurite perpendicular "
        "one were fixed. Diameters below the resolution limit of the gradient system cannot be "
        "told from zero, and the largest axons dominate the effective diameter of a voxel."
    )
    references: ClassVar[tuple[Reference, ...]] = (
        Reference(
            "fan2020",
            "Fan Q, Nummenmaa A, Witzel T, Ohringer N, Tian Q, Setsompop K, Klawiter EC, Rosen "
            "BR, Wald LL, Huang SY. Axon diameter index estimation independent of fiber "
            "orientation distribution using high-gradient diffusion MRI. NeuroImage "
            "2020;222:117197.",
            "10.1016/j.neuroimage.2020.117197",
        ),
        Reference(
            "vangelderen1994",
            "van Gelderen P, DesPres D, van Zijl PCM, Moonen CTW. Evaluation of restricted "
            "diffusion in cylinders: phosphocreatine in rabbit leg muscle. J Magn Reson B "
            "1994;103(3):255-260.",
            "10.1006/jmrb.1994.1038",
        ),
    )
    needs_diffusion_times = True
    minimum_measurements = 4
    required: ClassVar[tuple[str, ...]] = ("b", "big_delta", "small_delta")
    options: ClassVar[dict[str, Any]] = {
        "d0": 1.7,
        "dn": 1.7,
        "depar": 1.7,
        "dcsf": 3.0,
        "limit": "vangelderen",
    }
    option_limits: ClassVar[dict[str, tuple[float, float]]] = dict.fromkeys(
        ("d0", "dn", "depar", "dcsf"), POSITIVE
    )
    choices = {"limit": ("vangelderen", "neuman")}  # noqa: RUF012
    starts = 2
    linear: tuple[str, ...] = ("fn", "fcsf")
    # Fan et al. 2020, at 300 mT/m: indices of 3 to 5 um in large tracts.
    tissues = {  # noqa: RUF012
        "white matter": {"diameter": 4.0, "fn": 0.5, "fcsf": 0.05, "deperp": 0.6},
    }
    parameters: tuple[Parameter, ...] = axcaliber_parameters(1.7)
    derived = (
        Parameter("radius", "um", "Axon radius", window=(0.0, 5.0)),
        Parameter("fntotal", "1", "Neurite share of the whole signal", window=(0.0, 1.0)),
        Parameter("fetotal", "1", "Extra-neurite share of the whole signal", window=(0.0, 1.0)),
    )

    def __init__(
        self,
        scheme: DiffusionScheme,
        *,
        d0: float = 1.7,
        dn: float = 1.7,
        depar: float = 1.7,
        dcsf: float = 3.0,
        limit: str = "vangelderen",
        **options: Any,
    ) -> None:
        constants = {"d0": d0, "dn": dn, "depar": depar, "dcsf": dcsf}
        super().__init__(scheme, **constants, limit=limit, **options)
        self.dn, self.depar, self.dcsf = dn, depar, dcsf
        self.parameters = axcaliber_parameters(depar)
        assert scheme.small_delta is not None
        assert scheme.big_delta is not None
        self._across = RestrictedTable(
            CYLINDER,
            d0,
            scheme.b,
            scheme.small_delta,
            scheme.big_delta,
            self.parameters[0].bounds[1] / 2,
            wide=limit == "neuman",
        )
        # The series never attenuates more than free diffusion with d0; the limit may.
        self._oblate = limit == "neuman" or d0 > dn

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the powder average of each shell; shapes as in `SignalModel.signal`."""
        exponent, _ = self.attenuation(self._across, params["diameter"] / 2, inputs)
        return _mix(params, *self._compartments(params, inputs, exponent))

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return signal and derivatives by diameter, fn, fcsf and deperp."""
        deperp, fn, fcsf = params["deperp"], params["fn"], params["fcsf"]
        exponent, slope = self.attenuation(self._across, params["diameter"] / 2, inputs)
        axon, extra, csf = self._compartments(params, inputs, exponent)
        b, along_axon, along_extra = self._constants(inputs, deperp)
        by_exponent = axial_average_slope(exponent, along_axon, axon)
        by_radial = axial_average_slope(b * deperp, along_extra, extra)
        tissue = fn * axon + (1 - fn) * extra
        columns = (
            (1 - fcsf) * fn * 0.5 * slope * by_exponent,
            (1 - fcsf) * (axon - extra),
            csf - tissue,
            (1 - fcsf) * (1 - fn) * b * by_radial,
        )
        return _mix(params, axon, extra, csf), torch.stack(columns)

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the radius, and the shares fntotal and fetotal; with fcsf these add up to 1."""
        tissue = 1 - params["fcsf"]
        return {
            "radius": params["diameter"] / 2,
            "fntotal": tissue * params["fn"],
            "fetotal": tissue * (1 - params["fn"]),
        }

    def mixture(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the signals of axons, extra-neurite space and CSF."""
        exponent, _ = self.attenuation(self._across, params["diameter"] / 2, inputs)
        return torch.stack(torch.broadcast_tensors(*self._compartments(params, inputs, exponent)))

    def unmix(self, weights: Tensor) -> dict[str, Tensor]:
        """Return fn and fcsf; fn is 0.5 where all is CSF."""
        axon, extra, csf = weights
        tissue = axon + extra
        return {"fn": torch.where(tissue > 0, axon / tissue, 0.5), "fcsf": csf}

    def _compartments(
        self, params: dict[str, Tensor], inputs: Inputs | None, exponent: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the signals of axons, extra-neurite space and CSF; the latter broadcasts."""
        b, along_axon, along_extra = self._constants(inputs, params["deperp"])
        axon = axial_average(exponent, along_axon, oblate=self._oblate)
        extra = axial_average(b * params["deperp"], along_extra, oblate=False)
        return axon, extra, torch.exp(-self.dcsf * b)

    def _constants(self, inputs: Inputs | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return b, b dn and b depar, each (shells, 1...)."""
        b = self.b(inputs, like)
        return b, b * self.dn, b * self.depar


def _mix(params: dict[str, Tensor], axon: Tensor, extra: Tensor, csf: Tensor) -> Tensor:
    fn, fcsf = params["fn"], params["fcsf"]
    return (1 - fcsf) * (fn * axon + (1 - fn) * extra) + fcsf * csf
