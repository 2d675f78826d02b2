"""Soma and neurite density imaging with exchange between neurites and their surroundings."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from bids_gacelle.engine.models.base import Inputs, Parameter
from bids_gacelle.engine.models.nexi import FITTED, RATE, Nexi
from bids_gacelle.engine.models.nexidot import NexiDot
from bids_gacelle.engine.models.sandi import Sandi, soma_table
from bids_gacelle.engine.models.smex import OLESEN
from bids_gacelle.engine.scheme import DiffusionScheme


class Sandix(NexiDot):
    """SANDI whose neurites exchange with their surroundings: NEXI and spheres beside it.

    S_0 = fs exp(-C) + (1 - fs) NEXI_0, where C = g^2 h(rs) is the attenuation exponent in a sphere
    with diffusivity ds (um^2/ms) in the Gaussian phase approximation, and fn of NEXI is `fin`.
    Pulses are finite for the spheres and narrow for the exchange.
    """

    name = "sandix"
    title = "Soma and neurite density imaging with exchange"
    description = (
        "Powder-averaged signals at several b-values and diffusion times were fitted with three "
        "compartments: somas as impermeable spheres of one radius (Gaussian phase approximation, "
        "fixed diffusivity), and neurites that exchange water with the extra-neurite space "
        "(narrow-pulse anisotropic Kaerger model). The exchange time was fitted on a logarithmic "
        "scale."
    )
    references = (
        OLESEN,
        *NexiDot.references,
        *Sandi.references,
    )
    minimum_measurements = 6
    required = ("b", "big_delta", "small_delta")
    options: ClassVar[dict[str, Any]] = {"l_max": 0, "ds": 3.0}
    option_limits = Sandi.option_limits
    fitted: ClassVar[tuple[Parameter, ...]] = (*Sandi.parameters[:3], *FITTED[1:])
    parameters: tuple[Parameter, ...] = fitted
    derived = (
        Parameter("fn", "1", "Neurite signal fraction", window=(0.0, 1.0)),
        Parameter("fe", "1", "Extra-neurite signal fraction", window=(0.0, 1.0)),
        RATE,
    )
    # Somas as in SANDI, exchange as in NEXI.
    tissues = {  # noqa: RUF012
        name: {"tex": Nexi.tissues[name]["tex"]} | values for name, values in Sandi.tissues.items()
    }
    share = "fin"
    apart = "fs"

    def __init__(
        self, scheme: DiffusionScheme, *, l_max: int = 0, ds: float = 3.0, **options: Any
    ) -> None:
        super().__init__(scheme, l_max=l_max, ds=ds, **options)
        self._sphere = soma_table(scheme, ds)

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return fn and fe, which with fs add up to one, and rn in 1/ms."""
        fin, rest = params["fin"], 1 - params["fs"]
        return {"fn": rest * fin, "fe": rest * (1 - fin), "rn": (1 - fin) / params["tex"]}

    def _isotropic(
        self, params: dict[str, Tensor], inputs: Inputs | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        exponent, slope = self.attenuation(self._sphere, params["rs"], inputs)
        s0 = torch.exp(-exponent)
        return self._padded(s0), {"rs": self._padded(-slope * s0)}
