"""Neurite exchange imaging: sticks that exchange with their surroundings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bids_gacelle.engine.models.base import Inputs, Parameter, Reference, SignalModel
from bids_gacelle.engine.physics.exchange import karger, karger_derivatives
from bids_gacelle.engine.physics.quadrature import legendre2, powder_rule
from bids_gacelle.engine.scheme import DiffusionScheme

_FITTED = (
    Parameter(
        "fn",
        "1",
        "Neurite signal fraction",
        bounds=(0.0, 1.0),
        start=(0.05, 0.95),
        window=(0.0, 1.0),
    ),
    Parameter(
        "dn",
        "um^2/ms",
        "Intra-neurite axial diffusivity",
        bounds=(0.1, 3.5),
        start=(1.5, 3.0),
        window=(0.0, 3.0),
    ),
    Parameter(
        "de",
        "um^2/ms",
        "Extra-neurite diffusivity",
        bounds=(0.1, 3.5),
        start=(0.5, 1.5),
        window=(0.0, 2.0),
    ),
    Parameter(
        "tex",
        "ms",
        "Exchange time between neurites and extra-neurite space",
        bounds=(1.0, 150.0),
        start=(2.0, 100.0),
        window=(0.0, 100.0),
        coordinate="log",
    ),
)
_P2 = Parameter(
    "p2",
    "1",
    "Orientation coherence of the neurites (second Legendre coefficient)",
    bounds=(0.0, 1.0),
    start=(0.05, 0.95),
    window=(0.0, 1.0),
)


class Nexi(SignalModel):
    """Narrow-pulse anisotropic Kaerger model, averaged over directions.

    S_0 = int_0^1 M(x) dx and, with `l_max` 2, S_2 = p2 |int_0^1 M(x) P2(x) dx|, where M is the
    signal of a stick (diffusivity dn x^2 along the gradient) exchanging with an isotropic space
    (de) within the time tex. The diffusion time is the pulse separation.

    The measurements are S_0 of all shells, then, with `l_max` 2, S_2 of all shells.
    """

    name = "nexi"
    title = "Neurite exchange imaging"
    description = (
        "Powder-averaged signals at several b-values and diffusion times were fitted with the "
        "narrow-pulse anisotropic Kaerger model of neurites that exchange water with the "
        "extra-neurite space. The exchange time was fitted on a logarithmic scale."
    )
    references = (
        Reference(
            "jelescu2022",
            "Jelescu IO, de Skowronski A, Geffroy F, Palombo M, Novikov DS. Neurite Exchange "
            "Imaging (NEXI): a minimal model of diffusion in gray matter with inter-compartment "
            "water exchange. NeuroImage 2022;256:119277.",
            "10.1016/j.neuroimage.2022.119277",
        ),
    )
    kind = "dwi"
    datatype = "dwi"
    needs_diffusion_times = True
    minimum_measurements = 4
    required = ("b", "big_delta")
    options = {"l_max": 0}  # noqa: RUF012
    choices = {"l_max": (0, 2)}  # noqa: RUF012
    starts = 4
    scheme: DiffusionScheme
    parameters: tuple[Parameter, ...] = _FITTED
    derived = (
        Parameter(
            "rn", "1/ms", "Exchange rate from neurites to extra-neurite space", window=(0.0, 0.1)
        ),
    )

    def __init__(self, scheme: DiffusionScheme, *, l_max: int = 0, **options: Any) -> None:
        super().__init__(scheme, l_max=l_max, **options)
        self.l_max = l_max
        self.parameters = (*_FITTED, _P2) if l_max == 2 else _FITTED
        self.linear = ("p2",) if l_max == 2 else ()
        sharpest = float(scheme.b.max()) * _FITTED[1].bounds[1]
        # Six nodes err by 2e-6, far below any noise: enough for single-precision fits.
        self._rules = {
            torch.float32: powder_rule(sharpest, 6),
            torch.float64: powder_rule(sharpest, 8),
        }

    @property
    def n_measurements(self) -> int:
        """Number of shells times the number of rotational invariants."""
        return len(self.scheme) * (2 if self.l_max == 2 else 1)

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return S_0, and S_2 with `l_max` 2; shapes as in `SignalModel.signal`."""
        s0, s2 = self._invariants(params)
        return s0 if s2 is None else torch.cat((s0, params["p2"] * s2))

    def mixture(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the signals of no coherence (p2 = 0) and of full coherence (p2 = 1)."""
        s0, s2 = self._invariants(params)
        assert s2 is not None
        return torch.stack((torch.cat((s0, torch.zeros_like(s2))), torch.cat((s0, s2))))

    def unmix(self, weights: Tensor) -> dict[str, Tensor]:
        """Return p2, the weight of full coherence."""
        return {"p2": weights[1]}

    def _invariants(self, params: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return S_0 and, with `l_max` 2, S_2 / p2, each (shells, ...)."""
        kernel = karger(params["fn"], *self._exponents(params))
        if self.l_max == 0:
            return kernel.sum(1), None
        return kernel.sum(1), (kernel * self._legendre(params["fn"])).sum(1)

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return signal and derivatives by fn, dn, de, tex (and p2)."""
        parts = karger_derivatives(params["fn"], *self._exponents(params))
        signal, *columns = self._average(parts, None, params)
        if self.l_max == 0:
            return signal, torch.stack(columns)
        s2, *columns2 = self._average(parts, self._legendre(params["fn"]), params)
        p2 = params["p2"]
        full = [torch.cat((a, p2 * b)) for a, b in zip(columns, columns2, strict=True)]
        full.append(torch.cat((torch.zeros_like(signal), s2)))
        return torch.cat((signal, p2 * s2)), torch.stack(full)

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return rn = (1 - fn) / tex in 1/ms."""
        return {"rn": (1 - params["fn"]) / params["tex"]}

    def _exponents(self, params: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return b dn x^2, b de, Delta / tex, weights; broadcast to (shells, nodes, ...)."""
        like = params["fn"]
        nodes, weights = self._rule(like)
        assert self.scheme.big_delta is not None
        b = self.table("b", self.scheme.b[:, None], like)
        along = self.table("b_x2", self.scheme.b[:, None] * nodes**2, like)
        time = self.table("big_delta", self.scheme.big_delta[:, None], like)
        weight = self.table("weight", weights, like)
        return along * params["dn"], b * params["de"], time / params["tex"], weight

    def _average(
        self, parts: tuple[Tensor, ...], legendre: Tensor | None, params: dict[str, Tensor]
    ) -> list[Tensor]:
        """Integrate signal and derivatives over the nodes, each to (shells, ...)."""
        like = params["fn"]
        nodes, _ = self._rule(like)
        signal, by_fraction, by_first, by_second, by_log_time = (
            part if legendre is None else part * legendre for part in parts
        )
        b = self.table("b", self.scheme.b[:, None], like)[:, 0]
        x2 = self.table("x2", nodes**2, like)
        return [
            signal.sum(1),
            by_fraction.sum(1),
            b * (by_first * x2).sum(1),
            b * by_second.sum(1),
            by_log_time.sum(1) / params["tex"],
        ]

    def _rule(self, like: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return self._rules.get(like.dtype, self._rules[torch.float64])

    def _legendre(self, like: Tensor) -> Tensor:
        # M falls with x, so its integral with P2 is never positive: minus is the absolute value,
        # without a kink where neurites vanish.
        return self.table("legendre2", -legendre2(self._rule(like)[0]), like)
