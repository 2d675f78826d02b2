"""Soma and neurite density imaging."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bids_gacelle.engine.models.base import POSITIVE, Inputs, Parameter, Reference
from bids_gacelle.engine.models.diffusion import DiffusionModel
from bids_gacelle.engine.physics.powder import stick_average, stick_average_slope
from bids_gacelle.engine.physics.restricted import SPHERE, RestrictedTable
from bids_gacelle.engine.scheme import DiffusionScheme


class Sandi(DiffusionModel):
    """Somas as spheres, neurites as sticks and a space around them, without exchange.

    S = fs Ss + (1 - fs) [fin G(b dn) + (1 - fin) exp(-b de)], with G(a) = int_0^1 exp(-a x^2) dx
    the average over directions of a stick and Ss = exp(-C) the signal of a sphere of radius rs
    with diffusivity ds in um^2/ms inside.

    With the `limit` "murdaycotts", C is the series of Murday and Cotts (Gaussian phases, pulses of
    any duration). With "neuman" it is what this series tends to where the pulses are long for the
    sphere, rs^2 / ds << small_delta (motional narrowing), C = (16/175) g^2 small_delta rs^4 / ds;
    elsewhere it attenuates too much. Some programs call this limit the narrow-pulse one.
    """

    name = "sandi"
    title = "Soma and neurite density imaging"
    description = (
        "Powder-averaged signals at several b-values were fitted with SANDI: somas as impermeable "
        "spheres of one radius, neurites as sticks, and an extra-cellular space with isotropic "
        "diffusion, none of them exchanging water. The diffusivity inside the somas was fixed. "
        "Radius and fraction of the somas compensate each other over much of their range; the "
        "largest somas dominate the radius of a voxel."
    )
    references = (
        Reference(
            "palombo2020",
            "Palombo M, Ianus A, Guerreri M, Nunes D, Alexander DC, Shemesh N, Zhang H. SANDI: a "
            "compartment-based model for non-invasive apparent soma and neurite imaging by "
            "diffusion MRI. NeuroImage 2020;215:116835.",
            "10.1016/j.neuroimage.2020.116835",
        ),
        Reference(
            "murday1968",
            "Murday JS, Cotts RM. Self-diffusion coefficient of liquid lithium. J Chem Phys "
            "1968;48(11):4938-4945.",
            "10.1063/1.1668160",
        ),
    )
    needs_diffusion_times = True
    minimum_measurements = 5
    required = ("b", "big_delta", "small_delta")
    options = {"ds": 3.0, "limit": "murdaycotts"}  # noqa: RUF012
    option_limits = {"ds": POSITIVE}  # noqa: RUF012
    choices = {"limit": ("murdaycotts", "neuman")}  # noqa: RUF012
    starts = 6
    linear = ("fs", "fin")
    # Apparent values as Palombo et al. 2020 show them for human cortex and white matter.
    tissues = {  # noqa: RUF012
        "grey matter": {"rs": 9.0, "fs": 0.4, "fin": 0.45, "dn": 2.0, "de": 0.9},
        "white matter": {"rs": 7.5, "fs": 0.15, "fin": 0.65, "dn": 2.2, "de": 0.8},
    }
    # The start boxes, and by them the weak prior, leave fractions open and take what is known of
    # tissue: cell bodies from small glia to large neurons, diffusivities from strongly hindered to
    # free water, the ranges that others simulate for SANDI, too.
    parameters = (
        Parameter(
            "rs",
            "um",
            "Apparent soma radius",
            bounds=(0.1, 15.0),
            start=(2.0, 12.0),
            search=(0.1, 15.0),
            window=(0.0, 15.0),
        ),
        Parameter(
            "fs",
            "1",
            "Soma signal fraction",
            bounds=(0.0, 1.0),
            start=(0.0, 1.0),
            window=(0.0, 1.0),
        ),
        Parameter(
            "fin",
            "1",
            "Neurite share of the signal that is not of somas",
            bounds=(0.0, 1.0),
            start=(0.0, 1.0),
            window=(0.0, 1.0),
        ),
        Parameter(
            "dn",
            "um^2/ms",
            "Intra-neurite axial diffusivity",
            bounds=(0.1, 3.5),
            start=(0.5, 3.0),
            search=(0.1, 3.5),
            window=(0.0, 3.0),
        ),
        Parameter(
            "de",
            "um^2/ms",
            "Extra-cellular diffusivity",
            bounds=(0.1, 3.5),
            start=(0.5, 3.0),
            search=(0.1, 3.5),
            window=(0.0, 3.0),
        ),
    )
    derived = (
        Parameter("fn", "1", "Neurite signal fraction", window=(0.0, 1.0)),
        Parameter("fe", "1", "Extra-cellular signal fraction", window=(0.0, 1.0)),
    )

    def __init__(
        self,
        scheme: DiffusionScheme,
        *,
        ds: float = 3.0,
        limit: str = "murdaycotts",
        **options: Any,
    ) -> None:
        super().__init__(scheme, ds=ds, limit=limit, **options)
        self._sphere = soma_table(scheme, ds, wide=limit == "neuman")

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the powder average of each shell; shapes as in `SignalModel.signal`."""
        return _mix(params, *self._compartments(params, inputs))

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return signal and derivatives by rs, fs, fin, dn and de."""
        fs, fin = params["fs"], params["fin"]
        b = self.b(inputs, fs)
        exponent, slope = self.attenuation(self._sphere, params["rs"], inputs)
        soma = torch.exp(-exponent)
        along = b * params["dn"]
        stick, around = stick_average(along), torch.exp(-b * params["de"])
        columns = (
            -fs * slope * soma,
            soma - (fin * stick + (1 - fin) * around),
            (1 - fs) * (stick - around),
            (1 - fs) * fin * b * stick_average_slope(along, stick),
            -(1 - fs) * (1 - fin) * b * around,
        )
        return _mix(params, soma, stick, around), torch.stack(columns)

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return fn = (1 - fs) fin and fe = (1 - fs) (1 - fin); fs + fn + fe = 1."""
        rest = 1 - params["fs"]
        return {"fn": rest * params["fin"], "fe": rest * (1 - params["fin"])}

    def mixture(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the signals of somas, neurites and the space around them."""
        return torch.stack(self._compartments(params, inputs))

    def unmix(self, weights: Tensor) -> dict[str, Tensor]:
        """Return fs and fin; fin is 0.5 where all is soma."""
        soma, stick, around = weights
        rest = stick + around
        return {"fs": soma, "fin": torch.where(rest > 0, stick / rest, 0.5)}

    def _compartments(
        self, params: dict[str, Tensor], inputs: Inputs | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the signals of somas, neurites and the space around them, (shells, ...) each."""
        b = self.b(inputs, params["dn"])
        exponent, _ = self.attenuation(self._sphere, params["rs"], inputs)
        return (
            torch.exp(-exponent),
            stick_average(b * params["dn"]),
            torch.exp(-b * params["de"]),
        )


def soma_table(scheme: DiffusionScheme, ds: float, *, wide: bool = False) -> RestrictedTable:
    """Return the attenuation exponents of somas with diffusivity ds in um^2/ms."""
    assert scheme.small_delta is not None
    assert scheme.big_delta is not None
    largest = Sandi.parameters[0].bounds[1]
    return RestrictedTable(
        SPHERE, ds, scheme.b, scheme.small_delta, scheme.big_delta, largest, wide=wide
    )


def _mix(params: dict[str, Tensor], soma: Tensor, stick: Tensor, around: Tensor) -> Tensor:
    fs, fin = params["fs"], params["fin"]
    return fs * soma + (1 - fs) * (fin * stick + (1 - fin) * around)
