"""Neurite exchange imaging: sticks that exchange with their surroundings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bids_gacelle.engine.models.base import Inputs, Parameter, Reference
from bids_gacelle.engine.models.diffusion import DiffusionModel
from bids_gacelle.engine.physics.exchange import Exchange, karger, karger_derivatives
from bids_gacelle.engine.physics.quadrature import legendre2, legendre4, powder_rule
from bids_gacelle.engine.scheme import DiffusionScheme

JELESCU = Reference(
    "jelescu2022",
    "Jelescu IO, de Skowronski A, Geffroy F, Palombo M, Novikov DS. Neurite Exchange "
    "Imaging (NEXI): a minimal model of diffusion in gray matter with inter-compartment "
    "water exchange. NeuroImage 2022;256:119277.",
    "10.1016/j.neuroimage.2022.119277",
)

FITTED = (
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
_COHERENCES = tuple(
    Parameter(
        f"p{order}",
        "1",
        f"Orientation coherence of the neurites ({word} Legendre coefficient)",
        bounds=(0.0, 1.0),
        start=(0.05, 0.95),
        window=(0.0, 1.0),
    )
    for order, word in ((2, "second"), (4, "fourth"))
)
# Coherences of the signals that a mixture consists of; all others lie between them. The last one
# is where the least squares over the mixture look from: seen from there p2 and p4 do not mix.
_CORNERS = {0: ((),), 2: ((0,), (1,)), 4: ((1, 0), (0, 1), (1, 1), (0, 0))}
# The largest `bscale` that rules are made for: gradients a seventh stronger than nominal.
LARGEST_SCALE = 1.3
RATE = Parameter(
    "rn", "1/ms", "Exchange rate from neurites to extra-neurite space", window=(0.0, 0.1)
)


class Nexi(DiffusionModel):
    """Narrow-pulse anisotropic Kaerger model, averaged over directions.

    S_0 = int_0^1 M(x) dx and, up to `l_max`, S_l = p_l |int_0^1 M(x) P_l(x) dx|, where M is the
    signal of a stick (diffusivity dn x^2 along the gradient) exchanging with an isotropic space
    (de) within the time tex. The diffusion time is the pulse separation.

    The measurements are S_0 of all shells, then, with `l_max` 2 or 4, S_2 of all shells, and with
    4 S_4 of all shells.
    """

    name = "nexi"
    title = "Neurite exchange imaging"
    description = (
        "Powder-averaged signals at several b-values and diffusion times were fitted with the "
        "narrow-pulse anisotropic Kaerger model of neurites that exchange water with the "
        "extra-neurite space. The exchange time was fitted on a logarithmic scale."
    )
    references: ClassVar[tuple[Reference, ...]] = (JELESCU,)
    needs_diffusion_times = True
    minimum_measurements = 4
    required: ClassVar[tuple[str, ...]] = ("b", "big_delta")
    options: ClassVar[dict[str, Any]] = {"l_max": 0}
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"l_max": (0, 2, 4)}
    starts = 4
    fitted: ClassVar[tuple[Parameter, ...]] = FITTED
    share: ClassVar[str] = "fn"  # the neurite share of the signal that exchanges
    # Human cortex at 3 T has exchange times of 10 to 50 ms and neurite fractions around 0.35 (Uhl
    # et al. 2024, doi:10.1162/imag_a_00104; Jelescu et al. 2022 in rats); white matter exchanges
    # more slowly and has more neurites.
    tissues = {  # noqa: RUF012
        "grey matter": {"fn": 0.38, "dn": 2.4, "de": 0.95, "tex": 30.0, "p2": 0.2, "p4": 0.08},
        "white matter": {"fn": 0.58, "dn": 2.2, "de": 0.8, "tex": 60.0, "p2": 0.6, "p4": 0.35},
    }
    parameters: tuple[Parameter, ...] = FITTED
    derived: tuple[Parameter, ...] = (
        RATE,
        Parameter("fe", "1", "Extra-neurite signal fraction", window=(0.0, 1.0)),
    )

    def __init__(self, scheme: DiffusionScheme, *, l_max: int = 0, **options: Any) -> None:
        super().__init__(scheme, l_max=l_max, **options)
        self.l_max = l_max
        coherences = _COHERENCES[: l_max // 2]
        self.parameters = (*self.fitted, *coherences)
        self.coherences = self.linear = tuple(p.name for p in coherences)
        sharpest = float(scheme.b.max()) * FITTED[1].bounds[1]
        # Six nodes err by 2e-6, far below any noise: enough for single-precision fits. Not for
        # P4, which they were not fitted for.
        self._rules, self._scaled_rules = (
            {
                dtype: _rule(*powder_rule(largest, n), l_max)
                for dtype, n in ((torch.float32, 6 if l_max < 4 else 7), (torch.float64, 8))
            }
            for largest in (sharpest, LARGEST_SCALE * sharpest)
        )

    @property
    def n_measurements(self) -> int:
        """Number of shells times the number of rotational invariants."""
        return len(self.scheme) * (self.l_max // 2 + 1)

    @property
    def averages(self) -> np.ndarray:
        """Magnitudes averaged in S_0 of each shell; the others are no averages of magnitudes."""
        counts = super().averages[: len(self.scheme)]
        return np.concatenate((counts, np.zeros(self.n_measurements - len(counts))))

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return S_0 and the other invariants; shapes as in `SignalModel.signal`."""
        return self._coherent(params, self._invariants(params, inputs))

    def mixture(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the signals of no and of full coherence of either order."""
        s0, *others = self._invariants(params, inputs)
        zero = torch.zeros_like(s0)
        return torch.stack(
            [
                torch.cat([s0, *(s if on else zero for on, s in zip(corner, others, strict=True))])
                for corner in _CORNERS[self.l_max]
            ]
        )

    def unmix(self, weights: Tensor) -> dict[str, Tensor]:
        """Return p2 and p4, the weights of the signals that have the coherence."""
        corners = _CORNERS[self.l_max]
        return {
            name: weights[[k for k, corner in enumerate(corners) if corner[i]]].sum(0).clamp_max(1)
            for i, name in enumerate(self.coherences)
        }

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return signal and derivatives by all parameters."""
        signal, columns = self._columns(params, inputs)
        return signal, torch.stack([columns[name] for name in self.parameter_names])

    def _columns(
        self, params: dict[str, Tensor], inputs: Inputs | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the signal and its derivatives by name."""
        along, beside, rate = self._exponents(params, inputs)
        kernel = self._kernel_slopes(params[self.share], beside, rate)

        def slopes(x2: float) -> Exchange:
            found = kernel(along * x2)
            return found._replace(by_first=found.by_first * x2)

        orders = self._integrals(slopes, rate, inputs)
        b = self.b(inputs, params["dn"])
        one = torch.ones_like(b)
        factors = (one, one, b, b, 1 / params["tex"])
        orders = [
            [part * factor for part, factor in zip(order, factors, strict=True)]
            for order in orders
        ]
        signal, *columns = [self._coherent(params, parts) for parts in zip(*orders, strict=True)]
        named = dict(zip((self.share, "dn", "de", "tex"), columns, strict=True))
        zero = torch.zeros_like(rate)
        for i, name in enumerate(self.coherences, 1):
            rows = [orders[i][0] if k == i else zero for k in range(len(orders))]
            named[name] = torch.cat(rows)
        return signal, named

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return rn = (1 - fn) / tex in 1/ms, and fe = 1 - fn."""
        rest = 1 - params["fn"]
        return {"rn": rest / params["tex"], "fe": rest}

    def _coherent(self, params: dict[str, Tensor], orders: Sequence[Tensor]) -> Tensor:
        """Return (measurements, ...) from S_0 and S_l / p_l, each (shells, ...)."""
        rest = zip(self.coherences, orders[1:], strict=True)
        return torch.cat([orders[0], *(params[name] * part for name, part in rest)])

    def _invariants(self, params: dict[str, Tensor], inputs: Inputs | None) -> list[Tensor]:
        """Return S_0 and S_l / p_l, each (shells, ...)."""
        along, beside, rate = self._exponents(params, inputs)
        kernel = self._kernel(params[self.share], beside, rate)
        orders = self._integrals(lambda x2: (kernel(along * x2),), rate, inputs)
        return [order[0] for order in orders]

    def _integrals(
        self, of_square: Callable[[Any], Sequence[Tensor]], like: Tensor, inputs: Inputs | None
    ) -> list[list[Tensor]]:
        """Return |int_0^1 F P_l dx| of functions F(x^2), for each l a list of one for each F."""
        squares, weights = self._rule(like, inputs)
        totals: list[list[Any]] = [[0.0] * 5 for _ in weights]
        # One node after the other: tensors stay small, and a compiler fuses all of them.
        for i, x2 in enumerate(squares):
            parts = of_square(x2)
            totals = [
                [total + weight[i] * part for total, part in zip(order, parts, strict=False)]
                for order, weight in zip(totals, weights, strict=True)
            ]
        return totals

    def _kernel(self, fn: Tensor, beside: Tensor, rate: Tensor) -> Callable[[Tensor], Tensor]:
        """Return M as a function of the exponent along the stick.

        `beside` and `rate` are the exponent beside it, and Delta / tex.
        """
        return lambda along: karger(fn, along, beside, rate)

    def _kernel_slopes(
        self, fn: Tensor, beside: Tensor, rate: Tensor
    ) -> Callable[[Tensor], Exchange]:
        """Return M and its derivatives, as `_kernel`."""
        return lambda along: karger_derivatives(fn, along, beside, rate)

    def _exponents(
        self, params: dict[str, Tensor], inputs: Inputs | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return b dn, b de and Delta / tex, each of shape (shells, ...)."""
        assert self.scheme.big_delta is not None
        b = self.b(inputs, params["dn"])
        time = self.table("big_delta", self.scheme.big_delta, params["dn"])
        return b * params["dn"], b * params["de"], time / params["tex"]

    def _rule(self, like: Tensor, inputs: Inputs | None) -> tuple[list[float], list[list[float]]]:
        rules = self._scaled_rules if "bscale" in (inputs or {}) else self._rules
        return rules.get(like.dtype, rules[torch.float64])


def _rule(
    nodes: np.ndarray, weights: np.ndarray, l_max: int
) -> tuple[list[float], list[list[float]]]:
    """Return x^2 of each node of a rule, and for each l the weights times +-P_l(x).

    Spins spend some share t of the attenuation b dn x^2 in neurites, so that M is an average of
    exp(-t b dn x^2) with t from 0 to 1. Each of these has a negative integral with P2 and a
    positive one with P4, so the absolute value is a sign, without a kink where neurites vanish.
    For the same reason a rule that integrates exp(-a x^2) integrates M.
    """
    squares = (nodes**2).tolist()
    signed = [(1.0, -legendre2(x), legendre4(x))[: l_max // 2 + 1] for x in nodes.tolist()]
    return squares, (weights * np.transpose(signed)).tolist()
