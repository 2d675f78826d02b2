"""Neurite exchange imaging: sticks that exchange with their surroundings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bids_gacelle.engine.models.base import Inputs, Parameter, Reference
from bids_gacelle.engine.models.diffusion import DiffusionModel
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
        search=(0.1, 3.0),  # a second minimum has neurites slower than their surroundings
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


class Nexi(DiffusionModel):
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
    needs_diffusion_times = True
    minimum_measurements = 4
    required = ("b", "big_delta")
    options = {"l_max": 0}  # noqa: RUF012
    choices = {"l_max": (0, 2)}  # noqa: RUF012
    starts = 4
    # Human cortex at 3 T has exchange times of 10 to 50 ms and neurite fractions around 0.35 (Uhl
    # et al. 2024, doi:10.1162/imag_a_00104; Jelescu et al. 2022 in rats); white matter exchanges
    # more slowly and has more neurites.
    tissues = {  # noqa: RUF012
        "grey matter": {"fn": 0.38, "dn": 2.4, "de": 0.95, "tex": 30.0, "p2": 0.2},
        "white matter": {"fn": 0.58, "dn": 2.2, "de": 0.8, "tex": 60.0, "p2": 0.6},
    }
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
            dtype: _nodes(*powder_rule(sharpest, n))
            for dtype, n in ((torch.float32, 6), (torch.float64, 8))
        }

    @property
    def n_measurements(self) -> int:
        """Number of shells times the number of rotational invariants."""
        return len(self.scheme) * (2 if self.l_max == 2 else 1)

    @property
    def averages(self) -> np.ndarray:
        """Magnitudes averaged in S_0 of each shell; S_2 is no average of magnitudes."""
        counts = super().averages[: len(self.scheme)]
        return np.concatenate((counts, np.zeros(self.n_measurements - len(counts))))

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return S_0, and S_2 with `l_max` 2; shapes as in `SignalModel.signal`."""
        s0, s2 = self._invariants(params, inputs)
        return s0 if s2 is None else torch.cat((s0, params["p2"] * s2))

    def mixture(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the signals of no coherence (p2 = 0) and of full coherence (p2 = 1)."""
        s0, s2 = self._invariants(params, inputs)
        assert s2 is not None
        return torch.stack((torch.cat((s0, torch.zeros_like(s2))), torch.cat((s0, s2))))

    def unmix(self, weights: Tensor) -> dict[str, Tensor]:
        """Return p2, the weight of full coherence."""
        return {"p2": weights[1]}

    def _invariants(
        self, params: dict[str, Tensor], inputs: Inputs | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return S_0 and, with `l_max` 2, S_2 / p2, each (shells, ...)."""
        along, beside, rate = self._exponents(params, inputs)
        s0 = s2 = torch.zeros_like(rate)
        # One node after the other: tensors stay small, and a compiler fuses all of them.
        for x2, weight, legendre in self._rule(rate):
            kernel = karger(params["fn"], along * x2, beside, rate)
            s0 = s0 + weight * kernel
            s2 = s2 + legendre * kernel
        return s0, s2 if self.l_max == 2 else None

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return signal and derivatives by fn, dn, de, tex (and p2)."""
        along, beside, rate = self._exponents(params, inputs)
        zero = torch.zeros_like(rate)
        s0, s2 = [zero] * 5, [zero] * 5
        for x2, weight, legendre in self._rule(rate):
            parts = list(karger_derivatives(params["fn"], along * x2, beside, rate))
            parts[2] = parts[2] * x2
            s0 = [total + weight * part for total, part in zip(s0, parts, strict=True)]
            if self.l_max == 2:
                s2 = [total + legendre * part for total, part in zip(s2, parts, strict=True)]
        b = self.b(inputs, params["fn"])
        one = torch.ones_like(b)
        factors = (one, one, b, b, 1 / params["tex"])
        s0 = [total * factor for total, factor in zip(s0, factors, strict=True)]
        if self.l_max == 0:
            return s0[0], torch.stack(s0[1:])
        s2 = [total * factor for total, factor in zip(s2, factors, strict=True)]
        full = [torch.cat((a, params["p2"] * b)) for a, b in zip(s0, s2, strict=True)]
        return full[0], torch.stack([*full[1:], torch.cat((zero, s2[0]))])

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return rn = (1 - fn) / tex in 1/ms."""
        return {"rn": (1 - params["fn"]) / params["tex"]}

    def _exponents(
        self, params: dict[str, Tensor], inputs: Inputs | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return b dn, b de and Delta / tex, each of shape (shells, ...)."""
        assert self.scheme.big_delta is not None
        b = self.b(inputs, params["fn"])
        time = self.table("big_delta", self.scheme.big_delta, params["fn"])
        return b * params["dn"], b * params["de"], time / params["tex"]

    def _rule(self, like: Tensor) -> list[tuple[float, float, float]]:
        return self._rules.get(like.dtype, self._rules[torch.float64])


def _nodes(nodes: np.ndarray, weights: np.ndarray) -> list[tuple[float, float, float]]:
    """Return x^2, the weight, and the weight times -P2(x) of each node of a rule.

    M falls with x, so its integral with P2 is never positive: minus is the absolute value, without
    a kink where neurites vanish.
    """
    return [
        (x * x, weight, -weight * legendre2(x))
        for x, weight in zip(nodes.tolist(), weights.tolist(), strict=True)
    ]
