"""Neurite exchange imaging with still water beside."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from bids_gacelle.engine.models.base import Inputs, Parameter
from bids_gacelle.engine.models.nexi import FITTED, RATE, Nexi
from bids_gacelle.engine.scheme import DiffusionScheme

_FDOT = Parameter(
    "fdot",
    "1",
    "Signal fraction of still water",
    bounds=(0.0, 1.0),
    start=(0.0, 0.3),
    window=(0.0, 0.3),
)


class NexiDot(Nexi):
    """NEXI and an isotropic compartment that does not exchange, here water that does not move.

    S_0 = (1 - fdot) NEXI_0 + fdot, and S_l = (1 - fdot) NEXI_l, fn being the neurite share of the
    signal that is not still.
    """

    name = "nexidot"
    title = "Neurite exchange imaging with a dot compartment"
    description = (
        "Powder-averaged signals at several b-values and diffusion times were fitted with the "
        "narrow-pulse anisotropic Kaerger model of neurites that exchange water with the "
        "extra-neurite space, and still water (dot compartment) beside them. The exchange time "
        "was fitted on a logarithmic scale."
    )
    minimum_measurements = 5
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"l_max": (0, 2)}
    fitted: ClassVar[tuple[Parameter, ...]] = (*FITTED, _FDOT)
    parameters: tuple[Parameter, ...] = fitted
    derived = (
        RATE,
        Parameter("fntotal", "1", "Neurite share of the whole signal", window=(0.0, 1.0)),
        Parameter("fetotal", "1", "Extra-neurite share of the whole signal", window=(0.0, 1.0)),
    )
    tissues: ClassVar[dict[str, dict[str, float]]] = {
        name: values | {"fdot": 0.03} for name, values in Nexi.tissues.items()
    }
    apart: ClassVar[str] = "fdot"  # the signal fraction of what does not exchange

    def __init__(self, scheme: DiffusionScheme, *, l_max: int = 0, **options: Any) -> None:
        super().__init__(scheme, l_max=l_max, **options)
        self.linear = (self.apart, *self.coherences)

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return S_0, and S_2 with `l_max` 2; shapes as in `SignalModel.signal`."""
        alone, fraction = self._isotropic(params, inputs)[0], params[self.apart]
        return (1 - fraction) * super().signal(params, inputs) + fraction * alone

    def mixture(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the signal of what does not exchange, and those of `Nexi`."""
        exchanging = super().mixture(params, inputs)
        alone = self._isotropic(params, inputs)[0].expand_as(exchanging[0])
        return torch.cat((alone[None], exchanging))

    def unmix(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the fraction of what does not exchange, and p2 of the rest (0.5 where none)."""
        alone, rest = weights[0], weights[1:]
        total = rest.sum(0)
        shares = torch.where(total > 0, rest / total, 1 / len(rest))
        return {self.apart: alone} | super().unmix(shares)

    def _columns(
        self, params: dict[str, Tensor], inputs: Inputs | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        exchanging, columns = super()._columns(params, inputs)
        alone, slopes = self._isotropic(params, inputs)
        fraction = params[self.apart]
        columns = {name: (1 - fraction) * column for name, column in columns.items()}
        columns |= {
            name: (fraction * slope).expand_as(exchanging) for name, slope in slopes.items()
        }
        columns[self.apart] = alone - exchanging
        return (1 - fraction) * exchanging + fraction * alone, columns

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return rn in 1/ms, and fntotal and fetotal, which add up to one with fdot."""
        fn, moving = params["fn"], 1 - params["fdot"]
        return {
            "rn": (1 - fn) / params["tex"],
            "fntotal": moving * fn,
            "fetotal": moving * (1 - fn),
        }

    def _isotropic(
        self, params: dict[str, Tensor], inputs: Inputs | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the signal of what does not exchange, and its derivatives by name.

        Each is (measurements, ...) or broadcasts to it.
        """
        return self._padded(torch.ones_like(self.b(inputs, params["dn"]))), {}

    def _padded(self, s0: Tensor) -> Tensor:
        """Return S_0 with the other invariants of something isotropic, which are 0."""
        return torch.cat([s0, *(torch.zeros_like(s0) for _ in self.coherences)])
