"""Standard model with exchange: NEXI with pulses that last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bids_gacelle.engine.models.base import Inputs, Reference
from bids_gacelle.engine.models.nexi import FITTED, LARGEST_SCALE, Nexi
from bids_gacelle.engine.physics.exchange import Exchange
from bids_gacelle.engine.physics.finite_pulses import (
    pulse_rule,
    pulse_steps,
    pulsed_karger,
    pulsed_karger_derivatives,
)
from bids_gacelle.engine.scheme import DiffusionScheme

OLESEN = Reference(
    "olesen2022",
    "Olesen JL, Østergaard L, Shemesh N, Jespersen SN. Diffusion time dependence, power-law "
    "scaling, and exchange in gray matter. NeuroImage 2022;251:118976.",
    "10.1016/j.neuroimage.2022.118976",
)


class Smex(Nexi):
    """Anisotropic Kaerger model with rectangular pulses of any length, averaged over directions.

    As `Nexi`, M being the signal after two pulses during which water exchanges too.
    """

    name = "smex"
    title = "Standard model with exchange"
    description = (
        "Powder-averaged signals at several b-values and diffusion times were fitted with the "
        "standard model with exchange (SMEX): neurites that exchange water with the "
        "extra-neurite space, during the diffusion gradients as well as between them. The "
        "exchange time was fitted on a logarithmic scale."
    )
    references = (OLESEN, *Nexi.references)
    required = ("b", "big_delta", "small_delta")

    def __init__(self, scheme: DiffusionScheme, *, l_max: int = 0, **options: Any) -> None:
        super().__init__(scheme, l_max=l_max, **options)
        assert scheme.small_delta is not None
        assert scheme.big_delta is not None
        self._share = scheme.small_delta / scheme.big_delta
        limits = {p.name: p.bounds for p in FITTED}
        exponent = LARGEST_SCALE * scheme.b * max(limits["dn"][1], limits["de"][1])
        rate = scheme.big_delta / limits["tex"][0]
        # As for the nodes: single precision needs less.
        self._pulses = {
            dtype: pulse_rule(pulse_steps(exponent, rate, self._share, error))
            for dtype, error in ((torch.float32, 2e-6), (torch.float64, 5e-7))
        }

    def _integrals(
        self, of_square: Callable[[Any], Sequence[Tensor]], like: Tensor, inputs: Inputs | None
    ) -> list[list[Tensor]]:
        """Return the integrals as `Nexi`; compiled, nodes are an axis, for the kernel is long."""
        nodes = self._node_tables(
            like, inputs
        )  # filled before a trace, which must not change a cache
        if torch.compiler.is_compiling():
            return self._joint_integrals(of_square, *nodes)
        return super()._integrals(of_square, like, inputs)

    def _node_tables(self, like: Tensor, inputs: Inputs | None) -> tuple[Tensor, Tensor]:
        """Return x^2 of the nodes, (nodes, 1, 1...), and their weights, (orders, nodes)."""
        squares, weights = self._rule(like, inputs)
        number = len(squares)  # one name, one rule
        return (
            self.table(f"squares{number}", np.array(squares)[:, None], like[0]),
            self.table(f"weights{number}", np.array(weights), like.new_zeros(())),
        )

    def _joint_integrals(
        self, of_square: Callable[[Any], Sequence[Tensor]], squares: Tensor, weights: Tensor
    ) -> list[list[Tensor]]:
        # A matrix product is no part of the loop that computes the nodes, which it would repeat.
        sums = [torch.tensordot(weights, part, dims=1) for part in of_square(squares)]
        return [[total[i] for total in sums] for i in range(len(weights))]

    def _kernel(self, fn: Tensor, along: Tensor, beside: Tensor, rate: Tensor) -> Tensor:
        return pulsed_karger(fn, along, beside, rate, self._shares(fn), self._pulse(fn))

    def _kernel_slopes(self, fn: Tensor, along: Tensor, beside: Tensor, rate: Tensor) -> Exchange:
        share = self._shares(fn)
        return pulsed_karger_derivatives(fn, along, beside, rate, share, self._pulse(fn))

    def _shares(self, like: Tensor) -> Tensor:
        return self.table("share", self._share, like)

    def _pulse(self, like: Tensor) -> list[tuple[float, float]]:
        return self._pulses.get(like.dtype, self._pulses[torch.float64])
