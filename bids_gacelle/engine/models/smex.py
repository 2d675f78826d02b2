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
    Pulse,
    pulse_table,
    pulse_weights,
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
        # A shell of each length of pulses, and the place of each shell's length among these.
        lengths, shells, place = np.unique(
            scheme.small_delta, return_index=True, return_inverse=True
        )
        self._shells, self._place = shells, place
        limits = {p.name: p.bounds for p in FITTED}
        exponent = LARGEST_SCALE * scheme.b * max(limits["dn"][1], limits["de"][1])
        strongest = float((exponent * self._share / (3 - self._share)).max())
        fastest = float(lengths.max()) / limits["tex"][0]
        # As for the nodes: single precision needs less.
        self._pulses = {
            dtype: pulse_table(strongest, fastest, error)
            for dtype, error in ((torch.float32, 2e-6), (torch.float64, 1e-7))
        }

    def _integrals(
        self, of_square: Callable[[Any], Sequence[Tensor]], like: Tensor, inputs: Inputs | None
    ) -> list[list[Tensor]]:
        """Return the integrals as `Nexi`; compiled, nodes are an axis, for the kernel is long."""
        # Filled before a trace, which must not change a cache.
        nodes = self._node_tables(like, inputs)
        if torch.compiler.is_dynamo_compiling():
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

    def _kernel(self, fn: Tensor, beside: Tensor, rate: Tensor) -> Callable[[Tensor], Tensor]:
        share = self.table("share", self._share, fn)
        pulse = self._pulse(fn, rate, slice(0, 1))
        return lambda along: pulsed_karger(fn, along, beside, rate, share, pulse)

    def _kernel_slopes(
        self, fn: Tensor, beside: Tensor, rate: Tensor
    ) -> Callable[[Tensor], Exchange]:
        share = self.table("share", self._share, fn)
        pulse = self._pulse(fn, rate, slice(None))
        return lambda along: pulsed_karger_derivatives(fn, along, beside, rate, share, pulse)

    def _pulse(self, fn: Tensor, rate: Tensor, which: slice) -> Pulse:
        """Return the terms of a pulse, of the weights and of those derivatives that are asked."""
        table = self._pulses.get(fn.dtype, self._pulses[torch.float64])
        coefficients = self.table("pulse", table.coefficients, fn.new_zeros(()))[which]
        share = self.table("share", self._share, fn)
        exponent = (rate * share)[self.places("shells", self._shells, fn)]
        pulse = pulse_weights(coefficients, table, fn, exponent)
        # Eager, one row for all shells is cheaper; compiled, a loop with a lookup is twice faster.
        if len(self._shells) == 1 and not torch.compiler.is_dynamo_compiling():
            return pulse
        place = self.places("place", self._place, fn)
        return pulse._replace(weights=pulse.weights[:, :, :, place])
